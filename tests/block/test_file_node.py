"""FileNode: bytes, holes, the end of the file, locks."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replnbd.block import (
    STATUS_EXTENTS_MAX,
    BlockNode,
    FileNode,
    MemoryNode,
    each_extent,
    read_bytes,
)
from replnbd.block.file import WRITE_INLINE_MAX
from replnbd.block.threads import run_blocking
from replnbd.errors import ConfigError

MIB = 1 << 20


def make(path: Path, content: bytes = b"") -> FileNode:
    path.write_bytes(content)
    return FileNode.open(path)


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="replnbd-test-") as name:
            yield Path(name)


async def test_random_operations_match_a_bytearray(directory: Path) -> None:
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    size = 3 * MIB + 512
    model = bytearray(rng.randbytes(size))
    node = make(directory / "disk", bytes(model))
    assert node.size == size
    for _ in range(200):
        offset = rng.randrange(size)
        length = min(rng.choice([1, 511, 4096, 65536, WRITE_INLINE_MAX + 1]), size - offset)
        operation = rng.choice(["read", "write", "zero", "unmap", "discard"])
        if operation == "read":
            assert await read_bytes(node, offset, length) == model[offset : offset + length]
        elif operation == "write":
            data = rng.randbytes(length)
            await node.pwrite(offset, data)
            model[offset : offset + length] = data
        elif operation == "discard":
            await node.discard(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            await node.write_zeroes(offset, length, unmap=operation == "unmap")
            model[offset : offset + length] = bytes(length)
    await node.flush()
    assert await read_bytes(node, 0, size) == model
    await node.close()
    assert (directory / "disk").read_bytes() == model


async def test_reads_past_the_end_are_zeroes_and_writes_extend(directory: Path) -> None:
    node = make(directory / "disk", b"abc")
    assert await read_bytes(node, 1, 6) == b"bc\0\0\0\0"
    await node.pwrite(5, b"xyz")
    await node.write_zeroes(8, 4)
    await node.close()
    assert (directory / "disk").read_bytes() == b"abc\0\0xyz\0\0\0\0"


async def test_truncate_cuts_and_extends(directory: Path) -> None:
    node = make(directory / "disk", b"abcdef")
    await node.truncate(2)
    await node.truncate(4)
    await node.close()
    assert (directory / "disk").read_bytes() == b"ab\0\0"


async def test_block_status_finds_the_holes_and_covers_every_byte(tmp_path: Path) -> None:
    node = make(tmp_path / "disk")
    await node.truncate(16 * MIB)
    await node.pwrite(4 * MIB, b"x" * MIB)
    extents = await node.block_status(MIB, 15 * MIB)
    assert [(e.length, e.zero, e.depth) for e in extents] == [
        (3 * MIB, True, 0),
        (MIB, False, 0),
        (11 * MIB, True, 0),
    ]
    await node.write_zeroes(4 * MIB, MIB, unmap=True)
    assert all(e.zero for e in await node.block_status(0, 16 * MIB))
    await node.close()


async def test_block_status_of_a_fragmented_file_falls_short_and_goes_on_from_there(
    tmp_path: Path,
) -> None:
    node = make(tmp_path / "disk")
    count, unit = 5000, 128 * 1024
    await node.truncate(count * unit)
    for number in range(count):
        await node.pwrite(number * unit, b"x")
    first = await node.block_status(0, count * unit)
    assert len(first) == STATUS_EXTENTS_MAX
    assert sum(extent.length for extent in first) < count * unit
    extents = [extent async for extent in each_extent(node, 0, count * unit)]
    assert sum(extent.length for extent in extents) == count * unit
    assert [extent.zero for extent in extents] == [False, True] * count
    await node.close()


async def test_unmapped_space_is_given_back_and_kept_space_is_not(tmp_path: Path) -> None:
    node = make(tmp_path / "disk", b"x" * 2 * MIB)
    await node.write_zeroes(0, MIB, unmap=True)
    await node.write_zeroes(MIB, MIB, unmap=False)
    await node.close()
    status = (tmp_path / "disk").stat()
    assert MIB <= status.st_blocks * 512 <= MIB + 65536
    assert (tmp_path / "disk").read_bytes() == bytes(2 * MIB)


async def test_a_read_only_node_refuses_writes(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 512)
    node = FileNode.open(tmp_path / "disk", read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await node.pwrite(0, b"y")
    await node.close()
    assert (tmp_path / "disk").read_bytes() == b"x" * 512


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda p: None, "cannot open {}: No such file or directory"),
        (lambda p: p.mkdir(), "cannot open {}: Is a directory"),
        (lambda p: os.mkfifo(p), "cannot open {}: neither a regular file nor a block device"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(tmp_path: Path, prepare, text: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    path = tmp_path / "disk"
    prepare(path)
    with pytest.raises(ConfigError) as caught:
        FileNode.open(path)
    assert str(caught.value) == text.format(path)


async def test_a_second_opener_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    node = make(tmp_path / "disk", b"x")
    for read_only in (False, True):
        with pytest.raises(ConfigError, match="in use by another process"):
            FileNode.open(tmp_path / "disk", read_only=read_only)
    await node.close()
    readers = [FileNode.open(tmp_path / "disk", read_only=True) for _ in range(2)]
    with pytest.raises(ConfigError, match="in use by another process"):
        FileNode.open(tmp_path / "disk")
    for reader in readers:
        await reader.close()
    await FileNode.open(tmp_path / "disk").close()


@pytest.mark.interop
async def test_qemu_and_replnbd_keep_each_other_out(tmp_path: Path) -> None:
    async def qemu_io(*options: str) -> tuple[int, bytes]:
        process = await asyncio.create_subprocess_exec(
            "qemu-io", "-f", "raw", *options, "-c", "write -P 7 0 512", str(tmp_path / "disk"),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        return process.returncode or 0, output

    node = make(tmp_path / "disk", bytes(4096))
    code, output = await qemu_io()
    assert code != 0
    assert b'Failed to get "write" lock' in output
    assert await read_bytes(node, 0, 4096) == bytes(4096)
    await node.close()
    assert (await qemu_io())[0] == 0

    process = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", str(tmp_path / "disk"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"read -P 7 0 512\n")
    await process.stdout.readuntil(b"512/512")
    with pytest.raises(ConfigError, match="in use by another process"):
        FileNode.open(tmp_path / "disk")
    await process.communicate(b"quit\n")
    await FileNode.open(tmp_path / "disk").close()


async def test_a_full_disk_is_enospc_and_writes_before_it_stay(tmp_path: Path) -> None:
    node: BlockNode = FileNode(
        os.open("/dev/full", os.O_RDWR), "/dev/full", read_only=False, name="full"
    )
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what matters
        await node.pwrite(0, b"x" * 4096)
    assert caught.value.errno == errno.ENOSPC
    await node.close()


async def test_memory_node_behaves_like_a_file() -> None:
    node = MemoryNode(4)
    await node.pwrite(2, b"abcd")
    assert node.size == 6
    assert await read_bytes(node, 0, 8) == b"\0\0abcd\0\0"
    await node.truncate(3)
    await node.truncate(5)
    assert await read_bytes(node, 0, 5) == b"\0\0a\0\0"


async def test_after_a_failed_flush_none_succeeds_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    node = make(tmp_path / "disk", b"x")
    await node.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(OSError, match="No space left"):
            await node.flush()
    with pytest.raises(OSError, match=r"an earlier flush of .* failed") as caught:
        await node.flush()
    assert caught.value.errno == errno.ENOSPC
    await node.close()


async def test_flushes_that_come_while_one_runs_share_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each of them begins after the writes that it is to make durable."""
    fdatasync, order, running = os.fdatasync, [], threading.Event()

    def slow(fd: int) -> None:
        order.append(("sync", os.pread(fd, 4, 0)))
        running.wait(10)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    node = make(tmp_path / "disk", b"old.")
    first = asyncio.ensure_future(node.flush())
    while not order:
        await asyncio.sleep(0.001)
    await node.pwrite(0, b"new.")
    later = [asyncio.ensure_future(node.flush()) for _ in range(20)]
    await asyncio.sleep(0.01)
    assert not any(flush.done() for flush in [first, *later])
    later[3].cancel()  # whoever does not want to wait takes nothing from the others
    running.set()
    await asyncio.gather(first, *later[:3], *later[4:])
    assert order == [("sync", b"old."), ("sync", b"new.")]
    await node.flush()
    assert len(order) == 3
    await node.close()


