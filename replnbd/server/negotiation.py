"""Negotiation: a client in the handshake. Feeds the protocol core, and hands over or hangs up."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

from replnbd.errors import ConfigError, ProtocolError
from replnbd.nbd import ExportDirectory, Handshake, Outcome, TlsMode
from replnbd.server import limits
from replnbd.server.farewell import Farewell
from replnbd.server.tls import INTERNAL_ERROR, Tls

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
"""QEMU's handshake-max-seconds (CVE-2024-7409: clients that never finish)."""

_RECEIVE_BYTES = 8192


class Negotiation(asyncio.BufferedProtocol):
    """One client until it has chosen an export."""

    def __init__(
        self,
        directory: ExportDirectory,
        serial: int,
        on_chosen: Callable[[Negotiation, Outcome], None],
        on_closed: Callable[[Negotiation], None],
        *,
        tls_mode: TlsMode = TlsMode.OFF,
        tls: Tls | None = None,
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        """`tls`: credentials, unless `tls_mode` is OFF."""
        self._handshake = Handshake(directory, tls_mode)
        self._tls = tls
        self._upgrade: asyncio.Task[None] | None = None
        self._parting = False
        self._silent = False  # since TLS began
        self._decrypted = bytearray()  # what came while the upgrade was not over for us
        self._serial = serial
        self._on_chosen = on_chosen
        self._on_closed = on_closed
        self._timeout_s = timeout_s
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._reading_paused = False
        self.peer = f"client {serial}"
        self.write_paused = False
        self.transport: asyncio.Transport | None = None

    @property
    def secure(self) -> bool:
        """Whether TLS runs."""
        return self._handshake.identity.secure

    @property
    def early(self) -> bytes:
        """What arrived after the handshake's end."""
        return self._handshake.unconsumed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports derive from nothing of asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.peer = f"client {self._serial} ({_address(self.transport)})"
        _tune(self.transport)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._timeout_s, self._expired)
        log.debug("%s: connected", self.peer)
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._upgrade is not None:
            # TLS is ready, and has something for us, before `_start_tls` is woken.
            self._decrypted += self._buffer[:nbytes]
            return
        self._silent = False
        self._handshake.receive(self._buffer[:nbytes])
        self._advance()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        asyncio.get_running_loop().call_soon(self._advance)

    def eof_received(self) -> None:
        # Nobody hangs up half-way in a handshake: the transport closes itself.
        return

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._parting:
            self._lost()

    def _lost(self) -> None:
        self._deadline.cancel()
        if self.transport is not None:
            self.transport = None
            if self._silent:  # QEMU verifies certificates then
                log.info("%s: left right behind TLS; it may not trust our certificate", self.peer)
            else:
                told = self._handshake.refusal and self._handshake.outcome is None
                level = logging.INFO if told else logging.DEBUG
                log.log(level, "%s: left in the handshake%s", self.peer, self._refusal())
            self._on_closed(self)

    def _refusal(self) -> str:
        refusal = self._handshake.refusal
        return f", refused: {refusal}" if refusal else ""

    def shut_down(self) -> None:
        """Refuse whatever it asks for from now on."""
        self._handshake.shutting_down = True

    def abort(self) -> None:
        """Hang up at once."""
        self._silent = False
        if self.transport is not None:
            self.transport.abort()
        if self._parting and self._upgrade is not None:
            self._upgrade.cancel()

    def _expired(self) -> None:
        log.info("%s: no export chosen within %g s: closed", self.peer, self._timeout_s)
        self.abort()

    def _advance(self) -> None:
        transport = self.transport
        if transport is None or transport.is_closing() or self._upgrade is not None:
            return
        try:
            while not self.write_paused and (reply := self._handshake.advance()) is not None:
                transport.write(reply)
        except ProtocolError as exc:
            log.info("%s: closed in the handshake: %s", self.peer, exc)
            transport.close()
            return
        outcome = self._handshake.outcome
        if self._handshake.tls_wanted:
            # Nothing may be read as clear text any more; `start_tls` resumes.
            self._read_if(False)
            self._upgrade = asyncio.get_running_loop().create_task(self._start_tls(transport))
        elif outcome is None:
            self._read_if(not self.write_paused)
        elif outcome.export is None:
            reason = outcome.reason + self._refusal()
            log.info("%s: closed in the handshake: %s", self.peer, reason)
            transport.close()  # the deadline still runs, for who does not read the last reply
        else:
            self._deadline.cancel()
            self._read_if(True)
            self._on_chosen(self, outcome)

    async def _start_tls(self, transport: asyncio.Transport) -> None:
        assert self._tls is not None, "a listener that offers TLS has credentials"
        if self.transport is None or transport.is_closing():
            # It hung up behind STARTTLS. Loops wait for ever for TLS on a transport that is closed.
            self._upgrade = None
            return
        loop, fd = asyncio.get_running_loop(), transport.get_extra_info("socket").fileno()
        try:
            session = self._tls.session(fd)
        except ConfigError as exc:
            log.warning("%s: closed, TLS failed: %s", self.peer, exc)
            await self._part(transport, Farewell(fd, INTERNAL_ERROR))
            return
        try:
            secure = await loop.start_tls(
                transport, self, session.context, server_side=True,
                ssl_handshake_timeout=self._timeout_s,
                ssl_shutdown_timeout=limits.TLS_SHUTDOWN_TIMEOUT_S,
            )  # fmt: skip
        except OSError as exc:  # ssl.SSLError and TimeoutError are some
            log.info("%s: closed, TLS failed: %s", self.peer, session.describe_failure(exc))
            await self._part(transport, session.farewell)
            return
        self._upgrade = None
        # A connection that was closed meanwhile gives none (asyncio), or an empty one (uvloop).
        peer = None if secure is None else secure.get_extra_info("ssl_object")
        if peer is None or self.transport is None:
            self._lost()
            return
        self.transport = secure
        self._reading_paused = False
        self._handshake.tls_started(session.names(peer))
        log.debug("%s: TLS (%s)", self.peer, self._handshake.identity)
        self._silent = not self._decrypted
        self._handshake.receive(self._decrypted)
        self._decrypted.clear()
        self._advance()

    async def _part(self, transport: asyncio.Transport, farewell: Farewell | None) -> None:
        """Hang up; a client that was told something gets time to read it."""
        self._parting = True
        transport.abort()
        try:
            if farewell is not None:
                await farewell.wait()
        finally:
            self._upgrade = None
            self._lost()

    def _read_if(self, wanted: bool) -> None:
        """Read from the client only while it reads from us."""
        assert self.transport is not None
        if wanted and self._reading_paused:
            self.transport.resume_reading()
        elif not wanted and not self._reading_paused:
            self.transport.pause_reading()
        self._reading_paused = not wanted


def _address(transport: asyncio.Transport) -> str:
    address = transport.get_extra_info("peername")
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "unix"


def _tune(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is None:
        return
    if sock.family == socket.AF_UNIX:
        # The default holds three replies of 64 KiB, and each time it is full the loop goes round:
        # 15 µs for such a READ then, 10 with this. The system may allow less.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.UNIX_SEND_BUFFER)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        # A reply is complete when it is sent: waiting to fill a segment only adds latency.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose host vanished must not keep its connection for ever (see deadlines.py).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.KEEPALIVE_PROBES)
