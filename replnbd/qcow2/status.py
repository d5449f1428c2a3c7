"""What is where: `allocated` for this layer, `block_status` for the whole chain."""

from __future__ import annotations

from replnbd.block import Extent
from replnbd.qcow2.state import UNALLOCATED, ZERO, Image

_SLICES_MAX = 64
"""L2 slices (16 MiB each of an overlay) that one answer looks at: some 5 ms for a full disk."""
_EXTENTS_MAX = 4096  # as FileNode; NBD lets a reply fall short


async def allocated(image: Image, offset: int, length: int) -> tuple[bool, int]:
    """Whether this layer decides the byte at `offset`, and for how many bytes that holds."""
    end = offset + length
    position = offset
    first: bool | None = None
    coverage = image.shape.slice_bits + image.shape.cluster_bits
    while position < end and (position >> coverage) - (offset >> coverage) < _SLICES_MAX:
        state, _, count = await image.extent(position, end)
        here = state != UNALLOCATED
        if first is None:
            first = here
        elif here is not first:
            break
        position += count
    return bool(first), position - offset


async def block_status(image: Image, offset: int, length: int) -> list[Extent]:
    """The state of every byte of a range. What is too fragmented to tell is called data."""
    extents: list[Extent] = []
    end = offset + length
    while offset < end:
        if len(extents) >= _EXTENTS_MAX:
            _append(extents, Extent(end - offset, zero=False, depth=0))
            break
        state, _, count = await image.extent(offset, end)
        if state == UNALLOCATED:
            await _append_backing(image, extents, offset, count)
        else:
            _append(extents, Extent(count, zero=state == ZERO, depth=0))
        offset += count
    return extents


async def _append_backing(image: Image, extents: list[Extent], offset: int, length: int) -> None:
    backed = max(0, min(length, image.backing_size - offset))
    if backed:
        assert image.backing is not None
        for below in await image.backing.block_status(offset, backed):
            depth = below.depth + 1 if below.depth >= 0 else -1
            _append(extents, Extent(below.length, below.zero, depth))
    if backed < length:
        _append(extents, Extent(length - backed, zero=True, depth=-1))


def _append(extents: list[Extent], extent: Extent) -> None:
    if extents and extents[-1][1:] == extent[1:]:
        extents[-1] = extent._replace(length=extents[-1].length + extent.length)
    else:
        extents.append(extent)
