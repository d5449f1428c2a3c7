"""BackupJob: copy-before-write as a job (QEMU's backup with sync=none).

The copying happens in the writes' own turn, by the filter; the job is what can be seen and
cancelled of it. Pausing it or limiting its speed holds no write back, as with QEMU: a copy that
had to wait would be a write that has to wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from replnbd.events import EventBus
from replnbd.filters import CopyBeforeWrite
from replnbd.jobs.job import Job


class BackupJob(Job):
    """Runs until `finish`. `ended(job)` is called when it ends, cancelled or not."""

    type = "backup"

    def __init__(
        self,
        job_id: str,
        bus: EventBus,
        copy_before_write: CopyBeforeWrite,
        ended: Callable[[BackupJob], None],
    ) -> None:
        super().__init__(job_id, bus)
        self._filter = copy_before_write
        self._ended = ended
        self._finished = asyncio.Event()

    async def run(self) -> None:
        await self._finished.wait()

    def restart_progress(self) -> None:
        """A new checkpoint: nothing is saved yet."""
        self._filter.bytes_copied = 0

    async def finish(self) -> None:
        """The stage that needed the copies is over: end well, and return when ended."""
        self._finished.set()
        await self.wait()

    def describe(self) -> dict[str, Any]:
        # sync=none has no end to reach: the total is what has been copied.
        self.progress_current = self.progress_total = self._filter.bytes_copied
        return super().describe()

    def on_end(self) -> None:
        self._ended(self)
