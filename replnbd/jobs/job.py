"""Job: the life that all jobs share. This file knows no disks.

    created -> running -> [ready ->] waiting -> pending -> concluded -> null
                  |          |                     |           ^
                  +----------+---------------------+-> aborting

paused is running, and standby is ready, at a user's word. A job that has something to keep up (a
mirror) is ready once it has caught up, and goes on until it is told to complete. waiting is for
other jobs of its transaction: there are none, so it is only passed through. pending is passed
through too, unless the job is not `auto_finalize`; and so is concluded, unless it is not
`auto_dismiss`. Whether it ended well is decided when pending is left.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Any

from replnbd.errors import StateError
from replnbd.events import EventBus

log = logging.getLogger(__name__)


class JobStatus(StrEnum):
    """The states of a job (qapi/job.json, JobStatus)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


# Which verbs a user may use in which status (QEMU's JobVerbTable).
_READY = (JobStatus.READY, JobStatus.STANDBY)
_WORKING = (JobStatus.CREATED, JobStatus.RUNNING, JobStatus.PAUSED, *_READY)
_VERBS = {
    "pause": _WORKING,
    "resume": _WORKING,
    "set-speed": _WORKING,
    "cancel": (*_WORKING, JobStatus.WAITING, JobStatus.PENDING),
    "complete": _READY,
    "finalize": (JobStatus.PENDING,),
    "dismiss": (JobStatus.CONCLUDED,),
}


