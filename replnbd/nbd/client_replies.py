"""Replies as a client reads them: bytes in, ended transactions out.

    replies = ClientReplies(offer)
    replies.pending[cookie] = transaction             whenever a request is sent
    loop:   replies.get_buffer()                      where the next bytes are to be put
            replies.received(count)                   they are there: ends what is complete

What is complete is taken from `pending` and its `done` is called, in the order of the replies.
`received` raises ProtocolError when the server is out of step or lies about what it sends; then the
connection must be closed, and `end` called. What it may do wrong without harm fails the one
request: too few bytes, too few contexts, error chunks of unknown kinds.

Buffers. Everything lands in one buffer of STAGE_BYTES and is parsed there, but for the data of READ
chunks longer than WHOLE_MAX: their rest lands where the reader wants it. What a reply has beyond
what we keep (descriptors of a BLOCK_STATUS) is dropped as it comes. So a server makes us hold
STAGE_BYTES, and what was asked for.

An acknowledgement takes 0.5 µs; that is what the two loops are for.
"""

from __future__ import annotations

import errno
import struct

from replnbd.errors import ProtocolError
from replnbd.nbd import constants as c
from replnbd.nbd.client_handshake import ServerOffer
from replnbd.nbd.client_messages import shown
from replnbd.nbd.client_transactions import Progress, Transaction
from replnbd.nbd.constants import command_name
from replnbd.nbd.errors import error_number
from replnbd.nbd.replies import EXTENDED_REPLIES, STRUCTURED_REPLIES

STAGE_BYTES = 256 << 10
WHOLE_MAX = 16 << 10
"""A READ chunk up to this is parsed when all of it is there."""

EXTENTS_MAX = 8192
"""Of one context in one reply. What a server tells beyond is dropped: it may stop anywhere, too."""

STATUS_EXTENTS_MAX = 1 << 20
""" "Servers SHOULD NOT send more than 2^20 extents in a single reply chunk"."""

_ERROR_BYTES_MAX = 6 + c.NAME_BYTES_MAX + 64
_ERROR_BIT = 1 << 15

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_EXTENDED = struct.Struct(">IHHQQQ")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")
_OFFSET = struct.Struct(">Q")
_STATUS_EXT = struct.Struct(">II")
_SIMPLE_SIZE, _CHUNK_SIZE, _EXTENDED_SIZE = 16, 20, 32
_unpack_simple, _unpack_chunk = _SIMPLE.unpack_from, _CHUNK.unpack_from
_unpack_extended, _unpack_offset = _EXTENDED.unpack_from, _OFFSET.unpack_from
_SIMPLE_MAGIC, _STRUCTURED_MAGIC = c.SIMPLE_REPLY_MAGIC, c.STRUCTURED_REPLY_MAGIC
_EXTENDED_MAGIC, _NONE, _DONE = c.EXTENDED_REPLY_MAGIC, c.REPLY_TYPE_NONE, c.REPLY_FLAG_DONE

_SCRAP = memoryview(bytearray(64 << 10))  # written by all who drop what they receive, never read
_ZEROES = bytes(64 << 10)

# What has to be whole to be parsed fits, with room for more.
assert _EXTENDED_SIZE + 8 + 16 * EXTENTS_MAX < STAGE_BYTES
assert _EXTENDED_SIZE + 8 + WHOLE_MAX < STAGE_BYTES


