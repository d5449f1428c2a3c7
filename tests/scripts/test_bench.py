"""scripts/bench measures what it says, and says what is wrong in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--repeat", "1", "--runtime", "0.2", "--size", "16"]


def bench(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run scripts/bench in `directory`, with its temporary files there."""
    environment = os.environ | {"TMPDIR": str(directory), "VIRTUAL_ENV": sys.prefix}
    command = [str(ROOT / "scripts" / "bench"), *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("cell", ["primary first touch 4k@32", "standby read 4k@32 tcp"])
def test_a_cell_is_measured_on_both_servers(tmp_path: Path, cell: str) -> None:
    done = bench(*SMALL, "--cell", cell, "--json", "figures.json", directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["cells"]) == [cell]
    servers, ratio = figures["cells"][cell]["servers"], figures["cells"][cell]["ratio"]
    assert {"qemu", "replnbd"} <= set(servers)
    assert all(len(server["requests-per-s"]) == 1 for server in servers.values())
    assert ratio["qemu"] == servers["replnbd"]["median"] / servers["qemu"]["median"]
    assert [bar["what"] for bar in figures["bars"]] == [cell, f"{cell}: p99", f"{cell}: CPU"]
    assert "of 3 bars met" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.interop
@pytest.mark.slow
def test_a_plain_export_is_measured_next_to_other_servers(tmp_path: Path) -> None:
    done = bench(*SMALL, "--section", "plain", "--json", "-", directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert list(cells) == ["plain read 4k@32", "plain write 4k@32"]
    for cell in cells.values():
        assert set(cell["servers"]) == {"qemu-nbd", "nbdkit", "replnbd", "floor"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cell", "nothing*"], "no cell matches nothing*: see --list"),
        (["--repeat", "0"], "argument --repeat: invalid positive value: '0'"),
        (["--runtime", "-1"], "--runtime must be positive"),
        (["--directory", "missing"], "--directory: missing is not a directory"),
        (["--section", "nothing"], "argument --section: invalid choice: 'nothing'"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = bench(*arguments, directory=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    _usage, error = done.stderr.splitlines()
    assert error.startswith(f"scripts/bench: error: {complaint}")


def test_the_cells_can_be_listed(tmp_path: Path) -> None:
    done = bench("--list", "--cell", "standby read*", directory=tmp_path)
    assert done.stdout.splitlines()[:2] == ["standby read 4k@1", "standby read 4k@32"]
