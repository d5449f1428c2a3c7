"""VerifyJob: compares a disk with its copy, by digests, while it is written and read.

What is BEHIND is known to differ, and what is on its way may. So a granule whose digests differ is
looked at again, until they do not, or until it was CLEAN, and stayed so, while they were taken:
that is a mismatch. It is told, falls behind, and is copied again. What is BEHIND or being written
at every look is told as not compared.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from replnbd.block import BlockNode, DirtyMap, digests
from replnbd.block.digest import GRANULE
from replnbd.events import EventBus
from replnbd.jobs.job import Job, JobStatus
from replnbd.jobs.mirror import RUN, MirrorTarget

log = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Until a granule that was being written is looked at again."""
LOOKS_MAX = 20
"""At one granule."""


class VerifyJob(Job):
    """`source` with `target`, whose lacks are in `dirty`. OSError if one cannot be read."""

    type = "x-replnbd-verify"

    def __init__(
        self,
        job_id: str,
        bus: EventBus,
        source: BlockNode,
        dirty: DirtyMap,
        target: MirrorTarget,
    ) -> None:
        super().__init__(job_id, bus)
        self.mismatches = 0
        """Bytes, in granules."""
        self.skipped = 0
        """The same, of what could not be compared."""
        self.progress_total = source.size
        self._source = source
        self._dirty = dirty
        self._target = target
        self._key = target.digest_key()

    async def run(self) -> None:
        position, size = 0, self._source.size
        while position < size:
            position += await self._compare(position, size - position)

    @property
    def result(self) -> str | None:
        """In a few words, once it has ended."""
        if self.error is not None:
            return self._error_text()
        if self.status not in (JobStatus.CONCLUDED, JobStatus.NULL):
            return None
        if self.mismatches:
            return f"{self.mismatches} bytes differed"
        return f"{self.skipped} bytes could not be compared" if self.skipped else "equal"

    def on_end(self) -> None:
        if self.error is None:
            found = f"{self.mismatches} differ, {self.skipped} could not be compared"
            log.info("%s: of %d bytes, %s", self.id, self._source.size, found)
        counts = {"mismatches": self.mismatches, "skipped": self.skipped}
        self._bus.emit("x-replnbd-verified", id=self.id, **counts)

    def describe(self) -> dict[str, Any]:
        counts = {"mismatches": self.mismatches, "skipped": self.skipped}
        return super().describe() | {f"x-replnbd-{name}": count for name, count in counts.items()}

    async def _compare(self, offset: int, length: int) -> int:
        """The granules from `offset` on, as far as both sides tell at once; returns how far."""
        self.operation = "read"
        length = min(length, RUN)
        mine, theirs = await asyncio.gather(
            digests(self._source, offset, length, self._key), self._target.digests(offset, length)
        )
        assert theirs is not None
        done = 0
        here, there = iter(mine), iter(theirs)
        left_here = left_there = 0
        ours: int | None = None
        other: int | None = None
        while True:
            if not left_here:
                left_here, ours = next(here, (0, None))
            if not left_there:
                left_there, other = next(there, (0, None))
            count = min(left_here, left_there)
            if not count:
                break
            if ours != other:
                for granule in range(done, done + count, GRANULE):
                    await self._look_again(offset + granule, min(GRANULE, done + count - granule))
            done += count
            left_here -= count
            left_there -= count
            self.progress_current = offset + done
            await self.pause_point(count)
        return done

    async def _look_again(self, offset: int, length: int) -> None:
        """Until the digests are equal, or nothing was written between them being taken. What is
        BEHIND is given its time to be copied; if that was in vain once, no more."""
        for look in range(LOOKS_MAX):
            if look:
                await asyncio.sleep(AGAIN_S)
                await self.pause_point()
            if self._dirty.is_behind(offset, length):
                if self.skipped:
                    break
                continue
            proofs, clean = self._dirty.proofs, self._dirty.is_clean(offset)
            theirs = await self._target.digests(offset, length)
            if theirs == await digests(self._source, offset, length, self._key):
                return
            if clean and self._dirty.is_clean(offset) and self._dirty.proofs == proofs:
                log.warning("%s: %d bytes at %d differ", self.id, length, offset)
                self.mismatches += length
                await self._dirty.mark_behind(offset, length)
                self._target.nudge()
                return
        self.skipped += length
