"""Job: the life that all jobs share. This file knows no disks."""

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
    """The states a job of ours passes through (qapi/job.json, JobStatus)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


# Which verbs a user may use in which status (QEMU's JobVerbTable).
_ALIVE = (JobStatus.CREATED, JobStatus.RUNNING, JobStatus.PAUSED)
_VERBS = {"pause": _ALIVE, "resume": _ALIVE, "set-speed": _ALIVE, "cancel": _ALIVE}


class Job(ABC):
    """One job. `start` it, and `wait` for its end; between, a user may pause and cancel it.

    Emits JOB_STATUS_CHANGE {id, status} at every step, BLOCK_JOB_ERROR {device, operation, action}
    on an I/O error, and at the end BLOCK_JOB_COMPLETED or BLOCK_JOB_CANCELLED {type, device, len,
    offset, speed, error?}.
    """

    type: str

    def __init__(self, job_id: str, bus: EventBus) -> None:
        self.id = job_id
        self.status = JobStatus.CREATED
        self.progress_current = 0
        self.progress_total = 0
        self.speed = 0
        """Limit in bytes/s; 0 for none."""
        self.error: OSError | None = None
        self.cancelled = False
        self.operation = "write"
        """What the job is doing to a disk, "read" or "write", for BLOCK_JOB_ERROR."""
        self._bus = bus
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._wake = asyncio.Event()
        """Set by whatever ends a nap before its time."""
        self._debt_s = 0.0
        """Seconds that the speed limit wants the job to be slower than it was."""
        self._emit_status()

    @abstractmethod
    async def run(self) -> None:
        """The work. OSError is the job's failure; call `pause_point` at least every 100 ms."""

    def start(self) -> None:
        """Begin to run as a task that this job owns."""
        assert self._task is None
        self._set_status(JobStatus.RUNNING)
        self._task = asyncio.get_running_loop().create_task(self._live(), name=self.id)

    async def wait(self) -> None:
        """Wait for the end, whatever it is; see `error` and `cancelled`."""
        assert self._task is not None
        await asyncio.wait([self._task])

    def pause(self) -> None:
        """Stop at the next pause point (`job-pause`)."""
        self._require("pause")
        if self._paused:
            raise StateError("Job is already paused")
        self._paused = True
        self._set_status(JobStatus.PAUSED)

    def resume(self) -> None:
        """Go on (`job-resume`)."""
        self._require("resume")
        if not self._paused:
            raise StateError("Can't resume a job that was not paused")
        self._paused = False
        self._wake.set()
        self._set_status(JobStatus.RUNNING)

    def set_speed(self, speed: int) -> None:
        """Limit the job to `speed` bytes/s from now on, 0 for no limit (`block-job-set-speed`)."""
        self._require("set-speed")
        if speed < 0:
            raise StateError("Parameter 'speed' expects a non-negative value")
        self.speed = speed
        self._debt_s = 0.0
        self._wake.set()

    async def cancel(self) -> None:
        """End the job at its next pause point (`job-cancel`); returns when it has ended.

        Never in the middle of an operation: that would go on without its locks.
        """
        self._require("cancel")
        self.cancelled = True
        self._wake.set()
        await self.wait()

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
            "busy": self._task is not None and not self._paused,
            "paused": self._paused,
            "speed": self.speed,
            "io-status": "ok" if self.error is None else "failed",
            "ready": False,
            "auto-finalize": True,
            "auto-dismiss": True,
        }

    async def pause_point(self, bytes_done: int = 0) -> None:
        """Let others run; wait while paused, and for as long as the speed limit demands for
        the bytes just done. Hold no lock here: this is where a cancelled job ends."""
        if self.speed:
            self._debt_s += bytes_done / self.speed
        await asyncio.sleep(0)
        while not self.cancelled and (self._paused or self._debt_s > 0):
            self._wake.clear()
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(None if self._paused else self._debt_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._debt_s = max(0.0, self._debt_s - (time.monotonic() - began_s))
        if self.cancelled:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    @abstractmethod
    def on_end(self) -> None:
        """Called once, in the job's task, when the work has ended and before the events say so;
        the owner's hook: it sets the stage that `error` and `cancelled` call for."""

    async def _live(self) -> None:
        try:
            await self.run()
            self.cancelled = False  # if it was, it came too late
        except OSError as exc:
            self.error = exc
            if exc.errno != errno.ECANCELED:
                self._report(exc)
        except Exception as exc:
            self.error = OSError(errno.EIO, f"internal error: {exc!r}")
            log.exception("job %s failed: our bug", self.id)
        if self.error is not None:
            self._set_status(JobStatus.ABORTING)
        self.on_end()
        self._emit_end()
        self._set_status(JobStatus.CONCLUDED)
        self._set_status(JobStatus.NULL)

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

    def _emit_end(self) -> None:
        data: dict[str, Any] = {
            "type": self.type,
            "device": self.id,
            "len": self.progress_total,
            "offset": self.progress_current,
            "speed": self.speed,
        }
        if self.cancelled:
            self._bus.emit("BLOCK_JOB_CANCELLED", **data)
            return
        if self.error is not None:
            data["error"] = self._error_text()
        self._bus.emit("BLOCK_JOB_COMPLETED", **data)
