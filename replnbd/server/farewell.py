"""Farewell: the last words to a client whose connection is to be closed without ado.

Who closes a connection on which something is still on its way resets it, and the other side may
then never read what it was told: why TLS failed, here.
"""

from __future__ import annotations

import asyncio
import socket

from replnbd.server import limits

_RECEIVE_BYTES = 4096


class Farewell:
    """Says `words` on the connection whose socket is `fd`, and keeps it open until `wait` ends;
    `fd` itself may be closed at once. Whoever makes it must await that."""

    def __init__(self, fd: int, words: bytes) -> None:
        self._sock: socket.socket | None = None
        try:
            self._sock = socket.socket(fileno=socket.dup(fd))
            self._sock.setblocking(False)
            self._sock.send(words)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it does not listen any more, or we have no descriptor left

    async def wait(self) -> None:
        """Until the client has hung up, or had time to."""
        if self._sock is None:
            return
        with self._sock as sock:
            try:
                async with asyncio.timeout(limits.FAREWELL_TLS_S):
                    while await asyncio.get_running_loop().sock_recv(sock, _RECEIVE_BYTES):
                        pass
            except OSError:  # TimeoutError, too
                pass
