"""A raw client, nodes that wait, and both event loops: what the tests of the server share."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from loops import on_both_loops as on_both_loops  # for all tests of the server

from replnbd.block import BlockNode, Buffer, MemoryNode
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
GO = 7


@asynccontextmanager
async def serving(
    folder: Path, *exports: Export, bus: EventBus | None = None, **options: Any
) -> AsyncIterator[NbdServer]:
    """A server on a unix socket in `folder`, closed at the end."""
    server = NbdServer(bus or EventBus(), **options)
    for export in exports:
        server.add_export(export)
    await server.listen(uri(folder))
    try:
        yield server
    finally:
        await server.close()


def uri(folder: Path) -> str:
    return f"nbd+unix:///?socket={folder}/s"


class RawClient:
    """Sends exactly the bytes it is told to; knows just enough NBD to get going."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, folder: Path, name: str = "s") -> Self:
        """Connected, nothing sent."""
        return cls(*await asyncio.open_unix_connection(f"{folder}/{name}"))

    @classmethod
    async def open(cls, folder: Path, export: str) -> Self:
        """In the transmission phase."""
        client = await cls.connect(folder)
        await client.enter(export)
        return client

    async def enter(self, export: str) -> None:
        """Through the handshake."""
        self.send(choose(export))
        assert await self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        kind = 0
        while kind != 1:
            _, _, kind, length = struct.unpack(">QIII", await self.receive(20))
            text = await self.receive(length)
            assert kind < 0x80000000, text

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self, length: int) -> bytes:
        return await self.reader.readexactly(length)

    async def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """(error, cookie, payload) of the next reply; `length` bytes follow if it is no error."""
        magic, error, cookie = struct.unpack(">IIQ", await self.receive(16))
        assert magic == 0x67446698
        return error, cookie, b"" if error else await self.receive(length)

    async def at_end(self) -> bool:
        """Whether the server has closed the connection, with nothing more to read."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True

    async def pread(self, offset: int, length: int) -> bytes:
        self.send(request(READ, offset, length, cookie=77))
        error, cookie, payload = await self.reply(length)
        assert (error, cookie) == (0, 77)
        return payload

    async def pwrite(self, offset: int, data: bytes) -> None:
        self.send(request(WRITE, offset, len(data), cookie=78) + data)
        assert await self.reply() == (0, 78, b"")

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 0, flags: int = 0
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def choose(export: str) -> bytes:
    """Client flags and GO."""
    name = export.encode()
    body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    return struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", GO, len(body)) + body


class GatedNode(MemoryNode):
    """Operations wait while the gate is shut; `waiting` counts them. Suspends for real."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.changed = asyncio.Event()
        self.calls: list[str] = []

    async def _pass(self, call: str) -> None:
        self.waiting += 1
        self.changed.set()
        await self.gate.wait()
        self.waiting -= 1
        self.calls.append(call)

    async def wait_waiting(self, count: int) -> None:
        """Until `count` operations wait at the gate."""
        while self.waiting < count:
            self.changed.clear()
            await self.changed.wait()

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self._pass("pread")
        await super().pread(offset, buffer)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._pass("pwrite")
        await super().pwrite(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await self._pass(f"write_zeroes unmap={unmap} fast={fast}")
        await super().write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self._pass("discard")
        self.data[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        await self._pass("flush")


class CountingNode(MemoryNode):
    """Counts the bytes that operations read, but for those of small requests."""

    bytes_read = 0

    async def pread(self, offset: int, buffer: memoryview) -> None:
        self.bytes_read += len(buffer)
        await super().pread(offset, buffer)


async def check_healthy(folder: Path, export: str, node: BlockNode) -> None:
    """A new client is served, as if nothing had happened."""
    client = await RawClient.open(folder, export)
    await client.pwrite(3, b"healthy")
    assert await client.pread(3, 7) == b"healthy"
    assert await client.pread(0, 1000) == bytes(1000)[:3] + b"healthy" + bytes(990)
    await client.pwrite(3, bytes(7))
    client.send(request(DISC))
    assert await client.at_end()
    await client.close()


async def settled(condition: Callable[[], bool]) -> None:
    """Let the loop turn until `condition` holds."""
    while not condition():
        await asyncio.sleep(0)


def shrink_buffers(client: RawClient) -> None:
    """Let the kernel hold as little as possible, so that backpressure comes early."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
