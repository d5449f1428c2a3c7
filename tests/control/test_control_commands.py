"""The commands from the outside: greeting, order, ids, arguments, failures."""

from __future__ import annotations

import asyncio
import json

import pytest
from control_fakes import FakeBackend, RawClient

from replnbd import __version__
from replnbd.control import ControlServer
from replnbd.errors import StateError

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
        b'{"execute":"xen-set-replication","id":4,"arguments":'
        b'{"enable":false,"failover":true,"primary":false,"x-replnbd-to":"latest"}}'
    )
    replies = [json.loads(await client.line()) for _ in range(4)]
    assert replies == [
        {"return": {}, "id": 1},
        {"return": {}, "id": [2, {"a": None}]},
        {"return": {}, "id": "3"},
        {"return": {}, "id": 4},
    ]
    assert backend.calls == [
        ("set_replication", True, False, False),
        ("checkpoint",),
        ("checkpoint done",),
        ("set_replication", False, False, True),
        ("set_replication", False, False, True, "latest"),
    ]
    await client.close()


async def test_a_failover_has_one_of_three_targets(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.negotiated(server.path)
    for arguments, desc in (
        (
            {"enable": False, "primary": False, "failover": True, "x-replnbd-to": "moon"},
            "Parameter 'x-replnbd-to' does not accept value 'moon'",
        ),
        (
            {"enable": False, "primary": False, "x-replnbd-to": "latest"},
            "Parameter 'x-replnbd-to' is only for a failover",
        ),
    ):
        message = {"execute": "xen-set-replication", "arguments": arguments}
        await client.send(json.dumps(message).encode())
        assert json.loads(await client.line())["error"] == {"class": "GenericError", "desc": desc}
    assert backend.calls == []
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


@pytest.mark.parametrize(
    ("command", "desc"),
    [
        (
            '"block-job-set-speed","arguments":{"device":"commit-colo0","speed":-1}',
            "Parameter 'speed' expects a non-negative value",
        ),
        (
            '"nbd-server-add","arguments":{"device":"top0","bitmap":"b0"}',
            "Bitmap 'b0' is not found",
        ),
        ('"job-pause","arguments":{"id":"colo0"}', "Job not found"),
        ('"nbd-server-remove","arguments":{"name":"top0"}', "Export 'top0' is not found"),
    ],
)
async def test_what_no_backend_has_is_refused_before_it(
    server: ControlServer, backend: FakeBackend, command: str, desc: str
) -> None:
    client = await RawClient.negotiated(server.path)
    reply = json.loads(await client.ask(b'{"execute":' + command.encode() + b"}"))
    assert reply == {"error": {"class": "GenericError", "desc": desc}}
    assert backend.calls == []
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
