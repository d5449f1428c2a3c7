"""LinkMirror: the job by which a user brings a copy up to date and keeps it so: `blockdev-mirror`.

It starts its disk's link, is ready when that is LIVE, and stops it at its end. What the link needs
other jobs for is not seen beside it: their progress is this one's, its speed and its pauses are
theirs.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replnbd.block import GRANULE
from replnbd.events import EventBus
from replnbd.jobs import Job, JobStatus, MirrorJob
from replnbd.replication.link import Link
from replnbd.replication.session import LinkState

_UP = (LinkState.SYNCING, LinkState.LIVE)
_COPYING = (JobStatus.RUNNING, JobStatus.PAUSED)


@dataclass(frozen=True, slots=True)
class MirrorTerms:
    """What a user has said of a mirror. An error is answered by "report": the job fails; "ignore":
    it tries again; "stop": it pauses; "enospc": "stop" where the space is used up, else "report";
    "auto": the same."""

    on_source_error: str = "report"
    on_target_error: str = "report"
    sync: bool = False
    """A write is answered when the target has it, too."""
    open_timeout_s: float = 0
    """How long the target may be out of reach at first, without an error..."""
    reconnect_delay_s: float = 0
    """... and how long later."""
    auto_finalize: bool = True
    auto_dismiss: bool = True


class LinkMirror(Job):
    """Of `link`, which is OFF, to the node `node_name`, which is at the URI `to`. `on_stopped()` is
    called when the link is OFF again."""

    type = "mirror"

    def __init__(
        self,
        job_id: str,
        bus: EventBus,
        link: Link,
        node_name: str,
        to: str,
        terms: MirrorTerms,
        on_stopped: Callable[[], None],
    ) -> None:
        super().__init__(
            job_id, bus, auto_finalize=terms.auto_finalize, auto_dismiss=terms.auto_dismiss
        )
        self._link = link
        self._node_name = node_name
        self._to = to
        self._terms = terms
        self._on_stopped = on_stopped
        self._copying: MirrorJob | None = None
        self._copied_bytes = 0
        """By jobs that have ended."""
        self._failure: OSError | None = None
        self._was_up = False
        self._down_since: float | None = None

    async def run(self) -> None:
        link = self._link
        link.start_by(self, self._node_name, self._to, sync=self._terms.sync)
        try:
            while link.state is not LinkState.LIVE:
                await self._wait_for_news()
            self._update_progress()
            await self.become_ready()
            while not await self.told_to_end(idle=self._failure is None):
                self._check()
            await self._finish()
        finally:
            await link.stop()
            self._update_progress()
            self._on_stopped()
        self.progress_total = self.progress_current  # what was written since is not of the copy

    def on_end(self) -> None:
        return

    def describe(self) -> dict[str, Any]:
        """See `Job`."""
        self._update_progress()
        return super().describe()

    def pause(self) -> None:
        """See `Job`; what is written is sent all the same."""
        super().pause()
        if self._copying is not None and self._copying.status is JobStatus.RUNNING:
            self._copying.pause()

    def resume(self) -> None:
        """See `Job`."""
        super().resume()
        if self._copying is not None and self._copying.status is JobStatus.PAUSED:
            self._copying.resume()

    def set_speed(self, speed: int) -> None:
        """See `Job`."""
        super().set_speed(speed)
        if self._copying is not None and self._copying.status in _COPYING:
            self._copying.set_speed(speed)

    # Section: what the link tells

    def copies_by(self, job: MirrorJob) -> None:
        """It has started this."""
        self._copying = job
        job.set_speed(self.speed)
        if self._paused:
            job.pause()

    def copied(self, job: MirrorJob) -> None:
        """That has ended, and unless well, there will be another."""
        self._copying = None
        self._copied_bytes += job.progress_current
        if job.error is not None and job.error.errno != errno.ECANCELED:
            self._fail(job.operation, job.error)

    def target_failed(self, error: OSError) -> None:
        """The target has refused a write. It will be copied."""
        self._fail("write", error)

    def way_failed(self, error: OSError, *, final: bool) -> None:
        """There is no way to the target; `final`: it is not for want of trying."""
        now = asyncio.get_running_loop().time()
        if self._down_since is None:
            self._down_since = now
        terms = self._terms
        patience_s = terms.reconnect_delay_s if self._was_up else terms.open_timeout_s
        if final or now - self._down_since >= patience_s:
            self._fail("write", error)

    def nudge(self) -> None:
        """See `Job`; the link's state is another one."""
        if self._link.state in _UP:
            self._was_up, self._down_since = True, None
        super().nudge()

    # Section: inside

    async def _wait_for_news(self) -> None:
        await self.told_to_end(idle=self._failure is None)
        self._check()

    async def _finish(self) -> None:
        """All that was written before has arrived. However errors are to be answered, one is the
        end now: a target that is gone would not let the job end ever."""
        self._check()
        while self._link.catches_up:
            self._wake.clear()
            await self._wake.wait()
            self._end_if_cancelled()
            self._check()
        await self._link.wait_in_step()

    def _fail(self, operation: str, error: OSError) -> None:
        read = operation == "read"
        action = self._terms.on_source_error if read else self._terms.on_target_error
        if action in ("enospc", "auto"):
            action = "stop" if error.errno == errno.ENOSPC else "report"
        if action == "report":
            if self._failure is None:
                self.operation, self._failure = operation, error
            super().nudge()
            return
        self._bus.emit("BLOCK_JOB_ERROR", device=self.id, operation=operation, action=action)
        if action == "stop" and self.status in (JobStatus.RUNNING, JobStatus.READY):
            self.pause()

    def _check(self) -> None:
        if self._failure is not None:
            raise OSError(self._failure.errno, self._failure.strerror)

    def _update_progress(self) -> None:
        left = self._link.history.map.behind * GRANULE
        self.progress_current = self._copied_bytes
        if self._copying is not None:
            self.progress_current += self._copying.progress_current
            left = self._copying.bytes_left
        self.progress_total = self.progress_current + left
