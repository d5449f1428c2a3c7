"""Refcounts: how often each host cluster is referred to, and so which ones are free.

Source: the spec's "Host cluster management". A refcount table, contiguous, points to refcount
blocks of one cluster each, which hold 1 to 64 bits for every cluster of the file:

    refcount table     | block 0 | block 1 | 0 | block 3 | ...     64 bits each; 0: none, all free
    refcount block     | cluster 0 | cluster 1 | ...               1 << refcount_order bits each

Laws.
1. Everything that changes happens under `HostFile.lock`, one pwrite for one run of clusters.
2. A new block is complete on disk, its own refcount in it, before the table points to it; a new
   table before the header points to it.
3. Memory changes after the file, and only if the store succeeded. So memory may say 0 where a
   failed store left a 1 (a leak at worst), never the other way round.
"""

from __future__ import annotations

import errno
import struct
from array import array
from typing import TYPE_CHECKING

from replnbd.block import read_bytes
from replnbd.errors import ImageError
from replnbd.qcow2.format import OFFSET_REFCOUNT_TABLE, Header
from replnbd.qcow2.host import HostFile
from replnbd.qcow2.mapping import bytes_of, words_of

if TYPE_CHECKING:
    Words = array[int]

TABLE_BYTES_MAX = 8 << 20  # QEMU's limit (QCOW_MAX_REFTABLE_SIZE), which it refuses to open past
_CACHE_BYTES = 4 << 20
_table_fields = struct.Struct(">QI").pack