async def test_a_file_is_not_closed_under_a_flush_that_nobody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync, ended = os.fdatasync, []

    def slow(fd: int) -> None:
        threading.Event().wait(0.05)
        fdatasync(fd)  # EBADF if it is closed
        ended.append(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    node = make(tmp_path / "disk", b"x")
    flushes = [asyncio.ensure_future(node.flush()) for _ in range(2)]
    await asyncio.sleep(0.01)
    flushes.append(asyncio.ensure_future(node.flush()))
    await asyncio.sleep(0.01)
    for flush in flushes:
        flush.cancel()
    await node.close()
    assert len(ended) == 2


@pytest.mark.parametrize("supported", [True, False])
async def test_a_durable_write_asks_the_kernel_for_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    pwritev, fdatasync, calls = os.pwritev, os.fdatasync, []

    def recorded(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        calls.append(flags)
        if not supported:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return pwritev(fd, [buffers[0][:3]], offset, flags)  # a short write

    def recorded_sync(fd: int) -> None:
        calls.append(-1)
        fdatasync(fd)

    monkeypatch.setattr(os, "pwritev", recorded)
    monkeypatch.setattr(os, "fdatasync", recorded_sync)
    node = make(directory / "disk", b"0123456789")
    await node.pwrite_fua(2, b"abcdefg")
    assert await read_bytes(node, 0, 10) == b"01abcdefg9"
    assert calls == ([os.RWF_DSYNC] * 3 if supported else [os.RWF_DSYNC, -1])
    await node.close()


async def test_zeroing_past_the_end_never_cuts_off_what_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make(tmp_path / "disk", b"x" * 4096)
    fstat = os.fstat
    raced = []

    def fstat_and_lose_the_race(fd: int) -> os.stat_result:
        status = fstat(fd)
        raced.append(os.pwrite(fd, b"acknowledged", 1 << 20))
        return status

    monkeypatch.setattr(os, "fstat", fstat_and_lose_the_race)
    await node.write_zeroes(4096, 65536)
    monkeypatch.undo()
    assert raced
    content = (tmp_path / "disk").read_bytes()
    assert content == b"x" * 4096 + bytes((1 << 20) - 4096) + b"acknowledged"
    await node.close()


async def test_a_cancelled_call_ends_before_its_caller_hears_of_it() -> None:
    began, go, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        began.set()
        go.wait(30)
        ended.set()

    caller = asyncio.create_task(run_blocking(call))
    await asyncio.to_thread(began.wait)
    caller.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not caller.done()
    go.set()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert ended.is_set()
