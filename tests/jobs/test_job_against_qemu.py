"""The life of a job that becomes ready, command by command: the same answers and events as from
QEMU's mirror."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from keeping_up import SIZE, KeepingUp
from peers import PeerError, Process, QmpClient

from replnbd.errors import ControlError, StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry

pytestmark = [pytest.mark.interop, pytest.mark.slow]

BOUND_S = 20.0
LARGE = 64 * SIZE
"""More than QEMU copies before it thinks of a speed limit."""


class Step(NamedTuple):
    """A command, and the status that it leads to ("": none in particular; "gone": no job)."""

    command: str
    status: str = ""


class Record:
    """Of one job: answers ("" or an error's text), what `query-block-jobs` says after each step,
    and all events."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.described: list[dict[str, Any] | None] = []
        self.events: list[tuple[str, dict[str, Any]]] = []


# Section: QEMU's


class Qemu:
    """With two nodes to mirror."""

    def __init__(self, folder: Path) -> None:
        socket = folder / "qmp"
        argv = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-nodefaults", "-S"]
        argv += ["-qmp", f"unix:{socket},server=on,wait=off"]
        self.process = Process(argv, log=folder / "qemu.log")
        self.qmp = self.process.reach(lambda: QmpClient(socket))
        for name, size in (("a", SIZE), ("b", SIZE), ("large-a", LARGE), ("large-b", LARGE)):
            path = folder / name
            path.write_bytes(os.urandom(SIZE) * (size // SIZE))
            file = {"driver": "file", "node-name": name, "filename": str(path)}
            self.qmp.execute("blockdev-add", file)

    def run(self, options: dict[str, bool], steps: list[Step], first: str) -> Record:
        record = Record()
        self.qmp.events.clear()
        arguments: dict[str, Any] = {"job-id": "resync", "sync": "full", **options}
        if first == "ready":
            arguments |= {"device": "a", "target": "b"}
        else:
            arguments |= {"device": "large-a", "target": "large-b", "speed": 1}
        self.qmp.execute("blockdev-mirror", arguments)
        self._reach(first)
        for step in steps:
            command, key, more = COMMANDS[step.command]
            answer = self.qmp.answer(command, {key: "resync", **more})
            record.answers.append(answer.desc or "")
            self._reach(step.status)
            record.described.append(self._described())
        self.qmp.execute("query-status")  # all events before it are there
        record.events = [(event["event"], event["data"]) for event in self.qmp.events]
        return record

    def _described(self) -> dict[str, Any] | None:
        jobs = self.qmp.execute("query-block-jobs")
        return jobs[0] if jobs else None

    def _reach(self, status: str) -> None:
        deadline = time.monotonic() + BOUND_S
        while status:
            job = self._described()
            if (status if job is None else job["status"]) == status and (job is None) == (
                status == "gone"
            ):
                return
            if time.monotonic() > deadline:
                raise PeerError(f"no {status}: {job}")


# Section: ours


class Ours:
    """The same commands, by the methods of a job."""

    def __init__(self, options: dict[str, bool]) -> None:
        self.record = Record()
        bus = EventBus()
        bus.subscribe(lambda name, data: self.record.events.append((name, data)))
        self.registry = JobRegistry()
        names: dict[str, Any] = {key.replace("-", "_"): on for key, on in options.items()}
        self.job = KeepingUp(bus, **names)
        self.registry.add(self.job)

    async def run(self, steps: list[Step], first: str) -> Record:
        if first == "ready":
            self.job.copied.set()
        else:
            self.job.set_speed(1)
        self.job.start()
        await self._reach(first)
        for step in steps:
            try:
                METHODS[step.command](self._find(step.command))
                self.record.answers.append("")
            except (StateError, ControlError) as exc:
                self.record.answers.append(str(exc))
            await self._reach(step.status)
            self.record.described.append(self._described())
        return self.record

    def _find(self, command: str) -> KeepingUp:
        find = self.registry.get_block_job if command.startswith("block-") else self.registry.get
        job = find("resync")
        assert isinstance(job, KeepingUp)
        return job

    def _described(self) -> dict[str, Any] | None:
        jobs = [job.describe_block_job() for job in self.registry]
        return jobs[0] if jobs else None

    async def _reach(self, status: str) -> None:
        wanted = "null" if status == "gone" else status
        async with asyncio.timeout(BOUND_S):
            while status and self.job.status != wanted:
                await asyncio.sleep(0)


# Section: the same

COMMANDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "block-job-cancel": ("block-job-cancel", "device", {}),
    "block-job-cancel force": ("block-job-cancel", "device", {"force": True}),
    "block-job-pause": ("block-job-pause", "device", {}),
    "block-job-resume": ("block-job-resume", "device", {}),
    "block-job-complete": ("block-job-complete", "device", {}),
    "block-job-dismiss": ("block-job-dismiss", "id", {}),
    "block-job-finalize": ("block-job-finalize", "id", {}),
    "block-job-set-speed": ("block-job-set-speed", "device", {"speed": 4096}),
    "job-cancel": ("job-cancel", "id", {}),
    "job-pause": ("job-pause", "id", {}),
    "job-resume": ("job-resume", "id", {}),
    "job-complete": ("job-complete", "id", {}),
    "job-dismiss": ("job-dismiss", "id", {}),
    "job-finalize": ("job-finalize", "id", {}),
}
METHODS: dict[str, Callable[[KeepingUp], None]] = {
    name: {
        "cancel": lambda job: job.cancel(force=True),
        "pause": KeepingUp.pause,
        "resume": KeepingUp.resume,
        "complete": KeepingUp.complete,
        "dismiss": KeepingUp.dismiss,
        "finalize": KeepingUp.finalize,
        "set-speed": lambda job: job.set_speed(4096),
    }[name.removesuffix(" force").partition("job-")[2]]
    for name in COMMANDS
}
METHODS["block-job-cancel"] = lambda job: job.cancel(force=False)

EVERY = [Step(name) for name in COMMANDS]
NOT_AUTO = {"auto-dismiss": False}
SCENARIOS: dict[str, tuple[dict[str, bool], str, list[Step]]] = {
    "as the COLO daemon ends a resync": (
        NOT_AUTO,
        "ready",
        [Step("block-job-cancel", "concluded"), Step("block-job-dismiss", "gone")],
    ),
    "cancelled while it runs": (
        NOT_AUTO,
        "running",
        [Step("block-job-cancel", "concluded"), Step("job-dismiss", "gone")],
    ),
    "cancelled while it is paused": (
        {},
        "running",
        [
            Step("block-job-pause", "paused"),
            Step("block-job-cancel"),
            Step("block-job-cancel force", "gone"),
        ],
    ),
    "paused and resumed": (
        {},
        "running",
        [
            *(Step("job-resume"), Step("job-pause", "paused"), Step("job-pause")),
            *(Step("job-complete"), Step("job-dismiss"), Step("job-finalize")),
            *(Step("job-resume", "running"), Step("job-cancel", "gone"), Step("job-cancel")),
            Step("block-job-cancel"),
        ],
    ),
    "verbs of others while it runs": (
        {},
        "running",
        [
            *(Step("job-complete"), Step("block-job-complete"), Step("job-dismiss")),
            *(Step("block-job-finalize"), Step("block-job-resume"), Step("job-cancel", "gone")),
        ],
    ),
    "verbs of others while it is ready": (
        {},
        "ready",
        [
            *(Step("job-dismiss"), Step("block-job-dismiss"), Step("job-finalize")),
            *(Step("block-job-set-speed"), Step("job-resume"), Step("job-cancel", "gone")),
        ],
    ),
    "cancelled by force while it is ready": ({}, "ready", [Step("block-job-cancel force", "gone")]),
    "completed": ({}, "ready", [Step("block-job-complete", "gone")]),
    "completed in standby": (
        NOT_AUTO,
        "ready",
        [
            *(Step("job-pause", "standby"), Step("job-pause"), Step("job-complete")),
            *(Step("job-complete"), Step("job-dismiss"), Step("block-job-cancel")),
            *(Step("job-resume", "concluded"), Step("job-dismiss", "gone")),
        ],
    ),
    "cancelled in standby": (
        {},
        "ready",
        [Step("job-pause", "standby"), Step("job-cancel", "gone")],
    ),
    "every verb while it is concluded": (
        NOT_AUTO,
        "ready",
        [
            Step("block-job-cancel", "concluded"),
            *(step for step in EVERY if "dismiss" not in step.command),
            Step("job-dismiss", "gone"),
            *EVERY,
        ],
    ),
    "finalized by hand": (
        {"auto-finalize": False},
        "ready",
        [
            Step("block-job-cancel", "pending"),
            *(Step("job-pause"), Step("job-resume"), Step("job-complete"), Step("job-dismiss")),
            *(Step("block-job-set-speed"), Step("block-job-finalize", "gone")),
        ],
    ),
    "cancelled while it is pending": (
        {"auto-finalize": False, "auto-dismiss": False},
        "ready",
        [
            Step("job-complete", "pending"),
            Step("job-cancel", "concluded"),
            Step("job-dismiss", "gone"),
        ],
    ),
}
LOOSE = ("busy", "paused", "len", "offset")
"""`busy` is whatever QEMU's coroutine is doing just then, and QEMU calls pending paused. How far
each has got is its own business."""


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    qemu = Qemu(tmp_path_factory.mktemp("q"))
    yield qemu
    qemu.qmp.close()
    qemu.process.kill()


@pytest.mark.parametrize("name", SCENARIOS)
async def test_answers_events_and_descriptions_are_those_of_qemus_mirror(
    qemu: Qemu, name: str
) -> None:
    options, first, steps = SCENARIOS[name]
    theirs = qemu.run(options, steps, first)
    ours = await Ours(options).run(steps, first)
    assert ours.answers == theirs.answers
    assert [_firm(data) for _, data in ours.events] == [_firm(data) for _, data in theirs.events]
    assert [event for event, _ in ours.events] == [event for event, _ in theirs.events]
    for step, mine, other in zip(steps, ours.described, theirs.described, strict=True):
        assert _firm(mine) == _firm(other), step


def _firm(job: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if job is None else {key: job[key] for key in job if key not in LOOSE}
