"""A job that becomes ready: how it keeps up, and the ways to end it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest
from keeping_up import SIZE, KeepingUp

from replnbd.errors import ControlError, StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry, JobStatus

Events = list[tuple[str, dict[str, Any]]]
START = ["created", "running"]
WELL = ["waiting", "pending", "concluded", "null"]
CANCELLED = ["aborting", "concluded", "null"]


def watched(**options: Any) -> tuple[KeepingUp, Events]:
    bus = EventBus()
    events: Events = []
    bus.subscribe(lambda name, data: events.append((name, data)))
    return KeepingUp(bus, **options), events


async def ready(**options: Any) -> tuple[KeepingUp, Events]:
    job, events = watched(**options)
    job.copied.set()
    job.start()
    await reach(job, "ready")
    return job, events


async def reach(job: KeepingUp, status: str) -> None:
    async with asyncio.timeout(10):
        while job.status != status:
            await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def statuses(events: Events) -> list[str]:
    return [data["status"] for name, data in events if name == "JOB_STATUS_CHANGE"]


def block_job_events(events: Events) -> list[str]:
    return [name for name, _ in events if name.startswith("BLOCK_JOB")]


# Section: the ends


@pytest.mark.parametrize(
    ("end", "completed"),
    [(KeepingUp.complete, True), (lambda job: job.cancel(force=False), False)],
)
async def test_a_ready_job_that_is_told_to_end_ends_well(
    end: Callable[[KeepingUp], None], completed: bool
) -> None:
    job, events = await ready()
    assert events[-1] == (
        "BLOCK_JOB_READY",
        {"type": "mirror", "device": "resync", "len": SIZE, "offset": SIZE, "speed": 0},
    )
    end(job)
    assert statuses(events) == [*START, "ready"]  # its reply comes before what it leads to
    await job.wait()
    assert statuses(events) == [*START, "ready", *WELL]
    assert block_job_events(events) == ["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"]
    assert events[-3][0] == "BLOCK_JOB_COMPLETED"  # while pending
    assert "error" not in events[-3][1]
    assert (job.completed, job.cancelled, job.error, job.ended) == (completed, False, None, 1)


async def test_a_ready_job_that_is_cancelled_by_force_is_cancelled() -> None:
    job, events = await ready()
    job.cancel(force=True)
    await job.wait()
    assert statuses(events) == [*START, "ready", *CANCELLED]
    assert block_job_events(events) == ["BLOCK_JOB_READY", "BLOCK_JOB_CANCELLED"]


async def test_a_job_that_is_not_ready_yet_is_cancelled_with_or_without_force() -> None:
    job, events = watched()
    job.start()
    await settle()
    job.cancel(force=False)
    await job.wait()
    assert statuses(events) == [*START, *CANCELLED]


async def test_a_ready_job_that_fails_says_so() -> None:
    job, events = await ready()
    job.failure = OSError(errno.EIO, "the other host is gone")
    job.nudge()
    await job.wait()
    assert statuses(events) == [*START, "ready", *CANCELLED]
    assert block_job_events(events)[1:] == ["BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED"]
    assert events[-3][1]["error"] == "the other host is gone"


async def test_complete_is_for_jobs_that_have_it() -> None:
    job, _ = await ready()
    job.can_complete = False
    with pytest.raises(StateError, match=r"^The active block job 'resync' cannot be completed$"):
        job.complete()
    job.cancel()
    await job.wait()


# Section: keeping up


async def test_an_idle_job_takes_no_turns_until_it_is_nudged() -> None:
    job, _ = await ready()
    await settle()
    assert job.turns == 0
    job.todo = 3
    job.nudge()
    await settle()
    assert (job.turns, job.todo) == (3, 0)
    job.complete()
    await job.wait()


async def test_a_nudge_just_before_it_becomes_idle_is_not_lost() -> None:
    job, _ = await ready()
    job.todo = 1
    job.nudge()
    job.nudge()
    await asyncio.sleep(0)
    job.todo += 1
    job.nudge()
    await settle()
    assert job.todo == 0
    job.complete()
    await job.wait()


async def test_a_speed_limit_does_not_hold_up_an_end_that_is_wanted() -> None:
    job, _ = watched()
    job.copied.set()
    job.start()
    await reach(job, "ready")
    job.set_speed(1)
    job._debt_s = 1e6
    job.nudge()
    await settle()
    assert job.turns == 0
    job.complete()
    async with asyncio.timeout(10):
        await job.wait()


async def test_standby_is_ready_but_paused_and_an_end_waits_for_its_end() -> None:
    job, events = await ready()
    job.pause()
    assert job.status is JobStatus.STANDBY
    assert job.describe_block_job()["ready"]
    assert job.describe_block_job()["paused"]
    job.todo = 1
    job.nudge()
    with pytest.raises(
        StateError, match=r"^The block job for device 'resync' is currently paused$"
    ):
        job.cancel(force=False)
    job.complete()
    await settle()
    assert (job.status, job.turns) == (JobStatus.STANDBY, 0)
    job.resume()
    await job.wait()
    assert statuses(events) == [*START, "ready", "standby", "ready", *WELL]


async def test_a_job_in_standby_that_is_cancelled_is_ready_for_a_moment() -> None:
    job, events = await ready()
    job.pause()
    job.cancel()
    await job.wait()
    assert statuses(events) == [*START, "ready", "standby", "ready", *CANCELLED]


async def test_a_paused_job_does_not_become_ready_until_it_is_resumed() -> None:
    job, events = watched()
    job.start()
    await settle()
    job.pause()
    job.copied.set()
    await settle()
    assert statuses(events) == [*START, "paused"]
    job.resume()
    await reach(job, "ready")
    assert statuses(events) == [*START, "paused", "running", "ready"]
    job.complete()
    await job.wait()


# Section: pending and concluded


async def test_a_job_that_is_not_auto_finalized_waits_in_pending() -> None:
    job, events = await ready(auto_finalize=False)
    job.complete()
    await reach(job, "pending")
    assert events[-1] == ("BLOCK_JOB_PENDING", {"type": "mirror", "id": "resync"})
    await settle()
    assert (job.status, job.ended) == (JobStatus.PENDING, 0)
    job.finalize()
    await job.wait()
    assert statuses(events) == [*START, "ready", *WELL]


async def test_a_pending_job_can_still_be_cancelled() -> None:
    job, events = await ready(auto_finalize=False)
    job.complete()
    await reach(job, "pending")
    job.cancel()
    await job.wait()
    assert statuses(events) == [*START, "ready", "waiting", "pending", *CANCELLED]
    assert block_job_events(events)[-1] == "BLOCK_JOB_CANCELLED"


async def test_a_job_that_is_not_auto_dismissed_is_listed_until_it_is_dismissed() -> None:
    registry = JobRegistry()
    job, events = await ready(auto_dismiss=False)
    registry.add(job)
    job.cancel(force=False)
    await job.wait()
    assert statuses(events)[-1] == "concluded"
    assert registry.get("resync") is job
    described = job.describe_block_job()
    assert (described["status"], described["auto-dismiss"]) == ("concluded", False)
    assert not any(described[each] for each in ("ready", "busy", "paused"))
    with pytest.raises(ControlError, match=r"^Job ID 'resync' already in use$"):
        registry.check_new("resync")
    job.dismiss()
    assert statuses(events)[-1] == "null"
    registry.check_new("resync")
    with pytest.raises(ControlError, match=r"^Job not found$"):
        registry.get("resync")


@pytest.mark.parametrize("job_id", ["", "1x", "a b", "#a", "é", "-"])
def test_ids_of_jobs_are_as_qemu_wants_them(job_id: str) -> None:
    with pytest.raises(ControlError, match=f"^Invalid job ID '{job_id}'$"):
        JobRegistry().check_new(job_id)


def test_the_ids_of_the_disks_own_jobs_are_taken() -> None:
    with pytest.raises(ControlError, match=r"^Job ID 'commit-d' already in use$"):
        JobRegistry().check_new("commit-d")


# Section: who may be told what, when


async def at_status(status: str) -> KeepingUp:
    """A job that has got there."""
    if status in ("running", "paused"):
        job, _ = watched(auto_dismiss=False, auto_finalize=False)
        job.start()
        await settle()
    else:
        job, _ = await ready(auto_dismiss=False, auto_finalize=False)
    if status in ("paused", "standby"):
        job.pause()
    elif status in ("pending", "concluded"):
        job.complete()
        await reach(job, "pending")
        if status == "concluded":
            job.finalize()
            await job.wait()
    assert job.status == status
    return job


VERBS: dict[str, Callable[[KeepingUp], None]] = {
    "pause": KeepingUp.pause,
    "set-speed": lambda job: job.set_speed(1),
    "complete": KeepingUp.complete,
    "finalize": KeepingUp.finalize,
    "dismiss": KeepingUp.dismiss,
    "cancel": KeepingUp.cancel,
}
ACCEPTED = {
    "running": {"pause", "set-speed", "cancel"},
    "paused": {"set-speed", "cancel"},
    "ready": {"pause", "set-speed", "complete", "cancel"},
    "standby": {"set-speed", "complete", "cancel"},
    "pending": {"finalize", "cancel"},
    "concluded": {"dismiss"},
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("status", ACCEPTED)
async def test_a_status_accepts_its_verbs_and_refuses_others_in_qemus_words(
    status: str, verb: str
) -> None:
    job = await at_status(status)
    if verb in ACCEPTED[status]:
        VERBS[verb](job)
    else:
        text = f"Job 'resync' in state '{status}' cannot accept command verb '{verb}'"
        if verb == "pause" and status in ("paused", "standby"):
            text = "Job is already paused"
        with pytest.raises(StateError, match=f"^{text}$"):
            VERBS[verb](job)
    if job.status not in ("concluded", "null"):
        job.cancel()
        await job.wait()
