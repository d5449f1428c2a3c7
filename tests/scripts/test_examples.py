"""The examples run as their first lines say."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_standby_in_a_program_takes_over(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    content = random.randbytes(1 << 20)
    disk.write_bytes(content)
    done = run("standby_in_a_program.py", disk, "--seconds", "0.1", "--interval", "10")
    assert done.returncode == 0, done.stderr
    assert "stage done: the view is the disk now" in done.stdout
    stamp = b"the standby was here"
    assert disk.read_bytes() == stamp + content[len(stamp) :]


@pytest.mark.slow
@pytest.mark.interop
def test_a_throwaway_copy_changes_alone(tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk.raw", tmp_path / "copy.qcow2"
    content = random.randbytes(1 << 20)
    disk.write_bytes(content)
    os.truncate(disk, 2 << 20)
    done = run("throwaway_copy.py", disk, copy)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[2], line[-1]) for line in lines] == [
        ("data", "copy"),
        ("data", "disk"),
        ("zeroes", "disk"),
    ]
    flat = tmp_path / "flat.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", copy, flat], check=True)
    mark = b"changed in the copy alone"
    assert flat.read_bytes() == mark + content[len(mark) :] + bytes(1 << 20)
    assert disk.read_bytes() == content + bytes(1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standby_in_a_program.py", "throwaway_copy.py"])
def test_a_missing_disk_is_one_line(tmp_path: Path, name: str) -> None:
    copy = [] if name.startswith("standby") else [tmp_path / "copy.qcow2"]
    done = run(name, tmp_path / "missing.raw", *copy)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"cannot open {tmp_path}/missing.raw: No such file or directory"
    ]
    assert list(tmp_path.iterdir()) == []
