"""connect_nbd: from an NBD URI to a session: the socket, TLS, and the handshake over them.

Without TLS all bytes go through one transport. With it, STARTTLS is asked for on the bare socket,
and only what comes out of TLS after that is read: nothing that was sent in clear text, before or
behind the acknowledgement, is left anywhere to be taken for the server's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, cast

from replnbd.block.client_tls import check_server, client_context
from replnbd.block.nbd_connection import NbdConnection
from replnbd.block.nbd_session import RESPONSE_TIMEOUT_S
from replnbd.block.nbd_uri import NbdTarget
from replnbd.errors import ProtocolError
from replnbd.nbd import ABORT, BASE_ALLOCATION, ClientHandshake

CONNECT_TIMEOUT_S = 10.0
"""For all of it, from the name's resolution to GO. QEMU's servers give a client as long."""

TLS_SHUTDOWN_TIMEOUT_S = 2.0
"""How long a server has to answer the end of TLS, before the connection just ends."""

UNIX_SEND_BUFFER = 512 << 10
"""More than the default, so that a batch of requests is sent at once; the system may allow less."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 5, 3
"""An idle server's host is asked whether it is there, and given up after 25 s."""

_RECEIVE_BYTES = 64 << 10


async def connect_nbd(
    target: NbdTarget,
    *,
    contexts: tuple[str, ...] = (BASE_ALLOCATION,),
    timeout_s: float = CONNECT_TIMEOUT_S,
    response_timeout_s: float = RESPONSE_TIMEOUT_S,
) -> NbdConnection:
    """A session with `target`, with as many of these metadata contexts as it has.

    Raises OSError (not there, not in time, refused; ENOENT if the server has no such export),
    ProtocolError (it speaks no NBD that we know), and ConfigError (our credentials are no good).
    Each names the URI.
    """
    handshake = ClientHandshake(target.export, contexts=contexts, tls=target.tls)
    try:
        async with asyncio.timeout(timeout_s):
            transport = await _negotiate(target, handshake, timeout_s)
    except TimeoutError as exc:
        if exc.errno is not None:  # the kernel's own
            raise OSError(exc.errno, f"cannot connect to {target}: {exc.strerror}") from exc
        text = f"cannot connect to {target}: no answer within {timeout_s:g} s"
        raise OSError(errno.ETIMEDOUT, text) from None
    except OSError as exc:
        number, why = _explained(exc)
        raise OSError(number, f"cannot connect to {target}: {why}") from exc
    except ProtocolError as exc:
        raise ProtocolError(f"cannot connect to {target}: {exc}") from exc
    assert handshake.outcome is not None
    connection = NbdConnection(handshake.outcome, str(target), response_timeout_s)
    connection.start(transport, handshake.unconsumed)
    return connection


async def _negotiate(
    target: NbdTarget, handshake: ClientHandshake, timeout_s: float
) -> asyncio.Transport:  # fmt: skip
    """The transport of a handshake that has an outcome."""
    loop = asyncio.get_running_loop()
    context = client_context(target) if target.tls else None
    sock = await _connected_socket(loop, target, timeout_s)
    try:
        if context is not None:
            await _ask_for_tls(loop, sock, handshake)
        create = _transport_maker(loop, target, context)
        transport, haggling = await create(
            lambda: _Haggling(handshake, begin=context is None), sock=sock
        )
    except BaseException:
        sock.close()
        raise
    transport = cast(asyncio.Transport, transport)
    try:
        if context is not None:
            check_server(target, transport.get_extra_info("ssl_object"))
            handshake.tls_started()
            haggling.begin()
        await haggling.ended
        if transport.is_closing():
            raise _hung_up()
    except BaseException:
        transport.abort()
        raise
    return transport


