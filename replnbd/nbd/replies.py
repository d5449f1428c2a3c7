"""The three shapes of a conversation in the transmission phase, of which the handshake chose one.

Simple reply (16 bytes, then a READ's bytes)
    0  u32  magic 0x67446698
    4  u32  error, 0 for success
    8  u64  cookie

Structured reply chunk (20 bytes, then payload)     Extended reply chunk (32 bytes, then payload)
    0  u32  magic 0x668e33ef                            0  u32  magic 0x6e8a278c
    4  u16  flags; bit 0: the last chunk                4  u16  flags
    6  u16  type                                        6  u16  type
    8  u64  cookie                                      8  u64  cookie
   16  u32  length of the payload                      16  u64  offset of the request
                                                       24  u64  length of the payload

Payloads: OFFSET_DATA u64 offset, bytes; OFFSET_HOLE u64 offset, u32 length; ERROR u32 error, u16
length of a text, text; ERROR_OFFSET the same and u64 offset; BLOCK_STATUS u32 context id and pairs
of u32 length, flags; BLOCK_STATUS_EXT u32 context id, u32 count and pairs of u64 length, flags.
Flags of more bits than the shape has room for lose the upper ones.

With structured replies, what has no payload is still answered by a simple reply (it is shorter, and
"MAY" be). With extended headers it must not be.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from replnbd.nbd import constants as c
from replnbd.nbd.sparse import HOLE_BLOCK, may_have_holes, runs
from replnbd.nbd.texts import wire_text
from replnbd.nbd.transmission import (
    EXTENDED_REQUEST_SIZE,
    REQUEST_SIZE,
    Request,
    unpack_extended_request,
    unpack_request,
)

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_CHUNK_DATA = struct.Struct(">IHHQIQ")
_CHUNK_HOLE = struct.Struct(">IHHQIQI")
_EXTENDED = struct.Struct(">IHHQQQ")
_EXTENDED_DATA = struct.Struct(">IHHQQQQ")
_EXTENDED_HOLE = struct.Struct(">IHHQQQQI")
_ERROR = struct.Struct(">IH")
_STATUS = struct.Struct(">I")
_STATUS_EXT = struct.Struct(">II")
_OFFSET = struct.Struct(">Q")

_DATA_PREFIX, _EXTENDED_DATA_PREFIX = _CHUNK_DATA.size, _EXTENDED_DATA.size
_STRUCTURED_MAGIC, _EXTENDED_MAGIC = c.STRUCTURED_REPLY_MAGIC, c.EXTENDED_REPLY_MAGIC
_OFFSET_DATA, _OFFSET_HOLE = c.REPLY_TYPE_OFFSET_DATA, c.REPLY_TYPE_OFFSET_HOLE
_DONE = c.REPLY_FLAG_DONE
_pack_data, _pack_extended_data = _CHUNK_DATA.pack_into, _EXTENDED_DATA.pack_into

SIMPLE_REPLY_SIZE = _SIMPLE.size
assert SIMPLE_REPLY_SIZE == 16
assert _CHUNK.size == 20
assert _EXTENDED.size == 32

pack_simple_reply_into = _SIMPLE.pack_into
"""`(buffer, offset, SIMPLE_REPLY_MAGIC, error, cookie)`."""

Descriptor = tuple[int, int]
"""(length, status flags) of an extent in one metadata context."""


class Replies:
    """Simple replies and compact requests; and what the other two shapes have in common.

    `read_prefix`: bytes of a READ's reply before its data. `write_flags`: of a WRITE that asks for
    nothing special. `ack_size`: bytes of a reply that only says success.
    """

    name = "simple"
    request_magic = c.REQUEST_MAGIC
    request_size = REQUEST_SIZE
    unpack_request: Callable[..., tuple[int, ...]] = staticmethod(unpack_request)
    read_prefix = SIMPLE_REPLY_SIZE
    write_flags = 0
    ack_size = SIMPLE_REPLY_SIZE

    def payload_length(self, request: Request) -> int:
        """How many bytes follow the request."""
        return request.length if request.command == c.CMD_WRITE else 0

    def ack(self, request: Request) -> bytes:
        """Success, without payload."""
        return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, error: int, text: str, at: int | None = None) -> bytes:
        """Failure. `text` for people, `at` the offset where it failed, if the shape can say so."""
        return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, error, request.cookie)

    def pack_ack(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        """`ack`, into buffer[at : at + ack_size]."""
        _SIMPLE.pack_into(buffer, at, c.SIMPLE_REPLY_MAGIC, 0, cookie)

    def pack_read(
        self, buffer: bytearray, at: int, flags: int, cookie: int, offset: int, length: int
    ) -> int:
        """The reply to a READ whose bytes are there, at `at + read_prefix`. Returns its size; it
        begins at `at`, and is never longer than `read_prefix + length`."""
        _SIMPLE.pack_into(buffer, at, c.SIMPLE_REPLY_MAGIC, 0, cookie)
        return SIMPLE_REPLY_SIZE + length

    def status(self, request: Request, contexts: Sequence[tuple[int, list[Descriptor]]]) -> bytes:
        """The reply to a BLOCK_STATUS: descriptors, at least one, for each context id."""
        raise AssertionError("BLOCK_STATUS without structured replies")


class StructuredReplies(Replies):
    """Structured replies to compact requests (NBD_OPT_STRUCTURED_REPLY)."""

    name = "structured"
    read_prefix = _DATA_PREFIX

    def ack(self, request: Request) -> bytes:
        # "the server ... MUST NOT use a simple reply for NBD_CMD_READ": not for one of length 0.
        if request.command == c.CMD_READ:
            return self._chunk(request, c.REPLY_TYPE_NONE, b"")
        return super().ack(request)

    def error(self, request: Request, error: int, text: str, at: int | None = None) -> bytes:
        message = wire_text(text)
        payload = _ERROR.pack(error, len(message)) + message
        # ERROR_OFFSET is "valid as a reply to" what has a range.
        if at is None or request.command == c.CMD_FLUSH:
            return self._chunk(request, c.REPLY_TYPE_ERROR, payload)
        return self._chunk(request, c.REPLY_TYPE_ERROR_OFFSET, payload + _OFFSET.pack(at))

    def pack_read(
        self, buffer: bytearray, at: int, flags: int, cookie: int, offset: int, length: int
    ) -> int:
        start = at + _DATA_PREFIX
        # Nearly always it is one block, or a part of one, with something else than a zero in it.
        if (
            buffer[start + length // 3] and offset % HOLE_BLOCK + length <= HOLE_BLOCK
        ) or not may_have_holes(buffer, start, start + length, offset):
            _pack_data(
                buffer, at, _STRUCTURED_MAGIC, _DONE, _OFFSET_DATA, cookie, 8 + length, offset
            )
            return _DATA_PREFIX + length
        return self._pack_runs(buffer, at, flags, cookie, offset, length)

    def _pack_runs(
        self, buffer: bytearray, at: int, flags: int, cookie: int, offset: int, length: int
    ) -> int:
        start = at + self.read_prefix
        found = runs(buffer, start, start + length, offset)
        if flags & c.CMD_FLAG_DF and len(found) > 1:
            # "the server MUST use NBD_REPLY_TYPE_OFFSET_DATA with the zeroes explicitly present"
            found = [(start, start + length, False)]
        # Chunks move to the front: what a hole frees, 512 bytes at least, is more than the
        # headers of its chunk and the next.
        out = at
        done = 0
        for begin, end, zero in found:
            where = offset + begin - start
            if end == start + length:
                done = _DONE
            if zero:
                out += self._pack_hole(buffer, out, done, cookie, offset, where, end - begin)
                continue
            body = out + self.read_prefix
            if body != begin:
                buffer[body : body + end - begin] = buffer[begin:end]
            self._pack_data(buffer, out, done, cookie, offset, where, end - begin)
            out = body + end - begin
        return out - at

    def status(self, request: Request, contexts: Sequence[tuple[int, list[Descriptor]]]) -> bytes:
        last = len(contexts) - 1
        return b"".join(
            self._status_chunk(request, number == last, context, descriptors)
            for number, (context, descriptors) in enumerate(contexts)
        )

    def _status_chunk(
        self, request: Request, done: bool, context: int, descriptors: list[Descriptor]
    ) -> bytes:
        words = [word for length, flags in descriptors for word in (length, flags & 0xFFFFFFFF)]
        payload = _STATUS.pack(context) + struct.pack(f">{len(words)}I", *words)
        return self._chunk(request, c.ReplyType.BLOCK_STATUS, payload, done=done)

    def _chunk(self, request: Request, kind: int, payload: bytes, *, done: bool = True) -> bytes:
        header = _CHUNK.pack(
            c.STRUCTURED_REPLY_MAGIC, int(done), kind, request.cookie, len(payload)
        )
        return header + payload

    def _pack_data(
        self, buffer: bytearray, at: int, flags: int, cookie: int, _: int, where: int, length: int
    ) -> None:
        _pack_data(buffer, at, _STRUCTURED_MAGIC, flags, _OFFSET_DATA, cookie, 8 + length, where)

    def _pack_hole(
        self, buffer: bytearray, at: int, flags: int, cookie: int, _: int, where: int, length: int
    ) -> int:
        _CHUNK_HOLE.pack_into(
            buffer, at, _STRUCTURED_MAGIC, flags, _OFFSET_HOLE, cookie, 12, where, length
        )
        return _CHUNK_HOLE.size


class ExtendedReplies(StructuredReplies):
    """Extended headers both ways (NBD_OPT_EXTENDED_HEADERS)."""

    name = "extended"
    request_magic = c.EXTENDED_REQUEST_MAGIC
    request_size = EXTENDED_REQUEST_SIZE
    unpack_request = staticmethod(unpack_extended_request)
    read_prefix = _EXTENDED_DATA_PREFIX
    write_flags = c.CMD_FLAG_PAYLOAD_LEN
    ack_size = _EXTENDED.size

    def payload_length(self, request: Request) -> int:
        return request.length if request.flags & c.CMD_FLAG_PAYLOAD_LEN else 0

    def ack(self, request: Request) -> bytes:
        return self._chunk(request, c.REPLY_TYPE_NONE, b"")

    def pack_read(
        self, buffer: bytearray, at: int, flags: int, cookie: int, offset: int, length: int
    ) -> int:
        # As above, for the sake of 0.2 µs.
        start = at + _EXTENDED_DATA_PREFIX
        if (
            buffer[start + length // 3] and offset % HOLE_BLOCK + length <= HOLE_BLOCK
        ) or not may_have_holes(buffer, start, start + length, offset):
            _pack_extended_data(
                buffer, at, _EXTENDED_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, 8 + length, offset
            )
            return _EXTENDED_DATA_PREFIX + length
        return self._pack_runs(buffer, at, flags, cookie, offset, length)

    def pack_ack(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        _EXTENDED.pack_into(
            buffer, at, c.EXTENDED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_TYPE_NONE, cookie,
            offset, 0,
        )  # fmt: skip

    def _status_chunk(
        self, request: Request, done: bool, context: int, descriptors: list[Descriptor]
    ) -> bytes:
        words = [word for descriptor in descriptors for word in descriptor]
        payload = _STATUS_EXT.pack(context, len(descriptors))
        payload += struct.pack(f">{len(words)}Q", *words)
        return self._chunk(request, c.ReplyType.BLOCK_STATUS_EXT, payload, done=done)

    def _chunk(self, request: Request, kind: int, payload: bytes, *, done: bool = True) -> bytes:
        header = _EXTENDED.pack(
            c.EXTENDED_REPLY_MAGIC, int(done), kind, request.cookie, request.offset, len(payload)
        )
        return header + payload

    def _pack_data(
        self, buffer: bytearray, at: int, flags: int, cookie: int, asked: int, where: int,
        length: int,
    ) -> None:  # fmt: skip
        _pack_extended_data(
            buffer, at, _EXTENDED_MAGIC, flags, _OFFSET_DATA, cookie, asked, 8 + length, where
        )

    def _pack_hole(
        self, buffer: bytearray, at: int, flags: int, cookie: int, asked: int, where: int,
        length: int,
    ) -> int:  # fmt: skip
        _EXTENDED_HOLE.pack_into(
            buffer, at, _EXTENDED_MAGIC, flags, _OFFSET_HOLE, cookie, asked, 12, where, length
        )
        return _EXTENDED_HOLE.size


SIMPLE_REPLIES = Replies()
STRUCTURED_REPLIES = StructuredReplies()
EXTENDED_REPLIES = ExtendedReplies()
