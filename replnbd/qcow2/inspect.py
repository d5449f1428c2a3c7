"""What an image is and where its bytes are: for people, and as JSON.

Names and values are those of `qemu-img info` and `qemu-img map` with `--output=json`, so that what
reads theirs reads ours. Only the image itself is looked at: its backing file is named, not opened.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from replnbd.block import BlockNode, read_bytes
from replnbd.errors import ImageError
from replnbd.qcow2.directory import (
    BITMAP_AUTO,
    BITMAP_IN_USE,
    SNAPSHOT_TABLE_BYTES_MAX,
    Bitmap,
    Snapshot,
    parse_bitmap,
    read_snapshot,
)
from replnbd.qcow2.entries import COMPRESSED, OFFSET_MASK, Shape, run_of_subclusters
from replnbd.qcow2.format import AUTOCLEAR_BITMAPS, COMPRESSION_ZSTD, Header, path_of
from replnbd.qcow2.mapping import words_of

if TYPE_CHECKING:
    Words = array[int]

_BITMAPS_SHOWN_BYTES_MAX = 1 << 20
"""Of the directory: thousands of bitmaps, and no 64 MiB read for a command that shows them."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image's properties."""

    filename: str
    header: Header
    actual_size: int | None
    """Bytes the file takes on its file system; None where there is none."""
    snapshots: tuple[Snapshot, ...]
    bitmaps: tuple[Bitmap, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `qemu-img info --output=json` prints."""
        header = self.header
        values: dict[str, Any] = {
            "filename": self.filename,
            "format": "qcow2",
            "virtual-size": header.size,
            "cluster-size": header.cluster_size,
            "dirty-flag": header.dirty,
        }
        if self.actual_size is not None:
            values["actual-size"] = self.actual_size
        if header.backing_file is not None:
            values["backing-filename"] = header.backing_file
            values["full-backing-filename"] = os.path.join(
                os.path.dirname(self.filename), header.backing_file
            )
            if header.backing_format is not None:
                values["backing-filename-format"] = header.backing_format
        if self.snapshots:
            values["snapshots"] = [_snapshot_to_json(snapshot) for snapshot in self.snapshots]
        values["format-specific"] = {"type": "qcow2", "data": self._specific()}
        return values

    def _specific(self) -> dict[str, Any]:
        header = self.header
        values: dict[str, Any] = {
            "compat": "1.1" if header.version >= 3 else "0.10",
            "compression-type": "zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib",
            "refcount-bits": header.refcount_bits,
        }
        if header.version >= 3:
            values["lazy-refcounts"] = header.lazy_refcounts
            values["corrupt"] = header.corrupt
            values["extended-l2"] = header.extended_l2
            if self.bitmaps:
                values["bitmaps"] = [_bitmap_to_json(bitmap) for bitmap in self.bitmaps]
        return values


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A run of guest bytes in one state."""

    start: int
    length: int
    present: bool
    """This image decides the bytes; otherwise its backing file does, or they are zeroes."""
    zero: bool
    data: bool
    compressed: bool = False
    offset: int | None = None
    """In the image file, where the bytes or the space kept for them are."""
    depth: int = 0
    """1 where the backing file decides, else 0."""

    def to_json(self) -> dict[str, Any]:
        """An object as in the list that `qemu-img map --output=json` prints."""
        values: dict[str, Any] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.offset is not None:
            values["offset"] = self.offset
        return values


async def image_info(file: BlockNode, header: Header) -> ImageInfo:
    """Everything the header and the lists it points to say. Raises ImageError if a list is cut."""
    return ImageInfo(
        filename=path_of(file),
        header=header,
        actual_size=_actual_size(file),
        snapshots=await _snapshots(file, header),
        bitmaps=await _bitmaps(file, header),
    )


async def map_image(file: BlockNode, header: Header) -> AsyncIterator[MapEntry]:
    """The whole disk, run by run, in order; neighbours differ. Raises ImageError at an L1 or L2
    entry that cannot be."""
    below = header.backing_file is not None
    runs: list[_Run] = []
    async for table_runs in _runs_of_tables(file, header):
        for run in table_runs:
            _append(runs, run)
        for run in runs[:-1]:  # the last one may go on in the next table
            yield _map_entry(run, below)
        del runs[:-1]
    for run in runs:
        yield _map_entry(run, below)


_UNALLOCATED = 0  # as `run_of_subclusters` numbers them
_DATA = 1
_ZERO = 2
_COMPRESSED = 3


class _Run(NamedTuple):
    """A MapEntry in the making: there is one for each cluster of the disk, so it is light."""

    start: int
    length: int
    state: int
    offset: int
    """In the image file; -1: nowhere."""


def _append(runs: list[_Run], run: _Run) -> None:
    """Add a run, or make the last one longer if it is more of the same."""
    if runs:
        start, length, state, offset = runs[-1]
        if run.state == state and run.offset == (offset + length if offset >= 0 else -1):
            runs[-1] = _Run(start, length + run.length, state, offset)
            return
    runs.append(run)


def _map_entry(run: _Run, below: bool) -> MapEntry:
    state = run.state
    unallocated = state == _UNALLOCATED
    return MapEntry(
        start=run.start,
        length=run.length,
        present=not unallocated,
        zero=state == _ZERO or (unallocated and not below),
        data=state in (_DATA, _COMPRESSED),
        compressed=state == _COMPRESSED,
        offset=None if run.offset < 0 else run.offset,
        depth=int(unallocated and below),
    )


async def _runs_of_tables(file: BlockNode, header: Header) -> AsyncIterator[list[_Run]]:
    """The runs of each L2 table."""
    shape = Shape(header)
    path = path_of(file)
    covered = 1 << (shape.l1_shift + shape.cluster_bits)
    l1_bytes = header.l1_entries_needed * 8
    l1 = words_of(await read_bytes(file, header.l1_table_offset, l1_bytes))
    for index, entry in enumerate(l1):
        start = index * covered
        if not entry:
            yield [_Run(start, min(covered, header.size - start), _UNALLOCATED, -1)]
            continue
        fault = shape.l1_fault(entry)
        if fault:
            raise ImageError(f"{path}: L1 entry {index} ({entry:#x}) {fault}")
        words = words_of(await read_bytes(file, entry & OFFSET_MASK, header.cluster_size))
        yield _runs_of_table(shape, words, start, path, header.backing_file is not None)
        await asyncio.sleep(0)  # a table takes milliseconds, and others use the loop too


def _runs_of_table(shape: Shape, words: Words, guest: int, path: str, below: bool) -> list[_Run]:
    runs: list[_Run] = []
    cluster_size = shape.cluster_size
    seconds = words[1::2] if shape.extended else words
    for entry, second in zip(words[:: 1 << shape.entry_shift], seconds, strict=True):
        if guest >= shape.size:
            break
        length = min(cluster_size, shape.size - guest)
        descriptor, bitmap = shape.decode(entry, second)
        if entry & COMPRESSED:
            _append(runs, _Run(guest, length, _COMPRESSED, -1))
        else:
            fault = shape.fault(descriptor, bitmap)
            if fault:
                where = f"L2 entry of guest offset {guest:#x} ({entry:#x})"
                raise ImageError(f"{path}: {where} {fault}")
            host = descriptor & OFFSET_MASK
            position = 0
            while position * shape.sub_size < length:
                state, count = run_of_subclusters(bitmap, position, shape.sub_count)
                inside = position * shape.sub_size
                part = min(count * shape.sub_size, length - inside)
                # Space kept for what the backing file shows is not where those bytes are.
                here = host and not (below and state == _UNALLOCATED)
                _append(runs, _Run(guest + inside, part, state, host + inside if here else -1))
                position += count
        guest += cluster_size
    return runs


async def _snapshots(file: BlockNode, header: Header) -> tuple[Snapshot, ...]:
    found: list[Snapshot] = []
    position = header.snapshots_offset
    limit = min(position + SNAPSHOT_TABLE_BYTES_MAX, file.size + header.cluster_size)
    for number in range(header.nb_snapshots):
        snapshot = await read_snapshot(file, position)
        if snapshot.end > limit:
            raise ImageError(
                f"{path_of(file)}: snapshot {number} ends at {snapshot.end:#x}: past the end of "
                "the snapshot table"
            )
        found.append(snapshot)
        position = snapshot.end
    return tuple(found)


async def _bitmaps(file: BlockNode, header: Header) -> tuple[Bitmap, ...]:
    bitmaps = header.bitmaps
    if bitmaps is None or not header.autoclear_features & AUTOCLEAR_BITMAPS:
        return ()
    size = min(bitmaps.directory_size, _BITMAPS_SHOWN_BYTES_MAX)
    directory = await read_bytes(file, bitmaps.directory_offset, size)
    found: list[Bitmap] = []
    position = 0
    for number in range(bitmaps.nb_bitmaps):
        bitmap = parse_bitmap(directory, position)
        if bitmap is None:
            if size < bitmaps.directory_size:
                break
            raise ImageError(
                f"{path_of(file)}: bitmap {number} ends past the bitmap directory ({size} bytes)"
            )
        found.append(bitmap)
        position = bitmap.end
    return tuple(found)


def _snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    seconds, nanoseconds = divmod(snapshot.vm_clock_ns, 1_000_000_000)
    values: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_s,
        "date-nsec": snapshot.date_ns,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None:
        values["icount"] = snapshot.icount
    return values


def _bitmap_to_json(bitmap: Bitmap) -> dict[str, Any]:
    flags = []
    if bitmap.flags & BITMAP_IN_USE:
        flags.append("in-use")
    if bitmap.flags & BITMAP_AUTO:
        flags.append("auto")
    return {"flags": flags, "name": bitmap.name, "granularity": 1 << bitmap.granularity_bits}


def _actual_size(file: BlockNode) -> int | None:
    path = getattr(file, "path", None)
    try:
        return None if path is None else os.stat(path).st_blocks * 512
    except OSError:
        return None  # a file that has lost its name is open still, and as good as ever
