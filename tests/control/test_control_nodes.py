"""The commands on nodes and jobs: what reaches the backend, and what is refused here alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from control_fakes import FakeBackend, RawClient

from replnbd.control import (
    ControlServer,
    InetServer,
    MirrorOptions,
    NbdNodeOptions,
    UnixServer,
)

INET = {"type": "inet", "host": "standby", "port": "10809"}
NBD: dict[str, Any] = {"driver": "nbd", "node-name": "nbd0", "server": INET}


async def ask(server: ControlServer, command: str, /, **arguments: Any) -> Any:
    """The answer, or the text of the error."""
    client = await RawClient.negotiated(server.path)
    given = {name.replace("_", "-"): value for name, value in arguments.items()}
    message = {"execute": command, "arguments": given}
    reply = json.loads(await client.ask(json.dumps(message).encode()))
    await client.close()
    return reply["return"] if "return" in reply else reply["error"]["desc"]


async def test_blockdev_add_of_the_colo_daemon(server: ControlServer, backend: FakeBackend) -> None:
    assert await ask(server, "blockdev-add", **NBD, export="colo0", detect_zeroes="on") == {}
    assert backend.calls == [
        (
            "blockdev_add",
            NbdNodeOptions("nbd0", InetServer("standby", "10809"), "colo0", detect_zeroes="on"),
        )
    ]


async def test_blockdev_add_with_all_that_counts(
    server: ControlServer, backend: FakeBackend
) -> None:
    unix = {"type": "unix", "path": "/run/nbd.sock"}
    more: dict[str, Any] = {"discard": "unmap", "detect_zeroes": "unmap", "reconnect_delay": 5}
    more |= {"open_timeout": 7, "cache": {"direct": True}, "read_only": False}
    assert await ask(server, "blockdev-add", **NBD | {"server": unix}, **more) == {}
    assert backend.calls == [
        (
            "blockdev_add",
            NbdNodeOptions(
                "nbd0", UnixServer("/run/nbd.sock"), "", "unmap", reconnect_delay_s=5,
                open_timeout_s=7,
            ),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"driver": "qcow2"}, "replnbd adds nodes of driver nbd, not of qcow2"),
        (
            {"server": {"type": "vsock", "cid": "1", "port": "2"}},
            "replnbd connects by inet or unix, not by vsock",
        ),
        ({"read-only": True}, "replnbd adds nodes to write to them, not read-only ones"),
        ({"x-dirty-bitmap": "b"}, "Parameter 'x-dirty-bitmap' is unexpected"),
        ({"server": INET | {"ipv4": True}}, "Parameter 'server.ipv4' is unexpected"),
        ({"node-name": "top0"}, "Duplicate nodes with node-name='top0'"),
    ],
)
async def test_what_qemu_has_and_replnbd_has_not_is_refused(
    server: ControlServer, backend: FakeBackend, arguments: dict[str, Any], desc: str
) -> None:
    assert await ask(server, "blockdev-add", **NBD | arguments) == desc
    assert backend.calls == []


async def test_mirror_of_the_colo_daemon(server: ControlServer, backend: FakeBackend) -> None:
    arguments = {"job_id": "resync", "device": "colo0", "target": "top0", "sync": "full"}
    more = {"on_target_error": "report", "on_source_error": "ignore", "auto_dismiss": False}
    assert await ask(server, "blockdev-mirror", **arguments, **more) == {}
    options = MirrorOptions(
        "resync", "colo0", "top0", "full", on_source_error="ignore", auto_dismiss=False
    )
    assert backend.calls == [("blockdev_mirror", options)]


async def test_a_mirror_is_called_like_its_device_unless_told_otherwise(
    server: ControlServer, backend: FakeBackend
) -> None:
    arguments: dict[str, Any] = {"device": "colo0", "target": "top0", "sync": "top"}
    more: dict[str, Any] = {"granularity": 65536, "buf_size": 1 << 20, "speed": 5}
    more |= {"copy_mode": "write-blocking", "auto_finalize": False}
    await ask(server, "blockdev-mirror", **arguments, **more)
    options = MirrorOptions(
        "colo0", "colo0", "top0", "full", speed=5, granularity=65536, buf_size=1 << 20,
        copy_mode="write-blocking", auto_finalize=False,
    )  # fmt: skip
    assert backend.calls == [("blockdev_mirror", options)]


async def test_children_come_and_go(server: ControlServer, backend: FakeBackend) -> None:
    assert await ask(server, "x-blockdev-change", parent="colo0", node="top0") == {}
    assert await ask(server, "x-blockdev-change", parent="colo0", child="children.1") == {}
    assert await ask(server, "blockdev-del", node_name="top0") == {}
    assert backend.calls == [
        ("add_child", "colo0", "top0"),
        ("remove_child", "colo0", "children.1"),
        ("blockdev_del", "top0"),
    ]


@pytest.mark.parametrize(
    ("command", "arguments", "call"),
    [
        ("job-cancel", {"id": "commit-colo0"}, ("job_cancel", "commit-colo0", True)),
        ("block-job-cancel", {"device": "commit-colo0"}, ("job_cancel", "commit-colo0", False)),
        (
            "block-job-cancel",
            {"device": "commit-colo0", "force": True},
            ("job_cancel", "commit-colo0", True),
        ),
        ("job-complete", {"id": "commit-colo0"}, ("job_complete", "commit-colo0")),
        ("job-finalize", {"id": "commit-colo0"}, ("job_finalize", "commit-colo0")),
        ("job-dismiss", {"id": "commit-colo0"}, ("job_dismiss", "commit-colo0")),
        ("block-job-pause", {"device": "commit-colo0"}, ("job_pause", "commit-colo0")),
        ("block-job-resume", {"device": "commit-colo0"}, ("job_resume", "commit-colo0")),
        ("block-job-complete", {"device": "commit-colo0"}, ("job_complete", "commit-colo0")),
        ("block-job-finalize", {"id": "commit-colo0"}, ("job_finalize", "commit-colo0")),
        ("block-job-dismiss", {"id": "commit-colo0"}, ("job_dismiss", "commit-colo0")),
    ],
)
async def test_a_command_on_a_job_reaches_it(
    server: ControlServer,
    backend: FakeBackend,
    command: str,
    arguments: dict[str, Any],
    call: tuple[Any, ...],
) -> None:
    assert await ask(server, command, **arguments) == {}
    assert backend.calls == [call]


# Section: yank


async def test_yank_cuts_all_or_none(server: ControlServer, backend: FakeBackend) -> None:
    known = {"type": "block-node", "node-name": "nbd0"}
    assert await ask(server, "query-yank") == [known]
    other = {"type": "block-node", "node-name": "top0"}
    assert await ask(server, "yank", instances=[known, other]) == "Instance not found"
    assert backend.calls == []
    assert await ask(server, "yank", instances=[known]) == {}
    assert backend.calls == [("yank", "nbd0")]


async def test_yank_may_be_asked_for_out_of_band(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = await RawClient.connect(server.path)
    await client.ask(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
    instances = b'{"instances":[{"type":"block-node","node-name":"nbd0"}]}'
    assert json.loads(await client.ask(b'{"exec-oob":"query-yank","id":1}'))["id"] == 1
    reply = await client.ask(b'{"exec-oob":"yank","id":2,"arguments":' + instances + b"}")
    assert json.loads(reply) == {"return": {}, "id": 2}
    assert backend.calls == [("yank", "nbd0")]
    refused = json.loads(await client.ask(b'{"exec-oob":"query-jobs"}'))
    assert refused["error"]["desc"] == "The command query-jobs does not support OOB"
    await client.close()


@pytest.mark.parametrize("command", ["stop", "cont", "query-status", "migrate"])
async def test_there_is_no_virtual_machine_here(server: ControlServer, command: str) -> None:
    assert await ask(server, command) == f"The command {command} has not been found"
