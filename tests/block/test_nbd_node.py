"""NbdNode against nbdkit, qemu-nbd and replnbd: a disk like any other, and one that comes back."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from pathlib import Path

import pytest
from nbd_support import fresh_seed, nbdkit, on_both_loops, qemu_nbd, served, session, uri
from peers import Process

from replnbd.block import Extent, FileNode, MemoryNode, NbdNode, each_extent, read_bytes
from replnbd.errors import ConfigError

MIB = 1 << 20
SIZE = 4 * MIB


async def exercise(node: NbdNode, model: bytearray, rng: random.Random, rounds: int = 80) -> None:
    """Random operations against a model."""
    for _ in range(rounds):
        offset = rng.randrange(SIZE)
        length = rng.randint(1, min(SIZE - offset, rng.choice([1000, 300_000])))
        match rng.choice(["write", "write", "fua", "zeroes", "discard", "read", "flush"]):
            case "write" | "fua" as how:
                data = rng.randbytes(length)
                await (node.pwrite if how == "write" else node.pwrite_fua)(offset, data)
                model[offset : offset + length] = data
            case "zeroes":
                await node.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case "discard":
                await node.discard(offset, length)
                model[offset : offset + length] = bytes(length)
            case "read":
                got = await read_bytes(node, offset, length)
                assert got == model[offset : offset + length]
            case "flush":
                await node.flush()
    assert await read_bytes(node, 0, SIZE) == model
    await check_status(node, model, rng)


async def check_status(node: NbdNode, model: bytearray, rng: random.Random) -> None:
    """Of any range; what is said to be zero is zero."""
    for _ in range(10):
        offset = rng.randrange(SIZE)
        length = rng.randint(1, SIZE - offset)
        at = offset
        async for extent in each_extent(node, offset, length):
            assert extent.length > 0
            assert not extent.zero or not any(model[at : at + extent.length])
            at += extent.length
        assert at == offset + length


NBDKITS = {
    "as it is": [],
    "no WRITE_ZEROES": ["--filter=nozero"],
    "no block status": ["--filter=noextents"],
    "FUA without meaning": ["--filter=fua", "fuamode=discard"],
    "simple replies": ["--no-sr"],
    "blocks of 512": [
        "--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-error-policy=error",
    ],
    "blocks of 64 KiB": [
        "--filter=blocksize-policy", "blocksize-minimum=64k", "blocksize-preferred=64k",
        "blocksize-maximum=128k", "blocksize-error-policy=error",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", NBDKITS)
@on_both_loops
async def test_nbdkit_of_all_kinds_is_a_disk(short_dir: Path, kind: str) -> None:
    with nbdkit(short_dir, "memory", str(SIZE), *NBDKITS[kind]):
        node = await NbdNode.open(uri(short_dir))
        assert (node.size, node.driver) == (SIZE, "nbd")
        await exercise(node, bytearray(SIZE), random.Random(fresh_seed()))
        await node.close()


@pytest.mark.slow
@on_both_loops
async def test_a_server_that_can_only_read_and_write_is_a_disk(short_dir: Path) -> None:
    dd = "dd status=none"
    can = {
        "get_size": f"truncate -s {SIZE} $tmpdir/d; echo {SIZE}",
        "pread": f"{dd} iflag=skip_bytes,count_bytes if=$tmpdir/d skip=$4 count=$3",
        "pwrite": f"{dd} oflag=seek_bytes conv=notrunc of=$tmpdir/d seek=$4",
        "can_write": "exit 0",
    }
    with nbdkit(short_dir, "eval", *(f"{name}={script}" for name, script in can.items())):
        node = await NbdNode.open(uri(short_dir))
        await exercise(node, bytearray(SIZE), random.Random(fresh_seed()))
        await node.close()


@on_both_loops
async def test_qemu_nbd_is_a_disk(short_dir: Path) -> None:
    disk = short_dir / "disk"
    model = bytearray(SIZE)
    disk.write_bytes(model)
    with qemu_nbd(short_dir, "-f", "raw", "--discard=unmap", disk) as server:
        node = await NbdNode.open(uri(short_dir))
        await exercise(node, model, random.Random(fresh_seed()))
        await node.close()
        server.terminate()
    assert disk.read_bytes() == model


@on_both_loops
async def test_replnbd_itself_is_a_disk(short_dir: Path) -> None:
    file = MemoryNode(SIZE)
    async with served(short_dir, file) as address:
        node = await NbdNode.open(address)
        await exercise(node, bytearray(SIZE), random.Random(fresh_seed()))
        await node.close()


@on_both_loops
async def test_overlapping_parts_of_blocks_lose_nothing(short_dir: Path) -> None:
    policy = ["--filter=blocksize-policy", "blocksize-minimum=4k", "blocksize-error-policy=error"]
    with nbdkit(short_dir, "memory", str(SIZE), *policy):
        node = await NbdNode.open(uri(short_dir))
        places = range(0, 3 * 4096, 41)
        writes = [node.pwrite(at, bytes([at % 251]) * 41) for at in places]
        writes.append(node.pwrite(4 * 4096, b"x" * 8192))
        await asyncio.gather(*writes)
        expected = b"".join(bytes([at % 251]) * 41 for at in places)
        assert await read_bytes(node, 0, len(expected)) == expected
        assert await read_bytes(node, 4 * 4096, 8192) == b"x" * 8192
        await node.close()


@on_both_loops
async def test_holes_are_told(short_dir: Path) -> None:
    disk = short_dir / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
        file.seek(MIB)
        file.write(b"x" * 65536)
    with nbdkit(short_dir, "file", disk):
        node = await NbdNode.open(uri(short_dir))
        hole, data = Extent(MIB, zero=True, depth=0), Extent(65536, zero=False, depth=0)
        assert (await node.block_status(0, SIZE))[:2] == [hole, data]
        assert await node.block_status(MIB + 1, 10) == [Extent(10, zero=False, depth=0)]
        await node.close()


@on_both_loops
async def test_fast_zeroes_are_fast_or_refused(short_dir: Path) -> None:
    for mode, refused in (("slow", True), ("ignore", False), ("none", True)):
        options = ["--filter=nozero", "zeromode=notrim", f"fastzeromode={mode}"]
        with nbdkit(short_dir, "memory", str(SIZE), *options):
            node = await NbdNode.open(uri(short_dir))
            await node.pwrite(0, b"x" * 8192)
            if refused:
                with pytest.raises(OSError, match=r"ZEROES|fast") as caught:
                    await node.write_zeroes(0, 4096, fast=True)
                assert caught.value.errno == errno.ENOTSUP
            else:
                await node.write_zeroes(0, 4096, fast=True)
            await node.write_zeroes(0, 4096)
            assert await read_bytes(node, 0, 8192) == bytes(4096) + b"x" * 4096
            await node.close()


# Section: errors


@on_both_loops
async def test_errors_of_the_server_are_the_requests_own(short_dir: Path) -> None:
    options = ["--filter=error", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit(short_dir, "memory", str(SIZE), *options):
        node = await NbdNode.open(uri(short_dir), reconnect_delay_s=5)
        with pytest.raises(OSError, match="WRITE") as caught:
            await node.pwrite(0, bytes(512))
        assert caught.value.errno == errno.ENOSPC
        assert await read_bytes(node, 0, 512) == bytes(512)
        await node.close()


@on_both_loops
async def test_after_a_flush_has_failed_none_succeeds(short_dir: Path) -> None:
    script = """
