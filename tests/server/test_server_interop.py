"""Real clients against the server: libnbd's tools, QEMU's tools, nbd-client, fio.

The server runs in a thread with a loop of its own, as the daemon would run it; the clients are
the programs that Debian ships.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from replnbd.block import FileNode, MemoryNode
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MIB = 1 << 20
NBDSH = ["/usr/bin/env", "PATH=/usr/bin:/bin", "nbdsh"]  # its module belongs to Debian's Python


class Served:
    """A running server: a disk in memory, one in a file, and one that nobody may write."""

    def __init__(self, folder: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.folder = folder
        self.memory = MemoryNode(32 * MIB)
        self.file = folder / "disk.raw"
        self.file.write_bytes(bytes(32 * MIB))
        self.uris: list[str] = []
        self._loop_factory = loop_factory
        self._ready = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def unix(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.folder}/s"

    def tcp(self, export: str) -> str:
        return f"{self.uris[1]}/{export}"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._loop_factory) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        node = FileNode.open(self.file)
        server = NbdServer(EventBus())
        server.add_export(Export("mem", self.memory, "a disk in memory"))
        server.add_export(Export("file", node, "a disk in a file"))
        server.add_export(Export("ro", MemoryNode(MIB), "look, do not touch", writable=False))
        self.uris += await server.listen(f"nbd+unix:///?socket={self.folder}/s")
        self.uris += await server.listen("nbd://127.0.0.1:0")
        self._ready.set()
        await stop.wait()
        await server.close()
        await node.close()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Served]:
    server = Served(short_dir, request.param)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def run(*argv: str, status: int = 0) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == status, f"$ {' '.join(argv)}\n{done.returncode}\n{said}"
    return done.stdout


def nbdsh(uri: str, script: str) -> str:
    return run(*NBDSH, "-u", uri, "-c", script)


def test_nbdinfo_lists_every_export_with_what_it_can_do(served: Served) -> None:
    said = json.loads(run("nbdinfo", "--list", "--json", served.unix("")))
    exports = {each["export-name"]: each for each in said["exports"]}
    assert list(exports) == ["mem", "file", "ro"]
    disk, read_only = exports["mem"], exports["ro"]
    assert disk["description"] == "a disk in memory"
    assert disk["export-size"] == 32 * MIB
    for name in ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "df", "cache"):
        assert disk[f"can_{name}"], name
    assert not disk["is_read_only"]
    assert disk["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert disk["block_size_minimum"] == 1
    assert disk["block_size_preferred"] == 4096
    assert disk["block_size_maximum"] == 32 * MIB
    assert read_only["is_read_only"]
    assert read_only["can_multi_conn"]
    for name in ("trim", "zero", "fast_zero"):
        assert not read_only[f"can_{name}"], name


def test_nbd_client_lists_the_exports_over_tcp(served: Served) -> None:
    port = served.uris[1].rpartition(":")[2]
    said = run("nbd-client", "-l", "127.0.0.1", port)
    for line in ("mem: a disk in memory", "file: a disk in a file", "ro: look, do not touch"):
        assert line in said


def test_qemu_img_sees_size_and_list(served: Served) -> None:
    said = json.loads(run("qemu-img", "info", "--output=json", served.unix("mem")))
    assert said["virtual-size"] == 32 * MIB
    assert "exports available: 3" in run("qemu-nbd", "--list", "-k", f"{served.folder}/s")


@pytest.mark.parametrize("export", ["mem", "file"])
def test_libnbd_operations_do_what_they_say(served: Served, export: str) -> None:
    said = nbdsh(
        served.unix(export),
        """
h.pwrite(b"a" * 10000, 4000, nbd.CMD_FLAG_FUA)
h.zero(2000, 5000)
h.zero(1000, 8000, nbd.CMD_FLAG_NO_HOLE)
h.trim(500, 4000)
h.flush()
print(bytes(h.pread(10002, 3999)) ==
      bytes(501) + b"a" * 500 + bytes(2000) + b"a" * 1000 + bytes(1000) + b"a" * 5000 + bytes(1))
print(len(h.pread(32 << 20, 0)))
""",
    )
    assert said.split() == ["True", str(32 * MIB)]


def test_libnbd_is_told_errors_it_knows(served: Served) -> None:
    said = nbdsh(
        served.unix("mem"),
        """
h.set_strict_mode(0)
size = h.get_size()
for call in (lambda: h.pread(2, size - 1), lambda: h.pwrite(b"ab", size - 1),
             lambda: h.zero(2, size - 1), lambda: h.trim(2, size - 1), lambda: h.cache(1, size)):
    try:
        call()
        print("fine?")
    except nbd.Error as exc:
        print(exc.errno)
print(bytes(h.pread(1, size - 1)))
""",
    )
    assert said.split() == ["EINVAL", "ENOSPC", "ENOSPC", "EINVAL", "EINVAL", r"b'\x00'"]


def test_libnbd_without_go_and_zeroes_falls_back_to_export_name(served: Served) -> None:
    script = f"""
h = nbd.NBD()
h.set_handshake_flags(0)
h.set_export_name("mem")
h.connect_unix("{served.folder}/s")
h.pwrite(b"old but sound", 5)
print(bytes(h.pread(13, 5)))
"""
    assert run(*NBDSH, "-n", "-c", script).strip() == "b'old but sound'"


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("export", ["mem", "file"])
def test_nbdcopy_brings_a_disk_there_and_back(served: Served, over: str, export: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    disk = b"".join(rng.choice([bytes(65536), rng.randbytes(65536)]) for _ in range(512))
    source, copy = served.folder / "source", served.folder / "copy"
    source.write_bytes(disk)
    uri = served.unix(export) if over == "unix" else served.tcp(export)
    run("nbdcopy", "--flush", str(source), uri)
    run("nbdcopy", uri, str(copy))
    assert copy.read_bytes() == disk
    stored = served.memory.data if export == "mem" else served.file.read_bytes()
    assert stored == disk


def test_qemu_img_converts_and_compares(served: Served) -> None:
    rng = random.Random(1)
    disk = b"".join(rng.choice([bytes(65536), rng.randbytes(65536)]) for _ in range(512))
    source = served.folder / "source"
    source.write_bytes(disk)
    uri = served.unix("mem")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
    assert served.memory.data == disk
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)


def test_qemu_io_reads_back_what_it_wrote(served: Served) -> None:
    steps = ["write -P 7 100 70000", "write -f -P 8 4096 4096", "write -z -u 8192 4096", "flush"]
    steps += ["discard 20000 5000", "read -P 7 100 3996", "read -P 8 4096 4096"]
    steps += ["read -P 0 8192 4096", "read -P 0 20000 5000", "aio_write -P 9 0 1M", "aio_flush"]
    steps += ["read -P 9 0 1M"]
    argv = [part for step in steps for part in ("-c", step)]
    said = run("qemu-io", "-f", "raw", *argv, served.tcp("mem"))
    assert "failed" not in said.lower()


def test_qemu_io_cannot_open_a_read_only_export_for_writing(served: Served) -> None:
    uri = served.unix("ro")
    run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, status=1)
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 512", uri)


@pytest.mark.parametrize("export", ["mem", "file"])
def test_fio_verifies_what_it_wrote(served: Served, export: str) -> None:
    run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={served.unix(export)}"),
        *("--rw=randwrite", "--bsrange=512-128k", "--iodepth=32", "--size=32m", "--verify=crc32c"),
        *("--verify_fatal=1", "--fsync=64", "--verify_state_save=0"),
    )
