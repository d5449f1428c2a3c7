"""Pieces: what is written over TLS, in pieces, and each when the peer has taken what came before.

A TLS transport encrypts at once whatever it is given, and passes that on whole: to a peer that does
not read, a reply of 32 MiB would cost three times that. Here it waits as it is, and the transport
never has much more than its limits say. Nor does the loop wait while all of it is encrypted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

PIECE_BYTES = 64 << 10
"""Four records; what is encrypted of it is no large buffer for malloc yet."""

TURN_BYTES = 512 << 10
"""Encrypted in one turn of the loop: half a millisecond. And then a peer that is gone is noticed:
asyncio complains of what is written to it."""


class Pieces:
    """Stands before a transport, for one writer. Its owner passes on what the transport says of
    flow, by `pause` and `resume`; the latter not from within a `write`. `on_turn_over` is called
    where something waits for nothing but the next turn: then `resume`, too."""

    __slots__ = ("_on_turn_over", "_paused", "_stopped", "_transport", "_waiting", "waiting_bytes")

    def __init__(self, transport: asyncio.Transport, on_turn_over: Callable[[], None]) -> None:
        self._transport = transport
        self._on_turn_over = on_turn_over
        self._paused = self._stopped = False
        self._waiting: deque[memoryview] = deque()
        self.waiting_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """As a transport does: `data` must not change until it is sent."""
        if not self._paused and len(data) <= PIECE_BYTES:
            self._transport.write(data)  # nothing waits: only a pause ends `_go_on` before
        elif not self._stopped:
            self._waiting.append(memoryview(data))
            self.waiting_bytes += len(data)
            self._go_on()

    def get_write_buffer_size(self) -> int:
        """What is not sent yet, here and there."""
        return self.waiting_bytes + self._transport.get_write_buffer_size()

    def pause(self) -> None:
        """The transport has enough."""
        self._paused = True

    def resume(self) -> None:
        """The transport takes more."""
        self._paused = self._stopped
        self._go_on()

    def stop(self) -> None:
        """The transport takes nothing more: forget what waits, and what may still come."""
        self._paused = self._stopped = True
        self._waiting.clear()
        self.waiting_bytes = 0

    def _go_on(self) -> None:
        left = TURN_BYTES
        while self._waiting and not self._paused:
            if left <= 0:
                self._paused = True
                self._on_turn_over()
                return
            data = self._waiting.popleft()
            piece, rest = data[:PIECE_BYTES], data[PIECE_BYTES:]
            if rest:
                self._waiting.appendleft(rest)
            self.waiting_bytes -= len(piece)
            left -= len(piece)
            self._transport.write(piece)
