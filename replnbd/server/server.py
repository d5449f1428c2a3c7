"""NbdServer: exports, listeners and clients."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal

from replnbd.errors import ConfigError, StateError
from replnbd.events import EventBus
from replnbd.nbd import ClientIdentity, ExportOffer, Outcome, TlsMode
from replnbd.server.connection import Connection, State
from replnbd.server.deadlines import Deadlines
from replnbd.server.export import Export
from replnbd.server.limits import WRITE_TIMEOUT_S
from replnbd.server.listener import BACKLOG, BoundSocket, adopt, bind_uri, parse_listen_uri
from replnbd.server.negotiation import HANDSHAKE_TIMEOUT_S, Negotiation
from replnbd.server.slabs import Pool
from replnbd.server.tls import Tls

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1024
"""Clients at a time, handshakes included. QEMU allows 100; cluster tools open several per disk,
and ours cost 50 KiB each while they are idle."""

# From Python 3.13 on, loops remove a unix socket's file by themselves, also one that is not ours.
_KEEP_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

HANG_UP_S = 0.5
"""At the end, for a client that has all its replies to hang up: that takes a round trip."""


class NbdServer:
    """Serves exports to clients. Flushing and closing the nodes is their owner's business."""

    def __init__(
        self,
        bus: EventBus,
        *,
        tls: Tls | None = None,
        default_export: str | None = None,
        connections_max: int = CONNECTIONS_MAX,
        listener_connections_max: int | None = None,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        idle_timeout_s: float | None = None,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        """`connections_max`: clients at a time, handshakes included, of all listeners together;
        `listener_connections_max`: of each of them. The last two: see `Deadlines`."""
        self._bus = bus
        # Clients must not use up the descriptors that images and checkpoints need.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._connections_max = min(connections_max, descriptors * 3 // 4)
        self._listener_connections_max = listener_connections_max
        self._handshake_timeout_s = handshake_timeout_s
        self._tls = tls
        self._default_export = default_export
        self._exports: dict[str, Export] = {}
        self._listeners: list[tuple[asyncio.AbstractServer, BoundSocket]] = []
        # Each with the listener that it came through.
        self._negotiations: dict[Negotiation, BoundSocket] = {}
        self._connections: dict[Connection, BoundSocket] = {}
        self._deadlines = Deadlines(idle_timeout_s, write_timeout_s)
        self._pool = Pool()
        self._serial = 0
        self._refused = 0
        self._closed = False

    # Section: what there is

    @property
    def exports(self) -> Mapping[str, Export]:
        """All exports by name, fenced ones too."""
        return MappingProxyType(self._exports)

    @property
    def connections(self) -> frozenset[Connection]:
        """All clients in the transmission phase, and those whose operations are still ending."""
        return frozenset(self._connections)

    @property
    def uris(self) -> list[str]:
        """Where it listens, with actual addresses and ports."""
        return [bound.uri for _, bound in self._listeners]

    # Section: exports

    def add_export(self, export: Export) -> None:
        """Offer an export from now on. StateError (QEMU's text) if the name is taken."""
        if export.name in self._exports:
            raise StateError(f"NBD server already has export named '{export.name}'")
        self._exports[export.name] = export

    async def remove_export(self, name: str, mode: Literal["safe", "hard"] = "safe") -> None:
        """Take an export away. When this returns no operation of its clients is in flight.

        safe: StateError (QEMU's text) if it has clients. hard: they are disconnected, as `fence`
        does. StateError if there is no such export.
        """
        export = self._find(name)
        if mode == "safe" and export.connections:
            raise StateError(f"export '{name}' still in use")
        del self._exports[name]
        await self._disconnect(export, f"export '{name}' was removed")

    def fence(self, name: str, reason: str) -> Coroutine[Any, Any, None]:
        """Refuse an export to everyone until `unfence`: new clients are told `reason`, present
        ones are answered by ESHUTDOWN, and disconnected.

        At once: when this call returns, no operation of its clients begins any more. Await the
        result for those in flight to end; last replies may be on their way even then.
        """
        export = self._find(name)
        export.refusal = reason
        return self._disconnect(export, reason)

    def dismiss(
        self, name: str, chosen: Callable[[Connection], bool], reason: str
    ) -> Coroutine[Any, Any, None]:
        """As `fence`, of those clients that are `chosen`, and no new ones."""
        return _dismiss([each for each in self._of(self._find(name)) if chosen(each)], reason)

    def unfence(self, name: str) -> None:
        """Let clients use the export again."""
        self._find(name).refusal = None

    def _find(self, name: str) -> Export:
        try:
            return self._exports[name]
        except KeyError:
            raise StateError(f"Export '{name}' is not found") from None

    def _disconnect(self, export: Export, reason: str) -> Coroutine[Any, Any, None]:
        return _dismiss(self._of(export), reason)

    def _of(self, export: Export) -> list[Connection]:
        return [each for each in self._connections if each.export is export]

    # Section: ExportDirectory, for the handshake

    def offers(self, client: ClientIdentity) -> Iterable[ExportOffer]:
        """What LIST shows, in the order the exports were added."""
        return [export.offer(client) for export in self._exports.values() if export.listed]

    def offer(self, name: str, client: ClientIdentity) -> ExportOffer | None:
        """What INFO and GO show; "" is the default export, unless one has that name. Where there
        is no place left they are refused; a client's place is taken when its GO is answered,
        because that begins its transmission phase at once."""
        export = self._exports.get(name)
        if export is None and not name and self._default_export is not None:
            export = self._exports.get(self._default_export)
        if export is None:
            return None
        offer = export.offer(client)
        return replace(offer, refusal=offer.refusal or export.full)

    # Section: listeners and clients

    async def listen(self, uri: str, *, socket_mode: int | None = None) -> list[str]:
        """Accept clients at an NBD URI; returns the actual URIs (port 0, several addresses).

        `socket_mode`: of a unix socket's file. Raises ConfigError, naming the URI, if that cannot
        be.
        """
        self._check_open()
        self._check_credentials(uri, parse_listen_uri(uri).tls)
        bound = await bind_uri(uri, socket_mode=socket_mode)
        for each in bound:
            await self._accept_on(each)
            log.info("listening on %s", each.uri)
        return [each.uri for each in bound]

    async def listen_on(self, sock: socket.socket, tls: TlsMode = TlsMode.OFF) -> str:
        """Accept clients on a stream socket that listens already, from a service manager say;
        returns its URI. The server closes it; a unix socket's file stays."""
        self._check_open()
        bound = adopt(sock, tls)
        self._check_credentials(bound.uri, tls)
        await self._accept_on(bound)
        log.info("listening on %s, a socket that was passed to us", bound.uri)
        return bound.uri

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("NBD server not running")

    def _check_credentials(self, uri: str, tls: TlsMode) -> None:
        if tls is not TlsMode.OFF and self._tls is None:
            raise ConfigError(f"cannot listen on {uri}: TLS needs credentials, a table [tls]")

    async def _accept_on(self, bound: BoundSocket) -> None:
        loop = asyncio.get_running_loop()
        new_client = partial(self._new_client, bound)
        if bound.sock.family == socket.AF_UNIX:
            listener: asyncio.AbstractServer = await loop.create_unix_server(
                new_client, sock=bound.sock, backlog=BACKLOG, **_KEEP_FILE
            )
        else:
            listener = await loop.create_server(new_client, sock=bound.sock, backlog=BACKLOG)
        self._listeners.append((listener, bound))

    def _new_client(self, bound: BoundSocket) -> asyncio.BaseProtocol:
        if len(self._negotiations) + len(self._connections) >= self._connections_max:
            return self._refuse(self._connections_max, "")
        most = self._listener_connections_max
        if most is not None:
            everybody = chain(self._negotiations.values(), self._connections.values())
            if sum(each is bound for each in everybody) >= most:
                return self._refuse(most, f" on {bound.uri}")
        self._serial += 1
        negotiation = Negotiation(
            self,
            self._serial,
            self._begin_transmission,
            self._left,
            tls_mode=bound.tls,
            tls=self._tls,
            timeout_s=self._handshake_timeout_s,
        )
        self._negotiations[negotiation] = bound
        return negotiation

    def _refuse(self, most: int, where: str) -> asyncio.BaseProtocol:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            log.warning(
                "%d clients connected%s, the most allowed: refused %d so far",
                most,
                where,
                self._refused,
            )
        return _Refusal()

    def _begin_transmission(self, negotiation: Negotiation, outcome: Outcome) -> None:
        transport = negotiation.transport
        assert transport is not None
        assert outcome.export is not None
        bound = self._negotiations.pop(negotiation)
        export = self._exports[outcome.export.name]
        connection = Connection(
            export, negotiation.peer, outcome, self._bus, self._pool, self._left
        )
        self._connections[connection] = bound
        self._deadlines.watch(connection, transport.get_extra_info("socket"))
        log.info(
            "%s: uses export %s (%s replies%s%s)",
            negotiation.peer,
            export.name,
            outcome.replies.name,
            ", TLS" if negotiation.secure else "",
            "" if connection.writable or not export.writable else ", to read only",
        )
        connection.start(transport, negotiation.early, write_paused=negotiation.write_paused)

    def _left(self, client: Negotiation | Connection) -> None:
        if isinstance(client, Connection):
            del self._connections[client]
            self._deadlines.forget(client)
        else:
            del self._negotiations[client]

    # Section: the end

    async def close(self, *, timeout_s: float = 3.0) -> None:
        """Stop: no new clients, operations in flight end and are answered, then all is closed.

        Who has read its replies but does not hang up is dropped after HANG_UP_S, who does not
        read them after `timeout_s`. An operation that has not ended by then goes on; the log
        says so.
        """
        self._closed = True
        for listener, bound in self._listeners:
            listener.close()
            bound.unlink()
        self._listeners.clear()
        for negotiation in self._negotiations:
            negotiation.shut_down()
        leaving = tuple(self._connections)
        for connection in leaving:
            connection.refuse("the server is shutting down")
        patience_s = min(HANG_UP_S, timeout_s)
        all_closed = await _all_closed(leaving, patience_s)
        for negotiation in tuple(self._negotiations):
            negotiation.abort()
        if all_closed:
            return
        for connection in leaving:
            if connection.state is State.LINGERING and not connection.unsent_bytes:
                connection.abort()
        if await _all_closed(leaving, timeout_s - patience_s):
            return
        for connection in leaving:
            connection.abort()
        if not await _all_closed(leaving, 0.1):
            stuck = sum(not connection.closed.is_set() for connection in leaving)
            log.warning("closed while operations of %d clients had not ended", stuck)


class _Refusal(asyncio.Protocol):
    """A client too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _dismiss(leaving: list[Connection], reason: str) -> Coroutine[Any, Any, None]:
    for connection in leaving:
        connection.refuse(reason)
    return _all_idle(leaving)


async def _all_idle(connections: Iterable[Connection]) -> None:
    for connection in connections:
        await connection.idle.wait()


async def _all_closed(connections: Iterable[Connection], timeout_s: float) -> bool:
    """Whether all of them are closed, after at most `timeout_s`."""

    async def wait() -> None:
        for connection in connections:
            await connection.closed.wait()

    try:
        await asyncio.wait_for(wait(), timeout_s)
    except TimeoutError:
        return False
    return True
