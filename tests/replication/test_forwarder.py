"""What a forwarder takes for proven, and what it says of what was lost."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any, cast

from replnbd.block import DirtyMap, MemoryNode
from replnbd.block.digest import GRANULE
from replnbd.block.nbd_connection import NbdConnection
from replnbd.filters import QuorumNode
from replnbd.replication.forwarder import Forwarder

GRANULES = 8
DATA = b"data" * 128
LOST = OSError(errno.ECONNRESET, "the way is lost")


class Wire:
    """In the place of a connection: what was submitted is answered when the test says so; a flush
    at once, before all that came earlier, as the protocol allows."""

    can_flush = can_zero = can_trim = True
    bytes_outstanding = requests_outstanding = 0

    def __init__(self) -> None:
        self.writes: list[Callable[[OSError | None], None]] = []

    def submit(self, *_: Any, done: Callable[[OSError | None], None], **__: Any) -> int:
        self.writes.append(done)
        return len(self.writes)

    async def flush(self) -> None:
        await asyncio.sleep(0)


class Disk:
    """A disk and the way to its copy, all of it in memory. With `slow`, a write to it suspends."""

    def __init__(self, *, sync: bool = False, slow: bool = False) -> None:
        self.dirty = DirtyMap(GRANULES * GRANULE, MemoryNode(GRANULES), 0)
        self.steps = 0
        self.forwarder = Forwarder(
            self.dirty,
            sync=sync,
            before_alone=self._step,
            on_behind=lambda: None,
            on_bad=lambda *_: None,
        )
        self.wire = Wire()
        self.forwarder.connect(cast(NbdConnection, self.wire), ours=True)
        self.local = Slow(GRANULES * GRANULE) if slow else MemoryNode(GRANULES * GRANULE)
        self.node = QuorumNode("quorum", self.local, self.forwarder)

    async def _step(self) -> None:
        self.steps += 1

    def mark(self, granule: int) -> int:
        """As the next process would find it."""
        return cast(MemoryNode, self.dirty._file).data[granule]


class Slow(MemoryNode):
    """Writes when the test says so."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.may_write = asyncio.Event()

    async def pwrite(self, offset: int, data: Any) -> None:
        await self.may_write.wait()
        await super().pwrite(offset, data)


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_one_proof_waits_for_no_other_takes_for_proven() -> None:
    disk = Disk()
    assert disk.node.pwrite_nowait(0, DATA)
    first = asyncio.create_task(disk.forwarder.prove())
    await turns()
    second = asyncio.create_task(disk.forwarder.prove())
    await turns()
    assert disk.mark(0)
    disk.wire.writes[0](None)
    await asyncio.gather(first, second)
    assert not disk.mark(0)


async def test_a_proof_that_was_cancelled_leaves_the_next_one_to_wait() -> None:
    disk = Disk()
    assert disk.node.pwrite_nowait(0, DATA)
    first = asyncio.create_task(disk.forwarder.prove())
    await turns()
    first.cancel()
    second = asyncio.create_task(disk.forwarder.prove())
    await turns()
    assert disk.mark(0)
    disk.wire.writes[0](None)
    await second
    assert not disk.mark(0)


async def test_a_write_that_was_marked_before_a_proof_and_sent_after_it_is_waited_for() -> None:
    disk = Disk(slow=True)
    writing = asyncio.create_task(disk.node.pwrite(0, DATA))
    await turns()
    proving = asyncio.create_task(disk.forwarder.prove())
    await turns()
    cast(Slow, disk.local).may_write.set()
    await writing
    await turns()
    assert disk.wire.writes
    assert disk.mark(0)
    disk.wire.writes[0](None)
    await proving
    assert not disk.mark(0)


async def test_what_was_acknowledged_and_lost_on_the_way_is_told_when_the_way_is_lost() -> None:
    disk = Disk()
    assert disk.node.pwrite_nowait(0, DATA)
    disk.wire.writes[0](LOST)  # as a connection does when it ends, before its owner knows
    assert disk.forwarder.disconnect()


async def test_a_way_that_ends_with_nothing_on_it_has_lost_nothing() -> None:
    disk = Disk()
    assert disk.node.pwrite_nowait(0, DATA)
    disk.wire.writes[0](None)
    assert not disk.forwarder.disconnect()


async def test_with_sync_a_write_that_the_copy_has_not_is_the_first_of_a_disk_that_goes_on_alone(
) -> None:  # fmt: skip
    disk = Disk(sync=True)
    writing = asyncio.create_task(disk.node.pwrite(0, DATA))
    await turns()
    disk.wire.writes[0](LOST)
    before = disk.steps
    await writing
    assert (before, disk.steps) == (0, 1)


async def test_with_sync_a_write_whose_way_is_lost_meanwhile_is_one_of_a_disk_that_goes_on_alone(
) -> None:  # fmt: skip
    disk = Disk(sync=True, slow=True)
    writing = asyncio.create_task(disk.node.pwrite(0, DATA))
    await turns()
    disk.forwarder.keep_in_step()
    assert disk.forwarder.disconnect()
    assert isinstance(disk.local, Slow)
    disk.local.may_write.set()
    before = disk.steps
    await writing
    assert (before, disk.steps) == (0, 1)
