"""QEMU's own QMP people drive a daemon: the program qmp-shell, the library qemu.qmp, several of
them at once; and what they are told of it, in which order."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from interop_support import KIB, MIB, Twin, assert_same, fresh_seed, mottled, random_requests
from peers import PeerError, ReplnbdDaemon, ReplnbdDisk, run_replnbd, wait_until
from qemu.qmp import EventListener, ExecuteError, QMPClient

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 4 * MIB
TIMEOUT_S = 30.0
PROMPT = b"(QEMU) "
ENABLE = {"enable": True, "primary": False}
FAIL_OVER = {"enable": False, "primary": False, "failover": True}


class QmpShell:
    """A running qmp-shell, spoken to as a person would: a line in, what it prints out."""

    def __init__(self, socket: Path, home: Path, *options: str) -> None:
        program = Path(sys.executable).with_name("qmp-shell")
        self._popen = subprocess.Popen(
            [program, *options, str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": str(home)},  # it writes a history there
        )
        try:
            self.banner = self._until_prompt()
        except BaseException:
            self._popen.kill()
            self._popen.wait()
            raise

    def _until_prompt(self) -> str:
        assert self._popen.stdout is not None
        said, deadline = b"", time.monotonic() + TIMEOUT_S
        while not said.endswith(PROMPT):
            ready, _, _ = select.select([self._popen.stdout], [], [], deadline - time.monotonic())
            data = os.read(self._popen.stdout.fileno(), 65536) if ready else b""
            if not data:
                raise PeerError(f"qmp-shell ended, or hangs, after {said!r}")
            said += data
        return said[: -len(PROMPT)].decode()

    def say(self, line: str) -> str:
        """What it prints for a line."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(line.encode() + b"\n")
        self._popen.stdin.flush()
        return self._until_prompt()

    def execute(self, line: str) -> Any:
        """The value that a command returned; PeerError with the text of an error."""
        answer = json.loads(self.say(line))
        if "error" in answer:
            raise PeerError(f"{line}: {answer['error']['class']}: {answer['error']['desc']}")
        return answer["return"]

    def events(self) -> list[dict[str, Any]]:
        """The events since the last time: it shows them after an empty line."""
        self.execute("query-version")  # it looks at its socket during commands only
        return [ast.literal_eval(line) for line in self.say("").splitlines()]

    def leave(self) -> None:
        """End of input, and exit status 0."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        assert self._popen.wait(TIMEOUT_S) == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # a line that a dead shell never read


@pytest.fixture
def rng() -> random.Random:
    return random.Random(fresh_seed())


@pytest.fixture
def twin(rng: random.Random) -> Twin:
    return Twin(mottled(rng, SIZE))


@pytest.fixture
def daemon(short_dir: Path, twin: Twin) -> Iterator[ReplnbdDaemon]:
    """A daemon in stage none."""
    disk = ReplnbdDisk.create(short_dir, "colo0", "top0", bytes(twin.primary))
    with ReplnbdDaemon(short_dir, [disk]) as daemon:
        yield daemon


def write_both(daemon: ReplnbdDaemon, twin: Twin, rng: random.Random) -> None:
    """Requests of the primary and of the standby; both exports are compared whole."""
    with daemon.connect("colo0") as primary, daemon.connect("top0") as standby:
        random_requests(rng, primary, twin.primary, 30, length_max=100 * KIB)
        random_requests(rng, standby, twin.view, 30, length_max=100 * KIB)
        assert_same(primary.pread(0, SIZE), twin.primary, "colo0")
        assert_same(standby.pread(0, SIZE), twin.view, "top0")


def tell(events: list[dict[str, Any]]) -> list[str]:
    """Events as short lines; what is in them, without times."""
    lines = []
    for event in events:
        name, data = event["event"], event["data"]
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        match name:
            case "JOB_STATUS_CHANGE":
                lines.append(f"{data['id']} {data['status']}")
            case "x-replnbd-stage":
                lines.append(f"{data['device']}: {data['previous']} -> {data['stage']}")
            case "x-replnbd-checkpoint":
                lines.append(f"{data['device']}: checkpoint {data['count']}")
            case "BLOCK_JOB_COMPLETED":
                assert data["len"] == data["offset"]
                assert "error" not in data
                lines.append(f"{data['type']} job {data['device']} completed")
            case _:
                lines.append(f"{name} {data}")
    return lines


# Section: what a run tells

START_TOLD = [
    "colo0: checkpoint 1",
    "backup-colo0 created",
    "backup-colo0 running",
    "colo0: none -> running",
]
CHECKPOINT_TOLD = ["colo0: checkpoint 2"]
# The stage comes before the end of the job that led to it: whoever waits for the job finds it.
FAILOVER_TOLD = [
    "commit-colo0 created",
    "colo0: running -> failover",
    "commit-colo0 running",
    "commit-colo0 waiting",
    "commit-colo0 pending",
    "colo0: failover -> done",
    "commit job commit-colo0 completed",
    "commit-colo0 concluded",
    "commit-colo0 null",
]
# Amid those of the failover that ends it.
BACKUP_END_TOLD = [
    "backup-colo0 waiting",
    "backup-colo0 pending",
    "backup job backup-colo0 completed",
    "backup-colo0 concluded",
    "backup-colo0 null",
]
RESET_TOLD = ["colo0: done -> none"]


def assert_told(lines: list[str], *stories: list[str]) -> None:
    """`lines` are all the stories, each in its order; a story may run amid another."""
    assert sorted(lines) == sorted(line for story in stories for line in story)
    for story in stories:
        assert [line for line in lines if line in story] == story


def test_qmp_shell_takes_a_standby_through_its_life(
    daemon: ReplnbdDaemon, twin: Twin, rng: random.Random, short_dir: Path
) -> None:
    with QmpShell(daemon.control_socket, short_dir) as shell:
        version = shell.execute("query-version")
        assert version["package"].startswith("replnbd ")
        numbers = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
        assert f"Connected to QEMU {numbers}" in shell.banner
        status = "query-xen-replication-status"
        idle = {"error": True, "desc": "Block replication is not running"}
        assert shell.execute(status) == idle
        assert shell.execute("query-jobs") == []

        assert shell.execute("xen-set-replication enable=true primary=false") == {}
        assert_told(tell(shell.events()), START_TOLD)
        assert shell.execute(status) == {"error": False}
        (job,) = shell.execute("query-jobs")
        assert (job["id"], job["type"], job["status"]) == ("backup-colo0", "backup", "running")
        with pytest.raises(PeerError, match="GenericError: Block replication is running or done"):
            shell.execute("xen-set-replication enable=true primary=false")
        write_both(daemon, twin, rng)

        assert shell.execute("xen-colo-do-checkpoint") == {}
        twin.checkpoint()
        assert_told(tell(shell.events()), CHECKPOINT_TOLD)
        write_both(daemon, twin, rng)
        (disk,) = shell.execute("x-replnbd-status")["disks"]
        assert (disk["stage"], disk["checkpoints"]) == ("running", 2)
        assert disk["hidden-bytes"] > 0
        assert disk["active-bytes"] > 0
        with pytest.raises(PeerError, match="'reset' is not possible in stage 'running'"):
            shell.execute("x-replnbd-reset")

        failover = "xen-set-replication enable=false primary=false failover=true"
        assert shell.execute(failover) == {}
        wait_until(lambda: shell.execute("query-jobs") == [], "the end of the commit job")
        assert_told(tell(shell.events()), FAILOVER_TOLD, BACKUP_END_TOLD)
        assert shell.execute(status) == {"error": False}
        with daemon.connect("top0") as standby:
            assert_same(standby.pread(0, SIZE), twin.view, "top0 after the failover")

        assert shell.execute("x-replnbd-reset") == {}
        assert_told(tell(shell.events()), RESET_TOLD)
        assert shell.execute(status) == idle
        with pytest.raises(PeerError, match="CommandNotFound: The command no-such has not"):
            shell.execute("no-such")
        with pytest.raises(PeerError, match="GenericError: Parameter 'enable' is missing"):
            shell.execute("xen-set-replication primary=false")
        with pytest.raises(PeerError, match="DeviceNotActive: Block job 'x' not found"):
            shell.execute("block-job-set-speed device=x speed=1")
        shell.leave()
    daemon.quit()
    assert_same(daemon.disks[0].content(), twin.view, "the secondary disk")


def test_qmp_shell_pretty_and_verbose_and_an_end_by_quit(
    daemon: ReplnbdDaemon, short_dir: Path
) -> None:
    with QmpShell(daemon.control_socket, short_dir, "-p", "-v") as shell:
        echoed, answer = re.findall(r"^\{$.*?^\}$", shell.say("query-version"), re.M | re.S)
        assert json.loads(echoed) == {"execute": "query-version", "arguments": {}}
        assert json.loads(answer)["return"]["package"].startswith("replnbd ")
        # It is disconnected, sooner or later: the answer may or may not be printed.
        try:
            shell.say("quit")
        except PeerError:
            pass
    assert daemon.process.wait() == 0, daemon.process.failure("did not end well")
    assert not daemon.control_socket.exists()


async def connect(daemon: ReplnbdDaemon, name: str) -> QMPClient:
    client = QMPClient(name)
    await client.connect(str(daemon.control_socket))
    return client


async def heard(listener: EventListener, *stories: list[str]) -> list[str]:
    """What a listener hears: so many lines as the stories have, and they are those."""
    lines: list[str] = []
    async with asyncio.timeout(TIMEOUT_S):
        while len(lines) < sum(map(len, stories)):
            lines += tell([dict(await listener.get())])
    assert_told(lines, *stories)
    return lines


async def test_every_client_of_qemu_qmp_hears_the_same_story(
    daemon: ReplnbdDaemon, twin: Twin, rng: random.Random
) -> None:
    """One client commands, two listen to all, one only to jobs."""
    async with AsyncExitStack() as stack:
        clients = [await connect(daemon, f"client {number}") for number in range(4)]
        for client in clients:
            stack.push_async_callback(client.disconnect)
        told = []
        for client in clients[:3]:
            told.append(EventListener())
            stack.enter_context(client.listen(told[-1]))
        jobs = stack.enter_context(clients[3].listener("BLOCK_JOB_COMPLETED"))
        first = clients[0]
        assert await first.execute("xen-set-replication", ENABLE) == {}
        await asyncio.to_thread(write_both, daemon, twin, rng)
        assert await clients[1].execute("xen-colo-do-checkpoint") == {}
        twin.checkpoint()
        await asyncio.to_thread(write_both, daemon, twin, rng)
        assert await clients[2].execute("xen-set-replication", FAIL_OVER) == {}
        story = START_TOLD + CHECKPOINT_TOLD + FAILOVER_TOLD
        first_heard = await heard(told[0], story, BACKUP_END_TOLD)
        for listener in told[1:]:
            assert await heard(listener, story, BACKUP_END_TOLD) == first_heard
        await heard(jobs, *([f"{job} job {job}-colo0 completed"] for job in ("backup", "commit")))
        for client in clients:
            (disk,) = (await client.execute("x-replnbd-status"))["disks"]  # type: ignore[index]
            assert disk["stage"] == "done"
            assert await client.execute("query-jobs") == []
        assert await first.execute("x-replnbd-reset") == {}
        for listener in told:
            await heard(listener, RESET_TOLD)
    await asyncio.to_thread(daemon.quit)
    assert_same(daemon.disks[0].content(), twin.view, "the secondary disk")


async def test_of_many_clients_that_start_at_once_one_does(daemon: ReplnbdDaemon) -> None:
    async with AsyncExitStack() as stack:
        clients = [await connect(daemon, f"client {number}") for number in range(8)]
        for client in clients:
            stack.push_async_callback(client.disconnect)
        starts = [client.execute("xen-set-replication", ENABLE) for client in clients]
        answers = await asyncio.gather(*starts, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, ExecuteError)]
        assert len(refused) == len(clients) - 1
        assert {str(answer) for answer in refused} == {"Block replication is running or done"}
        # Commands of all of them, and queries amid them: each gets its own answer.
        commands = [
            client.execute(command)
            for client in clients
            for command in ("xen-colo-do-checkpoint", "query-jobs", "xen-colo-do-checkpoint")
        ]
        answers = await asyncio.gather(*commands)
        assert answers[0::3] == answers[2::3] == [{}] * len(clients)
        assert [len(jobs) for jobs in answers[1::3]] == [1] * len(clients)  # type: ignore[arg-type]
        (disk,) = (await clients[0].execute("x-replnbd-status"))["disks"]  # type: ignore[index]
        assert disk["checkpoints"] == 1 + 2 * len(clients)


async def test_a_client_that_hangs_up_in_mid_command_leaves_the_others_alone(
    daemon: ReplnbdDaemon, twin: Twin, rng: random.Random
) -> None:
    stays = await connect(daemon, "stays")
    try:
        with stays.listener("x-replnbd-stage") as stages:
            reader, writer = await asyncio.open_unix_connection(str(daemon.control_socket))
            assert b"QMP" in await reader.readline()
            writer.write(b'{"execute": "qmp_capabilities"}')
            assert await reader.readline() == b'{"return": {}}\r\n'
            command = {"execute": "xen-set-replication", "arguments": ENABLE}
            writer.write(json.dumps(command).encode() + b'{"execute": "query-')
            writer.close()
            await heard(stages, ["colo0: none -> running"])
        await asyncio.to_thread(write_both, daemon, twin, rng)
        assert len(await stays.execute("query-jobs")) == 1  # type: ignore[arg-type]
    finally:
        await stays.disconnect()


async def test_shell_library_and_our_command_line_together(
    daemon: ReplnbdDaemon, twin: Twin, rng: random.Random, short_dir: Path
) -> None:
    """What one does, the others see; with the daemon's own client on the socket, too."""
    library = await connect(daemon, "library")
    try:
        with QmpShell(daemon.control_socket, short_dir) as shell, library.listener() as told:
            shell.execute("xen-set-replication enable=true primary=false")
            await heard(told, START_TOLD)
            await asyncio.to_thread(write_both, daemon, twin, rng)
            done = run_replnbd("checkpoint", "--control", daemon.control_socket)
            assert done == (0, "colo0: running, checkpoint 2\n", "")
            twin.checkpoint()
            await heard(told, CHECKPOINT_TOLD)
            await asyncio.to_thread(write_both, daemon, twin, rng)
            listed = run_replnbd("jobs", "--json", "--control", daemon.control_socket)
            assert json.loads(listed.stdout) == shell.execute("query-jobs")
            assert await library.execute("xen-set-replication", FAIL_OVER) == {}
            await heard(told, FAILOVER_TOLD, BACKUP_END_TOLD)
            shown = run_replnbd("status", "--json", "--control", daemon.control_socket)
            assert json.loads(shown.stdout) == shell.execute("x-replnbd-status")
            assert daemon.stages() == {"done"}
            done = run_replnbd("reset", "--control", daemon.control_socket)
            assert done == (0, "colo0: none\n", "")
            story = START_TOLD + CHECKPOINT_TOLD + FAILOVER_TOLD + RESET_TOLD
            assert_told(tell(shell.events()), story, BACKUP_END_TOLD)
            shell.leave()
    finally:
        await library.disconnect()
    await asyncio.to_thread(daemon.quit)
    assert_same(daemon.disks[0].content(), twin.view, "the secondary disk")
