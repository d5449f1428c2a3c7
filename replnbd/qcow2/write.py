"""Writing any range: which clusters, which order. Rewrites in place do not come here (image.py).

The order, safe at any instant a process may die:

    1. the refcount of a new cluster          (allocation.py: a whole run of them, ahead)
    2. the data, with what must be copied around it
    3. the L2 entry, which makes 2 visible    (a new L2 table, and the L1 entry, before)
    4. the refcount of a cluster that 3 replaced

Stop after 1 or 2 and clusters have leaked; the guest sees what it saw. Stop after 3 and the old
cluster has leaked. The same holds if a step fails; then what was taken is given back as well.

In a power-safe image 2 is durable before 3, and 3 before 4: a flush each, which all requests share
that wait for it. Only a new cluster in an image without a backing needs none before 3: it is blank.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from replnbd.block import Buffer, read_bytes
from replnbd.qcow2.compressed import read_compressed
from replnbd.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO_SHIFT
from replnbd.qcow2.mapping import StoreLostError
from replnbd.qcow2.state import Image

if TYPE_CHECKING:
    from replnbd.qcow2.mapping import Words

log = logging.getLogger(__name__)

Entry = tuple[int, int]

_JOIN_MAX = 1 << 20
"""Bytes. Up to here data and what is copied around it are joined, to be stored with one pwrite."""


def first_touch_nowait(image: Image, words: Words, offset: int, data: Buffer) -> bool:
    """Store whole subclusters of one cluster, which is ours alone or not allocated yet.

    What copy-before-write and fresh overlays live on: two stores and 2 µs. `words`: the slice that
    maps the cluster. True: done. False: it is something else, or would have to wait, and the image
    is as before.
    """
    shape = image.shape
    inside = offset & shape.cluster_mask
    end = inside + len(data)
    if (inside | end) & shape.sub_mask:
        return False
    mapping = image.mapping
    cluster = offset >> shape.cluster_bits
    table = mapping.l1[cluster >> shape.l1_shift] ^ COPIED
    if table not in image.host.tables or image.host.lock.locked():
        return False
    descriptor, bitmap = mapping.decode(words, cluster)
    allocator = image.allocator
    assert allocator is not None
    if descriptor:
        host = descriptor & OFFSET_MASK
        owned = descriptor & (shape.invalid | COPIED) == COPIED
        if (
            image.host.power_safe
            or not owned
            or image.host.forbids(host)
            or bitmap & bitmap >> ZERO_SHIFT
        ):
            return False
    elif bitmap or image.ordered:
        return False
    else:
        host = allocator.allocate_nowait()
        if not host:
            return False
    mask = (2 << ((end - 1) >> shape.sub_bits)) - (1 << (inside >> shape.sub_bits))
    entry = host | COPIED, (bitmap | mask) & ~(mask << ZERO_SHIFT)
    written = False
    try:
        written = image.file.pwrite_nowait(host + inside, data)
        done = written and mapping.store_nowait(table, cluster, words, entry)
    except OSError as exc:
        if not descriptor and not isinstance(exc, StoreLostError):
            allocator.put_back(blank=False)
        raise
    if not done and not descriptor:
        allocator.put_back(blank=not written)
    return done


async def write_range(image: Image, offset: int, data: Buffer) -> None:
    """Store `data` at a guest offset; the caller holds the range exclusively."""
    view = memoryview(data)
    while view:
        done = await _write_some(image, offset, view)
        offset += done
        view = view[done:]
    await settle_if_crowded(image)


async def settle_if_crowded(image: Image) -> None:
    """Give released clusters back if there are many; an error here is not the request's."""
    allocator = image.allocator
    assert allocator is not None
    if allocator.crowded:
        try:
            await allocator.settle()
        except OSError as exc:
            log.warning("%s: cannot give clusters back yet: %s", image.host.path, exc)