case "$1" in
    get_size) echo 4096 ;;
    pread) head -c "$3" /dev/zero ;;
    pwrite) cat >/dev/null ;;
    can_write|can_flush) exit 0 ;;
    flush)
        test -e "$tmpdir/failed" && exit 0
        touch "$tmpdir/failed"; echo EIO gone >&2; exit 1 ;;
    *) exit 2 ;;
esac
"""
    with nbdkit(short_dir, "sh", write_script(short_dir, script)):
        node = await NbdNode.open(uri(short_dir))
        await node.pwrite(0, bytes(512))
        for _ in range(3):
            with pytest.raises(OSError, match=r"FLUSH|flush") as caught:
                await node.flush()
            assert caught.value.errno == errno.EIO
        await node.close()


def write_script(folder: Path, text: str) -> Path:
    path = folder / "script"
    path.write_text("#!/bin/sh" + text)
    path.chmod(0o700)
    return path


@on_both_loops
async def test_what_cannot_be_opened_is_a_config_error(short_dir: Path) -> None:
    with pytest.raises(ConfigError, match="cannot connect to nbd"):
        await NbdNode.open(uri(short_dir))
    with pytest.raises(ConfigError, match="not an NBD URI"):
        await NbdNode.open("nbd://host:port")
    with nbdkit(short_dir, "-r", "memory", str(SIZE)):
        with pytest.raises(ConfigError, match="the export is read-only"):
            await NbdNode.open(uri(short_dir))
        node = await NbdNode.open(uri(short_dir), read_only=True)
        with pytest.raises(OSError, match="read-only") as caught:
            await node.pwrite(0, b"x")
        assert caught.value.errno == errno.EROFS
        await node.close()


@on_both_loops
async def test_a_server_may_come_late(short_dir: Path) -> None:
    opening = asyncio.ensure_future(NbdNode.open(uri(short_dir), open_timeout_s=20))
    await asyncio.sleep(0.15)
    with nbdkit(short_dir, "memory", str(SIZE)):
        node = await opening
        await node.close()


# Section: sessions that break


class Server:
    """qemu-nbd on a file, which dies and comes back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.disk.write_bytes(bytes(SIZE))
        self.process: Process | None = None

    def start(self, *options: str) -> None:
        self.process = qemu_nbd(self.folder, "-f", "raw", "-e", "10", *options, self.disk)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()


