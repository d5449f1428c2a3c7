"""MirrorJob: copies what is BEHIND, while the disk is written and read, until nothing is (QEMU's
mirror, by a dirty map).

A run of granules is looked at in chunks, several at a time. Where the copy tells digests of what it
has, only what differs is sent; a hole on both sides costs next to nothing, however long.

    1. nothing of it is on its way any more; then their digests, if there are any
    2. under an exclusive lock on the chunk: what is here; what is equal is found_equal, what is
       not is on its way, from then on together with new writes to it
    3. without the lock: wait for the answer. What was refused is BEHIND again

Nobody but this job makes a granule less BEHIND; and while one is, nothing of it is sent: so the
digests of step 1 are true in step 2.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from replnbd.block import BlockNode, DirtyMap, Extent, RangeLock, each_extent
from replnbd.block.digest import GRANULE, digest_of, digest_of_zeroes
from replnbd.events import EventBus
from replnbd.jobs.job import Job

CHUNK = 1 << 20
"""Bytes under one lock: how long a request to the same place may wait (about 1 ms)."""

CHUNKS_MAX = 8
"""At a time: enough to be compared here, compared there and on the way."""

WINDOW = 16 << 20
"""Bytes of the source that are looked at for holes at a time; more where there is nothing else."""

RUN = 1 << 30
"""Bytes that are asked about at a time; what is no hole is answered in pieces."""


COURTESY = 4
"""While the disk is written, a chunk is followed by a pause of so many times what it took."""


class MirrorTarget(Protocol):
    """The copy."""

    async def digests(self, offset: int, length: int) -> list[tuple[int, int | None]] | None:
        """Of what it has, from a granule's `offset` on; they may fall short. None: it cannot tell.
        OSError."""

    def digest_key(self) -> bytes:
        """To its digests; the same for as long as a job lasts."""

    async def wait_answered(self, offset: int, length: int) -> None:
        """Until what is in flight in a range that is BEHIND is there, so that `digests` are of it,
        if they are not anyway. OSError."""

    def copy(self, offset: int, data: memoryview) -> Awaitable[object]:
        """Send it, in order with all that is written; `data` does not change until it is answered.
        OSError from the awaitable: it was refused, and has fallen behind."""

    def copy_zeroes(self, offset: int, length: int) -> Awaitable[object]:
        """The same of zeroes."""

    def nudge(self) -> None:
        """Something has fallen behind."""


class MirrorJob(Job):
    """From `source` (which `ranges` locks) to `target`, by the map `dirty`. Ends when nothing is
    BEHIND and all has been answered; OSError as soon as something was refused."""

    type = "mirror"

    def __init__(
        self,
        job_id: str,
        bus: EventBus,
        source: BlockNode,
        ranges: RangeLock,
        dirty: DirtyMap,
        target: MirrorTarget,
        *,
        compare: bool = True,
    ) -> None:
        """`compare`: it is likely that much of what is BEHIND is equal all the same."""
        super().__init__(job_id, bus)
        self.bytes_copied = 0
        """Sent; without zeroes, and without what was equal."""
        self._source = source
        self._ranges = ranges
        self._dirty = dirty
        self._target = target
        self._compare = compare
        self._key = target.digest_key()
        self._zero = digest_of_zeroes(GRANULE, self._key)
        self._marks = dirty.writes
        self._copying: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._buffers: list[bytearray] = []
        """Of chunks that have ended: a new one would have to be cleared first."""
        self._taken = 0
        """Bytes in chunks that have begun and not ended."""
        self._chunk_s = 0.0
        """What the last chunk took of the loop, at most."""

    @property
    def bytes_left(self) -> int:
        """To be looked at; in whole granules, and so at most."""
        return self._dirty.behind * GRANULE + self._taken

    def describe(self) -> dict[str, object]:
        self.progress_total = self.progress_current + self.bytes_left
        return super().describe()

    async def run(self) -> None:
        try:
            position = 0
            while not self._refused:
                found = self._dirty.next_behind(position, RUN)
                if found is not None:
                    position = await self._look_at(*found)
                elif self._copying:
                    # All of them, for what a chunk has not taken yet must not be found again.
                    await asyncio.wait(self._copying)
                    position = 0
                    if self._failure is not None:
                        break  # what could be copied, is
                elif position and self._failure is None:
                    position = 0
                else:
                    break
        finally:
            if self._copying:
                await asyncio.wait(self._copying)
        if self._failure is not None:
            raise self._failure

    def on_end(self) -> None:
        # Whoever made the job waits for its end.
        self.progress_total = self.progress_current

    async def _look_at(self, offset: int, length: int) -> int:
        """Begin to copy the first part of a run that is BEHIND; returns its end."""
        await self._target.wait_answered(offset, length)  # not under a lock: it may take long
        theirs = await self._target.digests(offset, length) if self._compare else None
        if theirs is None:
            theirs = [(min(CHUNK, length), None)]
        values: list[int | None] = []
        end = offset
        for count, value in theirs:
            end += count
            values += [value] * -(-count // GRANULE)
        position, window = offset, WINDOW
        while position < end:
            with self._reading():
                extents = await self._source.block_status(position, min(window, end - position))
            empty = len(extents) == 1 and extents[0].zero
            window = min(4 * window, RUN) if empty else WINDOW
            for start, stop, hole in _segments(position, end, extents):
                digests = values[(start - offset) // GRANULE :][: -(-(stop - start) // GRANULE)]
                if not hole or not await self._skip_hole(start, stop - start, digests):
                    for at in range(start, stop, CHUNK):
                        first = (at - start) // GRANULE
                        count = min(CHUNK, stop - at)
                        await self._begin(at, count, digests[first : first + CHUNK // GRANULE])
                position = stop
        return end

    async def _skip_hole(self, offset: int, length: int, theirs: Sequence[int | None]) -> bool:
        """Whether there is nothing on both sides; then it is equal."""
        if any(value != self._zero for value in theirs):
            return False
        key = await self._ranges.acquire(offset, length, True)
        try:
            with self._reading():
                async for extent in each_extent(self._source, offset, length):
                    if not extent.zero:
                        return False
            self._dirty.found_equal(offset, length)
        finally:
            self._ranges.release(key)
        self.progress_current += length
        await self.pause_point()
        return True

    async def _begin(self, offset: int, length: int, theirs: Sequence[int | None]) -> None:
        """Copy a chunk beside the others. `theirs`: the digests of its granules."""
        await self.pause_point(length)
        if self._dirty.writes != self._marks:
            # Somebody writes: he goes first, or it would be he who waits for the copy.
            self._marks = self._dirty.writes
            await asyncio.sleep(COURTESY * self._chunk_s)
        while len(self._copying) >= CHUNKS_MAX:
            await asyncio.wait(self._copying, return_when=asyncio.FIRST_COMPLETED)
        if self._refused:
            return
        self._taken += length
        task = asyncio.get_running_loop().create_task(self._copy(offset, length, theirs))
        self._copying.add(task)
        task.add_done_callback(self._copying.discard)

    async def _copy(self, offset: int, length: int, theirs: Sequence[int | None]) -> None:
        buffer = self._buffers.pop() if self._buffers else bytearray(CHUNK)
        try:
            begin_s = time.perf_counter()
            try:
                answers = await self._send(buffer, offset, length, theirs)
            finally:
                self._taken -= length
            self._chunk_s = time.perf_counter() - begin_s
            await asyncio.gather(*answers)
            self.progress_current += length
            self._buffers.append(buffer)
        except Exception as exc:
            self._fail("write", exc)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """An error in here is the source's."""
        try:
            yield
        except OSError as exc:
            self._fail("read", exc)
            raise

    @property
    def _refused(self) -> bool:
        """Whether to go on makes no sense: not after an error of the source alone, for what can be
        read of it is worth more on the copy."""
        failure = self._failure
        return failure is not None and (
            self.operation == "write" or not isinstance(failure, OSError)
        )

    def _fail(self, operation: str, error: Exception) -> None:
        """`run` raises it. The others may be reading or writing: the first one counts."""
        if self._failure is None:
            self._failure, self.operation = error, operation

    async def _send(
        self, buffer: bytearray, offset: int, length: int, theirs: Sequence[int | None]
    ) -> Sequence[Awaitable[object]]:
        """Step 2 of a chunk."""
        key = await self._ranges.acquire(offset, length, True)
        try:
            # Holes are read, too: faster than to ask for them.
            view = memoryview(buffer)[:length]
            with self._reading():
                await self._source.pread(offset, view)
            answers: list[Awaitable[object]] = []
            for start, end, what in _runs(buffer, length, theirs, self._key):
                if what == EQUAL:
                    self._dirty.found_equal(offset + start, end - start)
                    continue
                self._dirty.take(offset + start, end - start)
                if what == ZERO:
                    answers.append(self._target.copy_zeroes(offset + start, end - start))
                else:
                    self.bytes_copied += end - start
                    data = view[start:end].toreadonly()
                    answers.append(self._target.copy(offset + start, data))
            return answers
        finally:
            self._ranges.release(key)


