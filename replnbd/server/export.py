"""Export: a node under a name, for clients; what is counted of it, and how its errors are told."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replnbd.block import BlockNode
from replnbd.errors import ConfigError
from replnbd.events import EventBus
from replnbd.nbd import ClientIdentity, ExportOffer, Refusal, Request, wire_error
from replnbd.nbd import constants as c
from replnbd.server.contexts import DirtyBitmap, contexts_of

if TYPE_CHECKING:
    from replnbd.server.connection import Connection

log = logging.getLogger(__name__)

ERROR_LOG_INTERVAL_S = 10.0
"""One line per errno and interval: a dead disk fails thousands of requests a second."""

# Nothing is cached per connection: a flush on one covers what was answered on all.
_CAN_MULTI_CONN = int(c.TransmissionFlag.CAN_MULTI_CONN)
_READ_ONLY_FLAGS = _CAN_MULTI_CONN | int(
    c.TransmissionFlag.HAS_FLAGS
    | c.TransmissionFlag.READ_ONLY
    | c.TransmissionFlag.SEND_FLUSH
    | c.TransmissionFlag.SEND_FUA
    | c.TransmissionFlag.SEND_CACHE
)
_WRITABLE_FLAGS = _READ_ONLY_FLAGS & ~c.FLAG_READ_ONLY | c.WRITER_FLAGS

_READS = frozenset((c.CMD_READ, c.CMD_CACHE, c.CMD_BLOCK_STATUS))


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
        elif command in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self.zeroes += operations
            self.bytes_zeroed += length


class Export:
    """A disk on offer. `node` may be replaced at any time; requests then go to the new one."""

    def __init__(
        self,
        name: str,
        node: BlockNode,
        description: str = "",
        writable: bool = True,
        *,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
        with_digests: bool = False,
        digest_key: Callable[[], bytes] = bytes,
        listed: bool = True,
        allow: Iterable[str] | None = None,
        connections_max: int | None = None,
        writers: Callable[[], str | None] | None = None,
    ) -> None:
        """`bitmaps`: by name, what the metadata contexts qemu:dirty-bitmap:NAME answer.
        `with_digests`: there is a metadata context x-replnbd:digest, by the key that `digest_key`
        gives.
        `listed`: LIST shows it; if not, who uses it has to know its name.
        `allow`: who may use it, by the names in their certificates; None: everybody.
        `connections_max`: how many clients may use it at a time; None: as many as come.
        `writers` gives, at each handshake, the metadata context that a client must have selected to
        write; None: none.

        Raises ConfigError for a name or description that the protocol cannot carry.
        """
        for what, text in (("name", name), ("description", description)):
            if len(text.encode()) > c.NAME_BYTES_MAX:
                raise ConfigError(f"export {what} {text[:40]!r}... is too long")
            if "\0" in text:
                raise ConfigError(f"export {what} {text[:40]!r} contains a zero byte")
        self.name = name
        self.node = node
        self.description = description
        self.writable = writable
        self.allow = None if allow is None else frozenset(allow)
        self.refusal: str | None = None
        """Why clients are refused (set by NbdServer.fence); None while they are welcome."""
        self.listed = listed
        self.contexts = contexts_of(bitmaps or {}, digest_key=digest_key if with_digests else None)
        """Metadata contexts by name, in the order of LIST_META_CONTEXT."""
        self.stats = ExportStats()
        self.connections_max = connections_max
        self._writers = writers
        self.connections: set[Connection] = set()
        """Its clients, and those that have vanished while operations of theirs are still ending:
        as long as one of those may change the disk, nobody takes its place."""
        self._errors_logged: dict[int, float] = {}

    @property
    def transmission_flags(self) -> int:
        """What clients are told they may do."""
        flags = _WRITABLE_FLAGS if self.writable else _READ_ONLY_FLAGS
        # Who is told that it may open several connections does so.
        return flags & ~_CAN_MULTI_CONN if self.connections_max == 1 else flags

    @property
    def full(self) -> str | None:
        """Why there is no place for another client; None while there is."""
        used, most = len(self.connections), self.connections_max
        if most is None or used < most:
            return None
        return f"export '{self.name}' has {used} of {most} connections in use"

    def offer(self, client: ClientIdentity) -> ExportOffer:
        """The export as the handshake shows it to a client."""
        refusal = self.refusal
        if self.allow is not None and not self.allow & client.names:
            refusal = f"export '{self.name}' is not for {client}"
        return ExportOffer(
            self.name,
            self.description,
            self.node.size,
            self.transmission_flags,
            refusal,
            needs_tls=self.allow is not None and not client.secure,
            contexts=tuple(self.contexts),
            writers=None if self._writers is None else self._writers(),
        )

    def failed(self, failure: BaseException, request: Request, bus: EventBus) -> Refusal:
        """An operation raised `failure`: tell log and bus, and return what the client is told."""
        name = c.command_name(request.command)
        if isinstance(failure, OSError):
            return self._failed_in_order(failure, name, request, bus)
        self.stats.errors += 1
        if isinstance(failure, asyncio.CancelledError):
            # Only an ending loop cancels operations.
            return Refusal(c.ESHUTDOWN, f"{name}: the server is shutting down")
        # A bug of ours: the client gets an answer, the log the truth.
        log.error(
            "export %s: %s: bug in node %s", self.name, name, self.node.name, exc_info=failure
        )
        return Refusal(c.EIO, f"{name} failed: a bug in the server, see its log")

    def _failed_in_order(
        self, error: OSError, command: str, request: Request, bus: EventBus
    ) -> Refusal:
        """One log line per burst, and BLOCK_IO_ERROR as QEMU sends it (qapi/block-core.json) for
        an error that is reported to the client."""
        cause = error.errno or errno.EIO
        reason = error.strerror or str(error) or os.strerror(cause)
        refusal = Refusal(wire_error(error, request.flags), f"{command} failed: {reason}")
        if refusal.error == c.ENOTSUP:
            return refusal  # the answer to FAST_ZERO, no failure
        self.stats.errors += 1
        now = time.monotonic()
        if now - self._errors_logged.get(cause, -ERROR_LOG_INTERVAL_S) >= ERROR_LOG_INTERVAL_S:
            self._errors_logged[cause] = now
            log.warning(
                "export %s: %s failed: %s (more like it within %.0f s are not logged)",
                self.name,
                command,
                error,
                ERROR_LOG_INTERVAL_S,
            )
        bus.emit(
            "BLOCK_IO_ERROR",
            device=self.name,
            node_name=self.node.name,
            operation="read" if request.command in _READS else "write",
            action="report",
            nospace=refusal.error == c.ENOSPC,
            reason=reason,
        )
        return refusal