class ClientReplies:
    """The replies of one session, in the shape that its handshake has chosen."""

    def __init__(self, offer: ServerOffer) -> None:
        self.pending: dict[int, Transaction] = {}
        """By cookie."""
        self.bytes_outstanding = 0
        """Of what is pending, as it was sent."""
        self.shutting_down = False
        """The server has said ESHUTDOWN: "it MUST initiate a soft disconnect" is about us."""
        self._structured = offer.replies is STRUCTURED_REPLIES
        self._extended = offer.replies is EXTENDED_REPLIES
        self._context_ids = frozenset(offer.contexts.values())
        self._stage = bytearray(STAGE_BYTES)
        self._view = memoryview(self._stage)
        self._end = 0
        # The chunk whose payload is still coming: how much, where to, and of what
        self._rest = 0
        self._target: memoryview | None = None
        self._cookie = 0
        self._final = False

    # Section: bytes

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        rest = self._rest
        if not rest:
            return self._view[self._end :]
        return _SCRAP[:rest] if self._target is None else self._target[-rest:]

    def received(self, count: int) -> None:
        """`count` bytes are in what `get_buffer` gave last."""
        if self._rest:
            self._rest -= count
            if not self._rest:
                self._target = None
                if self._final:
                    self._finish(self._cookie)
            return
        end = self._end + count
        at = self._parse_extended(end) if self._extended else self._parse_compact(end)
        if 0 < at < end:
            self._view[: end - at] = self._view[at:end]
        self._end = end - at

    def forget(self, cookie: int) -> None:
        """Nobody wants the bytes of a READ any more: its buffer is not touched from now on."""
        transaction = self.pending.get(cookie)
        if transaction is not None and transaction[5] is not None:
            transaction[5].into = None
            if self._rest and self._cookie == cookie:
                self._target = None

    def end(self, failure: OSError) -> None:
        """The session is over: everything that is pending has failed."""
        self._target = None
        while self.pending:
            cookie = next(iter(self.pending))
            done = self.pending.pop(cookie)[4]
            done(failure)
        self.bytes_outstanding = 0

    # Section: replies. All give where the next one begins; 0: too few bytes are there. The loops:
    # where they stopped.

    def _parse_compact(self, end: int) -> int:
        stage, pending, at = self._stage, self.pending, 0
        while end - at >= _SIMPLE_SIZE:
            magic, error, cookie = _unpack_simple(stage, at)
            if magic == _SIMPLE_MAGIC and not error:
                transaction = pending.pop(cookie, None)
                if transaction is not None:
                    if transaction[5] is None:
                        self.bytes_outstanding -= transaction[3]
                        transaction[4](None)
                        at += _SIMPLE_SIZE
                        continue
                    pending[cookie] = transaction
            behind = self._compact(at, end)
            if not behind:
                break
            at = behind
        return at

    def _parse_extended(self, end: int) -> int:
        stage, pending, at = self._stage, self.pending, 0
        while end - at >= _EXTENDED_SIZE:
            magic, flags, kind, cookie, offset, length = _unpack_extended(stage, at)
            if kind == _NONE and flags == _DONE and not length and magic == _EXTENDED_MAGIC:
                transaction = pending.pop(cookie, None)
                if transaction is not None:
                    if transaction[5] is None and transaction[1] == offset:
                        self.bytes_outstanding -= transaction[3]
                        transaction[4](None)
                        at += _EXTENDED_SIZE
                        continue
                    pending[cookie] = transaction
            if magic != _EXTENDED_MAGIC:
                raise ProtocolError(f"reply magic is {magic:#x}, and headers are extended")
            if self._transaction(cookie)[1] != offset:
                raise ProtocolError(f"a reply to cookie {cookie} with offset {offset}")
            behind = self._chunk(at + _EXTENDED_SIZE, end, flags, kind, cookie, length)
            if not behind:
                break
            at = behind
        return at

    def _compact(self, at: int, end: int) -> int:
        magic, error, cookie = _unpack_simple(self._stage, at)
        if magic == _SIMPLE_MAGIC:
            return self._simple(at, end, error, cookie)
        if magic != _STRUCTURED_MAGIC or not self._structured:
            raise ProtocolError(f"reply magic is {magic:#x}")
        if end - at < _CHUNK_SIZE:
            return 0
        _, flags, kind, cookie, length = _unpack_chunk(self._stage, at)
        return self._chunk(at + _CHUNK_SIZE, end, flags, kind, cookie, length)

    def _simple(self, at: int, end: int, error: int, cookie: int) -> int:
        command, offset, length, *_ = self._transaction(cookie)
        if error:
            self._fail(cookie, error, b"")
        elif command == c.CMD_READ and not self._structured:
            return self._data(at + _SIMPLE_SIZE, end, cookie, 0, length, True)
        elif command in (c.CMD_READ, c.CMD_BLOCK_STATUS):
            # "MUST NOT use a simple reply for NBD_CMD_READ"; an error of one has no bytes, and is
            # let pass.
            raise ProtocolError(f"a simple reply to {command_name(command)} at {offset}")
        self._finish(cookie)
        return at + _SIMPLE_SIZE

    # Section: chunks, from their payload on

    def _chunk(self, at: int, end: int, flags: int, kind: int, cookie: int, length: int) -> int:
        final = bool(flags & _DONE)  # "Clients MUST ignore unrecognized flags."
        if kind == c.REPLY_TYPE_OFFSET_DATA:
            return self._offset_data(at, end, cookie, length, final)
        if kind in (c.ReplyType.BLOCK_STATUS, c.ReplyType.BLOCK_STATUS_EXT):
            return self._status(at, end, cookie, kind, length, final)
        if length > _ERROR_BYTES_MAX:
            raise ProtocolError(f"a chunk of type {kind} with {length} bytes")
        if end - at < length:
            return 0
        if kind & _ERROR_BIT:
            self._error(at, cookie, kind, length)
        elif kind == c.REPLY_TYPE_OFFSET_HOLE:
            self._hole(at, cookie, length)
        elif kind != _NONE or length or not final:
            raise ProtocolError(f"a chunk of type {kind}, flags {flags:#x}, with {length} bytes")
        else:
            self._transaction(cookie)
        if final:
            self._finish(cookie)
        return at + length

    def _offset_data(self, at: int, end: int, cookie: int, length: int, final: bool) -> int:
        command, asked, asked_length, cost, done, progress = self._transaction(cookie)
        if end - at < 8:
            return 0
        (offset,) = _unpack_offset(self._stage, at)
        # Nearly always the first chunk is all there is: 2 µs instead of 5.
        if (
            final
            and command == c.CMD_READ
            and offset == asked
            and length == 8 + asked_length
            and end - at >= length
            and progress is not None
            and progress.untouched
        ):
            if progress.into is not None:
                progress.into[:] = self._view[at + 8 : at + length]
            del self.pending[cookie]
            self.bytes_outstanding -= cost
            done(None)
            return at + length
        start = self._place(cookie, offset, length - 8)
        return self._data(at + 8, end, cookie, start, length - 8, final)

    def _data(
        self, at: int, end: int, cookie: int, start: int, length: int, final: bool
    ) -> int:  # fmt: skip
        """`length` bytes of data from `start` of a READ on."""
        got = min(end - at, length)
        if got < length <= WHOLE_MAX:
            return 0
        progress = self._progress(cookie)
        progress.cover(start, start + length)
        into = progress.into
        if into is not None:
            into[start : start + got] = self._view[at : at + got]
        if got < length:
            target = None if into is None else into[start : start + length]
            self._await_rest(length - got, target, cookie, final)
        elif final:
            self._finish(cookie)
        return at + got

    def _hole(self, at: int, cookie: int, length: int) -> None:
        if length != _HOLE.size:
            raise ProtocolError(f"OFFSET_HOLE with {length} bytes")
        offset, hole = _HOLE.unpack_from(self._stage, at)
        start = self._place(cookie, offset, hole)
        progress = self._progress(cookie)
        progress.cover(start, start + hole)
        if progress.into is not None:
            into = progress.into[start : start + hole]
            for done in range(0, hole, len(_ZEROES)):
                part = into[done : done + len(_ZEROES)]
                part[:] = _ZEROES[: len(part)]

    def _place(self, cookie: int, offset: int, length: int) -> int:
        """Where a content chunk begins within its READ; ProtocolError if not all of it is there."""
        command, asked, asked_length, *_ = self._transaction(cookie)
        start = offset - asked
        if command != c.CMD_READ or length < 1 or start < 0 or start + length > asked_length:
            raise ProtocolError(
                f"content at {offset} of {length} bytes in reply to {command_name(command)} at"
                f" {asked} of {asked_length} bytes"
            )
        return start

    def _error(self, at: int, cookie: int, kind: int, length: int) -> None:
        # "Each [error chunk] MUST begin with the same fields", unknown ones too.
        fixed = _ERROR.size + (8 if kind == c.REPLY_TYPE_ERROR_OFFSET else 0)
        error, text_length = _ERROR.unpack_from(self._stage, at) if length >= fixed else (0, length)
        if text_length > length - fixed:
            raise ProtocolError(f"an error of {length} bytes with a text of {text_length}")
        text_at = at + _ERROR.size
        if kind == c.REPLY_TYPE_ERROR_OFFSET:
            _, offset, asked_length, *_ = self._transaction(cookie)
            (where,) = _unpack_offset(self._stage, text_at + text_length)
            if not offset <= where < offset + asked_length:
                raise ProtocolError(f"an error at {where}, outside of the request's range")
        self._fail(cookie, error, bytes(self._stage[text_at : text_at + text_length]))

    def _status(
        self, at: int, end: int, cookie: int, kind: int, length: int, final: bool
    ) -> int:  # fmt: skip
        command, _, asked_length, *_ = self._transaction(cookie)
        extended = kind == c.ReplyType.BLOCK_STATUS_EXT
        if command != c.CMD_BLOCK_STATUS or extended is not self._extended:
            raise ProtocolError(f"a chunk of type {kind} in reply to {command_name(command)}")
        fixed, size, letter = (8, 16, "Q") if extended else (4, 8, "I")
        count, odd = divmod(length - fixed, size)
        if odd or not 1 <= count <= STATUS_EXTENTS_MAX:
            raise ProtocolError(f"a chunk of type {kind} with {length} bytes")
        kept = min(count, EXTENTS_MAX)
        used = fixed + kept * size
        if end - at < used:
            return 0
        context, told = _STATUS_EXT.unpack_from(self._stage, at)
        progress = self._progress(cookie)
        if context not in self._context_ids or context in progress.statuses:
            raise ProtocolError(f"block status of context {context}, not asked or told before")
        if extended and told != count:
            raise ProtocolError(f"{told} descriptors in {length} bytes")
        words = struct.unpack_from(f">{2 * kept}{letter}", self._stage, at + fixed)
        progress.statuses[context] = _clipped(words, asked_length)
        used = min(end - at, length)
        if used < length:
            self._await_rest(length - used, None, cookie, final)
        elif final:
            self._finish(cookie)
        return at + used

    # Section: transactions

    def _await_rest(
        self, rest: int, target: memoryview | None, cookie: int, final: bool
    ) -> None:  # fmt: skip
        """The stage is used up: the last `rest` bytes of a chunk come into the end of `target`, or
        nowhere."""
        self._rest, self._target, self._cookie, self._final = rest, target, cookie, final

    def _transaction(self, cookie: int) -> Transaction:
        transaction = self.pending.get(cookie)
        if transaction is None:
            raise ProtocolError(f"a reply to cookie {cookie}, which no request has")
        return transaction

    def _progress(self, cookie: int) -> Progress:
        transaction = self._transaction(cookie)
        progress = transaction[5]
        if progress is None:
            progress = Progress()
            self.pending[cookie] = (*transaction[:5], progress)
        return progress

    def _fail(self, cookie: int, error: int, text: bytes) -> None:
        command, offset, length, *_ = self._transaction(cookie)
        number = error_number(error)
        if number == errno.ESHUTDOWN:
            self.shutting_down = True
        reason = shown(text) if text else "the server gives no reason"
        name = f"{command_name(command)} at {offset} of {length} bytes"
        self._progress(cookie).fail(OSError(number, f"{name}: {reason}"))

    def _finish(self, cookie: int) -> None:
        command, offset, length, cost, done, progress = self.pending.pop(cookie)
        self.bytes_outstanding -= cost
        contexts = len(self._context_ids)
        done(progress.verdict(command, offset, length, contexts) if progress else None)


def _clipped(words: tuple[int, ...], length: int) -> list[tuple[int, int]]:
    """Descriptors, as far as they are about a range of `length` bytes."""
    found = []
    for extent_length, flags in zip(words[::2], words[1::2], strict=True):
        if not extent_length:
            raise ProtocolError("an extent of 0 bytes")
        found.append((min(extent_length, length), flags))
        length -= extent_length
        if length <= 0:
            break
    return found