EQUAL, ZERO, DATA = "equal", "zero", "data"

_ZEROES = bytes(GRANULE)


def _runs(
    buffer: bytearray, length: int, theirs: Sequence[int | None], key: bytes
) -> list[tuple[int, int, str]]:
    """buffer[:length], a chunk, as runs (start, end, what is to be done); `theirs`: see
    `MirrorJob._begin`."""
    runs: list[tuple[int, int, str]] = []
    view = memoryview(buffer)
    zeroes = digest_of_zeroes(GRANULE, key)
    for start, value in zip(range(0, length, GRANULE), theirs, strict=True):
        end = min(start + GRANULE, length)
        if not buffer[start] and buffer.startswith(_ZEROES[: end - start], start, end):
            what = EQUAL if value == digest_of_zeroes(end - start, key) else ZERO
        elif value in (None, zeroes) or value != digest_of(view[start:end], key):
            what = DATA
        else:
            what = EQUAL
        if runs and runs[-1][2] == what:
            runs[-1] = (runs[-1][0], end, what)
        else:
            runs.append((start, end, what))
    return runs


def _segments(offset: int, end: int, extents: Sequence[Extent]) -> list[tuple[int, int, bool]]:
    """`extents` from `offset` on as (start, stop, whether it is a hole worth a look of its own), in
    whole granules, but for `end`."""
    segments: list[tuple[int, int, bool]] = []
    position = done = offset
    for extent in extents:
        start = -(-position // GRANULE) * GRANULE
        position += extent.length
        stop = position if position == end else position // GRANULE * GRANULE
        if extent.zero and stop - start >= CHUNK:
            if start > done:
                segments.append((done, start, False))
            segments.append((start, stop, True))
            done = stop
    stop = position if position == end else position // GRANULE * GRANULE
    if stop > done or not segments:
        segments.append((done, max(stop, min(done + GRANULE, end)), False))
    return segments
