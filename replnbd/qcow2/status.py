"""What is where: `allocated` for this layer, `block_status` for the whole chain."""

from __future__ import annotations

import asyncio

from replnbd.block import STATUS_EXTENTS_MAX, Extent
from replnbd.qcow2.state import UNALLOCATED, ZERO, Image

_SLICES_MAX = 16
"""L2 slices (16 MiB each of an overlay) that one answer of `allocated` looks at: 5 to 10 ms."""
_CLUSTERS_MAX = 8192
"""Clusters that one answer of `block_status` looks at, 1 to 3 µs each. Where no L2 table is, they
are not looked at."""

_TURN = 1024
"""Clusters after which the loop has its turn."""


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
    """The state of a range, or of as much of it as may be looked at for one answer."""
    extents: list[Extent] = []
    end = offset + length
    slice_clusters = 1 << image.shape.slice_bits
    looked_at, turn = 0, _TURN

    async def look(position: int) -> tuple[int, int]:
        nonlocal looked_at, turn
        if looked_at >= turn:
            turn = looked_at + _TURN
            await asyncio.sleep(0)
        state, _, count = await image.extent(position, end)
        looked_at += min(count >> image.shape.cluster_bits, slice_clusters) + 1
        return state, count

    while offset < end and len(extents) < STATUS_EXTENTS_MAX and looked_at < _CLUSTERS_MAX:
        state, count = await look(offset)
        if state != UNALLOCATED:
            _append(extents, Extent(count, zero=state == ZERO, depth=0))
            offset += count
            continue
        # The whole run before the backing is asked: it may have to ask a file, in a thread.
        stop = offset + count
        while state == UNALLOCATED and stop < end and looked_at < _CLUSTERS_MAX:
            state, count = await look(stop)
            if state == UNALLOCATED:
                stop += count
        offset = await _append_backing(image, extents, offset, stop)
        if offset < stop:
            break
    return extents


async def _append_backing(image: Image, extents: list[Extent], offset: int, stop: int) -> int:
    """Up to where the extents of an unallocated run are known now."""
    backed_end = min(stop, image.backing_size)
    if offset < backed_end:
        assert image.backing is not None
        for below in await image.backing.block_status(offset, backed_end - offset):
            depth = below.depth + 1 if below.depth >= 0 else -1
            _append(extents, Extent(below.length, below.zero, depth))
            offset += below.length
        if offset < backed_end:
            return offset
    if offset < stop:
        _append(extents, Extent(stop - offset, zero=True, depth=-1))
    return stop


def _append(extents: list[Extent], extent: Extent) -> None:
    if extents and extents[-1][1:] == extent[1:]:
        extents[-1] = extent._replace(length=extents[-1].length + extent.length)
    else:
        extents.append(extent)
