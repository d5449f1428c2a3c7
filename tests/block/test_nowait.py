"""What `pread_nowait` and `pwrite_nowait` promise: done now, or False and nothing happened."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from replnbd.block import BlockNode, Buffer, FileNode, MemoryNode, PassThrough, RangeLock
from replnbd.block.file import WRITE_INLINE_MAX
from replnbd.filters import DelayNode, FaultNode


def read_nowait(node: BlockNode, offset: int, length: int) -> bytes | None:
    """The bytes, or None if the node would have to wait."""
    buffer = bytearray(length)
    return bytes(buffer) if node.pread_nowait(offset, memoryview(buffer)) else None


class Noting(PassThrough):
    """Overrides one operation, and no twin."""

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self.file.pwrite(offset, b"noted"[: len(data)])


class NotingMixin:
    """The same, for any node."""

    file: BlockNode

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self.file.pwrite(offset, b"noted"[: len(data)])


class NotingHeir(Noting):
    """Inherits the override."""


class NotingMixed(NotingMixin, PassThrough):
    """Has the override from a class that is no node."""


class NotingBeside(NotingHeir, DelayNode):
    """Has one override of several."""


class Hurried(Noting):
    """Has a twin of its own again."""

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.file.pwrite_nowait(offset, b"twin."[: len(data)])


@pytest.mark.parametrize("kind", [Noting, NotingHeir, NotingMixed])
async def test_an_override_is_not_passed_by_by_the_twin_that_it_inherits(
    kind: type[PassThrough],
) -> None:
    memory = MemoryNode(5)
    node = kind("n", memory)
    assert not node.pwrite_nowait(0, b"12345")
    assert memory.data == bytes(5)
    await node.pwrite(0, b"12345")
    assert read_nowait(node, 0, 5) == b"noted", "the operation that is not overridden is as before"


async def test_of_several_overrides_none_is_passed_by() -> None:
    node = NotingBeside("n", MemoryNode(5))
    assert not node.pwrite_nowait(0, b"12345")
    assert read_nowait(node, 0, 5) is None


async def test_a_twin_of_its_own_is_used() -> None:
    memory = MemoryNode(5)
    assert Hurried("n", memory).pwrite_nowait(0, b"12345")
    assert memory.data == b"twin."


async def test_a_filter_that_changes_nothing_asks_what_is_below() -> None:
    memory = MemoryNode(100)
    node = PassThrough("p", PassThrough("q", memory))
    assert node.pwrite_nowait(3, b"abc")
    assert read_nowait(node, 0, 8) == b"\0\0\0abc\0\0"
    slow = PassThrough("p", DelayNode("d", memory))
    assert not slow.pwrite_nowait(3, b"xyz")
    assert read_nowait(slow, 0, 8) is None
    assert memory.data[3:6] == b"abc"


async def test_memory_grows_and_ends_as_a_file_does() -> None:
    memory = MemoryNode(4)
    assert memory.pwrite_nowait(10, b"abc")
    assert (memory.size, bytes(memory.data)) == (13, bytes(10) + b"abc")
    assert read_nowait(memory, 11, 6) == b"bc" + bytes(4)


async def test_a_file_does_at_once_what_is_small_and_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    node = FileNode.open(path)
    data = random.Random(1).randbytes(WRITE_INLINE_MAX)
    assert node.pwrite_nowait(100, data)
    assert path.read_bytes() == bytes(100) + data
    assert read_nowait(node, 90, 4000) == bytes(10) + data[:3990]
    await node.close()


async def test_a_file_leaves_large_writes_to_a_thread_and_has_done_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old" * 100)
    node = FileNode.open(path)
    data = bytes(WRITE_INLINE_MAX + 1)
    assert not node.pwrite_nowait(0, data)
    assert path.read_bytes() == b"old" * 100
    await node.pwrite(0, data)
    assert path.read_bytes() == data
    await node.close()


async def test_the_zeroes_past_the_end_of_a_file_are_not_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    node = FileNode.open(path)
    buffer = bytearray(b"?" * 6)
    assert not node.pread_nowait(0, memoryview(buffer))
    await node.pread(0, memoryview(buffer))
    assert buffer == b"abc\0\0\0"
    await node.close()


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_a_file_that_would_wait_is_read_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"on a slow disk")
    node = FileNode.open(path)
    plain = os.preadv

    def waiting(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if flags:
            raise OSError(code, os.strerror(code))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", waiting)
    assert read_nowait(node, 0, 4) is None
    buffer = bytearray(4)
    await node.pread(0, memoryview(buffer))
    assert buffer == b"on a"
    await node.close()


async def test_an_error_of_a_file_is_an_error_not_a_wait(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    node = FileNode.open(path, read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        node.pwrite_nowait(0, b"x")
    await node.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_nowait(node, 0, 1)


async def test_an_injected_fault_counts_each_call_once(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    node = FaultNode("f", FileNode.open(path))
    past = memoryview(bytearray(6))
    node.fail("pread", skip=2)
    for _ in range(2):
        assert not node.pread_nowait(0, past)
        await node.pread(0, past)
    assert not node.pread_nowait(0, past)
    with pytest.raises(OSError, match="injected"):
        await node.pread(0, past)
    node.heal()
    assert node.pread_nowait(0, past[:3])
    assert node.calls == 4
    await node.close()


def starts(coroutine: Coroutine[Any, Any, int]) -> bool:
    """Whether it ends without suspending."""
    try:
        coroutine.send(None)
    except StopIteration:
        return True
    coroutine.close()
    return False


async def test_a_range_is_free_exactly_when_acquiring_it_would_not_wait() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        lock = RangeLock(rng.choice((1, 512, 65536)))

        async def hold(lock: RangeLock, turns: int, place: tuple[int, int, bool]) -> None:
            key = await lock.acquire(*place)
            for _ in range(turns):
                await asyncio.sleep(0)
            lock.release(key)

        def place() -> tuple[int, int, bool]:
            return rng.randrange(1 << 18), rng.choice((1, 512, 65536, 1 << 62)), rng.random() < 0.4

        tasks = []
        for _ in range(rng.randrange(8)):
            tasks.append(asyncio.ensure_future(hold(lock, rng.randrange(6), place())))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        for _ in range(10):
            asked = place()
            free = lock.is_free(*asked)
            before = set(lock.held)
            assert starts(lock.acquire(*asked)) == free
            for key in set(lock.held) - before:
                lock.release(key)
        await asyncio.gather(*tasks)
        assert not lock


async def test_a_drain_that_waits_is_not_overtaken() -> None:
    lock = RangeLock(4096)
    reading = await lock.acquire(0, 4096, False)
    drain = asyncio.ensure_future(lock.acquire(0, 1 << 63, True))
    await asyncio.sleep(0)
    assert not lock.is_free(1 << 40, 1, False)
    assert not lock.is_free(0, 1, False)
    lock.release(reading)
    assert not lock.is_free(1 << 40, 1, False), "it has been woken, and has not run yet"
    lock.release(await drain)
    assert lock.is_free(1 << 40, 1, True)
