"""Scripted clients, several at a time: each sends its bytes in pieces and reads what comes, none
waits for another, and if none gets on any more, that is a finding."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Sequence
from itertools import pairwise

from fuzz_sessions import Ending, Script
from peers.nbd_client import Address, connect
from peers.nbd_wire import GREETING
from peers.process import PeerError

DEADLINE_S = 30.0
"""Without a byte sent or received by any client of a round: far above what a loaded machine
needs."""
STALLED_S = 0.02
"""A deaf client whose bytes the server does not take for so long begins to read."""
RECEIVE_BYTES = 1 << 20


class Client:
    """One client at work. `received` is what came after the greeting."""

    def __init__(self, address: Address, script: Script, *, closed_by_server: bool) -> None:
        """`closed_by_server`: the server must hang up without being told to."""
        self.script = script
        self.received = bytearray()
        self.done = False
        self.moved_at = time.monotonic()
        """When a byte was sent or received last."""
        self._closed_by_server = closed_by_server
        edges = [0, *(cut for cut in script.cuts if cut), len(script.sent)]
        sent = memoryview(script.sent)
        self._pieces = [sent[a:b] for a, b in pairwise(edges)]
        self._pauses = [a in script.pauses for a in edges[:-1]]
        self._deaf = script.ending is Ending.DEAF
        self._stalled_since: float | None = None
        self._sent_all = False
        self.sock = connect(address, timeout_s=DEADLINE_S)
        greeting = self.sock.recv(18, socket.MSG_WAITALL)
        if greeting != GREETING:
            raise PeerError(f"greeting {greeting!r}")
        self.sock.setblocking(False)

    @property
    def events(self) -> int:
        """What to poll for."""
        reading = 0 if self._deaf else select.POLLIN
        waiting = self._sent_all or (self._pauses and self._pauses[0])
        return reading | (0 if waiting else select.POLLOUT)

    def step(self, events: int) -> None:
        """Go on, as far as that is possible now."""
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and not self._deaf:
            self._receive()
        if not self.done and not self._sent_all:
            self._send()

    def close(self) -> None:
        """Whatever comes now is nobody's."""
        self.done = True
        self.sock.close()

    def _receive(self) -> None:
        try:
            part = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            part = b""
        self.received += part
        self.moved_at = time.monotonic()
        if not part:
            self.close()

    def _send(self) -> None:
        if self._pauses and self._pauses[0]:
            if self._unread():
                self._stalled()
                return
            self._pauses[0] = False
            self._stalled_since = None
        try:
            while self._pieces:
                count = self.sock.send(self._pieces[0])
                self._stalled_since = None
                self.moved_at = time.monotonic()
                self._pieces[0] = self._pieces[0][count:]
                if self._pieces[0]:
                    return
                del self._pieces[0], self._pauses[0]
                if self._pauses and self._pauses[0]:
                    return
        except BlockingIOError:
            self._stalled()
            return
        except OSError:  # the server has hung up; what it said is still to be read
            self._deaf = False
            self._pieces.clear()
        self._finish()

    def _stalled(self) -> None:
        now = time.monotonic()
        self._stalled_since = self._stalled_since or now
        if now - self._stalled_since > STALLED_S:
            self._deaf = False

    def _finish(self) -> None:
        self._sent_all = True
        self._deaf = False
        if self.script.ending is Ending.RST:
            self.close()
        elif not self._closed_by_server:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was quicker

    def _unread(self) -> int:
        raw = fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", raw)[0])


def run(clients: Sequence[Client]) -> None:
    """Until all are done; PeerError if nothing moves any more."""
    while True:
        working = {client.sock.fileno(): client for client in clients if not client.done}
        if not working:
            return
        if time.monotonic() - max(each.moved_at for each in working.values()) > DEADLINE_S:
            stuck = [len(client.received) for client in working.values()]
            raise PeerError(f"hang: {len(stuck)} clients not done, having received {stuck} bytes")
        poll = select.poll()
        for number, client in working.items():
            poll.register(number, client.events)
        ready = dict(poll.poll(1))
        for number, client in working.items():
            client.step(ready.get(number, 0))
