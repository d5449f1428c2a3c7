"""Qcow2Node: an image as a block node. The fast paths, and the lock around everything else.

Requests are kept apart by a range lock at cluster granularity: reads shared, changes exclusive.
So a cluster's entry does not change under whoever holds its range, and no cluster is given to
another guest offset while somebody reads it. Lock order: range, then Allocator.settling,
then HostFile.lock.

The fast paths are the `_nowait` operations: requests within one cluster that find what they need in
memory, and need no lock because nothing can happen between their first and their last step. They
repeat what `Mapping.entry` and `Image.extent` do, for the sake of a microsecond each; everything
else goes to `read`, `write`, `zeroes`, `status` and `empty`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from replnbd.block import BlockNode, Buffer, Extent, OverlayNode, RangeLock
from replnbd.block.range_lock import EVERYTHING
from replnbd.errors import StateError
from replnbd.qcow2 import empty, status, zeroes
from replnbd.qcow2.copy_up import copy_up, new_copy_buffer
from replnbd.qcow2.entries import COPIED, OFFSET_MASK, ZERO_SHIFT
from replnbd.qcow2.format import Header
from replnbd.qcow2.read import read_range, read_subclusters_nowait
from replnbd.qcow2.reclaim import Reclaimer
from replnbd.qcow2.state import Image
from replnbd.qcow2.write import first_touch_nowait, write_range

_BOTH = (1 << 32) + 1
"""Times a mask of subclusters: their allocated bits and their zero bits."""


class Qcow2Node(OverlayNode):
    """An open qcow2 image over the node `file`; made by `open_qcow2`.

    Owns `file` and closes it; `backing` is the caller's.
    """

    driver = "qcow2"

    def __init__(self, image: Image, header: Header, name: str) -> None:
        self.name = name
        self.size = header.size
        self.header = header
        """As it was when the image was opened."""
        self.file: BlockNode = image.file
        self.backing = image.backing
        self._image = image
        self._host = image.host
        self._mapping = image.mapping
        self._reclaimer = Reclaimer(image.allocator) if image.allocator is not None else None
        self._ranges = RangeLock(header.cluster_size)
        shape = image.shape
        self.granularity = shape.sub_size
        self.power_safe = image.host.power_safe
        self.read_only = image.host.read_only
        # Copies for the fast paths: an attribute of an attribute costs 40 ns each time.
        self._slices = image.mapping.slices
        self._backing_size = image.backing_size
        self._extended = shape.extended
        self._cluster_bits = shape.cluster_bits
        self._cluster_mask = shape.cluster_mask
        self._cluster_size = shape.cluster_size
        self._sub_bits = shape.sub_bits
        self._slice_bits = shape.slice_bits
        self._slice_mask = shape.slice_mask
        self._l1_shift = shape.l1_shift
        self._invalid = shape.invalid
        self._invalid_for_rewrite = shape.invalid | COPIED

    # Data

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        length = len(buffer)
        ranges = self._ranges
        if ranges.held and not ranges.is_free(offset, length, False):
            return False
        inside = offset & self._cluster_mask
        if inside + length > self._cluster_size:
            return False
        cluster = offset >> self._cluster_bits
        words = self._slices.get(cluster >> self._slice_bits)
        if words is None:
            if self._mapping.l1[cluster >> self._l1_shift]:
                return False
        else:
            if self._extended:
                index = (cluster & self._slice_mask) << 1
                descriptor = words[index]
                mask = (2 << ((inside + length - 1) >> self._sub_bits)) - (
                    1 << (inside >> self._sub_bits)
                )
                bitmap = words[index + 1]
                state = bitmap & mask * _BOTH
            else:
                descriptor = words[cluster & self._slice_mask]
                mask = 1
                bitmap = state = 1 if descriptor & OFFSET_MASK else 0
            if descriptor & self._invalid:
                return False
            if state:
                if state != mask:
                    return read_subclusters_nowait(self._image, descriptor, bitmap, offset, buffer)
                host = descriptor & OFFSET_MASK
                if not host or host >= self._host.end:
                    return False
                if host in self._host.metadata:
                    return False
                return self.file.pread_nowait(host + inside, buffer)
        if offset + length > self._backing_size:
            return False
        return self.backing.pread_nowait(offset, buffer)  # type: ignore[union-attr]

    async def pread(self, offset: int, buffer: memoryview) -> None:
        if self.pread_nowait(offset, buffer):
            return
        key = await self._ranges.acquire(offset, len(buffer), False)
        try:
            await read_range(self._image, offset, buffer)
        finally:
            self._ranges.release(key)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        host = self._host
        ranges = self._ranges
        if ranges.held and not ranges.is_free(offset, length, True):
            return False
        inside = offset & self._cluster_mask
        cluster = offset >> self._cluster_bits
        words = self._slices.get(cluster >> self._slice_bits)
        if words is None or inside + length > self._cluster_size or host.corrupt or host.read_only:
            return False
        if self._extended:
            index = (cluster & self._slice_mask) << 1
            descriptor = words[index]
            mask = (2 << ((inside + length - 1) >> self._sub_bits)) - (
                1 << (inside >> self._sub_bits)
            )
            rewrite = words[index + 1] & mask * _BOTH == mask
        else:
            descriptor = words[cluster & self._slice_mask]
            rewrite = descriptor & OFFSET_MASK != 0
        if rewrite and descriptor & self._invalid_for_rewrite == COPIED:
            place = descriptor & OFFSET_MASK
            if place and place < host.end and place not in host.metadata:
                return self.file.pwrite_nowait(place + inside, data)
        return first_touch_nowait(self._image, words, offset, data)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if self.pwrite_nowait(offset, data):
            return
        key = await self._ranges.acquire(offset, len(data), True)
        try:
            self._host.check_writable()
            await write_range(self._image, offset, data)
        finally:
            self._ranges.release(key)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self._host.check_writable()
        await zeroes.zero(self._image, self._ranges, offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        self._host.check_writable()
        await zeroes.zero(self._image, self._ranges, offset, length, unmap=True, fast=False)

    async def flush(self) -> None:
        await self.settle()
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await status.block_status(self._image, offset, length)

    async def close(self) -> None:
        """Wait for what is in flight, make refcounts exact, flush, and close the file.

        The file is closed even if that fails; then the error is raised, and clusters may have
        leaked.
        """
        key = await self._ranges.acquire(0, EVERYTHING, True)
        try:
            if self._reclaimer is not None:
                await self._reclaimer.stop()
                await self.settle()
                await self._trim()
                await self.file.flush()
                await self._host.mark_clean()
        finally:
            self._ranges.release(key)
            await self.file.close()

    async def _trim(self) -> None:
        if self._image.allocator is not None and not self._host.corrupt:
            await self._image.allocator.trim()

    # Overlay

    async def allocated(self, offset: int, length: int) -> tuple[bool, int]:
        # The answer is of this instant: no range is held. Fast for what one cluster answers.
        cluster = offset >> self._cluster_bits
        inside = offset & self._cluster_mask
        if self._extended and inside + length <= self._cluster_size:
            words = self._slices.get(cluster >> self._slice_bits)
            if words is None:
                if not self._mapping.l1[cluster >> self._l1_shift]:
                    return False, length
            else:
                index = (cluster & self._slice_mask) << 1
                if not words[index] & self._invalid:
                    mask = (2 << ((inside + length - 1) >> self._sub_bits)) - (
                        1 << (inside >> self._sub_bits)
                    )
                    bitmap = words[index + 1]
                    state = (bitmap | bitmap >> 32) & mask
                    if state == mask:
                        return True, length
                    if not state:
                        return False, length
        return await status.allocated(self._image, offset, length)

    def copy_up_nowait(self, offset: int, length: int) -> int:
        host = self._host
        ranges = self._ranges
        if ranges.held and not ranges.is_free(offset, length, True):
            return -1
        inside = offset & self._cluster_mask
        cluster = offset >> self._cluster_bits
        words = self._slices.get(cluster >> self._slice_bits)
        if words is None or inside + length > self._cluster_size or host.corrupt or host.read_only:
            return -1
        if self._extended:
            index = (cluster & self._slice_mask) << 1
            descriptor = words[index]
            bitmap = words[index + 1]
            mask = (2 << ((inside + length - 1) >> self._sub_bits)) - (
                1 << (inside >> self._sub_bits)
            )
        else:
            descriptor, bitmap = self._mapping.decode(words, cluster)
            mask = 1
        allocated = (bitmap | bitmap >> ZERO_SHIFT) & mask
        if allocated or descriptor & self._invalid:
            return 0 if allocated == mask and not descriptor & self._invalid else -1
        if offset + length > self._backing_size or self.power_safe:
            return -1
        image = self._image
        image.copy_buffer = buffer = image.copy_buffer or new_copy_buffer(image)
        old = buffer[:length]
        if not self.backing.pread_nowait(offset, old):  # type: ignore[union-attr]
            return -1
        return length if first_touch_nowait(image, words, offset, old) else -1

    async def copy_up(self, offset: int, length: int) -> None:
        key = await self._ranges.acquire(offset, length, True)
        try:
            self._host.check_writable()
            await copy_up(self._image, offset, length)
            await self._host.order()
        finally:
            self._ranges.release(key)

    async def drop(self, offset: int, length: int) -> None:
        self._host.check_writable()
        self._refuse_snapshots("drop a range of")
        await zeroes.drop(self._image, self._ranges, offset, length)

    async def settle(self) -> None:
        allocator = self._image.allocator
        if allocator is not None and not allocator.idle and not self._host.corrupt:
            await allocator.settle(with_run=True)

    @asynccontextmanager
    async def emptying(
        self, *, keep_space: bool = False
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        self._host.check_writable()
        self._refuse_snapshots("empty")
        assert self._reclaimer is not None
        key = await self._ranges.acquire(0, EVERYTHING, True)
        try:
            async with empty.emptying(self._image, self._reclaimer, keep_space=keep_space) as clear:
                yield clear
        finally:
            self._ranges.release(key)

    def _refuse_snapshots(self, verb: str) -> None:
        if self.header.nb_snapshots:
            raise StateError(
                f"cannot {verb} {self._host.path}: it has {self.header.nb_snapshots} internal "
                "snapshots; remove them with: qemu-img snapshot -d"
            )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of data clusters in use in this layer's file; 0 for an image open read-only."""
        allocator = self._image.allocator
        if allocator is None:
            return 0
        # Everything that is counted, without metadata and what is only reserved. Tables of
        # internal snapshots count as data.
        clusters = (
            allocator.refcounts.used - allocator.spare_clusters - self._image.metadata_clusters()
        )
        return max(0, clusters) << self._cluster_bits
