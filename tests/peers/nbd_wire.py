"""NBD in bytes: what clients send, with any lie a test wants in it, and what servers say to
options, taken apart without trust.

Packing gives bytes: `option`, `choose`, `meta_context`, `request`, `write`. Taking apart reads from
a `Source`: `read_option_reply` here, `Answers` (nbd_answers.py) in the transmission phase. What the
protocol forbids a server to send raises PeerError; the stream's end raises StreamEnd.

The source is doc/proto.md of the NBD project, and for extended headers its branch
extension-ext-header.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import NamedTuple, Protocol

from peers.process import PeerError

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
"""Of a server that speaks fixed newstyle, and can leave out the zeroes."""
FIXED, FIXED_NO_ZEROES = struct.pack(">I", 1), struct.pack(">I", 3)
"""Client flags."""

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = range(1, 9)
LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 9, 10, 11
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = (
    0x80000000 + number for number in range(1, 8)
)
ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = 0x80000008, 0x80000009, 0x8000000A
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))

STRING_BYTES_MAX = 4096
PAYLOAD_BYTES_MAX = 32 << 20

_OPTION_REPLY_MAGIC = 0x3E889045565A9


class Shape(Enum):
    """What requests and replies look like, as negotiated."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


# Section: what a client sends


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """One option; `length` is the one it claims."""
    claimed = len(data) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", number, claimed) + data


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """A string with its length in front; `length` is the one it claims."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw) if length is None else length) + raw


def choose(
    number: int,
    name: str | bytes,
    *requests: int,
    name_length: int | None = None,
    count: int | None = None,
) -> bytes:
    """INFO or GO; `name_length` and `count` are what it claims."""
    body = string(name, length=name_length)
    body += struct.pack(">H", len(requests) if count is None else count)
    return option(number, body + b"".join(struct.pack(">H", each) for each in requests))


def meta_context(
    number: int,
    name: str | bytes,
    *queries: str | bytes,
    name_length: int | None = None,
    count: int | None = None,
) -> bytes:
    """LIST_META_CONTEXT or SET_META_CONTEXT; `name_length` and `count` are what it claims."""
    body = string(name, length=name_length)
    body += struct.pack(">I", len(queries) if count is None else count)
    return option(number, body + b"".join(string(query) for query in queries))


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 0,
    flags: int = 0,
    shape: Shape = Shape.SIMPLE,
) -> bytes:
    """A request's header."""
    if shape is Shape.EXTENDED:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def write(
    offset: int, data: bytes, *, cookie: int = 0, flags: int = 0, shape: Shape = Shape.SIMPLE
) -> bytes:
    """A WRITE and its payload, with the flag that extended headers want."""
    if shape is Shape.EXTENDED:
        flags |= PAYLOAD_LEN
    return request(WRITE, offset, len(data), cookie=cookie, flags=flags, shape=shape) + data


# Section: where answers come from


class StreamEnd(Exception):
    """The stream ended where more was expected; `missing` bytes of `wanted` did not come."""

    def __init__(self, wanted: int, missing: int) -> None:
        super().__init__(f"the stream ended {missing} bytes short of {wanted}")
        self.clean = wanted == missing
        """Whether it ended before the first of them."""


class Source(Protocol):
    """A stream of bytes."""

    def receive(self, length: int) -> bytes | bytearray:
        """Exactly `length` bytes, or StreamEnd."""


class Transcript:
    """A stream that has been received already."""

    def __init__(self, received: bytes | bytearray) -> None:
        self._received = memoryview(received)
        self._position = 0

    @property
    def left(self) -> int:
        """How many bytes were not asked for yet."""
        return len(self._received) - self._position

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes, or StreamEnd."""
        if length > self.left:
            raise StreamEnd(length, length - self.left)
        self._position += length
        return bytes(self._received[self._position - length : self._position])


# Section: what a server answers in the handshake


class OptionReply(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    payload: bytes

    @property
    def error(self) -> bool:
        """Whether it is the end of the option's replies, and a bad one."""
        return bool(self.kind & 0x80000000)

    @property
    def last(self) -> bool:
        """Whether no other reply to the same option follows."""
        return self.error or self.kind == REP_ACK


def read_option_reply(source: Source) -> OptionReply:
    """One reply; StreamEnd if there is none."""
    magic, number, kind, length = struct.unpack(">QIII", source.receive(20))
    if magic != _OPTION_REPLY_MAGIC:
        raise PeerError(f"option reply magic {magic:#x}")
    if length > PAYLOAD_BYTES_MAX:
        raise PeerError(f"option reply of {length} bytes")
    reply = OptionReply(number, kind, bytes(source.receive(length)))
    if kind == REP_ACK and reply.payload:
        raise PeerError("an ACK with data")
    if reply.error:
        check_text(reply.payload)
    return reply


_FORERUNNERS = {
    LIST: REP_SERVER,
    INFO: REP_INFO,
    GO: REP_INFO,
    LIST_META_CONTEXT: REP_META_CONTEXT,
    SET_META_CONTEXT: REP_META_CONTEXT,
}
"""What may come before the last reply, by option."""


def read_option_replies(source: Source, number: int) -> list[OptionReply]:
    """All replies to one option."""
    replies: list[OptionReply] = []
    while not replies or not replies[-1].last:
        reply = read_option_reply(source)
        if reply.option != number:
            raise PeerError(f"a reply to option {reply.option}, expected one to {number}")
        if not reply.last and reply.kind != _FORERUNNERS.get(number):
            raise PeerError(f"a reply of type {reply.kind:#x} to option {number}")
        replies.append(reply)
    return replies


def check_text(text: bytes) -> None:
    """PeerError unless it is a string that the protocol allows."""
    if len(text) > STRING_BYTES_MAX:
        raise PeerError(f"a text of {len(text)} bytes")
    try:
        text.decode()
    except UnicodeDecodeError:
        raise PeerError(f"a text that is not UTF-8: {text!r}") from None
