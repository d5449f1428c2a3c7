"""Reading any range: extent by extent. The common cases do not come here (see image.py)."""

from __future__ import annotations

from replnbd.qcow2.compressed import read_compressed
from replnbd.qcow2.entries import OFFSET_MASK, run_of_subclusters
from replnbd.qcow2.state import DATA, DEFLATED, UNALLOCATED, ZERO, Image


def read_subclusters_nowait(
    image: Image, descriptor: int, bitmap: int, offset: int, buffer: memoryview
) -> bool:
    """Fill `buffer` from one cluster, not a compressed one, whose subclusters have different
    states. False: that would have to wait, or there is something wrong with the entry.

    The backing first, with one call for all that shows it, and over that what is here: a call costs
    as much as 20 KiB, and what a small write has touched is read so for as long as it stays.
    """
    if image.mapping.fault(descriptor, bitmap) is not None:
        return False
    shape = image.shape
    host = descriptor & OFFSET_MASK
    start = offset & shape.cluster_mask
    end = start + len(buffer)
    here: list[tuple[int, int, int]] = []
    low = high = start
    position = start
    while position < end:
        first = position >> shape.sub_bits
        state, count = run_of_subclusters(bitmap, first, shape.sub_count)
        stop = min(end, (first + count) << shape.sub_bits)
        if state != UNALLOCATED:
            here.append((state, position, stop))
        else:
            low = low if high > start else position
            high = stop
        position = stop
    if low < high:
        base = offset - start
        if base + high > image.backing_size:
            return False
        assert image.backing is not None
        if not image.backing.pread_nowait(base + low, buffer[low - start : high - start]):
            return False
    for state, position, stop in here:
        part = buffer[position - start : stop - start]
        if state == ZERO:
            part[:] = bytes(stop - position)
        elif not image.file.pread_nowait(host + position, part):
            return False
    return True


async def read_range(image: Image, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the guest's bytes at `offset`; the caller holds the range shared."""
    end = offset + len(buffer)
    done = 0
    while offset < end:
        state, host, length = await image.extent(offset, end)
        part = buffer[done : done + length]
        if state == DATA:
            await image.file.pread(host, part)
        elif state == ZERO:
            part[:] = bytes(length)
        elif state == DEFLATED:
            inside = offset & image.shape.cluster_mask
            part[:] = (await read_compressed(image, host))[inside : inside + length]
        else:
            await image.read_backing(offset, part)
        offset += length
        done += length
