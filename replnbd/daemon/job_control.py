"""JobControl: what commands do to jobs."""

from __future__ import annotations

from typing import Any

from replnbd.jobs import JobRegistry


class JobControl:
    """The jobs' part of `control.Backend`."""

    jobs_registry: JobRegistry

    def jobs(self) -> list[dict[str, Any]]:
        """`query-jobs`; see `control.Backend`."""
        return [job.describe() for job in self.jobs_registry]

    def block_jobs(self) -> list[dict[str, Any]]:
        """`query-block-jobs`; see `control.Backend`."""
        return [job.describe_block_job() for job in self.jobs_registry]

    async def job_pause(self, job_id: str) -> None:
        """`job-pause`; see `control.Backend`."""
        self.jobs_registry.get(job_id).pause()

    async def job_resume(self, job_id: str) -> None:
        """`job-resume`; see `control.Backend`."""
        self.jobs_registry.get(job_id).resume()

    async def job_cancel(self, job_id: str, *, force: bool) -> None:
        """`job-cancel`; see `control.Backend`."""
        self.jobs_registry.get(job_id).cancel(force=force)

    async def job_complete(self, job_id: str) -> None:
        """`job-complete`; see `control.Backend`."""
        self.jobs_registry.get(job_id).complete()

    async def job_finalize(self, job_id: str) -> None:
        """`job-finalize`; see `control.Backend`."""
        self.jobs_registry.get(job_id).finalize()

    async def job_dismiss(self, job_id: str) -> None:
        """`job-dismiss`; see `control.Backend`."""
        self.jobs_registry.get(job_id).dismiss()

    async def set_speed(self, job_id: str, speed_bytes: int) -> None:
        """`block-job-set-speed`; see `control.Backend`."""
        self.jobs_registry.get(job_id).set_speed(speed_bytes)