@pytest.mark.slow
@on_both_loops
async def test_a_server_that_is_killed_under_load_and_comes_back(short_dir: Path) -> None:
    rng = random.Random(fresh_seed())
    server = Server(short_dir)
    server.start()
    node = await NbdNode.open(uri(short_dir), reconnect_delay_s=20)
    model = bytearray(SIZE)
    ends = asyncio.get_running_loop().time() + 2.5

    async def write(area: int) -> int:
        """Of an area of its own, so that the model knows the order."""
        count = 0
        while asyncio.get_running_loop().time() < ends:
            offset = (area * 64 + rng.randrange(60)) * 4096
            data = rng.randbytes(rng.choice([512, 4096, 16_384]))
            await node.pwrite(offset, data)
            model[offset : offset + len(data)] = data
            got = bytearray(len(data))
            await node.pread(offset, memoryview(got))
            assert got == data
            if rng.random() < 0.1:
                await node.flush()
            count += 1
        return count

    async def kill() -> int:
        deaths = 0
        while asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            server.kill()
            await asyncio.sleep(rng.uniform(0, 0.3))
            server.start()
            deaths += 1
        return deaths

    deaths, *counts = await asyncio.gather(kill(), *(write(area) for area in range(16)))
    print(f"{deaths} deaths, {sum(counts)} writes")
    assert deaths > 2
    assert await read_bytes(node, 0, SIZE) == model
    await node.close()
    server.kill()
    assert server.disk.read_bytes() == model


@on_both_loops
async def test_without_patience_requests_fail_and_later_ones_succeed(short_dir: Path) -> None:
    server = Server(short_dir)
    server.start()
    node = await NbdNode.open(uri(short_dir))
    server.kill()
    for _ in range(2):
        with pytest.raises(OSError, match=r"session|closed|pipe") as caught:
            await node.pwrite(0, bytes(512))
        assert caught.value.errno == errno.EIO
    server.start()
    while not node.connected:
        await asyncio.sleep(0.02)
    await node.pwrite(0, b"x" * 512)
    assert await read_bytes(node, 0, 512) == b"x" * 512
    await node.close()
    server.kill()


@on_both_loops
async def test_replnbd_serves_a_remote_disk_that_dies_and_comes_back(short_dir: Path) -> None:
    """Operations run outside of tasks there, until they wait."""
    server = Server(short_dir)
    server.start()
    node = await NbdNode.open(uri(short_dir), reconnect_delay_s=20)
    other = short_dir / "front"
    other.mkdir()
    async with served(other, node) as address, session(address) as client:
        await client.pwrite(100, b"one")
        server.kill()
        waiting = [client.pwrite(at * 512, bytes([at]) * 512) for at in range(1, 20)]
        tasks = [asyncio.ensure_future(each) for each in waiting]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
        server.start()
        await asyncio.gather(*tasks)
        await client.flush()
        got = bytearray(20 * 512)
        await client.pread(0, memoryview(got))
        assert got[100:103] == b"one"
        assert got[512:] == b"".join(bytes([at]) * 512 for at in range(1, 20))
    await node.close()
    server.kill()