async def _write_some(image: Image, offset: int, view: memoryview) -> int:
    """Write the first clusters that are alike; returns how many bytes of `view` that were."""
    shape = image.shape
    cluster = offset >> shape.cluster_bits
    first = await image.mapping.entry(cluster)
    if is_shared(first):
        length = min(len(view), shape.cluster_size - (offset & shape.cluster_mask))
        await replace_cluster(image, cluster, first, offset, view[:length])
        return length
    entries, host, fresh = await run_of_clusters(image, first, cluster, offset + len(view))
    length = min(len(view), ((cluster + len(entries)) << shape.cluster_bits) - offset)
    await _write_run(image, entries, host, offset, view[:length], fresh)
    return length


def is_shared(entry: Entry) -> bool:
    """Whether its host cluster cannot be written: compressed, or a snapshot has it too."""
    descriptor = entry[0]
    return bool(descriptor & COMPRESSED or (descriptor & OFFSET_MASK and not descriptor & COPIED))


async def run_of_clusters(
    image: Image, first: Entry, cluster: int, end: int
) -> tuple[list[Entry], int, bool]:
    """(entries, host offset, fresh): clusters from `cluster` on, before the guest offset `end`,
    that can be written in one piece. Neighbours in the file already, or else allocated here
    (fresh). `first`: the entry of the first, which is not shared."""
    mapping = image.mapping
    shape = image.shape
    host = first[0] & OFFSET_MASK
    entries = [first]
    limit = min((end - 1) >> shape.cluster_bits, cluster | shape.slice_mask)
    words = mapping.slices.get(cluster >> shape.slice_bits)
    while cluster + len(entries) <= limit:
        entry = (0, 0) if words is None else mapping.decode(words, cluster + len(entries))
        if host:
            alike = entry[0] == (host + (len(entries) << shape.cluster_bits)) | COPIED
        else:
            alike = not entry[0] & ~COPIED
        if not alike or mapping.fault(*entry) is not None:
            break  # the next round meets it
        entries.append(entry)
    if host:
        return entries, host, False
    assert image.allocator is not None
    host, count = await image.allocator.allocate(len(entries))
    return entries[:count], host, True


async def _write_run(
    image: Image, entries: list[Entry], host: int, offset: int, view: memoryview, fresh: bool
) -> None:
    """Write to neighbouring clusters whose host clusters are neighbours from `host` on.

    Subclusters that are written in part and not allocated yet are filled up with what was visible.
    """
    shape = image.shape
    sub_mask = shape.sub_mask
    end = offset + len(view)
    start, stop = offset, end
    base = offset & ~shape.cluster_mask
    if offset & sub_mask and not _allocated(image, entries[0], offset):
        start = offset & ~sub_mask
    if end & sub_mask and not _allocated(image, entries[-1], end - 1):
        stop = (end | sub_mask) + 1
    try:
        place = host + start - base
        if start == offset and stop == end:
            await image.file.pwrite(place, view)
        else:
            head = await _fill(image, entries[0], start, offset)
            tail = await _fill(image, entries[-1], end, stop)
            if stop - start <= _JOIN_MAX:
                await image.file.pwrite(place, b"".join((head, view, tail)))
            else:
                if head:
                    await image.file.pwrite(place, head)
                await image.file.pwrite(host + offset - base, view)
                if tail:
                    await image.file.pwrite(host + end - base, tail)
    except OSError:
        if fresh:
            take_back(image, host, len(entries))
        raise
    await store_run(image, entries, host, base, start, stop, fresh)


def _allocated(image: Image, entry: Entry, offset: int) -> int:
    shape = image.shape
    return entry[1] >> ((offset & shape.cluster_mask) >> shape.sub_bits) & 1


async def _fill(image: Image, entry: Entry, start: int, end: int) -> bytearray:
    """The visible bytes of a part of one subcluster that is not allocated."""
    content = bytearray(end - start)
    if content:
        shape = image.shape
        sub = (start & shape.cluster_mask) >> shape.sub_bits
        if not entry[1] >> (ZERO_SHIFT + sub) & 1:
            await image.read_backing(start, memoryview(content))
    return content


