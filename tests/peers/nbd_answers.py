"""What NBD servers answer to requests, taken apart without trust: simple replies, structured and
extended chunks (proto.md, "Transmission").

Every rule for servers is held up that can be seen from outside: whose chunk it is, what may be in
it, that the parts of an answer neither overlap nor leave a gap, and that exactly one ends it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from peers.nbd_wire import (
    DF,
    DISC,
    FLUSH,
    PAYLOAD_BYTES_MAX,
    READ,
    REQ_ONE,
    RESIZE,
    STATUS,
    Shape,
    Source,
    StreamEnd,
    check_text,
)
from peers.process import PeerError

EXTENTS_MAX = 1 << 20
""" "Servers SHOULD NOT send more than 2^20 extents in a single reply chunk"."""

_NONE, _DATA, _HOLE, _STATUS, _STATUS_EXT = 0, 1, 2, 5, 6
_ERROR, _ERROR_OFFSET = 0x8001, 0x8002
_SIMPLE_MAGIC = 0x67446698
_CHUNK_MAGIC = {Shape.STRUCTURED: 0x668E33EF, Shape.EXTENDED: 0x6E8A278C}
_DONE = 1


class Asked(NamedTuple):
    """A request that waits for its answer. `contexts`: ids that a BLOCK_STATUS must answer for."""

    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    contexts: tuple[int, ...] = ()


class Answer(NamedTuple):
    """A complete answer, all its chunks together.

    `error`: of the first chunk that has one, or 0; `text` is for people, `at` where it failed.
    `holes` are (offset, length) of what was not sent because it is zeroes.
    """

    cookie: int
    error: int = 0
    text: str = ""
    at: int | None = None
    data: bytes = b""
    holes: tuple[tuple[int, int], ...] = ()
    statuses: dict[int, list[tuple[int, int]]] = {}  # noqa: RUF012 - never changed
    chunks: int = 1
    wire_bytes: int = 0


class Answers:
    """Reads answers in one shape, and holds the server to every rule of them.

    Tell it of each request by `expect`; `next` reads until one of them has been answered.
    """

    def __init__(self, source: Source, shape: Shape) -> None:
        self.pending: dict[int, Asked] = {}
        self._source = source
        self._shape = shape
        self._begun: dict[int, _Parts] = {}

    def expect(self, cookie: int, asked: Asked) -> None:
        """A request was sent; no other of that cookie may be pending."""
        assert cookie not in self.pending
        self.pending[cookie] = asked

    def next(self) -> Answer | None:
        """The next complete answer; None where the stream ends before one begins."""
        while True:
            try:
                magic = struct.unpack(">I", self._source.receive(4))[0]
            except StreamEnd as end:
                if end.clean and not self._begun:
                    return None
                raise
            if magic == _SIMPLE_MAGIC and self._shape is not Shape.EXTENDED:
                return self._simple()
            answer = self._chunk(magic)
            if answer is not None:
                return answer

    def _take(self, cookie: int) -> Asked:
        if cookie not in self.pending:
            raise PeerError(f"a reply to cookie {cookie:#x}, of which nothing is pending")
        return self.pending[cookie]

    def _simple(self) -> Answer:
        error, cookie = struct.unpack(">IQ", self._source.receive(12))
        asked = self._take(cookie)
        if self._shape is Shape.STRUCTURED and (
            asked.command == READ or (asked.command == STATUS and not error)
        ):
            raise PeerError(f"a simple reply to {asked} where structured ones are negotiated")
        if cookie in self._begun:
            raise PeerError(f"a simple reply to {asked} after chunks")
        data = b""
        if asked.command == READ and not error:
            data = bytes(self._source.receive(asked.length))
        del self.pending[cookie]
        return Answer(cookie, error, data=data, wire_bytes=16 + len(data))

    def _chunk(self, magic: int) -> Answer | None:
        if self._shape is Shape.EXTENDED:
            header = self._source.receive(28)
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", header)
        else:
            header = self._source.receive(16)
            (flags, kind, cookie, length), offset = struct.unpack(">HHQI", header), None
        if magic != _CHUNK_MAGIC.get(self._shape):
            raise PeerError(f"reply magic {magic:#x} where {self._shape.value} ones are negotiated")
        asked = self._take(cookie)
        if offset is not None and offset != asked.offset:
            raise PeerError(f"a reply at {offset} to {asked}")
        if flags & ~_DONE:
            raise PeerError(f"reply flags {flags:#x}")
        if length > PAYLOAD_BYTES_MAX + 64:
            raise PeerError(f"a chunk of {length} bytes")
        parts = self._begun.setdefault(cookie, _Parts(asked, self._shape))
        parts.add(kind, self._source.receive(length), bool(flags & _DONE))
        parts.wire_bytes += 4 + len(header) + length
        if not flags & _DONE:
            return None
        del self._begun[cookie], self.pending[cookie]
        return parts.finish(cookie)


class _Parts:
    """The chunks of one answer so far."""

    def __init__(self, asked: Asked, shape: Shape) -> None:
        self._asked = asked
        self._extended = shape is Shape.EXTENDED
        self._error, self._text = 0, ""
        self._at: int | None = None
        self._content: list[tuple[int, int, bytes | None]] = []  # offset, length, None for a hole
        self._statuses: dict[int, list[tuple[int, int]]] = {}
        self._chunks = 0
        self.wire_bytes = 0

    def add(self, kind: int, payload: bytes | bytearray, done: bool) -> None:
        self._chunks += 1
        if kind == _NONE:
            if payload or not done:
                raise PeerError("a NONE chunk with a payload, or not the last")
        elif kind in (_DATA, _HOLE) and self._asked.command == READ:
            self._add_content(kind, payload)
        elif kind == (_STATUS_EXT if self._extended else _STATUS) and self._asked.command == STATUS:
            self._add_status(payload)
        elif kind in (_ERROR, _ERROR_OFFSET):
            self._add_error(kind, payload)
        else:
            raise PeerError(f"a chunk of type {kind} in the answer to {self._asked}")

    def _add_content(self, kind: int, payload: bytes | bytearray) -> None:
        if len(payload) < 9 or (kind == _HOLE and len(payload) != 12):
            raise PeerError(f"a content chunk of {len(payload)} bytes")
        (offset,) = struct.unpack_from(">Q", payload)
        length, data = len(payload) - 8, bytes(payload[8:])
        if kind == _HOLE:
            (length,) = struct.unpack_from(">I", payload, 8)
        end = self._asked.offset + self._asked.length
        if not length or offset < self._asked.offset or offset + length > end:
            raise PeerError(f"{length} bytes at {offset} in the answer to {self._asked}")
        if any(at < offset + length and offset < at + size for at, size, _ in self._content):
            raise PeerError(f"{length} bytes at {offset} overlap others in one answer")
        if self._content and self._asked.flags & DF:
            raise PeerError(f"several content chunks in the answer to {self._asked}")
        self._content.append((offset, length, None if kind == _HOLE else data))

    def _add_status(self, payload: bytes | bytearray) -> None:
        fixed, pair = (8, ">QQ") if self._extended else (4, ">II")
        rest = len(payload) - fixed
        if rest <= 0 or rest % struct.calcsize(pair):
            raise PeerError(f"a status chunk of {len(payload)} bytes")
        (context,) = struct.unpack_from(">I", payload)
        descriptors = list(struct.iter_unpack(pair, payload[fixed:]))
        if self._extended and struct.unpack_from(">I", payload, 4)[0] != len(descriptors):
            raise PeerError("a status chunk with another count of descriptors than it has")
        if context not in self._asked.contexts or context in self._statuses:
            raise PeerError(f"status in context {context} in the answer to {self._asked}")
        before_last = sum(length for length, _ in descriptors[:-1])
        if not all(length for length, _ in descriptors) or len(descriptors) > EXTENTS_MAX:
            raise PeerError("an empty descriptor, or too many of them")
        if self._asked.flags & REQ_ONE:
            if len(descriptors) > 1 or descriptors[0][0] > self._asked.length:
                raise PeerError(f"{descriptors} where REQ_ONE was set on {self._asked}")
        elif len(descriptors) > 1 and before_last >= self._asked.length:
            raise PeerError(f"descriptors reach further than {self._asked}")
        self._statuses[context] = [(length, flags) for length, flags in descriptors]

    def _add_error(self, kind: int, payload: bytes | bytearray) -> None:
        fixed = 6 if kind == _ERROR else 14
        if len(payload) < fixed:
            raise PeerError(f"an error chunk of {len(payload)} bytes")
        error, size = struct.unpack_from(">IH", payload)
        if not error or 6 + size > len(payload) - (fixed - 6):
            raise PeerError(f"an error chunk with error {error} and a text of {size} bytes")
        text = bytes(payload[6 : 6 + size])
        check_text(text)
        if kind == _ERROR_OFFSET:
            (self._at,) = struct.unpack_from(">Q", payload, 6 + size)
            # 'Valid as a reply to READ, WRITE, TRIM, CACHE, WRITE_ZEROES, and BLOCK_STATUS';
            # 'which MUST lie within the original offset and length of the request'.
            if self._asked.command in (FLUSH, DISC, RESIZE):
                raise PeerError(f"an error with an offset in the answer to {self._asked}")
            if not 0 <= self._at - self._asked.offset < max(self._asked.length, 1):
                raise PeerError(f"an error at {self._at} in the answer to {self._asked}")
        if not self._error:
            self._error, self._text = error, text.decode()

    def finish(self, cookie: int) -> Answer:
        asked, content = self._asked, sorted(self._content, key=lambda each: each[0])
        if not self._error and asked.command == READ:
            covered = sum(length for _, length, _ in content)  # they do not overlap
            if covered != asked.length:
                raise PeerError(f"{covered} bytes in the answer to {asked}")
        answered = self._statuses.keys() == set(asked.contexts)
        if not self._error and asked.command == STATUS and not answered:
            raise PeerError(f"contexts {list(self._statuses)} in the answer to {asked}")
        return Answer(
            cookie,
            self._error,
            self._text,
            self._at,
            b"".join(bytes(size) if data is None else data for _, size, data in content),
            tuple((at, size) for at, size, data in content if data is None),
            self._statuses,
            self._chunks,
            self.wire_bytes,
        )
