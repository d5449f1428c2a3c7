"""JobRegistry: where commands find jobs by their id."""

from __future__ import annotations

import re
from collections.abc import Iterator

from replnbd.errors import ControlError
from replnbd.jobs.job import Job, JobStatus

_WELL_FORMED = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]*")
_RESERVED = ("backup-", "commit-", "mirror-", "verify-")
"""What the ids of the disks' own jobs begin with."""


class JobRegistry:
    """The jobs of a daemon. A job is forgotten when it is null."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        """Make a job known; its id is free again when the job is null."""
        assert job.id not in self._alive()
        self._jobs[job.id] = job

    def check_new(self, job_id: str) -> None:
        """Whether a user may give a new job this id; ControlError with QEMU's text if not."""
        if not _WELL_FORMED.fullmatch(job_id):
            raise ControlError(f"Invalid job ID '{job_id}'")
        if job_id.startswith(_RESERVED) or job_id in self._alive():
            raise ControlError(f"Job ID '{job_id}' already in use")

    def get(self, job_id: str) -> Job:
        """The job for a `job-...` command; ControlError "Job not found"."""
        try:
            return self._alive()[job_id]
        except KeyError:
            raise ControlError("Job not found") from None

    def get_block_job(self, device: str) -> Job:
        """The job for a `block-job-...` command; ControlError of class DeviceNotActive."""
        try:
            return self._alive()[device]
        except KeyError:
            raise ControlError(f"Block job '{device}' not found", "DeviceNotActive") from None

    def __iter__(self) -> Iterator[Job]:
        return iter(self._alive().values())

    def _alive(self) -> dict[str, Job]:
        self._jobs = {i: job for i, job in self._jobs.items() if job.status is not JobStatus.NULL}
        return self._jobs
