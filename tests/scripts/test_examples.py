"""The examples run as their first lines say."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from peers import REPLNBD, Authority, Process, list_exports

from replnbd.daemon import DiskConfig, ServerConfig, TlsConfig

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


# Section: the configuration, and the service that runs it


PRIMARY_KEYS = {"disk", "to", "sync"}


def test_the_configuration_tells_of_every_key() -> None:
    text = (EXAMPLES / "replnbd.toml").read_text()
    server, tls, disk = re.split(r"^# \[tls\]|^\[\[disk\]\]", text, flags=re.MULTILINE)
    for table, config in ((server, ServerConfig), (tls, TlsConfig), (disk, DiskConfig)):
        told = set(re.findall(r"^(?:# )?([a-z-]+) = ", table, re.MULTILINE))
        assert told == set(config.__struct_encode_fields__) - PRIMARY_KEYS


def test_the_primary_s_configuration_tells_of_every_key_of_its_own() -> None:
    *_, disk = (EXAMPLES / "primary.toml").read_text().partition("[[disk]]")
    told = set(re.findall(r"^(?:# )?([a-z-]+) = ", disk, re.MULTILINE))
    assert told == PRIMARY_KEYS | {"name", "mode", "format", "history"}


def unit(name: str) -> list[tuple[str, str]]:
    """The directives of a unit file."""
    lines = (EXAMPLES / name).read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and line[0] not in "#["]
    return [(key, value) for key, value in pairs]


@pytest.mark.slow
@pytest.mark.interop
def test_systemd_takes_the_units_as_they_are(tmp_path: Path) -> None:
    for name in ("replnbd.service", "replnbd.socket"):
        text = (EXAMPLES / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/replnbd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "./replnbd.service", "./replnbd.socket"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.interop
def test_the_service_says_that_it_is_ready_as_its_unit_promises(short_dir: Path) -> None:
    """Its command, run on the example's configuration: uncommented, so that all of it is tried, but
    for what needs a later Python, or shows the exports to nobody without a certificate."""
    service = dict(unit("replnbd.service"))
    assert service["Type"] == "notify"
    program, *words, config = service["ExecStart"].split()
    assert (Path(program).name, words, Path(config).name) == ("replnbd", ["serve"], "replnbd.toml")
    text = (EXAMPLES / config.rpartition("/")[2]).read_text()
    text = re.sub(r"^# (psk|allow|top-allow) = .*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^# (\[tls\]|[a-z-]+ = )", r"\1", text, flags=re.MULTILINE)
    Authority(short_dir).issue("server", "localhost")
    (short_dir / "replnbd.toml").write_text(text.replace(":10809", ":0"))
    (short_dir / "colo0.raw").write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{short_dir}/notify")
        manager.settimeout(30)
        argv = ["env", f"NOTIFY_SOCKET={short_dir}/notify", *REPLNBD, *words, "replnbd.toml"]
        with Process(argv, log=short_dir / "log", cwd=short_dir) as process:
            assert manager.recv(4096).startswith(b"READY=1\n")
            names = [export.name for export in list_exports(short_dir / "nbd.sock")]
            assert names == ["colo0", "top0"]
            assert (short_dir / "nbd.sock").stat().st_mode & 0o777 == 0o660
            assert process.terminate() == 0


def test_the_socket_unit_listens_where_the_readme_says() -> None:
    listens = [value for key, value in unit("replnbd.socket") if key == "ListenStream"]
    assert listens == ["10809", "/run/replnbd/nbd.sock"]
