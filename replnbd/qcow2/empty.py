"""emptying: all guest data gone at once, whatever its amount. For images without snapshots.

The order, safe at any instant, without the dirty bit, for version 2 too:

    1. the L1 table becomes zero: the image is empty from here on, everything else a leak
    2. refcount blocks that describe no structure still in use leave the refcount table
    3. the other ones are stored anew, counting only header, L1 table, refcount table and blocks

A cluster in use has refcount 1 before and after every step. Step 1 is a store within one page, or
else a new L1 table, made beforehand, and one store of eight bytes into the header: it cannot be
torn. (Only if one refcount block cannot describe a whole new L1 table, with clusters of 512 bytes,
a longer one is zeroed in place, and whoever dies within that store keeps a part of the guest data.)

None of the steps depends on how much was there. What was in use is free for the allocator at once,
from the lowest cluster on; its blocks go back to the file system in the background (reclaim.py).
"""

from __future__ import annotations

import logging
import struct
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from replnbd.qcow2.mapping import bytes_of
from replnbd.qcow2.reclaim import Reclaimer
from replnbd.qcow2.refcounts import RefcountBlock
from replnbd.qcow2.state import Image

log = logging.getLogger(__name__)

_OFFSET_L1_TABLE = 40
_PAGE = 4096


@asynccontextmanager
async def emptying(
    image: Image, reclaimer: Reclaimer, *, keep_space: bool
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Empty an image by a call of what this yields, which does step 1 alone; the caller holds
    everything exclusively, and goes on holding it until the end, where the other steps are done."""
    assert image.allocator is not None
    async with image.allocator.settling, image.host.lock:
        blank = await _make_blank_l1(image)
        cleared = False

        async def clear() -> None:
            nonlocal cleared
            slices = list(image.mapping.slices.values())
            await _clear_l1(image, blank)
            reclaimer.retire(slices.pop)
            cleared = True

        try:
            yield clear
        finally:
            if cleared:
                await _free_everything(image, reclaimer, blank, keep_space=keep_space)
            elif blank is not None:
                image.allocator.release(blank, _l1_clusters(image))


async def _free_everything(
    image: Image, reclaimer: Reclaimer, blank: int | None, *, keep_space: bool
) -> None:
    """Steps 2 and 3. The image is empty, and only space is at stake: what has not been recounted
    has leaked, until the next time recounts everything again."""
    host = image.host
    allocator = image.allocator
    assert allocator is not None
    needed = host.end
    metadata, tables = host.metadata, host.tables
    try:
        await _recount(image)
        if blank is not None:
            if blank >> host.cluster_bits >= allocator.floor:
                await _bring_l1_down(image)
            # From there the next one does not have to be brought down.
            await allocator.keep_room(_l1_clusters(image))
    except OSError as exc:
        log.warning("%s: cannot give the space back yet: %s", host.path, exc)
        return
    host.end = max(host.metadata) + host.cluster_size
    reclaimer.retire(metadata.pop)
    reclaimer.retire(tables.pop)
    reclaimer.start(needed, keep_space=keep_space)


async def _make_blank_l1(image: Image) -> int | None:
    """The offset of an empty L1 table to switch to; None if the one in use can be zeroed itself."""
    mapping = image.mapping
    length = len(mapping.l1) * 8
    if mapping.l1_offset % _PAGE + length <= _PAGE or mapping.l1 == array("Q", bytes(length)):
        return None
    return await _allocate_l1(image)


async def _allocate_l1(image: Image) -> int | None:
    allocator = image.allocator
    assert allocator is not None
    count = _l1_clusters(image)
    offset = await allocator.allocate_contiguous(count)
    if offset is not None:
        try:
            await image.host.pwrite_ordered(offset, bytes(count * image.shape.cluster_size))
        except OSError:
            allocator.release(offset, count)
            raise
    return offset


async def _clear_l1(image: Image, blank: int | None) -> None:
    """Step 1."""
    mapping = image.mapping
    if blank is None:
        try:
            await image.host.pwrite_ordered(mapping.l1_offset, bytes(len(mapping.l1) * 8))
        except OSError:
            await _restore(image, mapping.l1_offset, bytes_of(mapping.l1), "the L1 table")
            raise
        mapping.forget(mapping.l1_offset)
    else:
        await _switch_l1(image, blank)
    image.inflated = (0, b"")


async def _switch_l1(image: Image, blank: int) -> None:
    """Make the empty table at `blank` the one in use."""
    mapping = image.mapping
    old = mapping.l1_offset
    try:
        await image.host.pwrite_ordered(_OFFSET_L1_TABLE, struct.pack(">Q", blank))
    except OSError:
        await _restore(image, _OFFSET_L1_TABLE, struct.pack(">Q", old), "the header")
        raise
    assert image.allocator is not None
    image.allocator.release(old, _l1_clusters(image))
    image.host.unmark(old, len(mapping.l1) * 8)
    image.host.mark(blank, len(mapping.l1) * 8)
    mapping.forget(blank)


async def _restore(image: Image, offset: int, content: bytes, what: str) -> None:
    """After a failed store: the file must be what memory says, or nobody writes any more."""
    try:
        await image.host.pwrite_ordered(offset, content)
    except OSError as exc:
        await image.host.corruption(f"{what} could not be restored ({exc})")


def _l1_clusters(image: Image) -> int:
    return -(-len(image.mapping.l1) * 8 // image.shape.cluster_size)


async def _bring_l1_down(image: Image) -> None:
    """A new L1 table lies behind the old data: put it where the file can be cut."""
    lower = await _allocate_l1(image)
    if lower is not None:
        if lower < image.mapping.l1_offset:
            await _switch_l1(image, lower)
        await _recount(image)


async def _recount(image: Image) -> None:
    """Steps 2 and 3: refcounts for nothing but the structures that are in use."""
    host = image.host
    allocator = image.allocator
    assert allocator is not None
    refcounts = allocator.refcounts
    structures = _structures(image)
    used = set(structures)
    wanted = {cluster // refcounts.block_entries for cluster in used}
    pending = list(wanted)
    while pending:
        # A block describes itself, or another block does, which then is needed as well.
        block_cluster = refcounts.table[pending.pop()] >> host.cluster_bits
        if not block_cluster:
            raise await host.corruption("a structure in use has no refcount block")
        used.add(block_cluster)
        describes = block_cluster // refcounts.block_entries
        if describes not in wanted:
            wanted.add(describes)
            pending.append(describes)
    # From here on nobody may give back what was taken or released before: its refcounts are not
    # what the allocator thinks. If a store fails, what is not recounted has leaked, until the
    # next make_empty recounts everything again.
    allocator.forget()
    host.metadata = {cluster << host.cluster_bits for cluster in used}
    host.tables = set()
    try:
        await _drop_blocks(image, wanted)
        await _store_blocks(image, wanted, used)
    except OSError:
        refcounts.forget()
        await refcounts.count_used()
        raise
    refcounts.used = len(used)


async def _store_blocks(image: Image, wanted: set[int], used: set[int]) -> None:
    """Store the blocks in `wanted` with refcount 1 for the clusters in `used`, and 0 else."""
    assert image.allocator is not None
    refcounts = image.allocator.refcounts
    blocks = {
        index: RefcountBlock(bytes(image.shape.cluster_size), refcounts.bits) for index in wanted
    }
    for cluster in used:
        index, inside = divmod(cluster, refcounts.block_entries)
        blocks[index].set_run(inside, 1, 1)
    refcounts.forget()
    for index, block in blocks.items():
        await image.file.pwrite(refcounts.table[index], block.encode())


def _structures(image: Image) -> list[int]:
    """Host cluster numbers of header, L1 table and refcount table."""
    assert image.allocator is not None
    refcounts = image.allocator.refcounts
    bits = image.shape.cluster_bits
    clusters = [0]
    for offset, length in (
        (image.mapping.l1_offset, len(image.mapping.l1) * 8),
        (refcounts.table_offset, len(refcounts.table) * 8),
    ):
        clusters += range(offset >> bits, -(-(offset + length) >> bits))
    return clusters


async def _drop_blocks(image: Image, wanted: set[int]) -> None:
    """Take all other refcount blocks out of the table: what they describe is free then."""
    assert image.allocator is not None
    refcounts = image.allocator.refcounts
    table = array("Q", bytes(len(refcounts.table) * 8))
    for index in wanted:
        table[index] = refcounts.table[index]
    if table == refcounts.table:
        return
    # All of it with one store: that takes 30 µs, and looking for what has changed takes 500.
    try:
        await image.host.pwrite_ordered(refcounts.table_offset, bytes_of(table))
    except OSError:
        content = bytes_of(refcounts.table)
        await _restore(image, refcounts.table_offset, content, "the refcount table")
        raise
    refcounts.table = table
