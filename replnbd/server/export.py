"""Export: a node under a name, for clients; what is counted of it, and how its errors are told."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replnbd.block import BlockNode
from replnbd.errors import ConfigError
from replnbd.events import EventBus
from replnbd.nbd import ExportOffer, wire_error
from replnbd.nbd import constants as c

if TYPE_CHECKING:
    from replnbd.server.connection import Connection

log = logging.getLogger(__name__)

ERROR_LOG_INTERVAL_S = 10.0
"""One line per errno and interval: a dead disk fails thousands of requests a second."""

_READ_ONLY_FLAGS = int(
    c.TransmissionFlag.HAS_FLAGS
    | c.TransmissionFlag.READ_ONLY
    | c.TransmissionFlag.SEND_FLUSH
    | c.TransmissionFlag.SEND_FUA
    # Nothing is cached per connection: a flush on one covers what was answered on all.
    | c.TransmissionFlag.CAN_MULTI_CONN
)
_WRITABLE_FLAGS = (_READ_ONLY_FLAGS & ~c.FLAG_READ_ONLY) | int(
    c.TransmissionFlag.SEND_TRIM
    | c.TransmissionFlag.SEND_WRITE_ZEROES
    | c.TransmissionFlag.SEND_FAST_ZERO
)


@dataclass(slots=True)
class ExportStats:
    """Completed and failed operations since the export was added."""

    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0
    flushes: int = 0
    zeroes: int = 0
    """WRITE_ZEROES and TRIM requests."""
    bytes_zeroed: int = 0
    errors: int = 0

    def count(self, command: int, operations: int, length: int) -> None:
        """Add operations that succeeded, with `length` bytes together."""
        if command == c.CMD_READ:
            self.reads += operations
            self.bytes_read += length
        elif command == c.CMD_WRITE:
            self.writes += operations
            self.bytes_written += length
        elif command == c.CMD_FLUSH:
            self.flushes += operations
        else:
            self.zeroes += operations
            self.bytes_zeroed += length


class Export:
    """A disk on offer. `node` may be replaced at any time; requests then go to the new one."""

    def __init__(
        self, name: str, node: BlockNode, description: str = "", writable: bool = True
    ) -> None:
        """Raises ConfigError for a name or description that the protocol cannot carry."""
        for what, text in (("name", name), ("description", description)):
            if len(text.encode()) > c.NAME_BYTES_MAX:
                raise ConfigError(f"export {what} {text[:40]!r}... is too long")
            if "\0" in text:
                raise ConfigError(f"export {what} {text[:40]!r} contains a zero byte")
        self.name = name
        self.node = node
        self.description = description
        self.writable = writable
        self.refusal: str | None = None
        """Why clients are refused (set by NbdServer.fence); None while they are welcome."""
        self.stats = ExportStats()
        self.connections: set[Connection] = set()
        self._errors_logged: dict[int, float] = {}

    @property
    def transmission_flags(self) -> int:
        """What clients are told they may do."""
        return _WRITABLE_FLAGS if self.writable else _READ_ONLY_FLAGS

    def offer(self) -> ExportOffer:
        """The export as the handshake shows it."""
        return ExportOffer(
            self.name, self.description, self.node.size, self.transmission_flags, self.refusal
        )

    def failed(self, failure: BaseException, command: int, flags: int, bus: EventBus) -> int:
        """An operation raised `failure`: tell log and bus, and return the error for the client."""
        if isinstance(failure, OSError):
            return self._failed_in_order(failure, command, flags, bus)
        self.stats.errors += 1
        if isinstance(failure, asyncio.CancelledError):
            return c.ESHUTDOWN  # only an ending loop cancels operations
        # A bug of ours: the client gets an answer, the log the truth.
        name, node = c.command_name(command), self.node.name
        log.error("export %s: %s: bug in node %s", self.name, name, node, exc_info=failure)
        return c.EIO

    def _failed_in_order(self, error: OSError, command: int, flags: int, bus: EventBus) -> int:
        """One log line per burst, and BLOCK_IO_ERROR as QEMU sends it (qapi/block-core.json) for
        an error that is reported to the client."""
        wire = wire_error(error, flags)
        if wire == c.ENOTSUP:
            return wire  # the answer to FAST_ZERO, no failure
        self.stats.errors += 1
        cause = error.errno or errno.EIO
        reason = error.strerror or str(error) or os.strerror(cause)
        now = time.monotonic()
        if now - self._errors_logged.get(cause, -ERROR_LOG_INTERVAL_S) >= ERROR_LOG_INTERVAL_S:
            self._errors_logged[cause] = now
            log.warning(
                "export %s: %s failed: %s (more like it within %.0f s are not logged)",
                self.name,
                c.command_name(command),
                error,
                ERROR_LOG_INTERVAL_S,
            )
        bus.emit(
            "BLOCK_IO_ERROR",
            device=self.name,
            node_name=self.node.name,
            operation="read" if command == c.CMD_READ else "write",
            action="report",
            nospace=wire == c.ENOSPC,
            reason=reason,
        )
        return wire
