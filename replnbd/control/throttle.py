"""Throttle: events that a failing disk would send thousands of times a second, once a second.

As QEMU does it (BLOCK_IO_ERROR per device, since 10.0): the first of a kind goes out at once; of
those that follow within the interval, the last goes out at its end. QEMU has one kind of
QUORUM_REPORT_BAD for each node; here reads are another one than writes, because who watches for the
loss of a standby heeds writes only. Without it, a full hidden
overlay would flood every client, and lose those that read but once in a while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

INTERVAL_S = 1.0
"""QEMU's."""

# The members of the event's data that tell two kinds of it apart.
_KINDS = {
    "BLOCK_IO_ERROR": ("device", "operation"),
    "QUORUM_REPORT_BAD": ("node-name", "type"),
    "QUORUM_FAILURE": ("reference",),
}

Message = dict[str, Any]


class _Timer(Protocol):
    def cancel(self) -> None: ...


class Throttle:
    """Stands between the event bus and the clients. Each kind keeps one timer and one message."""

    def __init__(
        self,
        send: Callable[[Message], None],
        call_later: Callable[[float, Callable[[tuple[Any, ...]], None], tuple[Any, ...]], _Timer],
    ) -> None:
        """`call_later` is an event loop's."""
        self._send = send
        self._call_later = call_later
        self._timers: dict[tuple[Any, ...], _Timer] = {}
        self._held: dict[tuple[Any, ...], Message] = {}

    def pass_on(self, message: Message) -> None:
        """Send an event's message now, or when its kind's interval ends."""
        members = _KINDS.get(message["event"])
        if members is None:
            self._send(message)
            return
        data = message.get("data", {})
        kind = (message["event"], *(data.get(member) for member in members))
        if kind in self._timers:
            self._held[kind] = message
        else:
            self._timers[kind] = self._call_later(INTERVAL_S, self._interval_ended, kind)
            self._send(message)

    def close(self) -> None:
        """Send what is held, and forget the intervals."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        while self._held:
            self._send(self._held.pop(next(iter(self._held))))

    def _interval_ended(self, kind: tuple[Any, ...]) -> None:
        message = self._held.pop(kind, None)
        if message is None:
            del self._timers[kind]
        else:
            self._timers[kind] = self._call_later(INTERVAL_S, self._interval_ended, kind)
            self._send(message)
