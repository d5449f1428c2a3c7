"""CopyBeforeWrite: before bytes of `file` change, the old ones are saved in `target`.

`target` is an overlay whose backing is `file`: what it has allocated is old data that was saved,
and all the rest still stands in `file`. So the overlay keeps showing `file` as it was when it was
last empty, and its own mapping is the only record of what was copied.

Order, for a process that may die at any point: old data to `target`, then `target`'s mapping (its
own law), then `file`. If saving fails, the write fails and `file` is untouched (QEMU's
on-cbw-error=break-guest-write). A `power_safe` target has all of it durable before `file` changes.

Whoever owns this filter serialises overlapping requests, rounded to `target.granularity`, and
readers of `target` with them: a reader that found a range unallocated in `target` must have read
`file` before the range is overwritten.
"""

from __future__ import annotations

import logging

from replnbd.block import BlockNode, Buffer, OverlayNode, PassThrough, each_extent

log = logging.getLogger(__name__)


class CopyBeforeWrite(PassThrough):
    """Saves whole subclusters (`target.granularity`) of old data, and only those not saved yet."""

    driver = "copy-before-write"

    def __init__(self, name: str, file: BlockNode, target: OverlayNode) -> None:
        super().__init__(name, file)
        self.target = target
        self.bytes_copied = 0
        self._mask = target.granularity - 1
        self._doubtful: list[tuple[int, int]] = []
        """(start, end) of what may be allocated in a power-safe target and not be durable."""

    def restart(self) -> None:
        """`target` is empty: nothing is saved."""
        self.bytes_copied = 0
        self._doubtful = []

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        if self._doubtful:
            return False
        mask = self._mask
        start = offset & ~mask
        end = (offset + len(data) + mask) & ~mask
        copied = self.target.copy_up_nowait(start, min(end, self.size) - start)
        if copied < 0:
            return False
        self.bytes_copied += copied
        return self.file.pwrite_nowait(offset, data)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._save(offset, len(data))
        await self.file.pwrite(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await self._save_nonzero(offset, length)
        await self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self._save_nonzero(offset, length)
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        # The old data is durable already, if its target is power-safe, and else need not be. But
        # whoever looks at the image after a flush finds it in order.
        try:
            await self.target.settle()
        except OSError as exc:
            # Clusters that stay counted harm nobody, and are no failure of the primary's disk.
            log.warning("%s: cannot settle: %s", self.target.name, exc)
        await self.file.flush()

    async def _save_nonzero(self, offset: int, length: int) -> None:
        # What reads as zeroes before and after does not change: a mkfs that discards an empty
        # disk saves nothing.
        async for extent in each_extent(self.file, offset, length):
            if not extent.zero:
                await self._save(offset, extent.length)
            offset += extent.length

    async def _save(self, offset: int, length: int) -> None:
        mask = self._mask
        position = offset & ~mask
        end = min((offset + length + mask) & ~mask, self.size)
        if any(position < there and here < end for here, there in self._doubtful):
            doubtful = self._doubtful
            await self.target.flush()  # fails for ever if it has failed on that file
            self._doubtful = [each for each in self._doubtful if each not in doubtful]
        allocated_in_target = self.target.allocated
        while position < end:
            allocated, count = await allocated_in_target(position, end - position)
            if not allocated:
                try:
                    await self.target.copy_up(position, count)
                except OSError:
                    if self.target.power_safe:
                        await self._doubt(position, position + count)
                    raise
                self.bytes_copied += count
            position += count

    async def _doubt(self, start: int, end: int) -> None:
        """Of a range that could not be saved, a part may be allocated all the same."""
        position, allocated = start, False
        while position < end and not allocated:
            allocated, count = await self.target.allocated(position, end - position)
            position += count
        if allocated:
            self._doubtful = [*self._doubtful, (start, end)]
