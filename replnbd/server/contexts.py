"""What BLOCK_STATUS answers in each metadata context.

An answer is a list of descriptors from the offset on, neighbours different, at least one, that
together are not longer than was asked. It may fall short: nodes bound what they look at.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from replnbd.block import BlockNode, digests
from replnbd.nbd import (
    BASE_ALLOCATION,
    DIRTY,
    QEMU_ALLOCATION_DEPTH,
    QEMU_DIRTY_BITMAP,
    X_REPLNBD_DIGEST,
    Descriptor,
)
from replnbd.nbd.constants import AllocationState

ContextStatus = Callable[[BlockNode, int, int], Awaitable[list[Descriptor]]]
"""`(node, offset, length)`: the descriptors of one context."""

DirtyBitmap = Callable[[int, int], Awaitable[list[tuple[int, bool]]]]
"""`(offset, length)`: runs as (length, whether it has changed); may fall short, as an answer may.

What cannot be known has changed."""

_HOLE = int(AllocationState.HOLE | AllocationState.ZERO)


async def allocation(node: BlockNode, offset: int, length: int) -> list[Descriptor]:
    """base:allocation. What a node knows to be zeroes takes no space, as in QEMU's server."""
    extents = await node.block_status(offset, length)
    return _merged((extent.length, _HOLE if extent.zero else 0) for extent in extents)


async def allocation_depth(node: BlockNode, offset: int, length: int) -> list[Descriptor]:
    """qemu:allocation-depth: 0 where no layer decides, 1 in the top one, 2 in its backing, ..."""
    extents = await node.block_status(offset, length)
    return _merged((extent.length, extent.depth + 1) for extent in extents)


def _dirty_bitmap(bitmap: DirtyBitmap) -> ContextStatus:
    async def status(_node: BlockNode, offset: int, length: int) -> list[Descriptor]:
        runs = await bitmap(offset, length)
        return _merged((count, DIRTY if changed else 0) for count, changed in runs)

    return status


def _digests(key: Callable[[], bytes]) -> ContextStatus:
    async def status(node: BlockNode, offset: int, length: int) -> list[Descriptor]:
        return await digests(node, offset, length, key())

    return status


def contexts_of(
    bitmaps: Mapping[str, DirtyBitmap], *, digest_key: Callable[[], bytes] | None = None
) -> dict[str, ContextStatus]:
    """By name: the contexts of an export that has these bitmaps, and, with a key to it,
    x-replnbd:digest."""
    contexts: dict[str, ContextStatus] = {
        BASE_ALLOCATION: allocation,
        QEMU_ALLOCATION_DEPTH: allocation_depth,
    }
    for name, bitmap in bitmaps.items():
        contexts[QEMU_DIRTY_BITMAP + name] = _dirty_bitmap(bitmap)
    if digest_key is not None:
        contexts[X_REPLNBD_DIGEST] = _digests(digest_key)
    return contexts


def _merged(descriptors: Iterable[Descriptor]) -> list[Descriptor]:
    merged: list[Descriptor] = []
    for length, flags in descriptors:
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + length, flags)
        else:
            merged.append((length, flags))
    return merged
