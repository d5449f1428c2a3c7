"""A secondary disk that another server has: replication over an NBD URI, every byte compared."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern
from peers import REPLNBD, NbdClient, Process, wait_until
from peers.nbd_client import NbdReplyError, connect

from replnbd.block import NbdNode
from replnbd.daemon import open_image
from replnbd.errors import ConfigError

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@contextmanager
def qemu_nbd(setup: Setup, *options: str) -> Iterator[Process]:
    """The secondary disk of `setup`, served by QEMU."""
    path = setup.folder / "remote"
    path.unlink(missing_ok=True)
    argv = ["qemu-nbd", "-t", "-e", "8", "-k", str(path), "-f", "raw", "-x", "disk", *options]
    argv.append(str(setup.folder / "d.raw"))
    log = setup.folder.with_name("qemu-nbd.log")
    with Process(argv, log=log) as process:
        process.reach(lambda: connect(path)).close()
        yield process


@pytest.fixture
def remote(setup: Setup) -> Setup:
    """One whose secondary disk is an NBD URI, with a path that is the configuration's."""
    setup.table["secondary"] = "nbd+unix:///disk?socket=remote"
    return setup


class Twin:
    """What both exports must show."""

    def __init__(self, running: Running, content: bytes, seed: int) -> None:
        print(f"seed {seed}")
        self.rng = random.Random(seed)
        self.running = running
        self.primary = bytearray(content)
        self.view = bytearray(content)

    def change(self, client: NbdClient, content: bytearray, count: int) -> None:
        for _ in range(count):
            offset = self.rng.randrange(SIZE)
            length = self.rng.randint(1, min(SIZE - offset, self.rng.choice([700, 60_000])))
            match self.rng.choice(["write", "write", "zeroes", "trim"]):
                case "write":
                    data = self.rng.randbytes(length)
                    client.pwrite(offset, data)
                case "zeroes":
                    data = bytes(length)
                    client.write_zeroes(offset, length)
                case _:
                    data = bytes(length)
                    client.trim(offset, length)
            content[offset : offset + length] = data

    def work(self) -> None:
        self.change(self.running.connect("d"), self.primary, 40)
        self.change(self.running.connect("d-top"), self.view, 40)
        self.compare()

    def compare(self) -> None:
        for export, content in (("d", self.primary), ("d-top", self.view)):
            assert self.running.connect(export).pread(0, SIZE) == content, export


def test_a_remote_disk_is_replicated_checkpointed_and_promoted(remote: Setup) -> None:
    with qemu_nbd(remote, "--discard=unmap"):
        with remote.serve() as running:
            twin = Twin(running, pattern(1), 4711)
            running.start()
            twin.work()
            running.checkpoint()
            twin.view[:] = twin.primary
            twin.work()
            assert (remote.folder / "d.raw").read_bytes() == twin.primary
            names = {
                node["node-name"]: (node["drv"], node["file"])
                for node in running.qmp.execute("query-named-block-nodes")
            }
            uri = f"nbd+unix:///disk?socket={remote.folder}/remote"
            assert names["d-secondary"] == ("raw", uri)
            running.failover()
            wait_until(lambda: running.disk()["stage"] == "done", "the commit")
            assert running.connect("d-top").pread(0, SIZE) == twin.view
            running.qmp.execute("quit")
            running.ended_well()
        assert (remote.folder / "d.raw").read_bytes() == twin.view
        check_overlays(remote)


def test_the_view_of_a_remote_disk_survives_kill_and_quit(remote: Setup) -> None:
    with qemu_nbd(remote):
        with remote.serve() as running:
            twin = Twin(running, pattern(1), 815)
            running.start()
            twin.work()
            running.process.kill()
        with remote.serve() as running:
            twin.running = running
            twin.compare()
            twin.work()
            running.qmp.execute("quit")
            running.ended_well()
        with remote.serve() as running:
            twin.running = running
            twin.compare()
            assert running.disk()["stage"] == "running"
            assert "orderly" in running.log
        check_overlays(remote)


def test_a_remote_disk_that_goes_away_fails_writes_and_may_come_back(remote: Setup) -> None:
    def written() -> bool:
        try:
            client.pwrite(4096, b"z" * 4096)
        except NbdReplyError:
            return False
        return True

    with qemu_nbd(remote) as server, remote.serve() as running:
        running.start()
        client = running.connect("d")
        client.pwrite(0, b"x" * 4096)
        server.kill()
        with pytest.raises(NbdReplyError) as caught:
            client.pwrite(4096, b"y" * 4096)
        assert caught.value.errno == errno.EIO
        with qemu_nbd(remote):
            wait_until(written, "a write")
            assert client.pread(0, 8192) == b"x" * 4096 + b"z" * 4096
            assert running.connect("d-top").pread(0, SIZE) == pattern(1)


@pytest.mark.parametrize("size", [SIZE + 512, 0])
def test_a_remote_disk_of_another_size_is_not_taken_for_the_one_there_was(
    remote: Setup, size: int
) -> None:
    with qemu_nbd(remote), remote.serve() as running:
        running.start()
        running.process.kill()
    (remote.folder / "d.raw").write_bytes(bytes(size))
    with qemu_nbd(remote):
        assert f"{size} bytes" in refusal(remote)


def refusal(setup: Setup) -> str:
    """What `replnbd serve` says when it does not begin."""
    log = setup.folder.with_name("refusal")
    with Process([*REPLNBD, "serve", str(setup.write())], log=log) as process:
        assert process.wait() == 1
    return log.read_text()


def test_a_server_that_is_not_there_is_told_of_in_one_line(remote: Setup) -> None:
    text = refusal(remote)
    assert text.count("\n") == 1
    assert f"cannot connect to nbd+unix:///disk?socket={remote.folder}/remote" in text
    assert not (remote.folder / "d.hidden").exists()


def test_the_command_line_takes_a_uri_too(remote: Setup, tmp_path: Path) -> None:
    argv = [*REPLNBD, "secondary", f"nbd+unix:///disk?socket={remote.folder}/remote"]
    argv += ["--hidden", f"{tmp_path}/h", "--active", f"{tmp_path}/a"]
    argv += ["--listen", f"nbd+unix:///?socket={remote.folder}/nbd"]
    argv += ["--control", f"{remote.folder}/qmp", "--start"]
    with qemu_nbd(remote), Process(argv, log=tmp_path / "log") as process:
        with process.reach(lambda: NbdClient(remote.folder / "nbd", "disk")) as client:
            assert client.pread(0, SIZE) == pattern(1)
        with NbdClient(remote.folder / "nbd", "disk-top") as client:
            assert client.pread(0, SIZE) == pattern(1)
        assert process.terminate() == 0


async def test_open_image_takes_a_uri(remote: Setup) -> None:
    uri = f"nbd+unix:///disk?socket={remote.folder}/remote"
    with qemu_nbd(remote):
        node = await open_image(uri, name="n")
        assert isinstance(node, NbdNode)
        assert (node.name, node.size) == ("n", SIZE)
        await node.close()
        with pytest.raises(ConfigError, match="over NBD a disk is raw, not qcow2"):
            await open_image(uri, format="qcow2")
