"""Notifier: tells a service manager how we are (sd_notify(3), sd_watchdog_enabled(3)).

Datagrams of NAME=VALUE lines to the socket NOTIFY_SOCKET. Without that variable every call does
nothing. The watchdog is fed from the event loop, so that a loop that hangs is noticed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

from replnbd.errors import ConfigError

log = logging.getLogger(__name__)

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_SEND_TIMEOUT_S = 1.0
"""A manager that does not read is not waited for longer: serving matters more."""


class Notifier:
    """The service manager's ear, if it has lent us one."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        """`address`: a path, or "@NAME" for a name without a file. `watchdog_s`: within that time
        of each other it wants signs of life."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier:
        """As the service manager has asked for. The variables are gone afterwards: they are meant
        for nobody whom we might start. ConfigError for a time that is none."""
        values = {name: environ.pop(name, "") for name in _VARIABLES}
        watchdog_s = None
        if values["WATCHDOG_USEC"] and values["WATCHDOG_PID"] in ("", str(os.getpid())):
            if not values["WATCHDOG_USEC"].isdecimal():
                raise ConfigError(f"WATCHDOG_USEC is no number: '{values['WATCHDOG_USEC']}'")
            watchdog_s = int(values["WATCHDOG_USEC"]) / 1e6
        return cls(values["NOTIFY_SOCKET"], watchdog_s)

    def ready(self, status: str) -> None:
        """We serve, from now on; `status` is shown by `systemctl status`. From the loop."""
        self._send(f"READY=1\nSTATUS={status}")
        if self._address and self._watchdog_s:
            self._feed_watchdog()

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def close(self) -> None:
        """Nothing is told any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _feed_watchdog(self) -> None:
        assert self._watchdog_s is not None
        self._send("WATCHDOG=1", timeout_s=0)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._watchdog_s / 2, self._feed_watchdog)

    def _send(self, text: str, timeout_s: float = _SEND_TIMEOUT_S) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(timeout_s)
                sock.connect(self._address)
                sock.send(os.fsencode(text))  # a path may be no UTF-8
        except OSError as exc:
            log.warning("cannot tell the service manager %r: %s", text.splitlines()[0], exc)
