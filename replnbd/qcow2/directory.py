"""The two lists an image may carry: its internal snapshots and its persistent bitmaps.

Source: the spec's "Snapshots" and "Bitmap directory". Entries have variable length, and nothing
but the entry itself says how long it is. Read only: replnbd makes neither, but checks, shows and
keeps both.

    snapshot     40 bytes | extra data | id | name | padding to a multiple of 8
    bitmap       24 bytes | extra data | name | padding to a multiple of 8
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from replnbd.block import BlockNode, read_bytes

SNAPSHOT_TABLE_BYTES_MAX = 64 << 20  # QEMU's bound: 65536 snapshots of 1 KiB
BITMAP_IN_USE = 1 << 0
BITMAP_AUTO = 1 << 1

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA = struct.Struct(">QQQ")
_BITMAP = struct.Struct(">QIIBBHI")
_EXTRA_MAX = 1024  # more than QEMU keeps; what is known takes 24
assert _SNAPSHOT.size == 40
assert _BITMAP.size == 24


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An entry of the snapshot table."""

    l1_offset: int
    l1_size: int
    id: str
    name: str
    date_s: int
    date_ns: int
    vm_clock_ns: int
    vm_state_size: int
    icount: int | None
    extra_size: int
    end: int
    """Where the next entry begins: an offset in the file."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """An entry of the bitmap directory."""

    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    name: str
    end: int
    """Where the next entry begins: an offset in the directory."""


async def read_snapshot(file: BlockNode, offset: int) -> Snapshot:
    """The snapshot table entry at `offset`, unchecked: whether it makes sense is for the caller
    to see, `end` before all."""
    raw = await read_bytes(file, offset, _SNAPSHOT.size)
    (l1_offset, l1_size, id_size, name_size, date_s, date_ns, clock, vm_state, extra_size) = (
        _SNAPSHOT.unpack(raw)
    )
    position = offset + _SNAPSHOT.size
    extra = await read_bytes(file, position, min(extra_size, _EXTRA_MAX))
    position += extra_size
    text = await read_bytes(file, position, id_size + name_size)
    position += id_size + name_size
    icount = None
    if len(extra) >= 8:  # "If this field is present, the 32-bit value [...] is ignored."
        vm_state = int.from_bytes(extra[:8], "big")
    if len(extra) >= _SNAPSHOT_EXTRA.size:
        count = _SNAPSHOT_EXTRA.unpack_from(extra)[2]
        icount = None if count == (1 << 64) - 1 else count
    return Snapshot(
        l1_offset=l1_offset,
        l1_size=l1_size,
        id=text[:id_size].decode("utf-8", "replace"),
        name=text[id_size:].decode("utf-8", "replace"),
        date_s=date_s,
        date_ns=date_ns,
        vm_clock_ns=clock,
        vm_state_size=vm_state,
        icount=icount,
        extra_size=extra_size,
        end=(position + 7) & ~7,
    )


def parse_bitmap(directory: bytes | bytearray, offset: int) -> Bitmap | None:
    """The bitmap directory entry at `offset`; None if the directory ends before it does."""
    if offset + _BITMAP.size > len(directory):
        return None
    table_offset, table_size, flags, _type, granularity_bits, name_size, extra_size = (
        _BITMAP.unpack_from(directory, offset)
    )
    name_offset = offset + _BITMAP.size + extra_size
    end = name_offset + name_size
    if end > len(directory):
        return None
    return Bitmap(
        table_offset=table_offset,
        table_size=table_size,
        flags=flags,
        granularity_bits=granularity_bits,
        name=directory[name_offset:end].decode("utf-8", "replace"),
        end=(end + 7) & ~7,
    )
