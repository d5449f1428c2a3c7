"""BackupJob: copy-before-write as a job (QEMU's backup with sync=none).

The copying happens in the writes' own turn, by the filter; the job is what can be seen of it.
Pausing it or limiting its speed holds no write back, as with QEMU: a copy that had to wait would be
a write that has to wait.
"""

from __future__ import annotations

import asyncio
from typing import Any

from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import CopyBeforeWrite
from replnbd.jobs.job import Job


class BackupJob(Job):
    """Runs until `finish`."""

    type = "backup"

    def __init__(
        self,
        job_id: str,
        bus: EventBus,
        copy_before_write: CopyBeforeWrite,
    ) -> None:
        super().__init__(job_id, bus)
        self._filter = copy_before_write
        self._finished = asyncio.Event()

    async def run(self) -> None:
        await self._finished.wait()

    def restart_progress(self) -> None:
        """A new checkpoint: nothing is saved yet."""
        self._filter.restart()

    def finish(self) -> None:
        """The stage that needed the copies is over: the job ends well, in its own turn."""
        self._finished.set()

    def cancel(self, *, force: bool = True) -> None:
        """Refused: without the copies, the view would not be the checkpoint's any more."""
        raise StateError(
            f"Job '{self.id}' keeps the checkpoint of its disk: end it by a stop or a failover"
        )

    def describe(self) -> dict[str, Any]:
        # sync=none has no end to reach: the total is what has been copied.
        self.progress_current = self.progress_total = self._filter.bytes_copied
        return super().describe()

    def on_end(self) -> None:
        # Nothing to say: whoever called `finish` has moved on.
        return
