"""One client of the control socket: negotiation, its commands in order, its replies and events."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from replnbd.control.backend import Backend
from replnbd.control.commands import QUERIES, version
from replnbd.control.registry import COMMANDS, Command
from replnbd.control.schema import check_arguments
from replnbd.control.wire import JsonParser, Malformed, encode, error_message
from replnbd.errors import ControlError, ReplnbdError

log = logging.getLogger(__name__)

READ_SIZE = 4096
"""Bytes parsed in one turn of the loop: 0.5 ms at most, so that block requests do not wait."""

EVENT_BACKLOG_MAX = 1 << 20
"""Bytes of output that a client may leave unread before an event finds it too slow. QEMU would
keep them all; 1 MiB is thousands of events."""

_INTERNAL_ERROR = "internal error, see the log"


class Session:
    """Serves one connection: `run` it in a task of its own."""

    def __init__(
        self,
        backend: Backend,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._backend = backend
        self._reader = reader
        self._writer = writer
        self._parser = JsonParser()
        self._negotiated = False
        self._oob = False
        self._busy = False
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self.refusal: str | None = None
        """If set, the answer to every command that is no query."""

    # Section: life

    def start(self) -> asyncio.Task[None]:
        """Begin to serve; the task ends when the connection does."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def stop(self) -> None:
        """End when the command being run, if any, has been answered."""
        self._stopping = True
        if not self._busy and self._task is not None:
            self._task.cancel()

    def abort(self) -> None:
        """End now: the command being run is cut short, and what is unsent is dropped."""
        self._writer.transport.abort()
        if self._task is not None:
            self._task.cancel()  # nothing, if it has ended

    async def _run(self) -> None:
        try:
            self._send({"QMP": {"version": version(), "capabilities": ["oob"]}})
            await self._serve()
        except ConnectionError:
            pass  # the client is gone; nothing here is left undone
        finally:
            self._writer.close()
            # Closing sends what is unsent first, and that takes as long as the client does.
            try:
                await self._writer.wait_closed()
            except ConnectionError:
                pass

    async def _serve(self) -> None:
        while data := await self._reader.read(READ_SIZE):
            for message in self._parser.feed(data):
                self._busy = True
                try:
                    reply = await self._reply_to(message)
                finally:
                    self._busy = False
                self._send(reply)
                if self._stopping:
                    return
                # Read no further while the client does not read its answers; and give others
                # their turn, however many commands one packet held.
                await self._writer.drain()
                await asyncio.sleep(0)
            if self._parser.exhausted:
                return

    # Section: output

    def _send(self, message: dict[str, Any]) -> None:
        try:
            line = encode(message)
        except (TypeError, ValueError):
            log.exception("a reply is no JSON: %r", message)
            line = encode(_with_id(error_message(_INTERNAL_ERROR), message))
        if not self._writer.transport.is_closing():
            self._writer.write(line)

    def send_event(self, line: bytes) -> None:
        """Pass an event on, once the client has negotiated; drop the client if it never reads."""
        transport = self._writer.transport
        if not self._negotiated or transport.is_closing():
            return
        transport.write(line)
        if transport.get_write_buffer_size() > EVENT_BACKLOG_MAX:
            log.warning(
                "control: a client has left %d bytes unread, dropping it",
                transport.get_write_buffer_size(),
            )
            transport.abort()

    # Section: commands

    async def _reply_to(self, message: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        try:
            command, given = self._understand(message)
            result = await self._execute(command, given)
        except ControlError as exc:
            reply = error_message(str(exc), exc.error_class)
        except ReplnbdError as exc:
            reply = error_message(str(exc))
        except OSError as exc:
            what = exc.filename or message["execute"]
            reply = error_message(f"{what}: {exc.strerror or str(exc) or type(exc).__name__}")
        except Exception:
            log.exception("control: bug in command %r", message)
            reply = error_message(_INTERNAL_ERROR)
        else:
            reply = {"return": result}
        return _with_id(reply, message)

    def _understand(self, message: Any) -> tuple[Command, dict[str, Any]]:  # noqa: ANN401
        """The command that `message` asks for, and its arguments, unchecked."""
        if isinstance(message, Malformed):
            raise ControlError(message.desc)
        if not isinstance(message, dict):
            raise ControlError("QMP input must be a JSON object")
        name = check_message(message, oob_allowed=self._oob)
        if not self._negotiated and name != "qmp_capabilities":
            raise ControlError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        command = COMMANDS.get(name)
        if command is None:
            raise ControlError(f"The command {name} has not been found", "CommandNotFound")
        if "exec-oob" in message and not command.oob:
            raise ControlError(f"The command {name} does not support OOB")
        return command, message.get("arguments", {})

    async def _execute(self, command: Command, given: dict[str, Any]) -> Any:  # noqa: ANN401
        arguments = check_arguments(command.arguments, given)
        if not self._negotiated:
            self._negotiated = True
            self._oob = "oob" in arguments.get("enable", ())
            return {}
        if self.refusal is not None and command.name not in QUERIES:
            raise ControlError(self.refusal)
        # %r: a client's text cannot forge a line of the log.
        level = logging.DEBUG if command.name in QUERIES else logging.INFO
        log.log(level, "control: %s %r", command.name, arguments)
        return await command.handler(self._backend, arguments)


def check_message(message: dict[str, Any], *, oob_allowed: bool) -> str:
    """The name of the command; ControlError if the members are not those of a command.

    Of several members that are wrong, this names the first; QEMU any one (the order of a hash).
    """
    name: str | None = None
    for member, value in message.items():
        if member == "execute" or (member == "exec-oob" and oob_allowed):
            if not isinstance(value, str):
                raise ControlError(f"QMP input member '{member}' must be a string")
            if name is not None:
                raise ControlError(f"QMP input member '{member}' is unexpected")
            name = value
        elif member == "arguments":
            if not isinstance(value, dict):
                raise ControlError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise ControlError(f"QMP input member '{member}' is unexpected")
    if name is None:
        raise ControlError("QMP input lacks member 'execute'")
    return name


def _with_id(reply: dict[str, Any], message: Any) -> dict[str, Any]:  # noqa: ANN401
    """QMP: the id of a command, whatever it is, comes back with its reply."""
    if isinstance(message, dict) and "id" in message:
        reply["id"] = message["id"]
    return reply
