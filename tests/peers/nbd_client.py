"""A minimal NBD client: fixed newstyle, GO, simple replies, one request at a time or pipelined.

Follows the NBD project's doc/proto.md. It trusts nothing: a wrong magic, cookie or length raises
PeerError, an error reply raises NbdReplyError with the errno of the wire.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from peers.process import PeerError

NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

OPT_ABORT = 2
OPT_LIST = 3
OPT_GO = 7

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_ERROR = 1 << 31

INFO_EXPORT = 0
INFO_BLOCK_SIZE = 3

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_FAST_ZERO = 1 << 4

PAYLOAD_BYTES_MAX = 32 << 20
"""The largest payload every server takes (proto.md, "Block size constraints")."""

REQUEST_LENGTH_MAX = (1 << 32) - (1 << 20)
"""Longest TRIM or WRITE_ZEROES sent in one request; a multiple of every block size in use."""

Address = str | Path | tuple[str, int]
"""A unix socket's path, or (host, port)."""

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPTION_REPLY = struct.Struct(">QIII")


class NbdReplyError(OSError):
    """The server answered a request, or an option, with an error."""


class NbdExport(NamedTuple):
    """One line of NBD_OPT_LIST."""

    name: str
    description: str


def connect(address: Address, *, timeout_s: float = 30.0) -> socket.socket:
    """A connected stream socket whose every operation has a deadline."""
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout=timeout_s)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(address))
    except OSError:
        sock.close()
        raise
    return sock


