"""Our own client, and QEMU's: the library qemu.qmp and the program qmp-shell."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from control_fakes import FakeBackend
from qemu.qmp import ExecuteError, QMPClient

from replnbd.control import ControlClient, ControlServer
from replnbd.errors import ConfigError, ControlError, ProtocolError, StateError

# Section: our client


async def test_own_client_executes_and_raises_what_the_server_says(
    server: ControlServer, backend: FakeBackend
) -> None:
    def talk() -> None:
        with ControlClient(server.path, timeout_s=20) as client:
            assert client.execute("query-version")["package"].startswith("replnbd")
            assert client.execute("xen-set-replication", enable=True, primary=False) == {}
            assert [job["id"] for job in client.execute("query-jobs")] == [
                "backup-colo0",
                "commit-colo0",
            ]
            with pytest.raises(ControlError, match="'x' not found") as caught:
                client.execute("block-job-set-speed", device="x", speed=1)
            assert caught.value.error_class == "DeviceNotActive"
            backend.failure = StateError("Block replication is running or done")
            with pytest.raises(ControlError, match="running or done"):
                client.execute("xen-set-replication", enable=True, primary=False)

    await asyncio.to_thread(talk)
    assert backend.calls[0] == ("set_replication", True, False, False)


async def test_own_client_keeps_events_that_come_before_a_reply(server: ControlServer) -> None:
    def talk() -> list[str]:
        with ControlClient(server.path, timeout_s=20) as client:
            assert client.execute("quit") == {}
            event = client.next_event()
            assert event is not None
            assert client.next_event(timeout_s=0) is None
            return [event["event"]]

    assert await asyncio.to_thread(talk) == ["SHUTDOWN"]


async def test_own_client_waits_for_an_event_and_hears_of_the_end(
    server: ControlServer, backend: FakeBackend
) -> None:
    connected = asyncio.Event()
    loop = asyncio.get_running_loop()

    def talk() -> dict[str, Any] | None:
        with ControlClient(server.path, timeout_s=20) as client:
            loop.call_soon_threadsafe(connected.set)
            event = client.next_event()
            with pytest.raises(ProtocolError, match="server closed the connection"):
                client.next_event(timeout_s=20)
            return event

    talking = asyncio.create_task(asyncio.to_thread(talk))
    await connected.wait()
    backend.events.emit("x-replnbd-stage", device="colo0", stage="done")
    await server.close()
    event = await talking
    assert event is not None
    assert event["data"] == {"device": "colo0", "stage": "done"}


async def test_own_client_gives_up_on_a_command_that_takes_too_long(
    server: ControlServer, backend: FakeBackend
) -> None:
    backend.checkpoint_gate = asyncio.Event()

    def talk() -> None:
        with ControlClient(server.path, timeout_s=0.2) as client:
            with pytest.raises(ProtocolError, match="no answer in time"):
                client.execute("xen-colo-do-checkpoint")
            with pytest.raises(ProtocolError):
                client.execute("query-jobs")

    await asyncio.to_thread(talk)
    backend.checkpoint_gate.set()


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_own_client_says_in_one_line_that_nobody_is_there(short_dir: Path) -> None:
    missing = short_dir / "none.sock"
    with pytest.raises(ConfigError, match=r"no replnbd answers at .*none\.sock"):
        ControlClient(missing)
    stale = short_dir / "stale.sock"
    _listening(stale).close()
    with pytest.raises(ConfigError, match="no replnbd answers"):
        ControlClient(stale)
    with pytest.raises(ConfigError, match="path too long"):
        ControlClient(short_dir / ("x" * 200))


@pytest.mark.parametrize(
    ("talk", "text"),
    [
        (lambda peer: peer.close(), "closed the connection"),
        (lambda peer: peer.sendall(b"SSH-2.0\r\n"), "no JSON"),
        (lambda peer: peer.sendall(b"[]\n"), "no QMP message"),
        (lambda peer: peer.sendall(b"{}\n"), "no QMP message"),
        (lambda peer: peer.sendall(b'{"error":"full"}\n'), "no QMP message"),
        (lambda peer: peer.sendall(b'{"QMP":{}}\n{"error":{}}\n'), "no QMP message"),
        (lambda peer: None, "no answer in time"),
        (
            lambda peer: peer.sendall(b'{"error":{"class":"GenericError","desc":"full"}}\n'),
            "full",
        ),
    ],
)
async def test_own_client_refuses_a_peer_that_does_not_speak_qmp(
    short_dir: Path, talk: Callable[[socket.socket], None], text: str
) -> None:
    path = short_dir / "qmp.sock"
    with _listening(path) as listener:

        def serve() -> socket.socket:
            peer, _ = listener.accept()
            talk(peer)
            return peer

        serving = asyncio.create_task(asyncio.to_thread(serve))
        with pytest.raises(ProtocolError, match=text):
            await asyncio.to_thread(ControlClient, path, 0.2)
        (await serving).close()


# Section: QEMU's clients


@pytest.mark.interop
async def test_qemu_qmp_library_drives_the_server(
    server: ControlServer, backend: FakeBackend
) -> None:
    client = QMPClient("test")
    await client.connect(server.path)
    with client.listener(names=["JOB_STATUS_CHANGE", "SHUTDOWN"]) as listener:
        assert await client.execute("query-xen-replication-status") == {"error": False}
        backend.error = "I/O error occurred"
        status: Any = await client.execute("query-xen-replication-status")
        assert status == {"error": True, "desc": "I/O error occurred"}
        with pytest.raises(ExecuteError, match="only for stopping") as caught:
            await client.execute(
                "xen-set-replication", {"enable": True, "primary": False, "failover": True}
            )
        assert caught.value.error_class == "GenericError"
        backend.events.emit("JOB_STATUS_CHANGE", id="backup-colo0", status="concluded")
        event = await listener.get()
        assert event["data"] == {"id": "backup-colo0", "status": "concluded"}
        await client.execute("quit")
        assert (await listener.get())["event"] == "SHUTDOWN"
    await server.close()
    try:
        await client.disconnect()
    except EOFError:
        pass  # the library's word for a server that closed first


@pytest.mark.interop
@pytest.mark.slow
async def test_qmp_shell_drives_the_server(server: ControlServer, backend: FakeBackend) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qemu.qmp.qmp_shell",
        server.path,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    script = (
        b"xen-set-replication enable=true primary=false\n"
        b"query-xen-replication-status\n"
        b"job-pause id=nope\n"
        b"nbd-server-remove name=colo0 mode=hard\n"
    )
    output, _ = await asyncio.wait_for(process.communicate(script), 60)
    text = output.decode()
    assert process.returncode == 0, text
    assert json.dumps({"return": {"error": False}}) in text
    assert "Job not found" in text
    assert backend.calls == [
        ("set_replication", True, False, False),
        ("nbd_server_remove", "colo0", "hard"),
    ]