def _transport_maker(
    loop: asyncio.AbstractEventLoop, target: NbdTarget, context: ssl.SSLContext | None
) -> Callable[..., Awaitable[tuple[asyncio.BaseTransport, _Haggling]]]:
    options: dict[str, Any] = {}
    if context is not None:
        options["ssl"] = context
        options["server_hostname"] = target.peer_name or ""
        options["ssl_shutdown_timeout"] = TLS_SHUTDOWN_TIMEOUT_S
    create = loop.create_connection if target.path is None else loop.create_unix_connection

    async def make(
        factory: Callable[[], _Haggling], sock: socket.socket
    ) -> tuple[asyncio.BaseTransport, _Haggling]:
        return await create(factory, sock=sock, **options)

    return make


async def _connected_socket(
    loop: asyncio.AbstractEventLoop, target: NbdTarget, timeout_s: float
) -> socket.socket:  # fmt: skip
    if target.path is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)
        return await _connect(loop, sock, target.path)
    found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
            _tune(sock)
            # One that does not answer must not keep us from the others.
            async with asyncio.timeout(timeout_s / len(found)):
                return await _connect(loop, sock, address)
        except OSError as exc:  # TimeoutError, too
            failure = exc
    raise failure or OSError(errno.EADDRNOTAVAIL, "the host has no address")


async def _connect(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, address: tuple[Any, ...] | str
) -> socket.socket:  # fmt: skip
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, OSError) and exc.errno is not None:
            # asyncio's own text has the address, and not the reason.
            raise OSError(exc.errno, os.strerror(exc.errno)) from exc
        raise
    return sock


def _tune(sock: socket.socket) -> None:
    # A request is complete when it is sent: waiting to fill a segment only adds latency.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


async def _ask_for_tls(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, handshake: ClientHandshake
) -> None:
    """The handshake in clear text, up to the acknowledgement of STARTTLS."""
    while True:
        try:
            request = handshake.advance()
        except OSError:
            await loop.sock_sendall(sock, ABORT)
            raise
        if request is not None:
            await loop.sock_sendall(sock, request)
            continue
        if handshake.tls_wanted:
            return
        received = await loop.sock_recv(sock, _RECEIVE_BYTES)
        if not received:
            raise _hung_up()
        handshake.receive(received)


class _Haggling(asyncio.BufferedProtocol):
    """The handshake over a transport, from `begin` (over TLS it has to be looked at first) until
    `ended` (with its error, if any)."""

    def __init__(self, handshake: ClientHandshake, *, begin: bool) -> None:
        self._handshake = handshake
        self._began = begin
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports derive from nothing of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def begin(self) -> None:
        """TLS, if there is any, is as it should be."""
        self._began = True
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._began:
            self._handshake.receive(self._buffer[:nbytes])
            self._advance()
        else:  # it does not wait for our options
            self._end(ProtocolError("the server speaks out of turn"))

    def eof_received(self) -> None:
        self._end(_hung_up())

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or _hung_up())

    def _advance(self) -> None:
        if self.ended.done():
            return
        try:
            while (request := self._handshake.advance()) is not None:
                self._transport.write(request)
        except OSError as exc:
            self._transport.write(ABORT)
            self._transport.close()
            self._end(exc)
        except ProtocolError as exc:
            self._end(exc)
        else:
            if self._handshake.outcome is not None:
                self.ended.set_result(None)

    def _end(self, reason: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(reason)
            self.ended.exception()  # seen, even if nobody waits any more


def _hung_up() -> OSError:
    return OSError(errno.ECONNRESET, "the server closed the connection in the handshake")


def _explained(exc: OSError) -> tuple[int, str]:
    """(errno, text) of what went wrong on the way to a session."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return errno.EACCES, f"the server's certificate was refused: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        reason = (exc.reason or str(exc)).replace("_", " ").lower()
        return errno.EPROTO, f"TLS failed: {reason}"
    if isinstance(exc, socket.gaierror):
        return errno.EHOSTUNREACH, exc.strerror or str(exc)
    return exc.errno or errno.EIO, exc.strerror or str(exc)
