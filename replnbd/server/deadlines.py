"""Deadlines: clients that are quiet, that take none of their replies, or whose host is gone.

One look at all connections now and then, instead of a timer for each: that costs the data path one
store per batch, `Connection.stirred`, which says that bytes came, or replies went, since the last
look. So a deadline passes up to a quarter later than it says, and never earlier.

A host that vanishes sends no farewell. While its connection is idle, the kernel's keepalive finds
out (negotiation.py); while something we sent is on its way nobody asks, and the kernel would
repeat it for a quarter of an hour. TCP_USER_TIMEOUT would end that, but it also ends a connection
whose living peer has its window closed for so long (a slow reader: `write_timeout_s` is for those),
and it overrules keepalive's count. So we look ourselves: has anything come from the peer's host, an
acknowledgement at least, while we are waiting for one?
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import struct
from dataclasses import dataclass

from replnbd.server.connection import Connection, State
from replnbd.server.limits import UNACKNOWLEDGED_S

log = logging.getLogger(__name__)

_INTERVAL_MIN_S = 0.01
_TCP_INFO = struct.Struct("=24xI28xI")  # tcpi_unacked; tcpi_last_ack_recv, in ms (linux/tcp.h)


@dataclass(slots=True)
class _Watched:
    """A connection at the last look. `tcp`: its socket, if it is one of TCP."""

    tcp: socket.socket | None
    since: float
    unsent: int = 0


class Deadlines:
    """Of all connections of a server."""

    def __init__(self, idle_timeout_s: float | None, write_timeout_s: float) -> None:
        """`idle_timeout_s`: for a client to send something, unless we owe it an answer; None: for
        ever. `write_timeout_s`: to take anything at all of the replies that wait for it."""
        self._idle_s = math.inf if idle_timeout_s is None else idle_timeout_s
        self._write_s = write_timeout_s
        shortest_s = min(self._idle_s / 8, self._write_s / 8, UNACKNOWLEDGED_S / 4)
        self._interval_s = max(shortest_s, _INTERVAL_MIN_S)
        self._watched: dict[Connection, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, connection: Connection, sock: socket.socket) -> None:
        """Look after a connection, and at its socket, until `forget`."""
        loop = asyncio.get_running_loop()
        tcp = None if sock.family == socket.AF_UNIX else sock
        self._watched[connection] = _Watched(tcp, loop.time())
        if self._timer is None:
            self._timer = loop.call_later(self._interval_s, self._look)

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        del self._watched[connection]
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval_s, self._look)
        now = loop.time()
        for connection, watched in tuple(self._watched.items()):
            unsent = connection.unsent_bytes
            if connection.stirred or unsent < watched.unsent:
                watched.since = now
            connection.stirred = False
            watched.unsent = unsent
            if connection.state is State.SERVING and watched.since < now:
                self._judge(connection, watched, now)

    def _judge(self, connection: Connection, watched: _Watched, now: float) -> None:
        """Drop a connection that has not stirred since the last look, if it is time."""
        quiet_s = now - watched.since
        owed = not connection.idle.is_set()
        if watched.tcp is not None and _unanswered_s(watched.tcp) >= UNACKNOWLEDGED_S:
            why, drop = f"its host has been gone for {UNACKNOWLEDGED_S:g} s", connection.abort
        elif watched.unsent and quiet_s >= self._write_s:
            why, drop = f"it took none of its replies for {self._write_s:g} s", connection.abort
        elif not watched.unsent and not owed and quiet_s >= self._idle_s:
            why, drop = f"nothing came from it for {self._idle_s:g} s", connection.finish
        else:
            if owed and not watched.unsent:
                watched.since = now
            return
        log.info("%s: dropped from export %s: %s", connection.peer, connection.export.name, why)
        drop()


def _unanswered_s(sock: socket.socket) -> float:
    """For how long nothing has come from the peer's host; 0 if it owes us no acknowledgement."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        return 0  # it is being closed
    unacknowledged, silent_ms = _TCP_INFO.unpack(info)
    return silent_ms / 1000 if unacknowledged else 0
