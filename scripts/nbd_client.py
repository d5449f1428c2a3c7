"""A small blocking NBD client, so that the quickstart needs nothing but Python.

It speaks what a QEMU of today speaks to a server with simple replies (NBD's doc/proto.md): fixed
newstyle handshake, NBD_OPT_GO, then READ, WRITE and FLUSH, one request at a time.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType

_GREETING = struct.Struct(">QQH")  # "NBDMAGIC", "IHAVEOPT", handshake flags
_OPTION = struct.Struct(">QII")  # "IHAVEOPT", option, length
_OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_REPLY = struct.Struct(">IIQ")  # magic, error, cookie

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698

_FLAG_FIXED_NEWSTYLE, _FLAG_NO_ZEROES = 1, 2
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT = 0
_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH = 0, 1, 2, 3

REQUEST_SIZE = 1 << 20  # bytes per request when a range is longer; servers take up to 32 MiB


class NbdError(OSError):
    """The server refused: an option, with its text, or a command, with NBD's error number."""


class NbdClient:
    """A connection to one export. `size` is the export's, in bytes."""

    def __init__(self, path: str, export: str, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._cookie = 0
        self.size = 0
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
            self._handshake(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Tell the server, if it still listens, and hang up."""
        try:
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
        except OSError:
            pass  # it has hung up already
        self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; NbdError if the server says no."""
        parts = []
        for start in range(offset, offset + length, REQUEST_SIZE):
            part = min(REQUEST_SIZE, offset + length - start)
            self._request(_CMD_READ, start, part)
            parts.append(self._receive(part))
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`; acknowledged when it returns."""
        for start in range(0, len(data), REQUEST_SIZE):
            part = data[start : start + REQUEST_SIZE]
            self._request(_CMD_WRITE, offset + start, len(part), part)

    def flush(self) -> None:
        """All that was acknowledged is durable when it returns."""
        self._request(_CMD_FLUSH, 0, 0)

    def _handshake(self, name: bytes) -> None:
        magic, option_magic, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option_magic) != (_NBDMAGIC, _IHAVEOPT) or not flags & _FLAG_FIXED_NEWSTYLE:
            raise NbdError("the peer is no NBD server with fixed newstyle")
        self._socket.sendall(struct.pack(">I", _FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES))
        payload = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(_OPTION.pack(_IHAVEOPT, _OPT_GO, len(payload)) + payload)
        while True:
            magic, _, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            data = self._receive(length)
            if magic != _OPTION_REPLY_MAGIC:
                raise NbdError("the server's option reply is malformed")
            if kind & _REP_ERROR:
                text = data.decode(errors="replace") or f"option error {kind & ~_REP_ERROR}"
                raise NbdError(f"export {name.decode()!r} refused: {text}")
            if kind == _REP_INFO and data[:2] == struct.pack(">H", _INFO_EXPORT):
                self.size = struct.unpack_from(">Q", data, 2)[0]
            if kind == _REP_ACK:
                return

    def _request(self, command: int, offset: int, length: int, data: bytes = b"") -> None:
        self._cookie += 1
        header = _REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length)
        self._socket.sendall(header + data)
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or cookie != self._cookie:
            raise NbdError("the server's reply is malformed")
        if error:
            raise NbdError(error, f"the server answered NBD error {error}")

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise NbdError("the server closed the connection")
            data += part
        return bytes(data)
