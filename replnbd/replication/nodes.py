"""The nodes behind the two exports of a replicated disk.

    GateNode         what an export holds on to for ever: serialises, and forwards to its `target`
    RefusingNode     the target behind a fence, and where the view is lost
    NotStartedNode   the standby's target before a start
    SplitWriteNode   the standby's target during and after a failover that has not ended

A stage is which targets the two gates have; changing it is two assignments while both are drained.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

from replnbd.block import BlockNode, Buffer, Extent, OverlayNode, PassThrough, RangeLock
from replnbd.replication.stage import NOT_RUNNING

PIECE = 16 << 20
"""Bytes. A longer zeroing or discarding is done in pieces, at multiples of this, so that no
overlapping request waits for the whole of it: saving 16 MiB of old data takes about 10 ms. A
command in between (a checkpoint) then finds it done in part, as it may until it is answered."""

TURN = 4 * PIECE
"""After which the loop gets a turn: a piece of which nothing has to be saved takes 0.1 ms or less,
and a request may be about the whole disk."""


class GateNode(BlockNode):
    """Forwards to `target`. Overlapping requests of all gates that share `ranges` wait for each
    other: reads shared, all that changes bytes exclusive."""

    driver = "replication"

    def __init__(self, name: str, size: int, target: BlockNode, ranges: RangeLock) -> None:
        self.name = name
        self.size = size
        self.target = target
        self.bytes_written = 0
        """Changed through this gate since the owner last set it to 0."""
        self.writes_failed = 0
        """Writes, zeroings and discards of which a part at least has not happened."""
        self._ranges = ranges

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        ranges = self._ranges
        if ranges.held and not ranges.is_free(offset, len(buffer), False):
            return False
        return self.target.pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        ranges = self._ranges
        length = len(data)
        if ranges.held and not ranges.is_free(offset, length, True):
            return False
        try:
            if not self.target.pwrite_nowait(offset, data):
                return False
        except OSError:
            self.writes_failed += 1
            raise
        self.bytes_written += length
        return True

    async def pread(self, offset: int, buffer: memoryview) -> None:
        key = await self._ranges.acquire(offset, len(buffer), False)
        try:
            await self.target.pread(offset, buffer)
        finally:
            self._ranges.release(key)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        length = len(data)
        key = await self._ranges.acquire(offset, length, True)
        try:
            await self.target.pwrite(offset, data)
        except OSError:
            self.writes_failed += 1
            raise
        finally:
            self._ranges.release(key)
        self.bytes_written += length

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        async def zero(position: int, count: int) -> None:
            await self.target.write_zeroes(position, count, unmap=unmap, fast=fast)

        await self._in_pieces(offset, length, zero)

    async def discard(self, offset: int, length: int) -> None:
        async def discard(position: int, count: int) -> None:
            await self.target.discard(position, count)

        await self._in_pieces(offset, length, discard)

    async def _in_pieces(
        self, offset: int, length: int, operate: Callable[[int, int], Awaitable[None]]
    ) -> None:
        end = offset + length
        while offset < end:
            piece = min(PIECE - offset % PIECE, end - offset)
            key = await self._ranges.acquire(offset, piece, True)
            try:
                await operate(offset, piece)
            except OSError:
                self.writes_failed += 1
                raise
            finally:
                self._ranges.release(key)
            offset += piece
            self.bytes_written += piece
            # What is below sees one piece a call, and cannot know how many there are.
            if offset < end and not offset % TURN:
                await asyncio.sleep(0)

    async def flush(self) -> None:
        await self.target.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        key = await self._ranges.acquire(offset, length, False)
        try:
            return await self.target.block_status(offset, length)
        finally:
            self._ranges.release(key)

    async def close(self) -> None:
        # The owner of the disk closes what is below.
        return


class RefusingNode(BlockNode):
    """Answers every request with one error."""

    driver = "refusing"

    def __init__(self, name: str, size: int, code: int, reason: str) -> None:
        self.name = name
        self.size = size
        self._code = code
        self._reason = reason

    def _refuse(self) -> OSError:
        return OSError(self._code, self._reason)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        raise self._refuse()

    async def pwrite(self, offset: int, data: Buffer) -> None:
        raise self._refuse()

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        raise self._refuse()

    async def discard(self, offset: int, length: int) -> None:
        raise self._refuse()

    async def flush(self) -> None:
        raise self._refuse()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        raise self._refuse()

    async def close(self) -> None:
        return


class NotStartedNode(RefusingNode):
    """The standby's target in stage *none*: EIO, but for what QEMU's filter does not check there:
    a flush (nothing was written) and a discard (a hint that it drops)."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size, errno.EIO, NOT_RUNNING)

    async def discard(self, offset: int, length: int) -> None:
        return

    async def flush(self) -> None:
        return


class SplitWriteNode(PassThrough):
    """Reads show the overlays over the base; writes go to the top overlay where an overlay has
    the range allocated, and elsewhere to the base (the seed's rule for a failed failover).

    It holds while the commit runs as well: so the overlays only shrink, and the commit ends.
    `is_copied(offset, length)` says that a commit has moved a part of the range down already and
    has not dropped it from the overlays yet: such a write goes to both.
    """

    driver = "replication-split"

    def __init__(
        self,
        name: str,
        overlays: tuple[OverlayNode, ...],
        base: BlockNode,
        is_copied: Callable[[int, int], bool],
    ) -> None:
        super().__init__(name, overlays[0])
        self._overlays = overlays
        self._base = base
        self._is_copied = is_copied

    async def pwrite(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)

        async def write(node: BlockNode, position: int, length: int) -> None:
            await node.pwrite(position, view[position - offset : position - offset + length])

        await self._split(offset, len(data), write)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        async def zero(node: BlockNode, position: int, count: int) -> None:
            await node.write_zeroes(position, count, unmap=unmap, fast=fast)

        await self._split(offset, length, zero)

    async def discard(self, offset: int, length: int) -> None:
        async def discard(node: BlockNode, position: int, count: int) -> None:
            await node.discard(position, count)

        await self._split(offset, length, discard)

    async def flush(self) -> None:
        # A range moves from an overlay to the base at any time: durable means durable in all.
        for overlay in self._overlays:
            await overlay.flush()
        await self._base.flush()

    async def _split(
        self,
        offset: int,
        length: int,
        operate: Callable[[BlockNode, int, int], Awaitable[None]],
    ) -> None:
        # One piece after the other: an overlay with large clusters may allocate, by its own
        # copy-on-write, the range of the next piece while it takes this one.
        end = offset + length
        while offset < end:
            count = end - offset
            allocated = False
            for overlay in self._overlays:
                allocated, count = await overlay.allocated(offset, count)
                if allocated:
                    break
            # The base first: if it fails, what is read stays what it was.
            if not allocated or self._is_copied(offset, count):
                await operate(self._base, offset, count)
            if allocated:
                await operate(self._overlays[0], offset, count)
            offset += count
