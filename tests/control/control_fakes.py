"""A backend of two jobs, two nodes and two exports, which writes down what it is asked to do."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

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

    async def set_replication(self, enable: bool, primary: bool, failover: bool) -> None:
        self.calls.append(("set_replication", enable, primary, failover))
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

    async def job_cancel(self, job_id: str) -> None:
        self.calls.append(("job_cancel", job_id))

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

    async def quit(self) -> None:
        self.calls.append(("quit",))


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


def answers_until_quiet(path: str | Path, data: bytes, marker: bytes) -> list[bytes]:
    """Send `data` and then a command with the id `marker`; the lines answered before that one's.

    For use from a thread: it blocks. A scratch `\\n` first ends whatever `data` left unfinished
    only where the language says so, so `data` must leave nothing open.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SOCKET_TIMEOUT_S)
        connection.connect(str(path))
        stream = connection.makefile("rb")
        lines = [stream.readline()]
        connection.sendall(data + b'\n{"execute":"qmp_capabilities","id":"' + marker + b'"}\n')
        while marker not in lines[-1]:
            line = stream.readline()
            assert line, f"connection closed after {lines!r}"
            lines.append(line)
        return [line.strip() for line in lines[1:-1]]
