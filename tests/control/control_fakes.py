"""A backend of two jobs, two nodes and two exports, which writes down what it is asked to do."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from replnbd.control import MirrorOptions, NbdNodeOptions
from replnbd.errors import StateError
from replnbd.events import EventBus

SOCKET_TIMEOUT_S = 20.0  # a bound for a hang, far above what a loaded machine needs


class FakeBackend:
    """Implements replnbd.control.Backend; `calls` holds every change asked for."""

    def __init__(self) -> None:
        self._events = EventBus()
        self.calls: list[tuple[Any, ...]] = []
        self.error: str | None = None
        self.checkpoint_gate: asyncio.Event | None = None
        self.failure: Exception | None = None
        self.reported: dict[str, Any] = {"disks": []}

    @property
    def events(self) -> EventBus:
        return self._events

    async def set_replication(
        self, enable: bool, primary: bool, failover: bool, target: str | None = None
    ) -> None:
        to = () if target is None else (target,)
        self.calls.append(("set_replication", enable, primary, failover, *to))
        if self.failure is not None:
            raise self.failure

    def replication_error(self) -> str | None:
        return self.error

    async def checkpoint(self) -> None:
        self.calls.append(("checkpoint",))
        if self.checkpoint_gate is not None:
            await self.checkpoint_gate.wait()
        self.calls.append(("checkpoint done",))

    async def reset(self, force: bool) -> None:
        self.calls.append(("reset", force))

    async def replicate(self, to: str, device: str | None) -> None:
        self.calls.append(("replicate", to, device))

    async def demote(self) -> None:
        self.calls.append(("demote",))

    async def verify(self) -> None:
        self.calls.append(("verify",))

    def status(self) -> dict[str, Any]:
        return self.reported

    def jobs(self) -> list[dict[str, Any]]:
        return [
            {
                "id": job_id,
                "type": job_id.partition("-")[0],
                "status": "running",
                "current-progress": 1,
                "total-progress": 2,
            }
            for job_id in ("backup-colo0", "commit-colo0")
        ]

    def block_jobs(self) -> list[dict[str, Any]]:
        return [{"device": job["id"]} for job in self.jobs()]

    async def job_pause(self, job_id: str) -> None:
        if ("job_pause", job_id) in self.calls:
            raise StateError("Job is already paused")
        self.calls.append(("job_pause", job_id))

    async def job_resume(self, job_id: str) -> None:
        self.calls.append(("job_resume", job_id))

    async def job_cancel(self, job_id: str, *, force: bool) -> None:
        self.calls.append(("job_cancel", job_id, force))

    async def job_complete(self, job_id: str) -> None:
        self.calls.append(("job_complete", job_id))

    async def job_finalize(self, job_id: str) -> None:
        self.calls.append(("job_finalize", job_id))

    async def job_dismiss(self, job_id: str) -> None:
        self.calls.append(("job_dismiss", job_id))

    async def set_speed(self, job_id: str, speed_bytes: int) -> None:
        self.calls.append(("set_speed", job_id, speed_bytes))

    def block_nodes(self) -> list[dict[str, Any]]:
        return [{"node-name": "colo0", "drv": "raw"}, {"node-name": "top0", "drv": "replication"}]

    def block_exports(self) -> list[dict[str, Any]]:
        return [{"id": "colo0", "type": "nbd", "node-name": "colo0", "shutting-down": False}]

    async def nbd_server_add(
        self, device: str, name: str, description: str | None, writable: bool
    ) -> None:
        self.calls.append(("nbd_server_add", device, name, description, writable))

    async def nbd_server_remove(self, name: str, mode: str) -> None:
        self.calls.append(("nbd_server_remove", name, mode))

    async def nbd_server_stop(self) -> None:
        self.calls.append(("nbd_server_stop",))

    async def blockdev_add(self, options: NbdNodeOptions) -> None:
        self.calls.append(("blockdev_add", options))

    async def blockdev_del(self, node_name: str) -> None:
        self.calls.append(("blockdev_del", node_name))

    async def blockdev_mirror(self, options: MirrorOptions) -> None:
        self.calls.append(("blockdev_mirror", options))

    async def add_child(self, parent: str, node: str) -> None:
        self.calls.append(("add_child", parent, node))

    async def remove_child(self, parent: str, child: str) -> None:
        self.calls.append(("remove_child", parent, child))

    def yankable(self) -> list[str]:
        return ["nbd0"]

    def yank(self, node_name: str) -> None:
        self.calls.append(("yank", node_name))

    async def quit(self) -> None:
        self.calls.append(("quit",))


class EmptyBackend(FakeBackend):
    """As a QEMU without any block device: no jobs, nodes or exports, nothing to replicate."""

    def jobs(self) -> list[dict[str, Any]]:
        return []

    def block_nodes(self) -> list[dict[str, Any]]:
        return []

    def block_exports(self) -> list[dict[str, Any]]:
        return []

    def yankable(self) -> list[str]:
        return []

    async def nbd_server_stop(self) -> None:
        raise StateError("NBD server not running")


class RawClient:
    """A client that sends the bytes it is told to, and reads lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: str | Path) -> RawClient:
        """Connected, and the greeting read."""
        client = cls(*await asyncio.open_unix_connection(str(path), limit=1 << 24))
        greeting = await client.line()
        assert b'"QMP"' in greeting
        return client

    @classmethod
    async def negotiated(cls, path: str | Path) -> RawClient:
        """Connected and negotiated."""
        client = await cls.connect(path)
        assert await client.ask(b'{"execute":"qmp_capabilities"}') == b'{"return": {}}'
        return client

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def line(self) -> bytes:
        """The next line without its end; empty at the end of the stream."""
        line = await asyncio.wait_for(self.reader.readline(), SOCKET_TIMEOUT_S)
        return line.removesuffix(b"\r\n")

    async def ask(self, data: bytes) -> bytes:
        await self.send(data + b"\n")
        return await self.line()

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass


def ask_blocking(path: str | Path, data: bytes) -> list[Any]:
    """Send `data`; all the messages that come back for it, the greeting left out.

    Blocks: for use from a thread. A stray byte and a command with an id of its own come last, so
    that whatever `data` leaves open is closed, and it is known when the answers are complete.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SOCKET_TIMEOUT_S)
        connection.connect(str(path))
        stream = connection.makefile("rb")
        stream.readline()
        connection.sendall(data + b'\x01\n{"execute":"query-block-jobs","id":"the end"}\n')
        messages: list[Any] = []
        while True:
            line = stream.readline()
            assert line, f"closed after {data!r} and {messages!r}"
            message = json.loads(line)
            if message.get("id") == "the end":
                return messages
            if "QMP" not in message:  # QEMU greets a client twice that comes while it starts
                messages.append(message)
