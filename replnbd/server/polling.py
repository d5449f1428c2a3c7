"""BusyPoll: a look at the socket for what comes next, before the loop goes to sleep.

A client that waits for each reply sends its next request some 10 to 40 µs after it. To sleep and be
woken costs about as much on each side, and several times that in a virtual machine: with this,
depth 1 is 1.5 to 1.8 times as fast. QEMU's iothreads do the same, for as long (poll-max-ns).

It must cost others nothing: only the connection that has had the loop twice in a row polls; not
for longer than TURN_S, then the loop has its turn; and the less, the more often nothing came.
"""

from __future__ import annotations

import os
from time import perf_counter
from typing import ClassVar

from replnbd.server.limits import POLL_BATCH_MAX, POLL_S, POLL_SKIPS_MAX, POLL_TURN_S


class BusyPoll:
    """Of one connection. `fd`: its socket, if its bytes can be read as they are; or -1."""

    __slots__ = ("_alone", "_fd", "_penalty", "_skips", "_turn_ends")

    _latest: ClassVar[BusyPoll | None] = None
    """Whose connection has had the loop last."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._alone = False
        self._turn_ends = 0.0
        self._penalty = 0
        self._skips = 0

    def begin(self) -> None:
        """The loop has brought something for this connection."""
        self._alone = BusyPoll._latest is self and self._fd >= 0
        BusyPoll._latest = self
        if self._skips:
            self._skips -= 1
            self._alone = False
        if self._alone:
            self._turn_ends = perf_counter() + POLL_TURN_S

    def receive(self, buffer: memoryview, batch: int) -> int:
        """How many bytes have come into `buffer` within POLL_S; 0: none, or not to be polled for.
        `batch`: how many requests have just been answered.

        What is wrong with the socket, and its end, is left for the transport to find.
        """
        if not self._alone or batch > POLL_BATCH_MAX:
            return 0
        now = perf_counter()
        ends = min(now + POLL_S, self._turn_ends)
        while now < ends:
            try:
                received = os.readv(self._fd, (buffer,))
            except BlockingIOError:
                now = perf_counter()
            except OSError:
                return 0
            else:
                self._penalty = 0
                return received
        if ends < self._turn_ends:
            self._penalty = self._skips = min(2 * self._penalty + 1, POLL_SKIPS_MAX)
        return 0
