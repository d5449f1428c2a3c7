"""The walk over an image's metadata: every reference counted anew, and compared with the refcounts.

In this order: header, active L1 and L2 tables, snapshots, bitmaps, refcount table and blocks. Each
cluster they use is counted; then the image's refcounts are read beside those counts. Nothing here
writes.

    corruption   the image says something false that can destroy data: a refcount below the
                 count, an entry that cannot be, two structures in one cluster, a wrong COPIED flag
    leak         a refcount above the count: space that nobody uses; harmless

What `qemu-img check` counts, this counts the same way, and more: overlaps which the refcounts
happen to agree with, a zero flag in a version 2 image, refcounts past the end of the file.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, NamedTuple

from replnbd.block import BlockNode, read_bytes
from replnbd.qcow2 import counts as kinds
from replnbd.qcow2.counts import KIND_NAMES, ClusterCounts
from replnbd.qcow2.directory import SNAPSHOT_TABLE_BYTES_MAX, parse_bitmap, read_snapshot
from replnbd.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, Shape
from replnbd.qcow2.format import (
    AUTOCLEAR_BITMAPS,
    L1_BYTES_MAX,
    MAX_HOST_OFFSET,
    Header,
    path_of,
)
from replnbd.qcow2.mapping import words_of
from replnbd.qcow2.refcounts import RefcountBlock
from replnbd.qcow2.report import CheckReport

if TYPE_CHECKING:
    Words = array[int]

_BLOCK_CACHE_BYTES = 4 << 20


class _L2Entry(NamedTuple):
    """Names an entry in a finding. Text is made of what is wrong only: a disk of terabytes has
    millions of good entries."""

    guest_offset: int
    entry: int

    def __str__(self) -> str:
        return f"L2 entry of guest offset {self.guest_offset:#x} ({self.entry:#x})"


class Scan:
    """One walk over all metadata; afterwards, what it learnt is what a repair works from."""

    def __init__(self, file: BlockNode, header: Header, file_size: int | None = None) -> None:
        self.file = file
        self.header = header
        self.file_size = file.size if file_size is None else file_size
        self.shape = Shape(header)
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.report = CheckReport(path_of(file))
        self.counts = ClusterCounts(self.report.filename)
        self.beyond_repair = 0
        """Corruptions that no rewriting of refcounts and flags can mend."""
        self.refcount_table: Words = array("Q")
        self.blocks: dict[int, int] = {}
        """Index in the refcount table -> offset, for the entries that can be right."""
        self.refcount_table_misplaced = False
        self._cache: dict[int, RefcountBlock] = {}

    async def run(self) -> None:
        """Walk the whole image; `report` is complete afterwards."""
        header = self.header
        self.report.total_clusters = -(-header.size // self.cluster_size)
        await self._load_refcount_table()
        self._mark(0, self.cluster_size, kinds.HEADER, "the header")
        if self._mark_table(header.l1_table_offset, header.l1_size, kinds.L1_TABLE, "L1 table"):
            l1 = await self._words(header.l1_table_offset, header.l1_size)
            await self._walk(l1, active=True)
        await self._snapshots()
        await self._bitmaps()
        self._mark_refcounts()
        await self._compare()

    # Findings

    def corruption(self, text: str, *, repairable: bool = False) -> None:
        """Count and note something wrong; unless `repairable`, the image is beyond repair."""
        self.report.corruptions += 1
        if not repairable:
            self.beyond_repair += 1
        self.report.note(text)

    # Counting references

    def _mark(self, offset: int, length: int, kind: int, what: str | _L2Entry) -> bool:
        """Count a structure's clusters; False if it is not inside the file."""
        # The last cluster of the file may be there in part.
        if offset + length - self.file_size >= self.cluster_size:
            self.corruption(f"{what}: {length} bytes at {offset:#x} are past the end of the file")
            return False
        bits = self.cluster_bits
        add = self.counts.add
        for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
            other = add(cluster, kind)
            if other:
                self.corruption(
                    f"{what}: {length} bytes at {offset:#x} overlap {KIND_NAMES[other]}"
                )
        return True

    def _mark_table(self, offset: int, entries: int, kind: int, what: str) -> bool:
        """As `_mark`, for a table of 64-bit words whose place is first checked."""
        if entries == 0:
            return False
        if offset % self.cluster_size or not offset:
            self.corruption(f"{what} at {offset:#x} is not at the start of a cluster of its own")
            return False
        if entries * 8 > L1_BYTES_MAX:
            self.corruption(f"{what} at {offset:#x} has {entries} entries: more than 32 MiB")
            return False
        return self._mark(offset, entries * 8, kind, what)

    async def _words(self, offset: int, entries: int) -> Words:
        return words_of(await read_bytes(self.file, offset, entries * 8))

    # L1 and L2

    async def _walk(self, l1: Words, *, active: bool) -> None:
        """Count what an L1 table refers to. COPIED flags count in the active one only."""
        for index, entry in enumerate(l1):
            if not entry:
                continue
            what = f"L1 entry {index} ({entry:#x})"
            fault = self.shape.l1_fault(entry)
            if fault:
                self.corruption(f"{what} {fault}")
                continue
            offset = entry & OFFSET_MASK
            if not self._mark(offset, self.cluster_size, kinds.L2_TABLE, what):
                continue
            if active:
                await self._check_copied(entry, offset, what)
            await self._l2_table(offset, index, active)
            await asyncio.sleep(0)  # a table takes milliseconds, and others use the loop too

    async def _l2_table(self, table: int, l1_index: int, active: bool) -> None:
        shape = self.shape
        cluster_size = self.cluster_size
        words = await self._words(table, cluster_size // 8)
        seconds = words[1::2] if shape.extended else words
        allocated = fragmented = next_offset = 0
        guest = (l1_index << shape.l1_shift) << self.cluster_bits
        for entry, second in zip(words[:: 1 << shape.entry_shift], seconds, strict=True):
            if entry or second:
                where = _L2Entry(guest, entry)
                offset = entry & OFFSET_MASK
                if entry & COMPRESSED:
                    self._compressed(entry, second if shape.extended else 0, where, active)
                elif self._sound(entry, second, where) and offset:
                    allocated += 1
                    if next_offset and offset != next_offset:
                        fragmented += 1
                    next_offset = offset + cluster_size
                    if self._mark(offset, cluster_size, kinds.DATA, where) and active:
                        await self._check_copied(entry, offset, where)
            guest += cluster_size
        if active:
            self.report.allocated_clusters += allocated
            self.report.fragmented_clusters += fragmented

    def _sound(self, entry: int, second: int, where: _L2Entry) -> bool:
        fault = self.shape.fault(*self.shape.decode(entry, second))
        if not fault and entry & COPIED and not entry & OFFSET_MASK:
            self.corruption(f"{where} has the COPIED flag and no offset", repairable=True)
        if fault:
            self.corruption(f"{where} {fault}")
        return not fault

    def _compressed(self, entry: int, bitmap: int, where: _L2Entry, active: bool) -> None:
        if entry & COPIED:
            self.corruption(f"{where} has the COPIED flag on a compressed cluster")
        if bitmap:
            self.corruption(f"{where} has subclusters ({bitmap:#x}) in a compressed cluster")
        offset, length = self.shape.compressed_extent(entry)
        if active:
            self.report.allocated_clusters += 1
            self.report.compressed_clusters += 1
            self.report.fragmented_clusters += 1  # as QEMU: by their nature
        self._mark(offset, length, kinds.COMPRESSED, where)

    async def _check_copied(self, entry: int, offset: int, what: str | _L2Entry) -> None:
        refcount = await self.refcount(offset >> self.cluster_bits)
        if (refcount == 1) != bool(entry & COPIED):
            state = "set" if entry & COPIED else "clear"
            text = f"{what}: the COPIED flag is {state}, but the refcount is {refcount}"
            self.corruption(text, repairable=True)

    # Snapshots and bitmaps

    async def _snapshots(self) -> None:
        """The snapshot table, and everything that snapshots refer to."""
        start = position = self.header.snapshots_offset
        tables: list[tuple[int, int, str]] = []
        for number in range(self.header.nb_snapshots):
            snapshot = await read_snapshot(self.file, position)
            what = f"snapshot {number}"
            # "Version 3 images must include extra data at least up to byte 55."
            if self.header.version >= 3 and snapshot.extra_size < 16:
                self.corruption(f"{what} has {snapshot.extra_size} bytes of extra data, not 16")
            limit = min(start + SNAPSHOT_TABLE_BYTES_MAX, self.file_size + self.cluster_size)
            if snapshot.end > limit:
                self.corruption(f"the snapshot table does not end in {what} ({snapshot.end:#x})")
                break
            position = snapshot.end
            tables.append((snapshot.l1_offset, snapshot.l1_size, f"{what}: L1 table"))
        if position > start:
            self._mark(start, position - start, kinds.SNAPSHOT_TABLE, "the snapshot table")
        for offset, entries, what in tables:
            if self._mark_table(offset, entries, kinds.L1_TABLE, what):
                await self._walk(await self._words(offset, entries), active=False)

    async def _bitmaps(self) -> None:
        """The bitmap directory, tables and data, if the image says that they are consistent."""
        bitmaps = self.header.bitmaps
        if bitmaps is None or not self.header.autoclear_features & AUTOCLEAR_BITMAPS:
            return
        start, size = bitmaps.directory_offset, bitmaps.directory_size
        if not self._mark(start, size, kinds.BITMAP, "the bitmap directory"):
            return
        directory = await read_bytes(self.file, start, size)
        position = 0
        for number in range(bitmaps.nb_bitmaps):
            what = f"bitmap {number}"
            bitmap = parse_bitmap(directory, position)
            if bitmap is None:
                self.corruption(f"the bitmap directory ({size} bytes) ends before {what}")
                return
            position = bitmap.end
            offset, entries = bitmap.table_offset, bitmap.table_size
            if self._mark_table(offset, entries, kinds.BITMAP, f"{what}: table"):
                await self._bitmap_data(await self._words(offset, entries), what)

    async def _bitmap_data(self, table: Words, what: str) -> None:
        aligned = OFFSET_MASK & -self.cluster_size
        for index, entry in enumerate(table):
            if entry & ~aligned & ~1 or (entry & 1 and entry & aligned):
                self.corruption(f"{what}: entry {index} ({entry:#x}) has reserved bits set")
            elif entry & aligned:
                self._mark(entry, self.cluster_size, kinds.BITMAP, f"{what}: data")

    # Refcounts

    async def _load_refcount_table(self) -> None:
        header = self.header
        entries = header.refcount_table_bytes // 8
        self.refcount_table = await self._words(header.refcount_table_offset, entries)
        for index, entry in enumerate(self.refcount_table):
            if not entry:
                continue
            what = f"refcount table entry {index} ({entry:#x})"
            if entry & 511:
                self.corruption(f"{what} has reserved bits set", repairable=True)
            elif entry % self.cluster_size:
                self.corruption(f"{what} is not aligned to a cluster", repairable=True)
            elif entry >= min(self.file_size, MAX_HOST_OFFSET):
                self.corruption(f"{what} is past the end of the file", repairable=True)
            else:
                self.blocks[index] = entry

    def _mark_refcounts(self) -> None:
        """Last, so that what they overlap is known: refcounts can move, the rest cannot."""
        header = self.header
        bits = self.cluster_bits
        first = header.refcount_table_offset >> bits
        for cluster in range(first, first + header.refcount_table_clusters):
            other = self.counts.add(cluster, kinds.REFCOUNT_TABLE)
            if other:
                self.refcount_table_misplaced = True
                text = f"the refcount table overlaps {KIND_NAMES[other]} at {cluster << bits:#x}"
                self.corruption(text, repairable=True)
        for index, offset in list(self.blocks.items()):
            other = self.counts.add(offset >> bits, kinds.REFCOUNT_BLOCK)
            if other:
                text = f"refcount block {index} at {offset:#x} overlaps {KIND_NAMES[other]}"
                self.corruption(text, repairable=True)
                # Trusted no more: its cluster is the other's, and its refcounts are anyone's.
                self.counts.remove(offset >> bits)
                del self.blocks[index]

    async def refcount(self, cluster: int) -> int:
        """What the image says."""
        index, inside = divmod(cluster, self.header.refcount_block_entries)
        if index not in self.blocks:
            return 0
        return (await self._block(index)).get(inside)

    async def _block(self, index: int) -> RefcountBlock:
        block = self._cache.get(index)
        if block is None:
            data = await read_bytes(self.file, self.blocks[index], self.cluster_size)
            block = RefcountBlock(data, self.header.refcount_bits)
            if len(self._cache) >= max(2, _BLOCK_CACHE_BYTES // self.cluster_size):
                del self._cache[next(iter(self._cache))]
            self._cache[index] = block
        return block

    async def _compare(self) -> None:
        header = self.header
        entries = header.refcount_block_entries
        end = self.counts.end()
        limit = (1 << header.refcount_bits) - 1
        if self.counts.most > limit:
            most = self.counts.most
            self.corruption(f"a cluster is referred to {most} times: refcounts end at {limit}")
        for index in sorted(self.blocks.keys() | self.counts.block_numbers(entries)):
            expected = self.counts.as_block(index, self.cluster_size, header.refcount_bits)
            if index in self.blocks:
                block = await self._block(index)
            else:
                block = RefcountBlock(bytes(self.cluster_size), header.refcount_bits)
            used = len(block.counts.rstrip(b"\0"))
            end = max(end, index * entries + -(-used // block.width))
            if block.counts != expected.counts:
                self._differences(index * entries, block, expected)
            await asyncio.sleep(0)
        self.report.image_end_offset = end << self.cluster_bits

    def _differences(self, first: int, block: RefcountBlock, expected: RefcountBlock) -> None:
        """Report a block's wrong refcounts, equal ones in a row as one line."""
        run: tuple[int, int, int] | None = None  # first cluster, refcount, references
        for inside in range(self.header.refcount_block_entries):
            refcount, references = block.get(inside), expected.get(inside)
            if run and (refcount, references) != run[1:]:
                self._wrong_refcount(run, first + inside)
                run = None
            if run is None and refcount != references:
                run = (first + inside, refcount, references)
        if run:
            self._wrong_refcount(run, first + self.header.refcount_block_entries)

    def _wrong_refcount(self, run: tuple[int, int, int], end: int) -> None:
        first, refcount, references = run
        count = end - first
        leaked = refcount > references
        self.report.note(
            f"{'leaked' if leaked else 'wrong refcount of'} {count} cluster{'s'[: count > 1]} at "
            f"{first << self.cluster_bits:#x}: refcount {refcount}, referred to {references} times"
        )
        if leaked:
            self.report.leaks += count
        else:
            self.report.corruptions += count
