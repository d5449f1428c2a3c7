"""The control socket from the outside: several clients, events, limits, life and death."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from control_fakes import FakeBackend, RawClient

from replnbd.control import ControlServer
from replnbd.control.server import CLIENTS_MAX
from replnbd.control.session import EVENT_BACKLOG_MAX
from replnbd.control.wire import MESSAGE_SIZE_MAX
from replnbd.errors import ConfigError

# Section: the socket


async def test_socket_has_mode_0600_and_is_removed_at_close(
    backend: FakeBackend, short_dir: Path
) -> None:
    path = short_dir / "qmp.sock"
    server = ControlServer(backend, path)
    await server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await server.close()
    assert not path.exists()


async def test_socket_of_a_live_server_is_refused_in_one_line(
    server: ControlServer, backend: FakeBackend
) -> None:
    second = ControlServer(backend, server.path)
    with pytest.raises(ConfigError, match="in use by another process") as caught:
        await second.start()
    assert "\n" not in str(caught.value)
    await second.close()
    client = await RawClient.negotiated(server.path)
    await client.close()


async def test_stale_socket_file_is_replaced(backend: FakeBackend, short_dir: Path) -> None:
    path = short_dir / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(backend, path)
    await server.start()
    await (await RawClient.negotiated(path)).close()
    await server.close()


async def test_file_that_is_no_socket_is_refused_and_kept(
    backend: FakeBackend, short_dir: Path
) -> None:
    path = short_dir / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="is no socket"):
        await ControlServer(backend, path).start()
    assert path.read_text() == "data"


@pytest.mark.parametrize("name", ["missing/qmp.sock", "x" * 200])
async def test_unusable_path_is_one_config_error(
    backend: FakeBackend, short_dir: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="control socket"):
        await ControlServer(backend, short_dir / name).start()


async def test_live_server_that_is_too_busy_to_accept_is_not_taken_for_dead(
    backend: FakeBackend, short_dir: Path
) -> None:
    path = short_dir / "qmp.sock"
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        try:
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(path))
        except BlockingIOError:
            pass
        with pytest.raises(ConfigError, match="in use by another process"):
            await ControlServer(backend, path).start()
        assert path.is_socket()
        for client in waiting:
            client.close()


async def test_lock_on_the_directory_is_waited_for_but_not_without_end(
    backend: FakeBackend, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = short_dir / "qmp.sock"
    directory = os.open(short_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        monkeypatch.setattr("replnbd.control.server._LOCK_ATTEMPTS", 2)
        with pytest.raises(ConfigError, match="holds a lock on its directory"):
            await ControlServer(backend, path).start()
        monkeypatch.undo()
        server = ControlServer(backend, path)
        starting = asyncio.create_task(server.start())
        await asyncio.sleep(0)
        assert not path.exists()
    finally:
        os.close(directory)
    await starting
    await (await RawClient.negotiated(path)).close()
    await server.close()


async def test_close_leaves_a_socket_that_took_our_place(
    backend: FakeBackend, short_dir: Path
) -> None:
    path = short_dir / "qmp.sock"
    server = ControlServer(backend, path)
    await server.start()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        await server.close()
        assert path.is_socket()


async def test_of_two_servers_that_start_at_once_one_wins_and_works(
    backend: FakeBackend, short_dir: Path
) -> None:
    path = short_dir / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    servers = [ControlServer(backend, path) for _ in range(5)]
    started = await asyncio.gather(*(s.start() for s in servers), return_exceptions=True)
    assert sorted(type(result).__name__ for result in started) == ["ConfigError"] * 4 + ["NoneType"]
    await (await RawClient.negotiated(path)).close()
    for server in servers:
        await server.close()


async def test_connection_of_the_moment_of_closing_is_closed(
    backend: FakeBackend, short_dir: Path
) -> None:
    server = ControlServer(backend, short_dir / "qmp.sock")
    await server.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.path)
        client.setblocking(False)
        closing = asyncio.create_task(server.close())
        for _ in range(3):
            await asyncio.sleep(0)
        await closing
        client.setblocking(True)
        client.settimeout(20)
        try:
            while client.recv(4096):
                pass
        except ConnectionError:
            pass


# Section: several clients, events


async def test_long_command_does_not_hold_up_other_clients(
    server: ControlServer, backend: FakeBackend
) -> None:
    backend.checkpoint_gate = asyncio.Event()
    slow = await RawClient.negotiated(server.path)
    quick = await RawClient.negotiated(server.path)
    await slow.send(b'{"execute":"xen-colo-do-checkpoint"}{"execute":"query-commands"}')
    assert b"return" in await quick.ask(b'{"execute":"query-jobs"}')
    assert ("checkpoint done",) not in backend.calls
    backend.checkpoint_gate.set()
    assert await slow.line() == b'{"return": {}}'
    assert b"xen-set-replication" in await slow.line()
    await slow.close()
    await quick.close()


async def test_command_runs_to_its_end_when_its_client_leaves(
    server: ControlServer, backend: FakeBackend
) -> None:
    backend.checkpoint_gate = asyncio.Event()
    client = await RawClient.negotiated(server.path)
    other = await RawClient.negotiated(server.path)
    await client.send(b'{"execute":"xen-colo-do-checkpoint"}')
    while ("checkpoint",) not in backend.calls:
        await other.ask(b'{"execute":"query-jobs"}')
    await client.close()
    backend.checkpoint_gate.set()
    while ("checkpoint done",) not in backend.calls:
        await other.ask(b'{"execute":"query-jobs"}')
    await other.close()


async def test_events_reach_every_negotiated_client_and_no_other(
    server: ControlServer, backend: FakeBackend
) -> None:
    first = await RawClient.negotiated(server.path)
    second = await RawClient.negotiated(server.path)
    silent = await RawClient.connect(server.path)
    backend.events.emit("JOB_STATUS_CHANGE", id="backup-colo0", status="running")
    backend.events.emit("STOP")
    for client in (first, second):
        event = json.loads(await client.line())
        assert event.pop("timestamp").keys() == {"seconds", "microseconds"}
        assert event == {
            "event": "JOB_STATUS_CHANGE",
            "data": {"id": "backup-colo0", "status": "running"},
        }
        assert json.loads(await client.line()).keys() == {"timestamp", "event"}
    assert await silent.ask(b'{"execute":"qmp_capabilities"}') == b'{"return": {}}'
    for client in (first, second, silent):
        await client.close()


async def test_flood_of_io_errors_is_one_event_now_and_the_last_one_later(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.negotiated(server.path)
    for count in range(100_000):
        backend.events.emit("BLOCK_IO_ERROR", device="d", operation="write", count=count)
    backend.events.emit("x-replnbd-stage", device="d")
    assert json.loads(await client.line())["data"]["count"] == 0
    assert b"x-replnbd-stage" in await client.line()
    await server.close()  # which sends what was held back
    assert json.loads(await client.line())["data"]["count"] == 99_999
    assert await client.line() == b""
    await client.close()


async def test_client_that_never_reads_is_dropped_and_the_others_hear_everything(
    server: ControlServer, backend: FakeBackend
) -> None:
    deaf = await RawClient.negotiated(server.path)
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    reader = await RawClient.negotiated(server.path)
    text = "x" * 65536
    count = 4 * EVENT_BACKLOG_MAX // len(text)
    for _ in range(count):
        backend.events.emit("x-replnbd-test", text=text)
        assert text.encode() in await reader.line()
    deaf.writer.transport.resume_reading()  # type: ignore[attr-defined]
    received = 0
    while line := await deaf.reader.read(1 << 20):
        received += len(line)
    assert received < count * len(text)
    await deaf.close()
    await reader.close()


async def test_client_beyond_the_limit_is_refused_until_another_leaves(
    server: ControlServer,
) -> None:
    clients = [await RawClient.connect(server.path) for _ in range(CLIENTS_MAX)]
    refused = RawClient(*await asyncio.open_unix_connection(server.path))
    assert b"Too many clients" in await refused.line()
    assert await refused.line() == b""
    await refused.close()
    await clients.pop().close()
    while True:  # the server learns of it in a turn of its own
        client = RawClient(*await asyncio.open_unix_connection(server.path))
        greeting = await client.line()
        await client.close()
        if b"QMP" in greeting:
            break
    for client in clients:
        await client.close()


async def test_oversized_message_ends_that_connection_only(server: ControlServer) -> None:
    client = await RawClient.negotiated(server.path)
    other = await RawClient.negotiated(server.path)
    try:
        await client.send(b'{"execute":"' + b"x" * (MESSAGE_SIZE_MAX + 8192))
        assert b"JSON token size limit exceeded" in await client.line()
        assert await client.line() == b""
    except ConnectionError:
        pass  # it was closed with bytes of ours unread
    assert b"return" in await other.ask(b'{"execute":"query-jobs"}')
    await client.close()
    await other.close()


# Section: the end


async def test_quit_sends_shutdown_to_all_answers_and_tells_the_backend(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.negotiated(server.path)
    other = await RawClient.negotiated(server.path)
    event = json.loads(await client.ask(b'{"execute":"quit","id":9}'))
    assert event["event"] == "SHUTDOWN"
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert await client.line() == b'{"return": {}, "id": 9}'
    assert b"SHUTDOWN" in await other.line()
    assert backend.calls == [("quit",)]
    await server.close()
    assert await client.line() == b""
    assert await other.line() == b""
    await client.close()
    await other.close()


async def test_daemon_that_ends_answers_queries_and_refuses_changes(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.negotiated(server.path)
    server.refuse_changes("replnbd is shutting down")
    late = await RawClient.negotiated(server.path)
    for each in (client, late):
        assert b"replnbd is shutting down" in await each.ask(b'{"execute":"nbd-server-stop"}')
        assert b"return" in await each.ask(b'{"execute":"x-replnbd-status"}')
        await each.close()
    assert backend.calls == []


async def test_close_lets_a_running_command_answer(
    server: ControlServer, backend: FakeBackend
) -> None:
    backend.checkpoint_gate = asyncio.Event()
    client = await RawClient.negotiated(server.path)
    await client.send(b'{"execute":"xen-colo-do-checkpoint"}{"execute":"query-jobs"}')
    while not backend.calls:
        await asyncio.sleep(0)
    closing = asyncio.create_task(server.close(timeout_s=20))
    await asyncio.sleep(0)
    backend.checkpoint_gate.set()
    assert await client.line() == b'{"return": {}}'
    assert await client.line() == b""
    await closing
    await client.close()


async def test_close_cuts_off_what_does_not_end(
    server: ControlServer, backend: FakeBackend
) -> None:
    backend.checkpoint_gate = asyncio.Event()
    stuck = await RawClient.negotiated(server.path)
    await stuck.send(b'{"execute":"xen-colo-do-checkpoint"}')
    deaf = await RawClient.negotiated(server.path)
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    backend.events.emit("x-replnbd-test", text="x" * (EVENT_BACKLOG_MAX - 1000))
    while not backend.calls:
        await asyncio.sleep(0)
    await server.close(timeout_s=0.01)
    assert ("checkpoint done",) not in backend.calls
    assert not os.path.exists(server.path)
    deaf.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await stuck.close()
    await deaf.close()


# Section: the other loop

Scenario = Callable[[ControlServer, FakeBackend], Awaitable[None]]


@pytest.mark.parametrize(
    "scenario",
    [
        test_long_command_does_not_hold_up_other_clients,
        test_command_runs_to_its_end_when_its_client_leaves,
        test_events_reach_every_negotiated_client_and_no_other,
        test_client_that_never_reads_is_dropped_and_the_others_hear_everything,
        test_quit_sends_shutdown_to_all_answers_and_tells_the_backend,
        test_close_lets_a_running_command_answer,
        test_close_cuts_off_what_does_not_end,
    ],
)
def test_scenario_is_the_same_on_uvloop_which_the_daemon_uses(
    short_dir: Path, scenario: Scenario
) -> None:
    async def life() -> None:
        backend = FakeBackend()
        server = ControlServer(backend, short_dir / "qmp.sock")
        await server.start()
        await scenario(server, backend)
        await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(life())
