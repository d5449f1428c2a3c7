"""The life that all jobs share: statuses in order, pausing, speed, cancelling."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest

from replnbd.errors import ControlError, StateError
from replnbd.events import EventBus
from replnbd.jobs import Job, JobRegistry, JobStatus


class Counting(Job):
    """Counts turns until told to stop; may fail."""

    type = "commit"

    def __init__(self, bus: EventBus, bytes_per_turn: int = 0) -> None:
        super().__init__("job0", bus)
        self.turns = 0
        self.stop_at = 1 << 60
        self.failure: Exception | None = None
        self.ended = 0
        self._bytes = bytes_per_turn

    async def run(self) -> None:
        while self.turns < self.stop_at:
            if self.failure is not None:
                raise self.failure
            self.turns += 1
            await self.pause_point(self._bytes)

    def on_end(self) -> None:
        self.ended += 1


def watched(**options: int) -> tuple[Counting, list[tuple[str, dict[str, Any]]]]:
    bus = EventBus()
    events: list[tuple[str, dict[str, Any]]] = []
    bus.subscribe(lambda name, data: events.append((name, data)))
    return Counting(bus, **options), events


def statuses(events: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [data["status"] for name, data in events if name == "JOB_STATUS_CHANGE"]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_a_job_that_ends_well_passes_through_its_statuses_in_order() -> None:
    job, events = watched()
    job.stop_at = 3
    job.start()
    await job.wait()
    assert statuses(events) == [*("created", "running", "waiting", "pending", "concluded", "null")]
    assert job.ended == 1
    assert events[-3][0] == "BLOCK_JOB_COMPLETED"
    assert "error" not in events[-3][1]


async def test_a_job_that_fails_says_why() -> None:
    job, events = watched()
    job.failure = OSError(errno.EIO, "the disk is gone")
    job.start()
    await job.wait()
    assert statuses(events) == ["created", "running", "aborting", "concluded", "null"]
    names = [name for name, _ in events]
    assert names.index("BLOCK_JOB_ERROR") < names.index("BLOCK_JOB_COMPLETED")
    assert events[names.index("BLOCK_JOB_COMPLETED")][1]["error"] == "the disk is gone"


async def test_a_bug_in_a_job_ends_it_and_nothing_else() -> None:
    job, _ = watched()
    job.failure = ZeroDivisionError("oops")
    job.start()
    await job.wait()
    assert job.error is not None
    assert job.error.errno == errno.EIO
    assert job.status is JobStatus.NULL


async def test_a_paused_job_stands_still_until_it_is_resumed() -> None:
    job, events = watched()
    job.start()
    await until(lambda: job.turns > 3)
    job.pause()
    with pytest.raises(StateError, match=r"^Job is already paused$"):
        job.pause()
    for _ in range(10):
        await asyncio.sleep(0)
    stood = job.turns
    for _ in range(10):
        await asyncio.sleep(0)
    assert job.turns == stood
    job.resume()
    with pytest.raises(StateError, match=r"^Can't resume a job that was not paused$"):
        job.resume()
    job.stop_at = stood + 5
    await job.wait()
    assert statuses(events) == [
        *("created", "running", "paused", "running"),
        *("waiting", "pending", "concluded", "null"),
    ]


@pytest.mark.parametrize("nap", ["paused", "slow", "busy"])
async def test_a_cancelled_job_ends_at_once_whatever_it_waits_for(nap: str) -> None:
    job, events = watched(bytes_per_turn=1 << 20)
    if nap == "slow":
        job.set_speed(1)
    job.start()
    await until(lambda: job.turns > 0)
    if nap == "paused":
        job.pause()
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        job.cancel()
        await job.wait()
    assert job.cancelled
    paused = ["paused", "running"] if nap == "paused" else []
    assert statuses(events) == ["created", "running", *paused, "aborting", "concluded", "null"]
    assert "BLOCK_JOB_CANCELLED" in [name for name, _ in events]
    with pytest.raises(StateError, match=r"in state 'null' cannot accept command verb 'cancel'"):
        job.cancel()


async def test_a_speed_limit_that_is_lifted_is_lifted_now() -> None:
    job, _ = watched(bytes_per_turn=1 << 20)
    job.set_speed(1)  # 12 days a turn
    job.start()
    await until(lambda: job.turns > 0)
    job.stop_at = 5
    with pytest.raises(StateError, match=r"^Parameter 'speed' expects a non-negative value$"):
        job.set_speed(-1)
    job.set_speed(0)
    async with asyncio.timeout(10):
        await job.wait()
    assert job.turns == 5


async def test_a_job_that_has_ended_is_not_found_any_more() -> None:
    registry = JobRegistry()
    job, _ = watched()
    registry.add(job)
    assert registry.get("job0") is registry.get_block_job("job0") is job
    job.stop_at = 0
    job.start()
    await job.wait()
    with pytest.raises(ControlError, match=r"^Job not found$"):
        registry.get("job0")
    with pytest.raises(ControlError, match=r"^Block job 'job0' not found$") as caught:
        registry.get_block_job("job0")
    assert caught.value.error_class == "DeviceNotActive"
    assert list(registry) == []