class Job(ABC):
    """One job. `start` it, and `wait` for its end; between, a user may pause and cancel it.

    Emits JOB_STATUS_CHANGE {id, status} at every step, BLOCK_JOB_ERROR {device, operation, action}
    on an I/O error, BLOCK_JOB_READY {type, device, len, offset, speed} when it becomes ready,
    BLOCK_JOB_PENDING {type, id} when it waits to be finalized, and at the end BLOCK_JOB_COMPLETED
    or BLOCK_JOB_CANCELLED {type, device, len, offset, speed, error?}.
    """

    type: str
    can_complete = False
    """Whether `complete` means something else than the end of a job that is ready: for a mirror,
    that its target takes the source's place."""

    def __init__(
        self, job_id: str, bus: EventBus, *, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        """Without `auto_finalize` it stays pending until `finalize`; without `auto_dismiss` it
        stays concluded, and listed, until `dismiss`."""
        self.id = job_id
        self.status = JobStatus.CREATED
        self.progress_current = 0
        self.progress_total = 0
        self.speed = 0
        """Limit in bytes/s; 0 for none."""
        self.error: OSError | None = None
        self.cancelled = False
        """It is to end, or has ended, without its work being done."""
        self.completed = False
        """`complete` was called. False in a job that is ready and ends: it was cancelled, which
        is an end as good, but leaves everything where it is."""
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.operation = "write"
        """What the job is doing to a disk, "read" or "write", for BLOCK_JOB_ERROR."""
        self._bus = bus
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._ending = False  # a job that is ready is to end well
        self._finalized = False
        self._nudged = False
        self._wake = asyncio.Event()
        """Set by whatever ends a nap before its time."""
        self._debt_s = 0.0
        """Seconds that the speed limit wants the job to be slower than it was."""
        self._emit_status()

    @abstractmethod
    async def run(self) -> None:
        """The work. OSError is the job's failure; call `pause_point` at least every 100 ms.

        A job that has something to keep up does so after it has caught up:

            await self.become_ready()
            while not await self.told_to_end(bytes_done, idle=nothing_to_do):
                ...  # keep up; whoever makes work for an idle job calls `nudge`
            ...  # the last of it, and what `completed` asks for
        """

    def start(self) -> None:
        """Begin to run as a task that this job owns."""
        assert self._task is None
        self._set_status(JobStatus.RUNNING)
        self._task = asyncio.get_running_loop().create_task(self._live(), name=self.id)

    async def wait(self) -> None:
        """Wait for the end, whatever it is; see `error` and `cancelled`. It is concluded then,
        and null if it is `auto_dismiss`."""
        assert self._task is not None
        await asyncio.wait([self._task])

    def pause(self) -> None:
        """Stop at the next pause point (`job-pause`)."""
        self._require("pause")
        if self._paused:
            raise StateError("Job is already paused")
        self._paused = True
        ready = self.status is JobStatus.READY
        self._set_status(JobStatus.STANDBY if ready else JobStatus.PAUSED)

    def resume(self) -> None:
        """Go on (`job-resume`)."""
        if not self._paused:
            raise StateError("Can't resume a job that was not paused")
        self._require("resume")
        self._unpause()
        self._wake.set()

    def set_speed(self, speed: int) -> None:
        """Limit the job to `speed` bytes/s from now on, 0 for no limit (`block-job-set-speed`)."""
        self._require("set-speed")
        if speed < 0:
            raise StateError("Parameter 'speed' expects a non-negative value")
        self.speed = speed
        self._debt_s = 0.0
        self._wake.set()

    def cancel(self, *, force: bool = True) -> None:
        """End the job at its next pause point (`job-cancel`); `wait` for that.

        Never in the middle of an operation: that would go on without its locks.
        Without `force` (`block-job-cancel`), one that is ready ends well: its work is done.
        """
        self._require("cancel")
        if not force and self._paused:
            raise StateError(f"The block job for device '{self.id}' is currently paused")
        if not force and self.status is JobStatus.READY:
            self._ending = True
        else:
            self.cancelled = True
        self._wake.set()

    def complete(self) -> None:
        """Let a job that is ready end well (`job-complete`), once it is not paused."""
        self._require("complete")
        if self.cancelled or not self.can_complete:
            raise StateError(f"The active block job '{self.id}' cannot be completed")
        self.completed = self._ending = True
        self._wake.set()

    def finalize(self) -> None:
        """Let a job that is pending end (`job-finalize`)."""
        self._require("finalize")
        self._finalized = True
        self._wake.set()

    def dismiss(self) -> None:
        """Forget a job that is concluded (`job-dismiss`)."""
        self._require("dismiss")
        self._set_status(JobStatus.NULL)

    def give_up(self) -> None:
        """End at the next pause point, because of what the job's owner knows; `wait` for it."""
        self.cancelled = True
        self._wake.set()

    def describe(self) -> dict[str, Any]:
        """A member of the answer to `query-jobs`."""
        description: dict[str, Any] = {
            "id": self.id,
            "type": self.type,
            "status": self.status.value,
            "current-progress": self.progress_current,
            "total-progress": self.progress_total,
        }
        if self.error is not None:
            description["error"] = self._error_text()
        return description

    def describe_block_job(self) -> dict[str, Any]:
        """A member of the answer to `query-block-jobs`."""
        description = self.describe()
        job_id, length = description.pop("id"), description.pop("total-progress")
        return description | {
            "device": job_id,
            "len": length,
            "offset": description.pop("current-progress"),
            "busy": self.status in (JobStatus.RUNNING, JobStatus.READY),
            "paused": self._paused,
            "speed": self.speed,
            # QEMU's says otherwise while an error stops the job; here an error ends it.
            "io-status": "ok",
            "ready": self.status in _READY,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }

    async def pause_point(self, bytes_done: int = 0) -> None:
        """Let others run; wait while paused, and for as long as the speed limit demands for
        the bytes just done. Hold no lock here: this is where a cancelled job ends."""
        if self.speed:
            self._debt_s += bytes_done / self.speed
        await asyncio.sleep(0)
        while not self.cancelled and (self._paused or (self._debt_s > 0 and not self._ending)):
            self._wake.clear()
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(None if self._paused else self._debt_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._debt_s = max(0.0, self._debt_s - (time.monotonic() - began_s))
        self._end_if_cancelled()

    async def become_ready(self) -> None:
        """The work is done, but for what comes up from now on: tell so, once not paused."""
        await self.pause_point()
        assert self.status is JobStatus.RUNNING
        self._set_status(JobStatus.READY)
        self._bus.emit("BLOCK_JOB_READY", **self._progress())

    async def told_to_end(self, bytes_done: int = 0, *, idle: bool = False) -> bool:
        """The `pause_point` of a job that is ready: whether it is to end well now.

        `idle`: there is nothing to do; wait for that, or for a `nudge`.
        """
        await self.pause_point(bytes_done)
        while idle and not (self._ending or self._nudged):
            self._wake.clear()
            await self._wake.wait()
            await self.pause_point()
        self._nudged = False
        return self._ending

    def nudge(self) -> None:
        """There is something to do for a job that is `idle`."""
        self._nudged = True
        self._wake.set()

    @abstractmethod
    def on_end(self) -> None:
        """Called once, in the job's task, when the work has ended and before the events say so;
        the owner's hook: it sets the stage that `error` and `cancelled` call for."""

    async def _live(self) -> None:
        try:
            await self.run()
            self.cancelled = False  # if it was, it came too late
            await self._reach_the_end()
        except OSError as exc:
            self.error = exc
            if exc.errno != errno.ECANCELED:
                self._report(exc)
        except Exception as exc:
            self.error = OSError(errno.EIO, f"internal error: {exc!r}")
            log.exception("job %s failed: our bug", self.id)
        if self.error is not None:
            self._unpause()
            self._set_status(JobStatus.ABORTING)
        self.on_end()
        self._emit_end()
        self._set_status(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._set_status(JobStatus.NULL)

    async def _reach_the_end(self) -> None:
        self._unpause()
        self._set_status(JobStatus.WAITING)
        self._set_status(JobStatus.PENDING)
        if self.auto_finalize:
            return
        self._bus.emit("BLOCK_JOB_PENDING", type=self.type, id=self.id)
        while not (self._finalized or self.cancelled):
            self._wake.clear()
            await self._wake.wait()
        self._end_if_cancelled()

    def _end_if_cancelled(self) -> None:
        if self.cancelled:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def _unpause(self) -> None:
        if self._paused:
            self._paused = False
            ready = self.status is JobStatus.STANDBY
            self._set_status(JobStatus.READY if ready else JobStatus.RUNNING)

    def _report(self, exc: OSError) -> None:
        log.error("job %s failed: %s", self.id, exc.strerror or exc)
        self._bus.emit("BLOCK_JOB_ERROR", device=self.id, operation=self.operation, action="report")

    def _error_text(self) -> str:
        assert self.error is not None
        return self.error.strerror or str(self.error)

    def _require(self, verb: str) -> None:
        if self.status not in _VERBS[verb]:
            raise StateError(
                f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb"
                f" '{verb}'"
            )

    def _set_status(self, status: JobStatus) -> None:
        if status is not self.status:
            self.status = status
            self._emit_status()

    def _emit_status(self) -> None:
        self._bus.emit("JOB_STATUS_CHANGE", id=self.id, status=self.status.value)

    def _progress(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "device": self.id,
            "len": self.progress_total,
            "offset": self.progress_current,
            "speed": self.speed,
        }

    def _emit_end(self) -> None:
        data = self._progress()
        if self.cancelled:
            self._bus.emit("BLOCK_JOB_CANCELLED", **data)
            return
        if self.error is not None:
            data["error"] = self._error_text()
        self._bus.emit("BLOCK_JOB_COMPLETED", **data)
