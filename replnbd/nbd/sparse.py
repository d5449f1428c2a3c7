"""Where the bytes of a READ are zeroes, so that a reply can say so instead of sending them.

Looked for in the bytes themselves: a node would have to be asked for its holes (two system calls
for a file), and the bytes also tell of zeroes that are stored. Looked for in whole blocks of 4 KiB,
aligned to the export as file systems are; a shorter piece at either end counts from 512 bytes on.

It costs next to nothing where there are none: of each block only the first byte is looked at, all
of them by one strided slice (0.1 µs for 4 KiB, 0.2 for 64 KiB, 2 for 1 MiB).
"""

from __future__ import annotations

HOLE_BLOCK = 4096
HOLE_MIN = 512
"""A shorter hole would save less than its chunk takes."""

_ZEROES = bytes(HOLE_BLOCK)

Run = tuple[int, int, bool]
"""(start, end, zero) of bytes in a buffer."""


def may_have_holes(buffer: bytearray, start: int, end: int, offset: int) -> bool:
    """Whether buffer[start:end], the bytes at `offset` of an export, may have a block of zeroes.
    False is certain, and quick."""
    if not buffer[start]:
        return True
    first = start + -offset % HOLE_BLOCK  # the first byte of the first whole block
    return first < end and 0 in buffer[first:end:HOLE_BLOCK]


def runs(buffer: bytearray, start: int, end: int, offset: int) -> list[Run]:
    """buffer[start:end] as runs, zero and not zero by turns; their lengths add up."""
    found: list[Run] = []
    position = start
    while position < end:
        stop = min(position + HOLE_BLOCK - (offset + position - start) % HOLE_BLOCK, end)
        length = stop - position
        zero = length >= HOLE_MIN and buffer.startswith(_ZEROES[:length], position, stop)
        if found and found[-1][2] == zero:
            found[-1] = (found[-1][0], stop, zero)
        else:
            found.append((position, stop, zero))
        position = stop
    return found
