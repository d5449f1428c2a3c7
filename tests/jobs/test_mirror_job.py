"""What a mirror job may rely on, and what it may not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from replnbd.block import DirtyMap, MemoryNode, RangeLock
from replnbd.block.digest import GRANULE, digest_of
from replnbd.events import EventBus
from replnbd.jobs import MirrorJob

GRANULES = 64


class SlowReads(MemoryNode):
    """Each read takes a few turns of the loop, as one that goes to a thread."""

    async def pread(self, offset: int, buffer: memoryview) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        await super().pread(offset, buffer)


class Same:
    """A target that has `data`."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.copies: list[tuple[int, int]] = []

    def digest_key(self) -> bytes:
        """Nobody needs one here."""
        return b""

    async def digests(self, offset: int, length: int) -> list[tuple[int, int | None]] | None:
        pieces = [self.data[at : at + GRANULE] for at in range(offset, offset + length, GRANULE)]
        return [(len(piece), digest_of(piece)) for piece in pieces]

    async def wait_answered(self, offset: int, length: int) -> None:
        return

    def nudge(self) -> None:
        return

    def copy(self, offset: int, data: memoryview) -> Awaitable[None]:
        self.copies.append((offset, len(data)))
        self.data[offset : offset + len(data)] = data
        answered = asyncio.get_running_loop().create_future()
        answered.set_result(None)
        return answered

    def copy_zeroes(self, offset: int, length: int) -> Awaitable[None]:
        return self.copy(offset, memoryview(bytes(length)))


@pytest.mark.parametrize("short", [0, 1, GRANULE - 512])
@pytest.mark.parametrize("different", [0, 3, GRANULES])
async def test_a_granule_is_looked_at_once_however_long_its_chunk_takes(
    different: int, short: int
) -> None:
    # Otherwise it is counted twice as one that is not BEHIND any more: then as many others are
    # taken for copied that are not, for as long as the process lives.
    source = SlowReads(GRANULES * GRANULE - short)
    for granule in range(GRANULES):
        source.data[granule * GRANULE] = granule + 1
    target = Same(bytes(source.data))
    for granule in range(different):
        target.data[granule * GRANULE] = 0xFF
    dirty = DirtyMap(source.size, MemoryNode(GRANULES), 0)
    await dirty.mark_everything()
    job = MirrorJob("mirror", EventBus(), source, RangeLock(), dirty, target)
    job.start()
    await job.wait()
    assert job.error is None
    assert (dirty.behind, dirty.unproven) == (0, different)
    sent = min(different * GRANULE, source.size)
    assert sum(length for _, length in target.copies) == sent
    assert target.data == source.data
