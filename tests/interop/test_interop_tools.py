"""The programs people already have, against both exports of a running standby. Every test compares
both exports whole: what is written to one must not be seen on the other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop_support import (
    CHECKPOINT,
    KIB,
    MIB,
    START,
    Standby,
    Twin,
    assert_same,
    fresh_seed,
    mottled,
    random_requests,
    run,
)
from peers import NbdClient, NbdReplyError, Process, ReplnbdDisk

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 8 * MIB
EXPORTS = ["colo0", "top0"]
NBDSH = ["/usr/bin/env", "PATH=/usr/bin:/bin", "nbdsh"]  # its module belongs to Debian's Python


class Running:
    """A standby in stage running, what its exports must hold, and a folder for files."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        content = mottled(rng, SIZE)
        self.twin = Twin(content)
        self.standby = Standby(folder, ReplnbdDisk.create(folder, "colo0", "top0", content))

    def expected(self, export: str) -> bytearray:
        """The model's bytes of an export, to be changed as the export is."""
        return self.twin.primary if export == "colo0" else self.twin.view

    def uri(self, export: str, over: str = "unix") -> str:
        """The NBD URI of an export."""
        return self.standby.unix(export) if over == "unix" else self.standby.tcp(export)

    def file(self, name: str, content: bytes | bytearray) -> Path:
        """A new file."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def compare(self) -> None:
        """Every export that is there to be read is what the model says."""
        fenced = self.standby.stage() == "done"
        for export in EXPORTS[fenced:]:
            assert_same(self.standby.content(export), self.expected(export), export)


@pytest.fixture
def running(short_dir: Path) -> Iterator[Running]:
    running = Running(short_dir, random.Random(fresh_seed()))
    with running.standby:
        running.standby.qmp.execute(*START)
        yield running
        running.compare()
        running.standby.quit()
        disk = running.standby.disk
        assert_same(disk.content(), running.twin.primary, "the secondary disk")
        for overlay in (disk.hidden, disk.active):
            run("qemu-img", "check", "-q", "-f", "qcow2", overlay)


# Section: libnbd


def info(uri: str, *options: str) -> dict[str, Any]:
    """What `nbdinfo --json` says."""
    answer: dict[str, Any] = json.loads(run("nbdinfo", *options, "--json", uri))
    return answer


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_nbdinfo_says_the_same_of_both_exports(running: Running, over: str) -> None:
    listed = info(running.uri("", over), "--list")
    assert [each["export-name"] for each in listed["exports"]] == EXPORTS
    for export, described in zip(EXPORTS, listed["exports"], strict=True):
        uri = running.uri(export, over)
        # For one export, nbdinfo would ask file(1) what is in it, which may not be there.
        (alone,) = info(uri, "--no-content")["exports"]
        assert alone == described
        assert described["export-size"] == SIZE
        assert not described["is_read_only"]
        for ability in ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn"):
            assert described[f"can_{ability}"], ability
        sizes = [described[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")]
        assert sizes == [1, 4096, 32 * MIB]
        assert run("nbdinfo", "--size", uri) == f"{SIZE}\n"
        for ability in ("--can=write", "--can=trim", "--can=multi-conn"):
            run("nbdinfo", ability, uri)
        run("nbdinfo", "--is=read-only", uri, status=2)
    assert "colo0" in listed["exports"][0]["description"]
    assert "view" in listed["exports"][1]["description"]


@pytest.mark.parametrize("export", EXPORTS)
def test_nbdsh_writes_zeroes_trims_and_reads_what_others_see(running: Running, export: str) -> None:
    expected = running.expected(export)
    before = expected[1_000_000:1_010_000]
    expected[1_000_001:1_000_701] = b"\x5a" * 700
    expected[1_002_047:1_006_147] = bytes(4100)
    expected[1_008_000:1_009_999] = bytes(1999)
    wanted = running.file("wanted", expected[1_000_000:1_010_000])
    found = running.file("before", before)
    script = f"""
