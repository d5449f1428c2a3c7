"""Where the bytes of a READ are zeroes, so that a reply can say so instead of sending them.

Looked for in the bytes themselves: a node would have to be asked for its holes (two system calls
for a file), and the bytes also tell of zeroes that are stored. Looked for in whole blocks of 4 KiB,
aligned to the export as file systems are; a shorter piece at either end counts from 512 bytes on.

Where there are none it must cost next to nothing. So a few bytes of each block are looked at first,
those of all blocks together: 0.2 µs for 4 KiB, 0.3 for 64 KiB, 2 for 1 MiB. Not the first byte of
each, for blocks of data that begin with a zero are common.
"""

from __future__ import annotations

HOLE_BLOCK = 4096
HOLE_MIN = 512
"""A shorter hole would save less than its chunk takes."""

_ZEROES = bytes(HOLE_BLOCK)
_PROBE = HOLE_BLOCK // 3
_MORE_PROBES = (0, 2 * _PROBE, HOLE_BLOCK - 1)

Run = tuple[int, int, bool]
"""(start, end, zero) of bytes in a buffer."""


def may_have_holes(buffer: bytearray, start: int, end: int, offset: int) -> bool:
    """Whether buffer[start:end], the bytes at `offset` of an export, may have a hole. False is
    certain, and quick."""
    first = start + -offset % HOLE_BLOCK  # of the whole blocks
    last = end - (offset + end - start) % HOLE_BLOCK  # their end
    if first < last:
        probes = buffer[first + _PROBE : last : HOLE_BLOCK]
        if 0 in probes:
            seen = int.from_bytes(probes, "big")
            for probe in _MORE_PROBES:
                seen |= int.from_bytes(buffer[first + probe : last : HOLE_BLOCK], "big")
            if 0 in seen.to_bytes(len(probes), "big"):
                return True
        if first == start and last == end:
            return False
    pieces = ((start, min(first, end)), (max(last, start), end))
    return any(a + HOLE_MIN <= b and not buffer[a] and not buffer[b - 1] for a, b in pieces)


def runs(buffer: bytearray, start: int, end: int, offset: int) -> list[Run]:
    """buffer[start:end] as runs, zero and not zero by turns; their lengths add up."""
    found: list[Run] = []
    position = start
    while position < end:
        stop = min(position + HOLE_BLOCK - (offset + position - start) % HOLE_BLOCK, end)
        zero = (
            not buffer[position]
            and stop - position >= HOLE_MIN
            and buffer.startswith(_ZEROES[: stop - position], position, stop)
        )
        if found and found[-1][2] == zero:
            found[-1] = (found[-1][0], stop, zero)
        else:
            found.append((position, stop, zero))
        position = stop
    return found
