"""Mapping: from a guest cluster to its L2 entry, and the stores that change one.

The L1 table is in memory. L2 tables come in *slices* of 4 KiB, loaded on demand into a bounded
cache. Every store is write-through: one small pwrite, then the words in memory. So a slice may be
dropped at any time, nothing is ever dirty, and what a request saw is what the file says.

Laws.
1. Stores and whatever moves a table happen under `HostFile.lock`. Lookups take no lock.
2. There is one copy of a slice at most: loads of the same slice wait for each other, and a slice
   that is being stored to is pinned.
3. `epoch` changes when a slice's place on disk may have changed. A load that spans such a change
   begins again.
4. Memory changes after the file, and only if the store succeeded.
5. An L2 table is complete on disk before the L1 entry that points to it.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from replnbd.block import read_bytes
from replnbd.qcow2.entries import COPIED, OFFSET_MASK, Shape
from replnbd.qcow2.host import HostFile

if TYPE_CHECKING:
    Words = array[int]

_SWAP = sys.byteorder == "little"
_SLICE_OVERHEAD = 300
"""Bytes of Python objects around a cached slice: array, dict entry, key."""

_pack_word = struct.Struct(">Q").pack
_pack_pair = struct.Struct(">QQ").pack


class ClusterSource(Protocol):
    """What Mapping needs of the allocator, for L2 tables."""

    async def allocate_locked(self, count: int) -> tuple[int, int]:
        """(host offset, clusters) of up to `count` neighbours; the caller has HostFile.lock."""

    def release(self, offset: int, count: int) -> None:
        """Nothing refers to these clusters any more."""


class StoreLostError(OSError):
    """A store of L2 entries failed, and so did storing the old ones again: the file may have
    either. Clusters that the new ones point to must stay allocated, or after the next start the
    file might refer to free ones."""


def words_of(data: bytes | bytearray) -> Words:
    """Big-endian 64-bit words as an array of native ones."""
    words = array("Q")
    words.frombytes(data)
    if _SWAP:
        words.byteswap()
    return words


def bytes_of(words: Words) -> bytes:
    """The inverse of `words_of`."""
    if not _SWAP:
        return words.tobytes()
    swapped = words[:]
    swapped.byteswap()
    return swapped.tobytes()


async def read_l1(host: HostFile, offset: int, entries: int) -> Words:
    """An L1 table as an array."""
    return words_of(await read_bytes(host.file, offset, entries * 8))


class Mapping:
    """The L1 table and the cache of L2 slices of an open image."""

    __slots__ = (
        "_limit",
        "_loading",
        "_pinned",
        "allocator",
        "epoch",
        "host",
        "l1",
        "l1_offset",
        "shape",
        "slices",
    )

    allocator: ClusterSource
    """Set by whoever opens the image for writing."""

    def __init__(
        self, host: HostFile, shape: Shape, l1: Words, l1_offset: int, cache_bytes: int
    ) -> None:
        self.host = host
        self.shape = shape
        self.l1 = l1
        self.l1_offset = l1_offset
        # Not a dict: to find its oldest key costs more the more have been deleted before it.
        self.slices: OrderedDict[int, Words] = OrderedDict()
        """Slice number (guest cluster >> shape.slice_bits) -> words. Oldest first."""
        self.epoch = 0
        # Eight at least: what a handful of requests in flight use at the same time.
        self._limit = max(8, cache_bytes // (shape.slice_bytes + _SLICE_OVERHEAD))
        self._loading: dict[int, asyncio.Future[None] | None] = {}
        self._pinned = -1

    # Lookup

    async def entry(self, cluster: int) -> tuple[int, int]:
        """The checked (descriptor, bitmap) of a guest cluster; OSError(EIO) if it is corrupt."""
        words = self.slices.get(cluster >> self.shape.slice_bits)
        words = words or await self.load(cluster >> self.shape.slice_bits)
        if words is None:
            return 0, 0
        descriptor, bitmap = self.decode(words, cluster)
        fault = self.fault(descriptor, bitmap)
        if fault is not None:
            raise await self.corruption(cluster, descriptor, fault)
        return descriptor, bitmap

    def decode(self, words: Words, cluster: int) -> tuple[int, int]:
        """The (descriptor, bitmap) of a guest cluster, from the slice that maps it."""
        shape = self.shape
        index = (cluster & shape.slice_mask) << shape.entry_shift
        return shape.decode(words[index], words[index + 1] if shape.extended else 0)

    def fault(self, descriptor: int, bitmap: int) -> str | None:
        """What is wrong with an entry, as the end of a sentence; None if it is sound."""
        if not (descriptor or bitmap):
            return None
        shape = self.shape
        fault = shape.fault(descriptor, bitmap)
        if fault is not None:
            return fault
        if descriptor & shape.invalid:  # only compressed ones get here with such a bit
            offset = shape.compressed_extent(descriptor)[0]
        else:
            offset = descriptor & OFFSET_MASK
        host = self.host
        if offset >= host.end:
            return "points beyond the end of the file"
        if offset & -shape.cluster_size in host.metadata and (offset or descriptor & shape.invalid):
            return "points to metadata"
        return None

    async def corruption(self, cluster: int, descriptor: int, fault: str) -> OSError:
        """Mark the image corrupt because of an entry's `fault`; the error to raise."""
        offset = cluster << self.shape.cluster_bits
        return await self.host.corruption(
            f"L2 entry {descriptor:#018x} at guest offset {offset:#x} {fault}"
        )

    async def load(self, number: int) -> Words | None:
        """The words of a slice, from the cache or the file; None if it has no L2 table."""
        shape = self.shape
        while True:
            words = self.slices.get(number)
            if words is not None:
                return words
            l1_entry = self.l1[number >> shape.table_slices_bits]
            if not l1_entry:
                return None
            if number in self._loading:
                waiting = self._loading[number]
                if waiting is None:
                    waiting = self._loading[number] = asyncio.get_running_loop().create_future()
                await asyncio.shield(waiting)
                continue
            self._loading[number] = None
            try:
                words = await self._read_slice(number, l1_entry)
            finally:
                loaded = self._loading.pop(number)
                if loaded is not None:
                    loaded.set_result(None)
            if words is not None:
                return words

    async def _read_slice(self, number: int, l1_entry: int) -> Words | None:
        """Read and cache a slice; None if its table moved meanwhile."""
        shape = self.shape
        epoch = self.epoch
        table = await self._table_offset(number >> shape.table_slices_bits, l1_entry)
        place = table + (number & (shape.table_slices - 1)) * shape.slice_bytes
        data = bytearray(shape.slice_bytes)
        await self.host.file.pread(place, memoryview(data))
        if epoch != self.epoch:
            return None
        words = words_of(data)
        self._insert(number, words)
        return words

    async def _table_offset(self, l1_index: int, l1_entry: int) -> int:
        fault = self.shape.l1_fault(l1_entry)
        table = l1_entry & OFFSET_MASK
        if fault is None and table >= self.host.end:
            fault = "points beyond the end of the file"
        elif fault is None and table in self.host.metadata and table not in self.host.tables:
            fault = "points to other metadata"
        if fault is not None:
            raise await self.host.corruption(f"L1 entry {l1_index} ({l1_entry:#018x}) {fault}")
        return table

    def _insert(self, number: int, words: Words) -> None:
        slices = self.slices
        if len(slices) >= self._limit:
            for victim in slices:
                if victim != self._pinned:
                    del slices[victim]
                    break
        slices[number] = words

    # Stores

    def store_nowait(self, table: int, cluster: int, words: Words, entry: tuple[int, int]) -> bool:
        """`store` of one entry, while nobody has `HostFile.lock`; `table`: where its L2 table is,
        which is ours alone; `words`: the slice that has it. False: the file wants to wait."""
        shape = self.shape
        host = self.host
        index = (cluster & shape.slice_mask) << shape.entry_shift
        slice_number = (cluster >> shape.slice_bits) & (shape.table_slices - 1)
        place = table + slice_number * shape.slice_bytes + index * 8
        single = shape.encode(*entry)
        data = _pack_pair(*single) if shape.extended else _pack_word(*single)
        try:
            if not host.file.pwrite_nowait(place, data):
                return False
        except OSError as exc:
            old = bytes_of(words[index : index + len(single)])
            try:
                restored = host.file.pwrite_nowait(place, old)
            except OSError:
                restored = False
            if not restored:
                raise StoreLostError(exc.errno, exc.strerror) from exc
            raise
        words[index] = single[0]
        if shape.extended:
            words[index + 1] = single[1]
        return True

    async def store(self, cluster: int, entries: Sequence[tuple[int, int]]) -> None:
        """Change the entries of consecutive clusters, all in one slice, with one pwrite.

        Creates or copies the L2 table if it must. If this fails, memory is as before, and the
        file is too, or else the error is a StoreLostError.
        """
        host = self.host
        await host.lock.acquire()
        try:
            table = await self._own_table(cluster >> self.shape.l1_shift)
            await self._store_words(table, cluster, entries)
        finally:
            host.lock.release()

    async def _store_words(
        self, table: int, cluster: int, entries: Sequence[tuple[int, int]]
    ) -> None:
        shape = self.shape
        number = cluster >> shape.slice_bits
        words = self.slices.get(number) or await self.load(number)
        assert words is not None
        index = (cluster & shape.slice_mask) << shape.entry_shift
        if len(entries) == 1:
            single = shape.encode(*entries[0])
            data = _pack_pair(*single) if shape.extended else _pack_word(*single)
        elif entries.count(entries[0]) == len(entries):
            run = array("Q", shape.encode(*entries[0])) * len(entries)
            data = bytes_of(run)
        else:
            run = array("Q")
            for descriptor, bitmap in entries:
                run.extend(shape.encode(descriptor, bitmap))
            data = bytes_of(run)
        place = table + (number & (shape.table_slices - 1)) * shape.slice_bytes + index * 8
        # Under the lock, so this is the only store: the one slice that must not be dropped.
        self._pinned = number
        try:
            await self.host.file.pwrite(place, data)
        except OSError as exc:
            old = words[index : index + (len(entries) << shape.entry_shift)]
            await self._restore(place, old, exc)
            raise
        finally:
            self._pinned = -1
        if len(entries) > 1:
            words[index : index + len(run)] = run
        else:
            words[index] = single[0]
            if shape.extended:
                words[index + 1] = single[1]

    async def _restore(self, place: int, old: Words, cause: OSError) -> None:
        """Make the file again what memory says, after a store that may have reached it."""
        try:
            await self.host.file.pwrite(place, bytes_of(old))
        except OSError:
            raise StoreLostError(cause.errno, cause.strerror) from cause

    async def _own_table(self, l1_index: int) -> int:
        """The offset of an L2 table that is ours alone to change: made or copied if need be."""
        l1_entry = self.l1[l1_index]
        host = self.host
        if l1_entry & COPIED:
            if l1_entry ^ COPIED in host.tables:
                return l1_entry ^ COPIED
            return await self._table_offset(l1_index, l1_entry)
        size = self.shape.cluster_size
        if l1_entry:
            old = await self._table_offset(l1_index, l1_entry)
            content = await read_bytes(host.file, old, size)
        else:
            old = 0
            content = bytearray(size)
        table, _ = await self.allocator.allocate_locked(1)
        try:
            await host.file.pwrite(table, content)
            await host.order()
        except OSError:
            self.allocator.release(table, 1)
            raise
        await self._store_l1(l1_index, table)
        host.metadata.add(table)
        host.tables.add(table)
        if old:
            self.allocator.release(old, 1)
        return table

    async def _store_l1(self, l1_index: int, table: int) -> None:
        file = self.host.file
        place = self.l1_offset + l1_index * 8
        try:
            await file.pwrite(place, _pack_word(table | COPIED))
        except OSError:
            try:
                await file.pwrite(place, _pack_word(self.l1[l1_index]))
            except OSError:
                pass  # the file may point to the new table: it stays allocated, a leak at worst
            else:
                self.allocator.release(table, 1)
            raise
        self.l1[l1_index] = table | COPIED
        self.epoch += 1

    def forget(self, l1_offset: int) -> None:
        """All tables are gone (make_empty): the L1 table is at `l1_offset` now and all zero."""
        self.l1 = array("Q", bytes(len(self.l1) * 8))
        self.l1_offset = l1_offset
        self.slices.clear()
        self.epoch += 1

    @property
    def table_count(self) -> int:
        """L2 tables of the active L1 table."""
        return len(self.l1) - self.l1.count(0)
