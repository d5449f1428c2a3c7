"""Checking and repairing images: the doors, and the repair. `scan` has the check itself.

A repair makes refcounts and COPIED flags say what was counted. It never guesses: if anything else
is wrong (an entry that cannot be, two structures in one cluster), a table may be unreachable, and
freeing what it refers to would turn damage into loss. Then nothing is written.

Order. The dirty bit is set before the first store and cleared after the last (version 3). Blocks
are exact on disk before the table points to them, and a new table before the header does. Death
in between leaves every refcount either as it was or right, so the next repair goes on from there.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING

from replnbd.block import BlockNode, read_bytes
from replnbd.errors import ImageError
from replnbd.qcow2 import counts as kinds
from replnbd.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK
from replnbd.qcow2.format import (
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    OFFSET_INCOMPATIBLE_FEATURES,
    OFFSET_REFCOUNT_TABLE,
    REFCOUNT_TABLE_BYTES_MAX,
    Header,
    read_header,
)
from replnbd.qcow2.mapping import bytes_of, words_of
from replnbd.qcow2.report import CheckReport
from replnbd.qcow2.scan import Scan

if TYPE_CHECKING:
    Words = array[int]

__all__ = ["CheckReport", "check_image", "repair_image", "repair_leaks", "repair_refcounts"]


async def check_image(
    file: BlockNode, header: Header, *, file_size: int | None = None
) -> CheckReport:
    """Check the image in `file`, which nobody may be writing to. Changes nothing.

    `file_size` is for a node whose `size` is not the file's present one. Raises OSError if the
    file cannot be read, and ImageUnsupportedError if the check would take too much memory.
    """
    scan = Scan(file, header, file_size)
    await scan.run()
    return scan.report


async def repair_image(
    file: BlockNode, header: Header, *, leaks_only: bool = False, file_size: int | None = None
) -> CheckReport:
    """Check, and repair what can be repaired: leaks, and unless `leaks_only` corruption too.

    An image that is beyond repair is left alone, to the byte. Otherwise its refcounts and COPIED
    flags are exact afterwards, and its dirty and corrupt bits clear. The report counts what is
    still wrong, and what was put right; its findings are those of the check before. Read the
    header again afterwards. Nobody else may use the image meanwhile.
    """
    scan = Scan(file, header, file_size)
    await scan.run()
    before = scan.report
    if scan.beyond_repair or (leaks_only and before.corruptions):
        return before
    unclean = header.incompatible_features & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT)
    if before.clean and not unclean:
        return before
    repair = _Repair(scan)
    await repair.run()
    after = await check_image(
        file, await read_header(file, file_size=repair.file_size), file_size=repair.file_size
    )
    if not after.corruptions:
        await repair.set_features(header.incompatible_features & ~unclean)
    after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
    after.leaks_fixed = max(0, before.leaks - after.leaks)
    after.findings = before.findings + after.findings
    after.findings_omitted += before.findings_omitted
    return after


async def repair_leaks(
    file: BlockNode, header: Header, *, file_size: int | None = None
) -> CheckReport:
    """Give leaked clusters back; `repair_image` with `leaks_only`."""
    return await repair_image(file, header, leaks_only=True, file_size=file_size)


async def repair_refcounts(
    file: BlockNode, header: Header, *, file_size: int | None = None
) -> CheckReport:
    """Make refcounts exact and clear the dirty bit: what a dirty image needs before it is written.

    Raises ImageError, and has changed nothing, if the image is beyond that.
    """
    report = await repair_image(file, header, file_size=file_size)
    if report.corruptions:
        raise ImageError(
            f"{report.filename}: cannot be repaired, {report.corruptions} corruptions, such as: "
            f"{report.findings[0]}"
        )
    return report


class _Repair:
    """Makes an image's refcounts and COPIED flags agree with what a scan counted."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.file = scan.file
        self.header = scan.header
        self.counts = scan.counts
        self.file_size = scan.file_size
        self.cluster_size = scan.cluster_size
        self.table_offset = self.header.refcount_table_offset
        self.table_clusters = self.header.refcount_table_clusters

    async def run(self) -> None:
        await self.set_features(self.header.incompatible_features | INCOMPATIBLE_DIRTY)
        new_blocks = await self._place()
        await self._write_blocks(new_blocks)
        await self.file.flush()
        await self._write_table()
        if self.scan.report.corruptions:
            await self._fix_copied_flags()
        await self.file.flush()

    async def set_features(self, features: int) -> None:
        """Store the incompatible features; version 2 has none."""
        if self.header.version >= 3:
            await self.file.pwrite(OFFSET_INCOMPATIBLE_FEATURES, struct.pack(">Q", features))
            await self.file.flush()

    # Refcounts

    async def _place(self) -> set[int]:
        """Find places for what is missing, at the end of the file: blocks, and the table if it
        must grow or move. Returns the numbers of the new blocks."""
        scan, counts = self.scan, self.counts
        size = self.cluster_size
        entries = self.header.refcount_block_entries
        needed = counts.block_numbers(entries) | scan.blocks.keys()
        start = max(counts.end(), -(-self.file_size // size))
        move = scan.refcount_table_misplaced
        table_clusters = self.table_clusters
        added = 0
        while True:  # what is added is counted as well, and may need more of itself
            if added:
                needed |= set(range(start // entries, (start + added - 1) // entries + 1))
            missing = needed - scan.blocks.keys()
            wanted = -(-(max(needed) + 1) * 8 // size)
            if wanted > table_clusters:
                move, table_clusters = True, wanted
            total = len(missing) + (table_clusters if move else 0)
            if total == added:
                break
            added = total
        if table_clusters * size > REFCOUNT_TABLE_BYTES_MAX:
            raise ImageError(
                f"{scan.report.filename}: the repair needs a refcount table of "
                f"{table_clusters * size} bytes, more than 8 MiB"
            )
        position = start
        for index in sorted(missing):
            scan.blocks[index] = position * size
            counts.add(position, kinds.REFCOUNT_BLOCK)
            position += 1
        if move:
            for cluster in range(self.table_clusters):
                counts.remove(self.table_offset // size + cluster)
            self.table_offset, self.table_clusters = position * size, table_clusters
            for cluster in range(table_clusters):
                counts.add(position + cluster, kinds.REFCOUNT_TABLE)
        if added:
            self.file_size = (start + added) * size
            await self.file.truncate(self.file_size)
        return missing

    async def _write_blocks(self, new_blocks: set[int]) -> None:
        bits = self.header.refcount_bits
        for index, offset in sorted(self.scan.blocks.items()):
            data = self.counts.as_block(index, self.cluster_size, bits).encode()
            if index in new_blocks or data != await read_bytes(self.file, offset, len(data)):
                await self.file.pwrite(offset, data)

    async def _write_table(self) -> None:
        table = array("Q", bytes(self.table_clusters * self.cluster_size))
        for index, offset in self.scan.blocks.items():
            table[index] = offset
        moved = self.table_offset != self.header.refcount_table_offset
        if not moved and table == self.scan.refcount_table:
            return
        # Where the table stays, each word is either as it was or right, whatever happens.
        await self.file.pwrite(self.table_offset, bytes_of(table))
        if moved:
            await self.file.flush()
            fields = struct.pack(">QI", self.table_offset, self.table_clusters)
            await self.file.pwrite(OFFSET_REFCOUNT_TABLE, fields)

    # COPIED flags

    async def _fix_copied_flags(self) -> None:
        """In the active L1 and L2 tables: set where there is one reference, clear elsewhere."""
        header = self.header
        l1_offset = header.l1_table_offset
        l1 = words_of(await read_bytes(self.file, l1_offset, header.l1_size * 8))
        for index, entry in enumerate(l1):
            if entry:
                await self._fix_l2_table(entry & OFFSET_MASK)
                l1[index] = self._with_copied_flag(entry)
                if l1[index] != entry:
                    await self.file.pwrite(l1_offset + index * 8, struct.pack(">Q", l1[index]))

    async def _fix_l2_table(self, offset: int) -> None:
        words = words_of(await read_bytes(self.file, offset, self.cluster_size))
        changed = False
        for index in range(0, len(words), self.header.l2_entry_size // 8):
            entry = words[index]
            if entry and not entry & COMPRESSED:
                words[index] = self._with_copied_flag(entry)
                changed = changed or words[index] != entry
        if changed:
            await self.file.pwrite(offset, bytes_of(words))

    def _with_copied_flag(self, entry: int) -> int:
        offset = entry & OFFSET_MASK
        references = self.counts.get(offset // self.cluster_size) if offset else 0
        return entry | COPIED if references == 1 else entry & ~COPIED