@pytest.mark.slow
@on_both_loops
async def test_a_server_that_ends_in_an_orderly_way_and_comes_back(short_dir: Path) -> None:
    """replnbd answers by ESHUTDOWN then; nobody but the node hears of it."""
    file = MemoryNode(SIZE)
    async with served(short_dir, file) as address:
        node = await NbdNode.open(address, reconnect_delay_s=20)
        await node.pwrite(0, b"old")
        ending = asyncio.Event()

        async def write() -> int:
            count = 0
            while not ending.is_set():
                await node.pwrite(4096 + count % 100, b"x")
                count += 1
            return count

        writing = [asyncio.ensure_future(write()) for _ in range(4)]
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.05)
    async with served(short_dir, file):
        while not node.connected:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        ending.set()
        assert min(await asyncio.gather(*writing)) > 10
        assert await read_bytes(node, 0, 3) == b"old"
        await node.close()


@pytest.mark.slow
@on_both_loops
async def test_patience_ends(short_dir: Path) -> None:
    server = Server(short_dir)
    server.start()
    node = await NbdNode.open(uri(short_dir), reconnect_delay_s=0.3)
    server.kill()
    loop = asyncio.get_running_loop()
    started = loop.time()
    results = await asyncio.gather(
        *(node.pwrite(at * 512, bytes(512)) for at in range(10)), return_exceptions=True
    )
    assert 0.2 < loop.time() - started < 5
    assert [getattr(result, "errno", None) for result in results] == [errno.EIO] * 10
    started = loop.time()
    with pytest.raises(OSError, match="no session"):
        await node.flush()
    assert loop.time() - started < 0.2  # what comes later does not wait any more
    await node.close()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["size", "read-only", "gone"])
@on_both_loops
async def test_another_disk_is_not_taken_for_the_one_we_had(
    short_dir: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    server = Server(short_dir)
    server.start()
    node = await NbdNode.open(uri(short_dir), reconnect_delay_s=0.5)
    server.kill()
    waiting = asyncio.ensure_future(node.pwrite(0, bytes(512)))
    if change == "size":
        server.disk.write_bytes(bytes(SIZE + 512))
    server.start(*{"read-only": ["-r"], "gone": ["-x", "other"]}.get(change, []))
    with pytest.raises(OSError, match=str(SIZE) if change == "size" else None) as caught:
        await waiting
    assert caught.value.errno == errno.EIO
    assert bool(caplog.records) is (change != "gone")
    await node.close()
    server.kill()


@on_both_loops
async def test_close_ends_what_waits_for_a_session(short_dir: Path) -> None:
    server = Server(short_dir)
    server.start()
    node = await NbdNode.open(uri(short_dir), reconnect_delay_s=60)
    server.kill()
    waiting = asyncio.ensure_future(node.pwrite(0, bytes(512)))
    await asyncio.sleep(0.05)
    await node.close()
    with pytest.raises(OSError, match="closed") as caught:
        await waiting
    assert caught.value.errno == errno.EIO


@pytest.mark.slow
@on_both_loops
async def test_a_server_that_hangs_up_at_once_again_and_again_is_not_hammered(
    short_dir: Path,
) -> None:
    """It lets us in, and closes as soon as it is asked for something."""
    tries = 0
    node = MemoryNode(SIZE)
    async with served(short_dir, node) as address:
        remote = await NbdNode.open(address, reconnect_delay_s=1)
        await remote.pwrite(0, b"x")

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        writer.close()

    async with await asyncio.start_unix_server(hang_up, short_dir / "s"):
        with pytest.raises(OSError, match="no session"):
            await remote.pwrite(0, b"x")
    assert 2 <= tries < 10
    await remote.close()


@on_both_loops
async def test_a_copy_from_a_file(short_dir: Path) -> None:
    disk = short_dir / "source"
    content = random.Random(9).randbytes(SIZE)
    disk.write_bytes(content)
    source = FileNode.open(disk)
    with nbdkit(short_dir, "memory", str(SIZE)):
        node = await NbdNode.open(uri(short_dir))
        await node.copy_from(source, 0, 0, SIZE)
        assert await read_bytes(node, 0, SIZE) == content
        await node.close()
    await source.close()
