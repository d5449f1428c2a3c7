"""DirtyMap: where a disk may differ from its copy elsewhere, in a file that survives any death.

A *granule* is 64 KiB of the disk. It is marked in the file before a byte of it changes on the disk,
and unmarked only when it is proven that the copy has it: so whatever dies, and whenever, what is
not marked is the same on both sides (a write-intent bitmap, and a dirty bitmap, in one).

    state     in the file    what it says
    CLEAN     0              the copy has it
    SENT      1              written and sent; not proven yet that the copy has it
    FRESH     1              the same, in the present epoch
    BEHIND    1              the copy lacks it, and nothing of it is on its way: it must be copied

    CLEAN, SENT --mark--> FRESH --turn--> SENT --clear--> CLEAN
    any --fall_behind--> BEHIND --take--> FRESH
                         BEHIND --found_equal--> CLEAN

An *epoch* is what is proven at a time: `turn` ends one and gives its granules; once all that was
sent in it has arrived, and is durable there, `clear` unmarks those that were not written since.

The file has a byte a granule, so that marking is one store without reading; the map in memory is a
byte a granule too, in pages that the system gives as they are touched: a clean disk of 16 TiB has
256 MiB of addresses there, and next to no memory.

A store that unmarks never waits, and none is made while one that marks does: so they cannot pass
each other.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterable

from replnbd.block.digest import GRANULE
from replnbd.block.node import BlockNode, read_bytes

GRANULE_BITS = GRANULE.bit_length() - 1

CLEAN, SENT, FRESH, BEHIND = range(4)

_LOAD_BYTES = 1 << 20
_PIECE = 64 << 10
"""Bytes of the map that are looked through at a time."""
_MARK = b"\1"
_LOADED = bytes([CLEAN]) + bytes([BEHIND]) * 255
"""The state of a granule whose byte in the file is that."""


class DirtyMap:
    """Of a disk of `size` bytes, in `file` from `start` on. Offsets and lengths are the disk's, in
    bytes. All marks found by `load` are BEHIND: whoever sent something then is dead."""

    def __init__(self, size: int, file: BlockNode, start: int) -> None:
        self.size = size
        self.count = -(-size // GRANULE)
        """Granules."""
        # Private, or what is only read would take memory, too.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.states = mmap.mmap(-1, self.count, flags=flags)
        self.behind = 0
        """Granules that are BEHIND."""
        self.writes = 0
        """How many have been announced (`mark`)."""
        self.late: set[int] = set()
        """Granules that stay marked whatever is proven: the copy may change there yet."""
        self.proofs = 0
        """How often something has become CLEAN."""
        self._file = file
        self._start = start
        self._fresh: set[int] = set()
        self._sent: set[int] = set()
        self._marking = asyncio.Lock()
        self._waiting = False
        """A store that marks has to wait: what it marks is in the file only after that."""

    async def load(self) -> None:
        """Read the marks. OSError."""
        for first in range(0, self.count, _LOAD_BYTES):
            length = min(_LOAD_BYTES, self.count - first)
            stored = await read_bytes(self._file, self._start + first, length)
            if stored != bytes(length):  # a mostly clean disk of 16 TiB: 0.1 s
                self.states[first : first + length] = states = stored.translate(_LOADED)
                self.behind += states.count(BEHIND)

    @property
    def dirty(self) -> int:
        """Granules that are not CLEAN."""
        return self.behind + len(self._fresh) + len(self._sent)

    @property
    def unproven(self) -> int:
        """Granules that have been sent, and of which it is not proven that the copy has them."""
        return len(self._fresh) + len(self._sent)

    @property
    def behind_bytes(self) -> int:
        """At most: the last granule may be a short one."""
        return min(self.behind << GRANULE_BITS, self.size)

    @property
    def unproven_bytes(self) -> int:
        """At most."""
        return min(self.unproven << GRANULE_BITS, self.size)

    # Section: writes

    def mark_nowait(self, offset: int, length: int) -> bool:
        """`mark`, if it need not wait: True: done."""
        if self._waiting:
            return False
        self.writes += 1
        first = offset >> GRANULE_BITS
        last = (offset + length - 1) >> GRANULE_BITS
        states = self.states
        if first == last:
            state = states[first]
            if state < FRESH:
                if state == CLEAN and not self._file.pwrite_nowait(self._start + first, _MARK):
                    return False
                self._freshen(first)
            return True
        wanting = [granule for granule in range(first, last + 1) if states[granule] < FRESH]
        if wanting:
            # Those between are marked already.
            low, count = wanting[0], wanting[-1] + 1 - wanting[0]
            if not self._file.pwrite_nowait(self._start + low, _MARK * count):
                return False
            for granule in wanting:
                self._freshen(granule)
        return True

    async def mark(self, offset: int, length: int) -> None:
        """A range is about to be written: mark it, before that. What is BEHIND stays so. OSError,
        and then nobody may write."""
        async with self._marking:
            if self.mark_nowait(offset, length):
                return
            first, last = offset >> GRANULE_BITS, (offset + length - 1) >> GRANULE_BITS
            self._waiting = True
            try:
                await self._file.pwrite(self._start + first, _MARK * (last + 1 - first))
            finally:
                self._waiting = False
            for granule in range(first, last + 1):
                if self.states[granule] < FRESH:
                    self._freshen(granule)

    def is_behind(self, offset: int, length: int) -> bool:
        """Whether a granule of the range is BEHIND."""
        first, last = offset >> GRANULE_BITS, (offset + length - 1) >> GRANULE_BITS
        if first == last:
            return self.states[first] == BEHIND
        return self._find(BEHIND, first, last + 1) <= last

    def is_clean(self, offset: int) -> bool:
        """Whether the granule at `offset` is CLEAN."""
        return self.states[offset >> GRANULE_BITS] == CLEAN

    def fall_behind(self, offset: int, length: int) -> None:
        """Nothing of a range, which is marked, is on its way (any more)."""
        first, last = offset >> GRANULE_BITS, (offset + length - 1) >> GRANULE_BITS
        states = self.states
        for granule in range(first, last + 1):
            state = states[granule]
            if state != BEHIND:
                states[granule] = BEHIND
                self.behind += 1
                if state == CLEAN:
                    self._mark_again(granule)
                else:
                    self._fresh.discard(granule)
                    self._sent.discard(granule)

    def all_fall_behind(self) -> None:
        """The way to the copy is lost: nothing is on it any more."""
        states = self.states
        for granules in (self._fresh, self._sent):
            for granule in granules:
                states[granule] = BEHIND
            self.behind += len(granules)
            granules.clear()

    async def mark_everything(self) -> None:
        """There is no copy, or none that is known: all is BEHIND."""
        for first in range(0, self.count, _LOAD_BYTES):
            length = min(_LOAD_BYTES, self.count - first)
            await self._store_all(first, _MARK * length, BEHIND)

    async def mark_behind(self, offset: int, length: int) -> None:
        """Mark a range that is BEHIND: what another side has changed."""
        await self.mark(offset, length)
        self.fall_behind(offset, length)

    # Section: copying and proof

    def next_behind(self, offset: int, length_max: int) -> tuple[int, int] | None:
        """(offset, length) of the next run that is BEHIND, of granules that begin at `offset` or
        after it: none, at the end of a disk whose last granule is a short one."""
        first = self._find(BEHIND, -(-offset // GRANULE), self.count)
        if first == self.count:
            return None
        most = min(first + (length_max >> GRANULE_BITS), self.count)
        run = self.states[first:most]
        count = len(run) - len(run.lstrip(bytes([BEHIND])))
        start = first << GRANULE_BITS
        return start, min(count << GRANULE_BITS, self.size - start)

    def take(self, offset: int, length: int) -> None:
        """What is BEHIND of a range is on its way now."""
        first, last = offset >> GRANULE_BITS, (offset + length - 1) >> GRANULE_BITS
        for granule in range(first, last + 1):
            if self.states[granule] == BEHIND:
                self.behind -= 1
                self._freshen(granule)

    def turn(self) -> set[int]:
        """End the epoch; its granules, for `clear`. Those of the one before are among them."""
        states = self.states
        for granule in self._fresh:
            states[granule] = SENT
        self._sent |= self._fresh
        self._fresh = set()
        return set(self._sent)

    def clear(self, granules: Iterable[int]) -> None:
        """It is proven that the copy has these granules, as they were when `turn` gave them: unmark
        those that have not been written since. If the file cannot be written they stay marked."""
        if self._waiting:
            return  # another time
        self.proofs += 1
        states, late = self.states, self.late
        for first, count in _runs(
            sorted(g for g in granules if states[g] == SENT and g not in late)
        ):
            if not self._unmark(first, count):
                return
            states[first : first + count] = bytes(count)
            self._sent.difference_update(range(first, first + count))

    def found_equal(self, offset: int, length: int) -> None:
        """A range, all of it BEHIND, is the same on both sides: nothing needs to be sent. Nobody
        may write to it meanwhile."""
        first = offset >> GRANULE_BITS
        count = ((offset + length - 1) >> GRANULE_BITS) + 1 - first
        assert self.states[first : first + count].count(BEHIND) == count
        doubtful = bool(self.late) and not self.late.isdisjoint(range(first, first + count))
        if self._waiting or doubtful or not self._unmark(first, count):
            return self.take(offset, length)
        self.proofs += 1
        self.behind -= count
        self.states[first : first + count] = bytes(count)
        return None

    async def clear_everything(self) -> None:
        """There is nothing to tell of: this disk is a copy now, and follows another one."""
        for first in range(0, self.count, _LOAD_BYTES):
            if not self.dirty:
                return
            length = min(_LOAD_BYTES, self.count - first)
            if self.states[first : first + length] != bytes(length):
                await self._store_all(first, bytes(length), CLEAN)

    # Section: what it shows

    def runs(self, offset: int, length: int, runs_max: int) -> list[tuple[int, bool]]:
        """(length, whether it may differ) from `offset` on: at least one run; may fall short."""
        found: list[tuple[int, bool]] = []
        end = offset + length
        states = self.states
        while offset < end and len(found) < runs_max:
            granule = offset >> GRANULE_BITS
            dirty = states[granule] != CLEAN
            most = (end - 1 >> GRANULE_BITS) + 1
            stop = self._find(CLEAN, granule, most) if dirty else self._end_of_clean(granule, most)
            count = min(stop << GRANULE_BITS, end) - offset
            found.append((count, dirty))
            offset += count
        return found

    # Section: inside

    def _find(self, state: int, first: int, stop: int) -> int:
        """The first granule in that state; `stop` if there is none before."""
        for begin in range(first, stop, _PIECE):
            found = self.states[begin : min(begin + _PIECE, stop)].find(state)
            if found >= 0:
                return begin + found
        return stop

    def _end_of_clean(self, granule: int, most: int) -> int:
        # A clean disk is a long run of zero bytes: by pieces, each at the speed of memory.
        while granule < most:
            piece = self.states[granule : min(granule + _PIECE, most)]
            if rest := piece.lstrip(b"\0"):
                return granule + len(piece) - len(rest)
            granule += len(piece)
        return most

    def _freshen(self, granule: int) -> None:
        self.states[granule] = FRESH
        self._fresh.add(granule)
        self._sent.discard(granule)

    async def _store_all(self, first: int, marks: bytes, state: int) -> None:
        """Store the marks of granules from `first` on, while no other can be stored; all of them
        are in that state then."""
        stop = first + len(marks)
        async with self._marking:
            self._waiting = True
            try:
                await self._file.pwrite(self._start + first, marks)
            finally:
                self._waiting = False
            before, after = self.states[first:stop], bytes([state]) * len(marks)
            self.states[first:stop] = after
            self.behind += after.count(BEHIND) - before.count(BEHIND)
            for granules in (self._fresh, self._sent):
                granules -= {granule for granule in granules if first <= granule < stop}

    def _mark_again(self, granule: int) -> None:
        """Of one that was found equal while an older write to it was still to fail."""
        try:
            self._file.pwrite_nowait(self._start + granule, _MARK)
        except OSError:
            pass  # in memory it is marked: lost only if the process dies before it is copied

    def _unmark(self, first: int, count: int) -> bool:
        try:
            return self._file.pwrite_nowait(self._start + first, bytes(count))
        except OSError:
            return False  # what is marked without need is copied without need


def _runs(granules: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count)."""
    runs: list[tuple[int, int]] = []
    for granule in granules:
        if runs and runs[-1][0] + runs[-1][1] == granule:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((granule, 1))
    return runs
