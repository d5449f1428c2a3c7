"""The control socket from the outside: clients, order, events, limits, life and death."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from control_fakes import FakeBackend, RawClient

from replnbd import __version__
from replnbd.control import ControlServer
from replnbd.control.server import CLIENTS_MAX
from replnbd.control.session import EVENT_BACKLOG_MAX
from replnbd.control.wire import MESSAGE_SIZE_MAX
from replnbd.errors import ConfigError, StateError


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def server(backend: FakeBackend, short_dir: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(backend, short_dir / "qmp.sock")
    await server.start()
    yield server
    await server.close()


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


# Section: the protocol


async def test_greeting_names_replnbd_in_the_shape_of_qemu(server: ControlServer) -> None:
    client = RawClient(*await asyncio.open_unix_connection(server.path))
    greeting = json.loads(await client.line())
    major, minor, micro = (int(part) for part in __version__.split("."))
    assert greeting == {
        "QMP": {
            "version": {
                "qemu": {"major": major, "minor": minor, "micro": micro},
                "package": f"replnbd {__version__}",
            },
            "capabilities": ["oob"],
        }
    }
    await client.close()


async def test_commands_of_one_packet_are_answered_in_order_with_their_ids(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.negotiated(server.path)
    await client.send(
        b"{'execute':'xen-set-replication','id':1,'arguments':{'enable':true,'primary':false}}"
        b'{"execute":"xen-colo-do-checkpoint","id":[2,{"a":null}]}'
        b'{"execute":"xen-set-replication","id":"3","arguments":'
        b'{"enable":false,"failover":true,"primary":false}}'
    )
    replies = [json.loads(await client.line()) for _ in range(3)]
    assert replies == [
        {"return": {}, "id": 1},
        {"return": {}, "id": [2, {"a": None}]},
        {"return": {}, "id": "3"},
    ]
    assert backend.calls == [
        ("set_replication", True, False, False),
        ("checkpoint",),
        ("checkpoint done",),
        ("set_replication", False, False, True),
    ]
    await client.close()


async def test_end_of_input_comes_after_the_answers(server: ControlServer) -> None:
    client = await RawClient.connect(server.path)
    await client.send(b'{"execute":"qmp_capabilities"}{"execute":"query-jobs"}{"execute"')
    client.writer.write_eof()
    assert await client.line() == b'{"return": {}}'
    assert b"backup-colo0" in await client.line()
    assert await client.line() == b""
    await client.close()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ('"query-xen-replication-status"', {"error": False}),
        ('"x-replnbd-status"', {"disks": []}),
        ('"x-replnbd-reset","arguments":{"force":true}', {}),
        ('"nbd-server-add","arguments":{"device":"top0"}', {}),
        ('"nbd-server-remove","arguments":{"name":"colo0","mode":"hard"}', {}),
        ('"nbd-server-stop"', {}),
        ('"job-pause","arguments":{"id":"backup-colo0"}', {}),
        ('"job-resume","arguments":{"id":"backup-colo0"}', {}),
        ('"job-cancel","arguments":{"id":"commit-colo0"}', {}),
        ('"block-job-set-speed","arguments":{"device":"commit-colo0","speed":5}', {}),
    ],
)
async def test_command_succeeds(server: ControlServer, command: str, answer: object) -> None:
    client = await RawClient.negotiated(server.path)
    reply = json.loads(await client.ask(b'{"execute":' + command.encode() + b"}"))
    assert reply == {"return": answer}
    await client.close()


async def test_arguments_reach_the_backend_with_qemus_defaults(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.negotiated(server.path)
    await client.ask(b'{"execute":"nbd-server-add","arguments":{"device":"top0"}}')
    await client.ask(
        b'{"execute":"nbd-server-add","arguments":'
        b'{"device":"top0","name":"n","description":"d","writable":true}}'
    )
    await client.ask(b'{"execute":"nbd-server-remove","arguments":{"name":"colo0"}}')
    await client.ask(b'{"execute":"x-replnbd-reset"}')
    assert backend.calls == [
        ("nbd_server_add", "top0", "top0", None, False),
        ("nbd_server_add", "top0", "n", "d", True),
        ("nbd_server_remove", "colo0", "safe"),
        ("reset", False),
    ]
    await client.close()


# Section: failures


@pytest.mark.parametrize(
    ("failure", "desc"),
    [
        (
            StateError("Block replication is running or done"),
            "Block replication is running or done",
        ),
        (OSError(28, "No space left on device"), "xen-set-replication: No space left on device"),
        (OSError(5, "Input/output error", "a.qcow2"), "a.qcow2: Input/output error"),
        (TimeoutError(), "xen-set-replication: TimeoutError"),
    ],
)
async def test_expected_failure_is_a_generic_error_with_its_text(
    server: ControlServer, backend: FakeBackend, failure: Exception, desc: str
) -> None:
    backend.failure = failure
    client = await RawClient.negotiated(server.path)
    command = b'{"execute":"xen-set-replication","arguments":{"enable":true,"primary":false}}'
    reply = json.loads(await client.ask(command))
    assert reply == {"error": {"class": "GenericError", "desc": desc}}
    await client.close()


async def test_bug_in_a_handler_is_logged_and_the_session_lives(
    server: ControlServer, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = ZeroDivisionError("the bug")
    client = await RawClient.negotiated(server.path)
    reply = json.loads(
        await client.ask(
            b'{"execute":"xen-set-replication","id":7,"arguments":{"enable":true,"primary":false}}'
        )
    )
    assert reply["error"]["class"] == "GenericError"
    assert reply["error"]["desc"].startswith("internal error")
    assert reply["id"] == 7
    assert "ZeroDivisionError: the bug" in caplog.text
    assert b"return" in await client.ask(b'{"execute":"query-jobs"}')
    await client.close()


async def test_result_that_is_no_json_is_an_internal_error(
    server: ControlServer, backend: FakeBackend
) -> None:
    backend.reported = {"ratio": float("nan")}
    client = await RawClient.negotiated(server.path)
    reply = json.loads(await client.ask(b'{"execute":"x-replnbd-status","id":1}'))
    assert reply["error"]["desc"].startswith("internal error")
    assert reply["id"] == 1
    await client.close()


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