class _Wire:
    """Whole reads from a socket, and the haggling that LIST and GO share."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.sock = connect(address, timeout_s=timeout_s)
        try:
            self._greet()
        except BaseException:
            self.sock.close()
            raise

    def _greet(self) -> None:
        magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
        if (magic, option_magic) != (NBD_MAGIC, OPTION_MAGIC):
            raise PeerError(f"no newstyle NBD greeting: {magic:#x} {option_magic:#x}")
        if not flags & FLAG_FIXED_NEWSTYLE:
            raise PeerError(f"not fixed newstyle: handshake flags {flags:#x}")
        self.sock.sendall(struct.pack(">I", flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)))

    def receive(self, length: int) -> bytearray:
        """Exactly `length` bytes."""
        data = bytearray(length)
        view, filled = memoryview(data), 0
        while filled < length:
            count = self.sock.recv_into(view[filled:])
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "NBD server closed the connection")
            filled += count
        return data

    def send_option(self, option: int, data: bytes = b"") -> None:
        """Send one option of the haggling phase."""
        self.sock.sendall(struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data)

    def option_reply(self, option: int) -> tuple[int, bytes]:
        """One reply: its type and payload. An error reply raises NbdReplyError."""
        magic, echoed, kind, length = _OPTION_REPLY.unpack(self.receive(_OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or echoed != option:
            raise PeerError(f"bad option reply: magic {magic:#x}, option {echoed}")
        payload = bytes(self.receive(length))
        if kind & REP_ERROR:
            text = payload.decode("utf-8", "replace") or "no text"
            raise NbdReplyError(errno.ENOENT, f"option {option}: error {kind & ~REP_ERROR}: {text}")
        return kind, payload


def list_exports(address: Address, *, timeout_s: float = 30.0) -> list[NbdExport]:
    """What NBD_OPT_LIST says."""
    wire = _Wire(address, timeout_s)
    try:
        wire.send_option(OPT_LIST)
        exports = []
        while True:
            kind, payload = wire.option_reply(OPT_LIST)
            if kind == REP_ACK:
                break
            (length,) = struct.unpack_from(">I", payload)
            name, rest = payload[4 : 4 + length], payload[4 + length :]
            exports.append(NbdExport(name.decode(), rest.decode()))
        wire.send_option(OPT_ABORT)
        return exports
    finally:
        wire.sock.close()


class NbdClient:
    """One connection to one export.

    `size`, `flags` (transmission flags) and `block_sizes` (minimum, preferred, maximum; None when
    the server did not say) come from the handshake. Errors: NbdReplyError for an error reply,
    OSError when the connection breaks, PeerError when the server breaks the protocol.
    """

    def __init__(self, address: Address, export: str, *, timeout_s: float = 30.0) -> None:
        self.export = export
        self.size = 0
        self.flags = 0
        self.block_sizes: tuple[int, int, int] | None = None
        self._wire = _Wire(address, timeout_s)
        self._cookie = 0
        try:
            self._go()
        except BaseException:
            self._wire.sock.close()
            raise

    def _go(self) -> None:
        name = self.export.encode()
        wanted = struct.pack(">HH", 1, INFO_BLOCK_SIZE)
        self._wire.send_option(OPT_GO, struct.pack(">I", len(name)) + name + wanted)
        while True:
            kind, payload = self._wire.option_reply(OPT_GO)
            if kind == REP_ACK:
                return
            (info,) = struct.unpack_from(">H", payload)
            if info == INFO_EXPORT:
                self.size, self.flags = struct.unpack_from(">QH", payload, 2)
            elif info == INFO_BLOCK_SIZE:
                minimum, preferred, maximum = struct.unpack_from(">III", payload, 2)
                self.block_sizes = (minimum, preferred, maximum)

    # -- one request at a time ------------------------------------------------------------------

    def pread(self, offset: int, length: int) -> bytearray:
        """The bytes of a range, however long (split at the largest payload)."""
        result = bytearray()
        while len(result) < length:
            count = min(length - len(result), PAYLOAD_BYTES_MAX)
            cookie = self._send(CMD_READ, offset + len(result), count)
            self._reply(cookie)
            result += self._wire.receive(count)
        return result

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview, *, flags: int = 0) -> None:
        """Write `data`, split at the largest payload."""
        view = memoryview(data)
        for start in range(0, len(view), PAYLOAD_BYTES_MAX):
            part = view[start : start + PAYLOAD_BYTES_MAX]
            self._reply(self._send(CMD_WRITE, offset + start, len(part), flags=flags, data=part))

    def write_zeroes(self, offset: int, length: int, *, flags: int = 0) -> None:
        """NBD_CMD_WRITE_ZEROES."""
        self._reply(self._send(CMD_WRITE_ZEROES, offset, length, flags=flags))

    def trim(self, offset: int, length: int, *, flags: int = 0) -> None:
        """NBD_CMD_TRIM."""
        self._reply(self._send(CMD_TRIM, offset, length, flags=flags))

    def flush(self) -> None:
        """NBD_CMD_FLUSH."""
        self._reply(self._send(CMD_FLUSH, 0, 0))

    # -- several requests in flight -------------------------------------------------------------

    def send_writes(self, writes: Iterable[tuple[int, bytes]]) -> set[int]:
        """Send every write and read no reply; what to give to `finish` later. Some dozens at a
        time: a server whose replies nobody reads stops reading requests."""
        return {self._send(CMD_WRITE, at, len(data), data=memoryview(data)) for at, data in writes}

    def send(self, command: int, offset: int, length: int, data: bytes | None = None) -> int:
        """One request that is no READ, and no reply is read; its cookie is for `finish`."""
        view = None if data is None else memoryview(data)
        return self._send(command, offset, length, data=view)

    def finish(self, pending: set[int]) -> None:
        """Read the replies, which may come in any order (proto.md, "Ordering of messages and
        writes"); the first error reply raises once all came."""
        pending = set(pending)
        first_error = 0
        while pending:
            error, cookie = self._read_reply()
            if cookie not in pending:
                raise PeerError(f"reply with unknown cookie {cookie:#x}")
            pending.remove(cookie)
            first_error = first_error or error
        if first_error:
            raise _reply_error(first_error, self.export)

    def set_timeout(self, timeout_s: float) -> None:
        """For whatever is waited for from now on: TimeoutError, and the connection is of no use."""
        self._wire.sock.settimeout(timeout_s)

    # -- the wire -------------------------------------------------------------------------------

    def _send(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: memoryview | None = None,
    ) -> int:
        self._cookie += 1
        header = _REQUEST.pack(REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        self._wire.sock.sendall(header if data is None else header + data)
        return self._cookie

    def _read_reply(self) -> tuple[int, int]:
        magic, error, cookie = _REPLY.unpack(self._wire.receive(_REPLY.size))
        if magic != SIMPLE_REPLY_MAGIC:
            raise PeerError(f"bad simple reply magic {magic:#x}")
        return error, cookie

    def _reply(self, cookie: int) -> None:
        error, echoed = self._read_reply()
        if echoed != cookie:
            raise PeerError(f"reply to cookie {echoed:#x}, expected {cookie:#x}")
        if error:
            raise _reply_error(error, self.export)

    def close(self) -> None:
        """Soft disconnect (NBD_CMD_DISC); never raises."""
        try:
            self._send(CMD_DISC, 0, 0)
        except OSError:
            pass
        self._wire.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _reply_error(error: int, export: str) -> NbdReplyError:
    """proto.md "Error values": the numbers are Linux's, but for ESHUTDOWN, which is 108 in both."""
    return NbdReplyError(error, f"{errno.errorcode.get(error, 'unknown error')} from {export!r}")
