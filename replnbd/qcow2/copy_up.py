"""Copying up: what the backing shows becomes this layer's own, unchanged.

What copy-before-write does. The order is that of a write (write.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replnbd.block import BlockNode
from replnbd.qcow2.entries import ZERO_SHIFT
from replnbd.qcow2.state import Image
from replnbd.qcow2.write import (
    first_touch_nowait,
    is_shared,
    replace_cluster,
    run_of_clusters,
    settle_if_crowded,
    store_run,
    take_back,
    write_range,
)

if TYPE_CHECKING:
    from replnbd.qcow2.mapping import Words

_INLINE_MAX = 256 * 1024
"""Bytes. Up to here, what is in the page cache is copied in line; a thread costs 30 to 50 µs."""


def copy_up_nowait(image: Image, words: Words, offset: int, length: int) -> int:
    """OverlayNode.copy_up_nowait, within one cluster; `words`: the slice that maps it."""
    shape = image.shape
    descriptor, bitmap = image.mapping.decode(words, offset >> shape.cluster_bits)
    inside = offset & shape.cluster_mask
    mask = (2 << ((inside + length - 1) >> shape.sub_bits)) - (1 << (inside >> shape.sub_bits))
    allocated = (bitmap | bitmap >> ZERO_SHIFT) & mask
    if allocated == mask:
        return 0 if image.mapping.fault(descriptor, bitmap) is None else -1
    backing = image.backing
    if allocated or backing is None or offset + length > image.backing_size:
        return -1
    image.copy_buffer = buffer = image.copy_buffer or _new_buffer(image)
    old = buffer[:length]
    if not backing.pread_nowait(offset, old):
        return -1
    return length if first_touch_nowait(image, words, offset, old) else -1


async def copy_up(image: Image, offset: int, length: int) -> None:
    """OverlayNode.copy_up; the caller holds the range exclusively."""
    backing = image.backing
    if backing is None or offset + length > image.backing_size:
        content = memoryview(bytearray(length))
        await image.read_backing(offset, content)
        await write_range(image, offset, content)
        return
    end = offset + length
    while offset < end:
        offset += await _copy_some(image, backing, offset, end)
    await settle_if_crowded(image)


async def _copy_some(image: Image, backing: BlockNode, offset: int, end: int) -> int:
    """Copy up the first clusters that are alike; returns how many bytes that were."""
    shape = image.shape
    cluster = offset >> shape.cluster_bits
    first = await image.mapping.entry(cluster)
    inside = offset & shape.cluster_mask
    if is_shared(first):
        content = memoryview(bytearray(min(end - offset, shape.cluster_size - inside)))
        await backing.pread(offset, content)
        await replace_cluster(image, cluster, first, offset, content)
        return len(content)
    entries, host, fresh = await run_of_clusters(image, first, cluster, end)
    stop = min(end, (cluster + len(entries)) << shape.cluster_bits)
    length = stop - offset
    # Taken while it is in use: the file may suspend.
    buffer, image.copy_buffer = image.copy_buffer or _new_buffer(image), None
    try:
        if length <= len(buffer) and backing.pread_nowait(offset, buffer[:length]):
            await image.file.pwrite(host + inside, buffer[:length])
        else:
            await image.file.copy_from(backing, offset, host + inside, length)
    except OSError:
        if fresh:
            take_back(image, host, len(entries))
        raise
    finally:
        image.copy_buffer = buffer
    await store_run(image, entries, host, offset - inside, offset, stop, fresh)
    return length


def _new_buffer(image: Image) -> memoryview:
    return memoryview(bytearray(max(_INLINE_MAX, image.shape.cluster_size)))
