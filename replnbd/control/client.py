"""A blocking QMP client: what the command line needs, and no more.

Why not the library qemu.qmp: it is made for programs that live with a QEMU. Here, each command
line connects, asks once and ends; a socket and 100 lines do that with one-line errors, without
an event loop and without a dependency. (The tests drive the server with qemu.qmp as well.)
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from replnbd.errors import ConfigError, ControlError, ProtocolError

_RECEIVE_SIZE = 65536
_LINE_SIZE_MAX = 64 << 20  # as QEMU's own limit for a message; a status has some kilobytes


class ControlClient:
    """A negotiated connection; use it as a context manager."""

    def __init__(self, path: str | Path, timeout_s: float | None = 60.0) -> None:
        """Connect and negotiate. `timeout_s` bounds the wait for each answer; None: no bound.

        Raises ConfigError if nobody answers at `path`, ProtocolError if it is no QMP server.
        """
        self.path = str(path)
        self._timeout_s = timeout_s
        self._buffer = bytearray()
        self._events: deque[dict[str, Any]] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._connect()
            greeting = self._greeting()
            if "QMP" not in greeting:
                raise ProtocolError(f"control socket {path}: {self._refusal(greeting)}")
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a command already sent runs to its end all the same."""
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 - JSON values
        """Run a command and return its result. `_` in arguments' names stands for `-`.

        Raises ControlError with the server's text and class, ProtocolError if the server is
        gone or silent for longer than the timeout.
        """
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = {
                name.replace("_", "-"): value for name, value in arguments.items()
            }
        deadline = self._deadline()
        try:
            self._socket.settimeout(self._timeout_s)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            while "event" in (reply := self._receive(deadline)):
                self._events.append(reply)
        except OSError as exc:
            raise self._lost(exc) from exc
        if "return" in reply:
            return reply["return"]
        raise self._refusal(reply)

    def next_event(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next event, in the order of sending: members event, timestamp, and maybe data.

        None if none comes within `timeout_s`; without it, waits as long as it takes.
        Raises ProtocolError if the server is gone.
        """
        if self._events:
            return self._events.popleft()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while True:
                message = self._receive(deadline)
                if "event" in message:
                    return message
        except TimeoutError:
            return None
        except OSError as exc:
            raise self._lost(exc) from exc

    def _greeting(self) -> dict[str, Any]:
        try:
            return self._receive(self._deadline())
        except OSError as exc:
            raise self._lost(exc) from exc

    def _connect(self) -> None:
        try:
            self._socket.connect(self.path)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise ConfigError(
                f"no replnbd answers at {self.path}: is the daemon running, and is this its"
                " control socket?"
            ) from exc
        except OSError as exc:
            raise ConfigError(f"cannot connect to {self.path}: {exc.strerror or exc}") from exc

    def _refusal(self, reply: dict[str, Any]) -> ControlError | ProtocolError:
        error = reply.get("error")
        if isinstance(error, dict):
            desc, error_class = error.get("desc"), error.get("class")
            if isinstance(desc, str) and isinstance(error_class, str):
                return ControlError(desc, error_class)
        return ProtocolError(f"control socket {self.path}: no QMP message: {reply!r:.80}")

    def _deadline(self) -> float | None:
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        """The next message: the server sends each on a line of its own."""
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            # Not to wait for the end of a line from a server that greets in another language.
            if scanned and self._buffer[0] not in b"{ \r":
                raise ProtocolError(
                    f"control socket {self.path}: no QMP message: {bytes(self._buffer[:80])!r}"
                )
            if scanned > _LINE_SIZE_MAX:
                raise ProtocolError(f"control socket {self.path}: endless message")
            # A timeout of 0 would mean "do not block"; this one means "look once more".
            left_s = None if deadline is None else max(deadline - time.monotonic(), 1e-6)
            self._socket.settimeout(left_s)
            data = self._socket.recv(_RECEIVE_SIZE)
            if not data:
                raise ProtocolError(f"control socket {self.path}: the server closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as exc:
            raise ProtocolError(f"control socket {self.path}: no JSON: {line[:80]!r}") from exc
        if not isinstance(message, dict):
            raise ProtocolError(f"control socket {self.path}: no QMP message: {line[:80]!r}")
        return message

    def _lost(self, exc: OSError) -> ProtocolError:
        # A late reply would be taken for that of the next command: this connection is over.
        self._socket.close()
        reason = "no answer in time" if isinstance(exc, TimeoutError) else exc.strerror or str(exc)
        return ProtocolError(f"control socket {self.path}: {reason}")
