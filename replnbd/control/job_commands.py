"""The commands on jobs: QEMU's `job-...`, and the older `block-job-...`, which do the same but for
what is said here."""

from __future__ import annotations

from replnbd.control.backend import Backend, JsonObject
from replnbd.control.registry import Arguments, command, listed
from replnbd.control.schema import Argument
from replnbd.errors import ControlError

_ID = Argument("id", str)
_DEVICE = Argument("device", str)


@command("query-jobs")
async def query_jobs(backend: Backend, arguments: Arguments) -> list[JsonObject]:
    """JobInfo of every job."""
    return backend.jobs()


@command("query-block-jobs")
async def query_block_jobs(backend: Backend, arguments: Arguments) -> list[JsonObject]:
    """BlockJobInfo of every job."""
    return backend.block_jobs()


def _job(backend: Backend, job_id: str) -> str:
    if not listed(backend.jobs(), "id", job_id):
        raise ControlError("Job not found")
    return job_id


def _block_job(backend: Backend, job_id: str) -> str:
    if not listed(backend.jobs(), "id", job_id):
        raise ControlError(f"Block job '{job_id}' not found", "DeviceNotActive")
    return job_id


# Section: job-...


@command("job-pause", _ID)
async def job_pause(backend: Backend, arguments: Arguments) -> JsonObject:
    """Pause a job; "Job not found"."""
    await backend.job_pause(_job(backend, arguments["id"]))
    return {}


@command("job-resume", _ID)
async def job_resume(backend: Backend, arguments: Arguments) -> JsonObject:
    """Let a paused job go on; "Job not found"."""
    await backend.job_resume(_job(backend, arguments["id"]))
    return {}


@command("job-cancel", _ID)
async def job_cancel(backend: Backend, arguments: Arguments) -> JsonObject:
    """Cancel a job, one that is ready too; "Job not found". It ends after this has answered."""
    await backend.job_cancel(_job(backend, arguments["id"]), force=True)
    return {}


@command("job-complete", _ID)
async def job_complete(backend: Backend, arguments: Arguments) -> JsonObject:
    """Let a job that is ready end well; "Job not found"."""
    await backend.job_complete(_job(backend, arguments["id"]))
    return {}


@command("job-finalize", _ID)
async def job_finalize(backend: Backend, arguments: Arguments) -> JsonObject:
    """Let a job that is pending end; "Job not found"."""
    await backend.job_finalize(_job(backend, arguments["id"]))
    return {}


@command("job-dismiss", _ID)
async def job_dismiss(backend: Backend, arguments: Arguments) -> JsonObject:
    """Forget a job that is concluded; "Job not found"."""
    await backend.job_dismiss(_job(backend, arguments["id"]))
    return {}


# Section: block-job-...: the error class for a job that is not there is DeviceNotActive


@command("block-job-pause", _DEVICE)
async def block_job_pause(backend: Backend, arguments: Arguments) -> JsonObject:
    """As `job-pause`."""
    await backend.job_pause(_block_job(backend, arguments["device"]))
    return {}


@command("block-job-resume", _DEVICE)
async def block_job_resume(backend: Backend, arguments: Arguments) -> JsonObject:
    """As `job-resume`."""
    await backend.job_resume(_block_job(backend, arguments["device"]))
    return {}


@command("block-job-cancel", _DEVICE, Argument("force", bool, optional=True))
async def block_job_cancel(backend: Backend, arguments: Arguments) -> JsonObject:
    """Cancel a job. One that is ready ends well instead, unless `force`; one that is paused is
    refused, unless `force`."""
    job_id = _block_job(backend, arguments["device"])
    await backend.job_cancel(job_id, force=arguments.get("force", False))
    return {}


@command("block-job-complete", _DEVICE)
async def block_job_complete(backend: Backend, arguments: Arguments) -> JsonObject:
    """As `job-complete`."""
    await backend.job_complete(_block_job(backend, arguments["device"]))
    return {}


@command("block-job-finalize", _ID)
async def block_job_finalize(backend: Backend, arguments: Arguments) -> JsonObject:
    """As `job-finalize`."""
    await backend.job_finalize(_block_job(backend, arguments["id"]))
    return {}


@command("block-job-dismiss", _ID)
async def block_job_dismiss(backend: Backend, arguments: Arguments) -> JsonObject:
    """As `job-dismiss`."""
    await backend.job_dismiss(_block_job(backend, arguments["id"]))
    return {}


@command("block-job-set-speed", _DEVICE, Argument("speed", int))
async def block_job_set_speed(backend: Backend, arguments: Arguments) -> JsonObject:
    """Limit a job to `speed` bytes per second, 0 for no limit."""
    job_id, speed_bytes = _block_job(backend, arguments["device"]), arguments["speed"]
    if speed_bytes < 0:
        raise ControlError("Parameter 'speed' expects a non-negative value")
    await backend.set_speed(job_id, speed_bytes)
    return {}
