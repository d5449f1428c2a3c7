"""Reading any range: extent by extent. The common cases do not come here (see image.py)."""

from __future__ import annotations

from replnbd.qcow2.compressed import read_compressed
from replnbd.qcow2.state import DATA, DEFLATED, ZERO, Image


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