class RefcountBlock:
    """One refcount block. In memory a refcount takes whole bytes, big-endian as on disk, so that
    runs are slices and searches run in C; narrow ones (1, 2, 4 bits) get a byte each."""

    __slots__ = ("bits", "counts", "width")

    def __init__(self, data: bytes | bytearray, bits: int) -> None:
        self.bits = bits
        self.width = max(1, bits // 8)
        """Bytes of a refcount in `counts`."""
        self.counts = bytearray(data) if bits >= 8 else _widen(data, bits)

    def get(self, index: int) -> int:
        """The refcount of one cluster of this block."""
        width = self.width
        return int.from_bytes(self.counts[index * width : (index + 1) * width], "big")

    def set_run(self, index: int, count: int, value: int) -> None:
        """Make `count` refcounts from `index` on `value`, in memory."""
        width = self.width
        self.counts[index * width : (index + count) * width] = value.to_bytes(width, "big") * count

    def encode_run(self, index: int, count: int, value: int) -> tuple[int, bytes]:
        """(byte offset in the block, bytes to store) that make a run's refcounts `value`."""
        if self.bits >= 8:
            return index * self.width, value.to_bytes(self.width, "big") * count
        # Neighbours in the first and last byte keep what they have.
        per_byte = 8 // self.bits
        first = index // per_byte
        last = (index + count - 1) // per_byte
        counts = self.counts[first * per_byte : (last + 1) * per_byte]
        start = index - first * per_byte
        counts[start : start + count] = bytes((value,)) * count
        return first, _narrow(counts, self.bits)

    def encode(self) -> bytes:
        """The whole block as on disk."""
        return bytes(self.counts) if self.bits >= 8 else _narrow(self.counts, self.bits)

    def find_free(self, start: int, limit: int) -> tuple[int, int]:
        """(index, count) of the first run of zero refcounts from `start`, at most `limit` long;
        count is 0 if there is none."""
        width = self.width
        counts = self.counts
        zero = bytes(width)
        position = start * width
        while True:
            position = counts.find(zero, position)
            if position < 0:
                return 0, 0
            odd = position % width
            if not odd:
                break
            # Zero bytes across two refcounts: go on at the second one.
            position += width - odd
        run = counts[position : position + limit * width]
        return position // width, (len(run) - len(run.lstrip(b"\0"))) // width

    def used(self) -> int:
        """How many refcounts are not zero."""
        width = self.width
        counts = self.counts
        low = counts[width - 1 :: width]
        high = range(width - 1)
        if all(not counts[lane::width].strip(b"\0") for lane in high):
            return len(low) - low.count(0)
        zero = bytes(width)
        pieces = (counts[i : i + width] for i in range(0, len(counts), width))
        return sum(piece != zero for piece in pieces)


def _widen(data: bytes | bytearray, bits: int) -> bytearray:
    per_byte = 8 // bits
    mask = (1 << bits) - 1
    counts = bytearray(len(data) * per_byte)
    for lane in range(per_byte):  # lane 0 is the least significant bits
        table = bytes(value >> (lane * bits) & mask for value in range(256))
        counts[lane::per_byte] = data.translate(table)
    return counts


def _narrow(counts: bytes | bytearray, bits: int) -> bytes:
    per_byte = 8 // bits
    total = 0
    for lane in range(per_byte):
        # Lanes do not overlap, so one big OR combines all bytes at once.
        total |= int.from_bytes(counts[lane::per_byte], "big") << (lane * bits)
    return total.to_bytes(len(counts) // per_byte, "big")


class Refcounts:
    """The refcount structures of an image open for writing; use `load_refcounts`."""

    __slots__ = (
        "_blocks",
        "_blocks_max",
        "bits",
        "block_entries",
        "host",
        "orphaned",
        "table",
        "table_offset",
        "used",
        "value_max",
    )

    def __init__(self, host: HostFile, header: Header, table: Words) -> None:
        self.host = host
        self.bits = header.refcount_bits
        self.value_max = (1 << self.bits) - 1
        self.block_entries = header.refcount_block_entries
        self.table = table
        self.table_offset = header.refcount_table_offset
        self.used = 0
        """Host clusters with a refcount other than 0."""
        self.orphaned: list[tuple[int, int]] = []
        """(cluster, count) of tables that were replaced: for the allocator to give back."""
        self._blocks: dict[int, RefcountBlock] = {}
        self._blocks_max = max(2, _CACHE_BYTES // host.cluster_size)

    # Reading

    async def get(self, cluster: int) -> int:
        """The refcount of host cluster number `cluster`."""
        index, inside = divmod(cluster, self.block_entries)
        if index >= len(self.table) or not self.table[index]:
            return 0
        return (await self.block(index)).get(inside)

    def covered(self, cluster: int) -> bool:
        """Whether a refcount block for this host cluster exists."""
        index = cluster // self.block_entries
        return index < len(self.table) and self.table[index] != 0

    async def block(self, index: int) -> RefcountBlock:
        """An existing block, from the cache or the file."""
        block = self._blocks.get(index)
        if block is None:
            data = await read_bytes(self.host.file, self.table[index], self.host.cluster_size)
            block = RefcountBlock(data, self.bits)
            self._insert(index, block)
        return block

    def _insert(self, index: int, block: RefcountBlock) -> None:
        if len(self._blocks) >= self._blocks_max:
            del self._blocks[next(iter(self._blocks))]
        self._blocks[index] = block

    async def find_free(self, start: int, limit: int) -> tuple[int, int]:
        """(cluster, count) of the first free run from host cluster `start` on, within what one
        block describes. Where no block exists everything is free, so one is always found."""
        entries = self.block_entries
        while True:
            index, inside = divmod(start, entries)
            if index >= len(self.table) or not self.table[index]:
                return start, min(limit, entries - inside)
            found, count = (await self.block(index)).find_free(inside, limit)
            if count:
                return index * entries + found, count
            start = (index + 1) * entries

    # Changing

    async def set_run(self, cluster: int, count: int, value: int) -> None:
        """Store one refcount for a run of clusters that one existing block describes."""
        index, inside = divmod(cluster, self.block_entries)
        block = await self.block(index)
        place, data = block.encode_run(inside, count, value)
        await self.host.file.pwrite(self.table[index] + place, data)
        before = block.counts[inside * block.width : (inside + count) * block.width]
        block.set_run(inside, count, value)
        if not before.strip(b"\0"):
            self.used += count if value else 0
        else:
            free = sum(not block_value for block_value in _values(before, block.width))
            self.used += free if value else free - count

    async def add_block(self, cluster: int) -> None:
        """Make the block that describes host cluster `cluster`, which is free, and put it there.
        Grows the refcount table if the block has no place in it."""
        index, inside = divmod(cluster, self.block_entries)
        if index >= len(self.table):
            await self._grow_table(index)
            return
        host = self.host
        offset = cluster * host.cluster_size
        await host.check_target(offset, host.cluster_size, "a new refcount block")
        block = RefcountBlock(bytes(host.cluster_size), self.bits)
        block.set_run(inside, 1, 1)
        await host.file.pwrite(offset, block.encode())
        await host.file.pwrite(self.table_offset + index * 8, struct.pack(">Q", offset))
        self.table[index] = offset
        self._insert(index, block)
        self.used += 1
        host.end = max(host.end, offset + host.cluster_size)
        host.mark(offset, host.cluster_size)

    async def _grow_table(self, index: int) -> None:
        """Move the table to where it has room for block `index` and more: to the first clusters
        that the new blocks describe, behind those blocks themselves.

            | new block | new block ... | new table ... |      from cluster index * block_entries
        """
        host = self.host
        size = host.cluster_size
        entries = self.block_entries
        # Half as much again, so that a growing image moves its table a few times only.
        words = size // 8
        clusters = -(-max(index + 1, len(self.table) * 3 // 2) // words)
        blocks = 1
        while True:
            needed = -(-(blocks + clusters) // entries)
            if index + needed > clusters * words:
                clusters += 1
            elif needed > blocks:
                blocks = needed
            else:
                break
        if clusters * size > TABLE_BYTES_MAX:
            raise OSError(errno.EFBIG, f"{host.path}: the refcount table is at its limit of 8 MiB")
        start = index * entries * size
        table_offset = start + blocks * size
        await host.check_target(start, (blocks + clusters) * size, "the new refcount table")
        table = array("Q", bytes(clusters * size))
        table[: len(self.table)] = self.table
        made = []
        for number in range(blocks):
            block = RefcountBlock(bytes(size), self.bits)
            block.set_run(0, min(entries, blocks + clusters - number * entries), 1)
            table[index + number] = start + number * size
            await host.file.pwrite(start + number * size, block.encode())
            made.append(block)
        await host.file.pwrite(table_offset, bytes_of(table))
        await host.order()
        old = (self.table_offset, len(self.table) * 8)
        try:
            await host.pwrite_ordered(OFFSET_REFCOUNT_TABLE, _table_fields(table_offset, clusters))
        except OSError:
            await self._restore_header(*old)
            raise
        self.table, self.table_offset = table, table_offset
        for number, block in enumerate(made):
            self._insert(index + number, block)
        self.used += blocks + clusters
        host.end = max(host.end, table_offset + clusters * size)
        host.unmark(*old)
        host.mark(start, (blocks + clusters) * size)
        self.orphaned.append((old[0] // size, old[1] // size))

    async def _restore_header(self, offset: int, length: int) -> None:
        host = self.host
        try:
            fields = _table_fields(offset, length // host.cluster_size)
            await host.pwrite_ordered(OFFSET_REFCOUNT_TABLE, fields)
        except OSError as exc:
            # Which table counts after a restart is unknown: nothing may be allocated any more.
            await host.corruption(
                f"the header could not be written ({exc}) while the refcount table moved"
            )

    def forget(self) -> None:
        """Drop the cached blocks: their contents on disk were changed past this object."""
        self._blocks.clear()
        self.orphaned.clear()

    async def count_used(self) -> None:
        """Find `used` by reading all blocks."""
        self.used = 0
        for index, offset in enumerate(self.table):
            if offset:
                self.used += (await self.block(index)).used()


def _values(counts: bytearray, width: int) -> list[int]:
    return [int.from_bytes(counts[i : i + width], "big") for i in range(0, len(counts), width)]


async def load_refcounts(host: HostFile, header: Header) -> Refcounts:
    """Read the refcount table and count the used clusters.

    Raises ImageError if an entry is no place for a block: an image whose refcounts cannot be
    trusted is not opened for writing.
    """
    size = header.cluster_size
    data = await read_bytes(host.file, header.refcount_table_offset, header.refcount_table_bytes)
    table = words_of(data)
    for index, offset in enumerate(table):
        if not offset:
            continue
        if offset % size or offset >= host.end or offset in host.metadata:
            raise ImageError(
                f"{host.path}: refcount table entry {index} is {offset:#x}: not a free-standing "
                f"cluster of {size} bytes within the file; repair it with: qemu-img check -r all"
            )
        host.metadata.add(offset)
    refcounts = Refcounts(host, header, table)
    await refcounts.count_used()
    return refcounts