async def store_run(
    image: Image, entries: list[Entry], host: int, base: int, start: int, stop: int, fresh: bool
) -> None:
    """Store the entries that change because the guest's bytes `start` to `stop` are data now."""
    shape = image.shape
    size = shape.cluster_size
    new = []
    first = last = -1
    for index, (descriptor, bitmap) in enumerate(entries):
        begin = base + index * size
        if start <= begin and begin + size <= stop:
            mask = shape.full
        else:
            mask = shape.mask(max(start - begin, 0), min(stop - begin, size))
        entry = (host + index * size) | COPIED, (bitmap | mask) & ~(mask << ZERO_SHIFT)
        new.append(entry)
        if entry[0] != descriptor or entry[1] != bitmap:
            last = index
            if first < 0:
                first = index
    if first < 0:
        return
    cluster = (base >> shape.cluster_bits) + first
    try:
        if image.ordered or not fresh:
            await image.host.order()
        await image.mapping.store(cluster, new[first : last + 1])
    except OSError as exc:
        if fresh and not isinstance(exc, StoreLostError):
            take_back(image, host, len(entries))
        raise


async def replace_cluster(
    image: Image, cluster: int, entry: Entry, offset: int, view: memoryview
) -> None:
    """Give a cluster that is compressed, or shared with a snapshot, a host cluster of its own,
    with `view` (it may be empty) written over it at guest offset `offset`."""
    shape = image.shape
    descriptor, bitmap = entry
    allocator = image.allocator
    assert allocator is not None
    if descriptor & COMPRESSED:
        content = bytearray(await read_compressed(image, descriptor))
        bitmap = shape.full
    else:
        content = await read_bytes(image.file, descriptor & OFFSET_MASK, shape.cluster_size)
    mask = 0
    if view:
        inside = offset & shape.cluster_mask
        end = inside + len(view)
        mask = shape.mask(inside, end)
        await _complete(image, (descriptor, bitmap), cluster, content, inside, end)
        content[inside:end] = view
    bitmap = (bitmap | mask) & ~(mask << ZERO_SHIFT)
    used = bitmap & shape.full
    low = ((used & -used).bit_length() - 1) << shape.sub_bits
    high = used.bit_length() << shape.sub_bits
    host, _ = await allocator.allocate(1)
    try:
        await image.file.pwrite(host + low, memoryview(content)[low:high])
        await image.host.order()
    except OSError:
        take_back(image, host, 1)
        raise
    try:
        await image.mapping.store(cluster, ((host | COPIED, bitmap),))
    except OSError as exc:
        if not isinstance(exc, StoreLostError):
            take_back(image, host, 1)
        raise
    release_host(image, descriptor)


async def _complete(
    image: Image, entry: Entry, cluster: int, content: bytearray, inside: int, end: int
) -> None:
    """Fill the subclusters at the edges of `inside` to `end` with what is visible there, where
    `content`, the host cluster's bytes, does not have it."""
    shape = image.shape
    sub_mask = shape.sub_mask
    base = cluster << shape.cluster_bits
    low = inside & ~sub_mask
    if low < inside and not _allocated(image, entry, inside):
        content[low:inside] = await _fill(image, entry, base + low, base + inside)
    high = (end + sub_mask) & ~sub_mask
    if end < high and not _allocated(image, entry, end - 1):
        content[end:high] = await _fill(image, entry, base + end, base + high)


def release_host(image: Image, descriptor: int) -> None:
    """An entry that referred to these host clusters is gone from the disk."""
    allocator = image.allocator
    assert allocator is not None
    if descriptor & COMPRESSED:
        allocator.release_bytes(*image.shape.compressed_extent(descriptor))
    elif descriptor & OFFSET_MASK:
        allocator.release(descriptor & OFFSET_MASK, 1)


def take_back(image: Image, host: int, count: int) -> None:
    """Clusters that were allocated for a step that failed are not used."""
    assert image.allocator is not None
    image.allocator.release(host, count)