assert h.get_size() == {SIZE} and h.can_multi_conn() and not h.is_read_only()
assert h.pread(10000, 1000000) == open("{found}", "rb").read()
h.pwrite(b"\\x5a" * 700, 1000001, nbd.CMD_FLAG_FUA)
h.zero(4100, 1002047, nbd.CMD_FLAG_NO_HOLE)
h.trim(1999, 1008000)
h.flush()
assert h.pread(10000, 1000000) == open("{wanted}", "rb").read()
second = nbd.NBD()
second.connect_uri("{running.uri(export, "tcp")}")
assert second.pread(10000, 1000000) == open("{wanted}", "rb").read()
print("all good")
"""
    assert run(*NBDSH, "-u", running.uri(export), "-c", script) == "all good\n"


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("export", EXPORTS)
def test_nbdcopy_brings_a_disk_there_and_back(running: Running, export: str, over: str) -> None:
    content = mottled(running.rng, SIZE)
    running.expected(export)[:] = content
    source, copy = running.file("source", content), running.folder / "copy"
    run("nbdcopy", "--flush", source, running.uri(export, over))
    run("nbdcopy", running.uri(export, over), copy)
    assert_same(copy.read_bytes(), content, "the copy")


def test_nbdcopy_from_the_primarys_export_to_the_view(running: Running) -> None:
    with running.standby.connect("colo0") as primary:
        random_requests(running.rng, primary, running.twin.primary, 50, length_max=100 * KIB)
    run("nbdcopy", "--flush", running.uri("colo0"), running.uri("top0", "tcp"))
    running.twin.checkpoint()


def test_nbdcopy_takes_a_still_view_while_the_primary_writes(running: Running) -> None:
    copy = running.folder / "copy"
    still = bytes(running.twin.view)
    # Small steps, so that many writes of the primary come between them.
    options = ["--connections=1", "--requests=1", "--request-size=4096"]
    argv = ["nbdcopy", *options, running.uri("top0"), str(copy)]
    with Process(argv, log=running.folder / "log") as tool:
        with running.standby.connect("colo0") as primary:
            while tool.running:
                random_requests(running.rng, primary, running.twin.primary, 10, length_max=64 * KIB)
        assert tool.wait() == 0, tool.failure("nbdcopy failed")
    assert_same(copy.read_bytes(), still, "the copy")


# Section: QEMU's tools


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("export", EXPORTS)
def test_qemu_img_converts_in_and_out_and_compares(
    running: Running, export: str, over: str
) -> None:
    uri = running.uri(export, over)
    content = mottled(running.rng, SIZE)
    raw, qcow2 = running.file("raw", content), running.folder / "qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, uri)
    running.expected(export)[:] = content
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, qcow2)
    out = running.folder / "out"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, out)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, raw)
    described = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri))
    assert described["virtual-size"] == SIZE
    one_byte_off = bytearray(content)
    one_byte_off[SIZE // 3] ^= 1
    other = running.file("other", one_byte_off)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, other, status=1)


@pytest.mark.parametrize("export", EXPORTS)
def test_qemu_io_patterns_at_unaligned_offsets(running: Running, export: str) -> None:
    expected = running.expected(export)
    steps = []
    ranges: list[tuple[int, int, int]] = []
    for index in range(30):
        # Spans of their own, so that every pattern can be read again at the end.
        offset = index * 256 * KIB + running.rng.randrange(100 * KIB)
        length = running.rng.randint(1, 100 * KIB)
        pattern = running.rng.randrange(1, 256)
        verb = ("write", "write -f", "aio_write", "write -z", "write -z -u", "discard")[index % 6]
        if verb in ("write -z", "write -z -u", "discard"):
            pattern = 0
            steps.append(f"{verb} {offset} {length}")
        else:
            steps.append(f"{verb} -P {pattern} {offset} {length}")
        expected[offset : offset + length] = bytes([pattern]) * length
        ranges.append((pattern, offset, length))
    steps += ["aio_flush", "flush"]
    steps += [f"read -P {pattern} {offset} {length}" for pattern, offset, length in ranges]
    argv = [word for step in steps for word in ("-c", step)]
    said = run("qemu-io", "-d", "unmap", "-f", "raw", *argv, running.uri(export))
    assert "failed" not in said.lower(), said


def test_qemu_nbd_lists_both_exports(running: Running) -> None:
    said = run("qemu-nbd", "--list", "-k", running.standby.nbd_socket)
    assert "exports available: 2" in said
    for export in EXPORTS:
        assert f"export: '{export}'" in said


# Section: nbd-client, fio


def test_nbd_client_lists_both_exports(running: Running) -> None:
    said = run("nbd-client", "-l", "127.0.0.1", str(running.standby.port))
    for export in EXPORTS:
        assert any(line.startswith(f"{export}:") for line in said.splitlines()), said


@pytest.mark.parametrize("export", EXPORTS)
def test_fio_verifies_what_it_wrote(running: Running, export: str) -> None:
    run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={running.uri(export)}"),
        *("--rw=randwrite", "--bsrange=512-64k", "--iodepth=32", f"--size={SIZE}", "--io_size=24m"),
        *("--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--verify_state_save=0"),
    )
    # What fio wrote is fio's secret, but for the other export it must not be there at all.
    running.expected(export)[:] = running.standby.content(export)


# Section: other servers in front of it


def proxy_argv(kind: str, socket: Path, uri: str) -> list[str]:
    """A server on `socket` that hands every request on to `uri`."""
    if kind == "nbdkit":
        return ["nbdkit", "--foreground", "--unix", str(socket), "nbd", f"uri={uri}"]
    options = ["--persistent", "--shared=8", "--format=raw", "--discard=unmap"]
    return ["qemu-nbd", *options, f"--socket={socket}", uri]


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_a_proxy_in_front_of_each_export_changes_nothing_and_is_fenced_too(
    running: Running, kind: str
) -> None:
    sockets = {export: running.folder / f"{export}.proxy" for export in EXPORTS}
    logs = {export: running.folder / f"{export}.log" for export in EXPORTS}
    argvs = {
        export: proxy_argv(kind, sockets[export], running.uri(export, over))
        for export, over in zip(EXPORTS, ["tcp", "unix"], strict=True)
    }
    with (
        Process(argvs["colo0"], log=logs["colo0"]) as to_colo0,
        Process(argvs["top0"], log=logs["top0"]) as to_top0,
        to_colo0.reach(lambda: NbdClient(sockets["colo0"], "")) as primary,
        to_top0.reach(lambda: NbdClient(sockets["top0"], "")) as view,
    ):
        assert primary.size == view.size == SIZE
        for _ in range(3):
            random_requests(running.rng, primary, running.twin.primary, 30, length_max=100 * KIB)
            random_requests(running.rng, view, running.twin.view, 30, length_max=100 * KIB)
            primary.flush()
            view.flush()
            assert_same(primary.pread(0, SIZE), running.twin.primary, "the primary's proxy")
            assert_same(view.pread(0, SIZE), running.twin.view, "the view's proxy")
            running.compare()
            running.standby.qmp.execute(*CHECKPOINT)
            running.twin.checkpoint()
            # A proxy that kept the old view in a cache would show it now.
            assert_same(view.pread(0, SIZE), running.twin.view, "the view's proxy")
        random_requests(running.rng, view, running.twin.view, 30, length_max=100 * KIB)
        random_requests(running.rng, primary, running.twin.primary, 30, length_max=100 * KIB)
        running.standby.fail_over()
        running.twin.primary[:] = running.twin.view
        with pytest.raises((NbdReplyError, ConnectionError)):
            primary.pwrite(0, bytes(4096))
        random_requests(running.rng, view, running.twin.view, 30, length_max=100 * KIB)
        assert_same(view.pread(0, SIZE), running.twin.view, "the view's proxy")
    running.twin.primary[:] = running.twin.view
