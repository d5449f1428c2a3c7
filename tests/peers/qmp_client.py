"""A minimal synchronous QMP client (QEMU docs/interop/qmp-spec).

qemu.qmp is asyncio only and turns errors into exceptions; the oracle wants the answers as they
came, to compare them.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from peers.process import PeerError

RECEIVE_BYTES = 65536


class Answer(NamedTuple):
    """What a command answered: a value, or an error's class and text."""

    value: Any
    error_class: str | None = None
    desc: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the command succeeded."""
        return self.error_class is None


NEGOTIATION_S = 3.0
"""QEMU may lose what a client says that connects while QEMU is still starting: then connect again,
which `Process.reach` does."""


class QmpClient:
    """One session, negotiated. `events` keeps every event that came between answers."""

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._id = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(NEGOTIATION_S)
        try:
            self._sock.connect(str(path))
            self.greeting = self._receive()
            if "QMP" not in self.greeting:
                raise PeerError(f"no QMP greeting: {self.greeting}")
            self.execute("qmp_capabilities")
            self._sock.settimeout(timeout_s)
        except TimeoutError as exc:
            self._sock.close()
            raise ConnectionRefusedError("no answer to qmp_capabilities") from exc
        except BaseException:
            self._sock.close()
            raise

    def answer(self, command: str, arguments: dict[str, Any] | None = None) -> Answer:
        """Run a command and return its answer, error or not."""
        return self.answers((command, arguments))[0]

    def answers(self, *commands: tuple[str, dict[str, Any] | None]) -> list[Answer]:
        """Send commands in one go, so that nothing of ours comes between them, and return their
        answers."""
        first = self.send(*commands)
        return [
            self._answer(command, number) for number, (command, _) in enumerate(commands, first)
        ]

    def send(self, *commands: tuple[str, dict[str, Any] | None]) -> int:
        """Send commands, and do not wait for their answers; returns the id of the first."""
        first = self._id + 1
        lines = b""
        for command, arguments in commands:
            self._id += 1
            message: dict[str, Any] = {"execute": command, "id": self._id}
            if arguments is not None:
                message["arguments"] = arguments
            lines += json.dumps(message).encode() + b"\r\n"
        self._sock.sendall(lines)
        return first

    def _answer(self, command: str, number: int) -> Answer:
        while True:
            reply = self._receive()
            if "event" in reply:
                self.events.append(reply)
                continue
            if "QMP" in reply:
                # QEMU greets a client twice that connects while QEMU is still starting.
                continue
            if reply.get("id") != number:
                raise PeerError(f"{command}: answer without our id {number}: {reply}")
            if "error" in reply:
                return Answer(None, reply["error"]["class"], reply["error"]["desc"])
            return Answer(reply["return"])

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command that must succeed and return its value; PeerError otherwise."""
        answer = self.answer(command, arguments)
        if not answer.ok:
            raise PeerError(f"{command} {arguments}: {answer.error_class}: {answer.desc}")
        return answer.value

    def human(self, line: str) -> str:
        """QEMU's human monitor: what the command printed."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._sock.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError("QMP server closed the connection")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        if not isinstance(message, dict):
            raise PeerError(f"QMP message is no object: {line!r}")
        return message

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
