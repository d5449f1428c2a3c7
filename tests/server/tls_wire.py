"""TLS on a raw client's stream, by hand: the test decides which bytes leave, and when."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from peers import Authority
from peers.nbd_wire import FIXED_NO_ZEROES, GREETING, STARTTLS, option
from server_wire import RawClient, choose, serving, settled

from replnbd.server import Export, NbdServer, Tls, TlsFiles
from replnbd.server.connection import Connection
from replnbd.server.negotiation import Negotiation
from replnbd.server.tls import TlsSession, _Context, _SslObject

STARTTLS_ACK = bytes.fromhex("0003e889045565a9 00000005 00000001 00000000")
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER: a RST over TCP, whatever is still on its way."""

IDLE_S = 0.1
NOISE = {"socket.send() raised exception."}
"""asyncio's, when several replies are written to a client that is gone."""

KEPT_BY_A_CLIENT = (Connection, Negotiation, TlsSession, _Context, _SslObject)


class Pki:
    """An authority, what the server has of it, and what its clients have."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "authority")
        self.server = self.authority.issue("server", "localhost")
        self.client = self.authority.issue("client", "primary.example", common_name="primary")

    def tls(self, *, verify: bool = False) -> Tls:
        """The server's; `verify`: clients need a certificate."""
        authority = str(self.authority.certificate) if verify else None
        return Tls(TlsFiles(str(self.server.certificate), str(self.server.key), authority))

    def context(self, *, certificate: bool = False, version: str = "TLSv1_3") -> ssl.SSLContext:
        """A client's, for this version and no other."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        if certificate:
            context.load_cert_chain(self.client.certificate, self.client.key)
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """One for all tests of a module."""
    return Pki(tmp_path_factory.mktemp("pki"))


@asynccontextmanager
async def serving_tls(
    folder: Path, *exports: Export, tls: Tls, **options: Any
) -> AsyncIterator[NbdServer]:
    """A server that requires TLS at `folder`/t, and offers it at `folder`/on."""
    async with serving(folder, *exports, tls=tls, **options) as server:
        await server.listen(f"nbds+unix:///?socket={folder}/t")
        await server.listen(f"nbd+unix:///?socket={folder}/on&tls=on")
        yield server


async def tcp_port(server: NbdServer) -> int:
    """A port where the server requires TLS from now on."""
    (listening,) = await server.listen("nbds://127.0.0.1:0")
    return int(listening.rpartition(":")[2])


class TlsClient(RawClient):
    """In clear text until `handshake`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self.tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    @classmethod
    async def connect(cls, folder: Path, name: str = "t") -> Self:
        """Connected to `folder`/`name`, nothing sent."""
        return cls(*await asyncio.open_unix_connection(f"{folder}/{name}"))

    @classmethod
    async def connect_tcp(cls, port: int) -> Self:
        """The same over TCP."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    # Section: the TLS handshake

    async def starttls(self, *, behind: bytes = b"") -> Self:
        """Client flags, STARTTLS, and its ACK; `behind` is in the same segment."""
        self.send_raw(FIXED_NO_ZEROES + option(STARTTLS) + behind)
        assert await self.reader.readexactly(len(GREETING)) == GREETING
        assert await self.reader.readexactly(len(STARTTLS_ACK)) == STARTTLS_ACK
        return self

    def begin(self, context: ssl.SSLContext) -> None:
        """TLS from here on; nothing is sent yet."""
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    async def step(self) -> bytes:
        """What the client has to send next in the handshake, after what it has to wait for."""
        assert self.tls is not None
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                if said := self._outgoing.read():
                    return said
                await self._fill()
            else:
                return self._outgoing.read()

    async def handshake(self, context: ssl.SSLContext, *, behind: bytes = b"") -> Self:
        """TLS. `behind` is encrypted, and in the segment that ends the handshake for the server
        (TLS 1.3: the client has the last word)."""
        self.begin(context)
        assert self.tls is not None
        self.send_raw(await self.step())
        last = await self.step()
        if self.tls.version() is None:  # TLS 1.2: the server has it
            self.send_raw(last)
            last = await self.step()
        self.send_raw(last + self.encrypt(behind))
        return self

    # Section: a session

    async def go(self, export: str, context: ssl.SSLContext) -> Self:
        """All the way into the transmission phase."""
        await self.starttls()
        await self.handshake(context, behind=choose(export)[4:])
        await self.chosen()
        return self

    async def chosen(self) -> None:
        """All replies to a GO that succeeds."""
        while await self.option_reply() != (7, 1, b""):
            pass

    async def option_reply(self) -> tuple[int, int, bytes]:
        """(option, type, payload) of the next reply."""
        magic, number, kind, length = struct.unpack(">QIII", await self.receive(20))
        assert magic == 0x3E889045565A9
        return number, kind, await self.receive(length)

    # Section: bytes

    def encrypt(self, data: bytes) -> bytes:
        """What `data` looks like on the wire."""
        assert self.tls is not None
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view) :]
        return self._outgoing.read()

    def send_raw(self, data: bytes) -> None:
        """As it is."""
        self.writer.write(data)

    def send(self, data: bytes) -> None:
        """Encrypted."""
        self.send_raw(self.encrypt(data))

    async def receive(self, length: int) -> bytes:
        """Exactly `length` bytes, decrypted."""
        assert self.tls is not None
        parts: list[bytes] = []
        while length:
            try:
                parts.append(self.tls.read(min(length, 1 << 14)))
                length -= len(parts[-1])
            except ssl.SSLWantReadError:
                await self._fill()
        return b"".join(parts)

    async def at_end(self) -> bool:
        """Whether the server has ended TLS in an orderly way, with nothing more to read."""
        assert self.tls is not None
        while True:
            try:
                return self.tls.read(1) == b""
            except ssl.SSLWantReadError:
                await self._fill()
            except ssl.SSLZeroReturnError:
                return True

    async def _fill(self) -> None:
        data = await self.reader.read(1 << 18)
        if not data:
            raise ConnectionResetError("the server closed, without an end of TLS")
        self._incoming.write(data)

    # Section: ways to leave

    def notify(self) -> None:
        """End TLS (close_notify); the connection stays."""
        assert self.tls is not None
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        self.send_raw(self._outgoing.read())

    def hang_up(self) -> None:
        """Close, without an end of TLS: a FIN if all that came was read."""
        self.writer.transport.abort()

    def reset(self) -> None:
        """Close; over TCP this is a RST in any case."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.writer.transport.abort()


# Section: what is left


def descriptors() -> int:
    """How many the process has open."""
    return len(os.listdir("/proc/self/fd"))


def kept_by_clients() -> list[object]:
    """The server's objects that are there for a client."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in KEPT_BY_A_CLIENT]


@asynccontextmanager
async def leaving_nothing(
    server: NbdServer, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[None]:
    """Afterwards the server's clients of this block are gone; no descriptor, object or task of
    theirs is left, no processor time is used, and nobody has complained."""
    loop, complaints = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    await settled(lambda: not server.connections and not server._negotiations)
    before = descriptors(), len(asyncio.all_tasks())
    yield
    await settled(lambda: not server.connections and not server._negotiations)
    await settled(lambda: (descriptors(), len(asyncio.all_tasks())) <= before)
    for _ in range(20):  # what was scheduled runs
        await asyncio.sleep(0)
    assert kept_by_clients() == []
    assert complaints == []
    assert {each.getMessage() for each in caplog.records if each.levelno > logging.INFO} <= NOISE
    used_s = time.process_time()
    await asyncio.sleep(IDLE_S)
    assert time.process_time() - used_s < IDLE_S / 4
