"""Qcow2Node: an image as a block node. The fast paths, and the lock around everything else.

Requests are kept apart by a range lock at cluster granularity: reads shared, changes exclusive.
So a cluster's entry does not change under whoever holds its range, and no cluster is given to
another guest offset while somebody reads it. Lock order: range, then Allocator.settling,
then HostFile.lock.

The fast paths are the requests that need no metadata: reads of allocated or unallocated
subclusters and rewrites in place, within one cluster. They repeat what `Mapping.entry` and
`Image.extent` do, for the sake of a microsecond each; everything else goes to `read`, `write`,
`zeroes`, `status` and `empty`.
"""

from __future__ import annotations

from replnbd.block import BlockNode, Buffer, Extent, OverlayNode, RangeLock
from replnbd.block.range_lock import EVERYTHING
from replnbd.errors import StateError
from replnbd.qcow2 import empty, status, zeroes
from replnbd.qcow2.entries import COPIED, OFFSET_MASK
from replnbd.qcow2.format import Header
from replnbd.qcow2.read import read_range
from replnbd.qcow2.state import Image
from replnbd.qcow2.write import write_range

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
        self._ranges = RangeLock(header.cluster_size)
        shape = image.shape
        self.granularity = shape.sub_size
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

    async def pread(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        ranges = self._ranges
        key = await ranges.acquire(offset, length, False)
        try:
            inside = offset & self._cluster_mask
            cluster = offset >> self._cluster_bits
            words = self._slices.get(cluster >> self._slice_bits)
            if words is None:
                if (
                    not self._mapping.l1[cluster >> self._l1_shift]
                    and inside + length <= self._cluster_size
                    and offset + length <= self._backing_size
                ):
                    await self.backing.pread(offset, buffer)  # type: ignore[union-attr]
                    return
            elif inside + length <= self._cluster_size:
                if self._extended:
                    index = (cluster & self._slice_mask) << 1
                    descriptor = words[index]
                    mask = (2 << ((inside + length - 1) >> self._sub_bits)) - (
                        1 << (inside >> self._sub_bits)
                    )
                    state = words[index + 1] & mask * _BOTH
                else:
                    descriptor = words[cluster & self._slice_mask]
                    mask = 1
                    state = 1 if descriptor & OFFSET_MASK else 0
                if not descriptor & self._invalid:
                    if state == mask:
                        host = descriptor & OFFSET_MASK
                        if host and host < self._host.end and host not in self._host.metadata:
                            await self.file.pread(host + inside, buffer)
                            return
                    elif not state and offset + length <= self._backing_size:
                        await self.backing.pread(offset, buffer)  # type: ignore[union-attr]
                        return
            await read_range(self._image, offset, buffer)
        finally:
            ranges.release(key)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        length = len(data)
        host = self._host
        if host.read_only or host.corrupt:
            host.check_writable()
        ranges = self._ranges
        key = await ranges.acquire(offset, length, True)
        try:
            inside = offset & self._cluster_mask
            cluster = offset >> self._cluster_bits
            words = self._slices.get(cluster >> self._slice_bits)
            if words is not None and inside + length <= self._cluster_size:
                if self._extended:
                    index = (cluster & self._slice_mask) << 1
                    descriptor = words[index]
                    mask = (2 << ((inside + length - 1) >> self._sub_bits)) - (
                        1 << (inside >> self._sub_bits)
                    )
                    rewrite = words[index + 1] & mask * _BOTH == mask
                else:
                    descriptor = words[cluster & self._slice_mask]
                    rewrite = True
                if rewrite and descriptor & self._invalid_for_rewrite == COPIED:
                    place = descriptor & OFFSET_MASK
                    if place and place < host.end and place not in host.metadata:
                        await self.file.pwrite(place + inside, data)
                        return
            await write_range(self._image, offset, data)
        finally:
            ranges.release(key)

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
            if not self._host.read_only:
                await self.flush()
                await self._host.mark_clean()
        finally:
            self._ranges.release(key)
            await self.file.close()

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

    async def drop(self, offset: int, length: int) -> None:
        self._host.check_writable()
        self._refuse_snapshots("drop a range of")
        await zeroes.drop(self._image, self._ranges, offset, length)

    async def settle(self) -> None:
        allocator = self._image.allocator
        if allocator is not None and not allocator.idle and not self._host.corrupt:
            await allocator.settle(with_run=True)

    async def make_empty(self) -> None:
        self._host.check_writable()
        self._refuse_snapshots("empty")
        key = await self._ranges.acquire(0, EVERYTHING, True)
        try:
            await empty.make_empty(self._image)
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
