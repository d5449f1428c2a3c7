"""make_empty: all guest data gone at once, the space given back. For images without snapshots.

The order, safe at any instant, without the dirty bit, for version 2 too:

    1. the L1 table becomes zero: the image is empty from here on, everything else a leak
    2. refcount blocks that describe no structure still in use leave the refcount table
    3. the other ones are stored anew, counting only header, L1 table, refcount table and blocks
    4. the file is cut behind the last of these, and holes are punched before it

A cluster in use has refcount 1 before and after every step. Step 1 is a store within one page, or
else a new L1 table and one store of eight bytes into the header: it cannot be torn.
"""

from __future__ import annotations

import errno
import logging
import struct
from itertools import pairwise

from replnbd.qcow2.mapping import bytes_of
from replnbd.qcow2.refcounts import RefcountBlock
from replnbd.qcow2.state import Image

log = logging.getLogger(__name__)

_OFFSET_L1_TABLE = 40
_PAGE = 4096


async def make_empty(image: Image) -> None:
    """Empty an image; the caller holds everything exclusively."""
    assert image.allocator is not None
    async with image.allocator.settling, image.host.lock:
        moved = await _clear_l1(image)
        try:
            await _recount(image)
            if moved:
                await _bring_l1_down(image)
        except OSError as exc:
            # The image is empty since step 1; from there on only space is at stake. What has not
            # been recounted has leaked, until the next make_empty recounts everything again.
            if image.host.corrupt:
                raise
            log.warning("%s: cannot give the space back yet: %s", image.host.path, exc)
            return
        await _cut_file(image)


async def _clear_l1(image: Image) -> bool:
    """Step 1; whether the L1 table is in another place now."""
    mapping = image.mapping
    allocator = image.allocator
    assert allocator is not None
    length = len(mapping.l1) * 8
    moved = False
    if mapping.table_count:
        offset = None
        if mapping.l1_offset % _PAGE + length > _PAGE:
            offset = await allocator.allocate_contiguous(_clusters(image, length))
        if offset is None:
            try:
                await image.file.pwrite(mapping.l1_offset, bytes(length))
            except OSError:
                await _rewrite_l1(image)
                raise
        else:
            await _switch_l1(image, offset, length)
            moved = True
    mapping.forget(mapping.l1_offset)
    image.inflated = (0, b"")
    return moved


async def _rewrite_l1(image: Image) -> None:
    """After a failed store: the L1 table must be what memory says, or nobody writes any more."""
    mapping = image.mapping
    try:
        await image.file.pwrite(mapping.l1_offset, bytes_of(mapping.l1))
    except OSError as exc:
        await image.host.corruption(f"the L1 table could not be restored ({exc})")


async def _switch_l1(image: Image, offset: int, length: int) -> None:
    """Make the clusters at `offset` an empty L1 table, and the one in use."""
    mapping = image.mapping
    allocator = image.allocator
    assert allocator is not None
    host = image.host
    clusters = _clusters(image, length)
    try:
        await image.file.pwrite(offset, bytes(clusters * host.cluster_size))
        await image.file.pwrite(_OFFSET_L1_TABLE, struct.pack(">Q", offset))
    except OSError:
        try:
            await image.file.pwrite(_OFFSET_L1_TABLE, struct.pack(">Q", mapping.l1_offset))
        except OSError as exc:
            await host.corruption(f"the header could not be restored ({exc}) while the L1 moved")
        else:
            allocator.release(offset, clusters)
        raise
    allocator.release(mapping.l1_offset, clusters)
    host.unmark(mapping.l1_offset, length)
    host.mark(offset, length)
    mapping.forget(offset)


def _clusters(image: Image, length: int) -> int:
    return -(-length // image.shape.cluster_size)


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
    allocator.forget(0)
    host.metadata = {cluster << host.cluster_bits for cluster in used}
    host.tables.clear()
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
    unwanted = [n for n, offset in enumerate(refcounts.table) if offset and n not in wanted]
    if not unwanted:
        return
    table = refcounts.table[:]
    for index in unwanted:
        table[index] = 0
    first, last = unwanted[0], unwanted[-1] + 1
    place = refcounts.table_offset + first * 8
    try:
        await image.file.pwrite(place, bytes_of(table[first:last]))
    except OSError:
        try:
            await image.file.pwrite(place, bytes_of(refcounts.table[first:last]))
        except OSError as exc:
            await image.host.corruption(f"the refcount table could not be restored ({exc})")
        raise
    refcounts.table = table


async def _bring_l1_down(image: Image) -> None:
    """The new L1 table lies behind the old data: put it where the file can be cut."""
    allocator = image.allocator
    assert allocator is not None
    length = len(image.mapping.l1) * 8
    offset = await allocator.allocate_contiguous(_clusters(image, length))
    if offset is None:
        return
    if offset > image.mapping.l1_offset:
        allocator.release(offset, _clusters(image, length))
        return
    await _switch_l1(image, offset, length)
    await _recount(image)


async def _cut_file(image: Image) -> None:
    """Step 4. Only space is at stake here, so an error is logged, not raised."""
    host = image.host
    size = host.cluster_size
    used = sorted(host.metadata)
    end = used[-1] + size
    try:
        if end < host.end:
            await host.file.truncate(end)
            host.end = end
        for before, after in pairwise(used):
            if after > before + size:
                start = before + size
                await host.file.write_zeroes(start, after - start, unmap=True, fast=True)
    except OSError as exc:
        if exc.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            log.warning("%s: cannot give the space back: %s", host.path, exc)
