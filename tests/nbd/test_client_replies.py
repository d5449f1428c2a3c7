"""Replies as a client reads them: whole, in pieces, and from servers that lie."""

from __future__ import annotations

import errno
import random
import struct
from dataclasses import dataclass, field

import pytest
from garble import garbled
from hypothesis import given
from hypothesis import strategies as st

from replnbd.errors import ProtocolError
from replnbd.nbd import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    STRUCTURED_REPLIES,
    ClientReplies,
    Progress,
    Replies,
    Request,
    ServerOffer,
)
from replnbd.nbd.client_replies import EXTENTS_MAX, STAGE_BYTES

READ, WRITE, _, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
NONE, DATA, HOLE, STATUS_CHUNK, STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002
CONTEXTS = {"base:allocation": 3, "x:y": 8}
SHAPES = {"simple": SIMPLE_REPLIES, "structured": STRUCTURED_REPLIES, "extended": EXTENDED_REPLIES}


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def data(offset: int, content: bytes) -> bytes:
    return struct.pack(">Q", offset) + content


def hole(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def failure(error: int, text: bytes = b"", *, claimed: int | None = None) -> bytes:
    return struct.pack(">IH", error, len(text) if claimed is None else claimed) + text


@dataclass
class Session:
    """A session's replies, and how its requests ended."""

    shape: Replies
    ended: list[tuple[int, OSError | None]] = field(default_factory=list)
    buffers: dict[int, bytearray] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    statuses: dict[int, dict[int, list[tuple[int, int]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.replies = ClientReplies(ServerOffer(1 << 40, 1, self.shape, contexts=CONTEXTS))

    def ask(self, cookie: int, command: int, offset: int = 0, length: int = 0) -> None:
        progress = None
        if command == READ:
            self.buffers[cookie] = bytearray(b"?" * length)
            progress = Progress(memoryview(self.buffers[cookie]))
        elif command == STATUS:
            self.statuses[cookie] = {}
            progress = Progress(statuses=self.statuses[cookie])
        self.offsets[cookie] = offset

        def done(failure: OSError | None) -> None:
            self.ended.append((cookie, failure))

        self.replies.pending[cookie] = (command, offset, length, 28, done, progress)
        self.replies.bytes_outstanding += 28

    def chunk(self, cookie: int, kind: int, payload: bytes = b"", *, flags: int = 1) -> bytes:
        if self.shape is EXTENDED_REPLIES:
            offset = self.offsets.get(cookie, 0)
            head = struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload))
        else:
            head = struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload))
        return head + payload

    def say(self, said: bytes, piece: int = 1 << 30) -> None:
        while said:
            buffer = self.replies.get_buffer()
            length = min(len(buffer), len(said), piece)
            assert length, "no room to receive"
            buffer[:length] = said[:length]
            self.replies.received(length)
            said = said[length:]

    def only_failure(self) -> OSError:
        ((_, failure),) = self.ended
        assert failure is not None
        assert not self.replies.pending
        assert self.replies.bytes_outstanding == 0
        return failure


@pytest.fixture(params=["structured", "extended"])
def session(request: pytest.FixtureRequest) -> Session:
    return Session(SHAPES[request.param])


def reading(session: Session, offset: int = 1000, length: int = 100) -> Session:
    session.ask(1, READ, offset, length)
    return session


# Section: what is right


@pytest.mark.parametrize("shape", SHAPES)
def test_acknowledgements_end_requests_in_the_order_of_replies(shape: str) -> None:
    session = Session(SHAPES[shape])
    for cookie in range(1, 100):
        session.ask(cookie, WRITE, cookie * 512, 512)
    order = list(range(1, 100))
    random.Random(1).shuffle(order)
    reply = [SHAPES[shape].ack(Request(0, WRITE, cookie, cookie * 512, 512)) for cookie in order]
    session.say(b"".join(reply))
    assert session.ended == [(cookie, None) for cookie in order]
    assert session.replies.bytes_outstanding == 0


def test_a_structured_server_may_acknowledge_by_a_chunk() -> None:
    session = Session(STRUCTURED_REPLIES)
    session.ask(1, FLUSH)
    session.say(session.chunk(1, NONE))
    assert session.ended == [(1, None)]


@pytest.mark.parametrize("piece", [1, 7, 1 << 30])
@pytest.mark.parametrize("length", [1, 4096, 16 << 10, (16 << 10) + 1, 1 << 20])
def test_a_simple_read_lands_in_its_buffer(length: int, piece: int) -> None:
    if piece == 1 and length > 1 << 16:
        piece = 1000
    session = Session(SIMPLE_REPLIES)
    session.ask(1, READ, 512, length)
    session.ask(2, WRITE, 0, 1)
    content = random.Random(length).randbytes(length)
    session.say(simple(1, 0, content) + simple(2), piece)
    assert session.ended == [(1, None), (2, None)]
    assert session.buffers[1] == content


def test_a_read_in_pieces_of_any_order(session: Session) -> None:
    reading(session)
    said = [
        session.chunk(1, DATA, data(1050, b"b" * 20), flags=0),
        session.chunk(1, HOLE, hole(1000, 50), flags=0),
        session.chunk(1, DATA, data(1090, b"d" * 10), flags=2),  # an unknown flag
        session.chunk(1, DATA, data(1070, b"c" * 20), flags=0),
        session.chunk(1, NONE),
    ]
    session.say(b"".join(said))
    assert session.ended == [(1, None)]
    assert session.buffers[1] == bytes(50) + b"b" * 20 + b"c" * 20 + b"d" * 10


def test_a_long_hole_is_zeroed(session: Session) -> None:
    reading(session, 0, 200_001)
    session.say(session.chunk(1, HOLE, hole(0, 200_001)))
    assert session.ended == [(1, None)]
    assert session.buffers[1] == bytes(200_001)


def test_chunks_of_several_reads_may_mingle(session: Session) -> None:
    rng = random.Random(5)
    session.ask(1, READ, 0, 100_000)
    session.ask(2, READ, 50_000, 100_000)
    content = {1: rng.randbytes(100_000), 2: rng.randbytes(100_000)}
    said = []
    for at in range(0, 100_000, 20_000):
        for cookie in (1, 2):
            part = content[cookie][at : at + 20_000]
            where = session.offsets[cookie] + at
            said.append(session.chunk(cookie, DATA, data(where, part), flags=int(at == 80_000)))
    session.say(b"".join(said), 33_333)
    assert session.ended == [(1, None), (2, None)]
    assert session.buffers[1] == content[1]
    assert session.buffers[2] == content[2]


def test_block_status_is_clipped_to_the_range(session: Session) -> None:
    session.ask(1, STATUS, 4096, 1 << 20)
    session.say(status(session, 1, 3, [(4096, 0), (1 << 20, 3)], flags=0))
    session.say(status(session, 1, 8, [((1 << 32) - 1, 1)]))
    assert session.ended == [(1, None)]
    assert session.statuses[1] == {3: [(4096, 0), ((1 << 20) - 4096, 3)], 8: [(1 << 20, 1)]}


def test_extents_of_64_bits_are_clipped() -> None:
    session = Session(EXTENDED_REPLIES)
    session.ask(1, STATUS, 0, 1 << 39)
    most = (1 << 64) - 1
    session.say(status(session, 1, 3, [(1, most), (most, 2)], flags=0))
    session.say(status(session, 1, 8, [(most, most)] * 3))
    assert session.ended == [(1, None)]
    assert session.statuses[1] == {3: [(1, most), ((1 << 39) - 1, 2)], 8: [(1 << 39, most)]}


def test_more_extents_than_are_kept_are_dropped_as_they_come(session: Session) -> None:
    session.ask(1, STATUS, 0, 1 << 30)
    session.ask(2, WRITE, 0, 1)
    many = [(16, 0), (16, 1)] * 30_000
    said = status(session, 1, 3, many, flags=0) + status(session, 1, 8, [(1, 1)])
    session.say(said + session.chunk(2, NONE), 100_000)
    assert session.ended == [(1, None), (2, None)]
    assert session.statuses[1][3] == many[:EXTENTS_MAX]


def status(
    session: Session,
    cookie: int,
    context: int,
    extents: list[tuple[int, int]],
    *,
    flags: int = 1,
    count: int | None = None,
) -> bytes:
    words = [word for extent in extents for word in extent]
    if session.shape is EXTENDED_REPLIES:
        payload = struct.pack(">II", context, len(extents) if count is None else count)
        payload += struct.pack(f">{len(words)}Q", *words)
        return session.chunk(cookie, STATUS_EXT, payload, flags=flags)
    payload = struct.pack(f">I{len(words)}I", context, *words)
    return session.chunk(cookie, STATUS_CHUNK, payload, flags=flags)


# Section: errors that fail one request


@pytest.mark.parametrize("shape", ["simple", "structured"])
@pytest.mark.parametrize("command", [WRITE, READ, FLUSH])
def test_a_simple_error_fails_its_request(shape: str, command: int) -> None:
    session = Session(SHAPES[shape])
    session.ask(1, command, 0, 4096 if command != FLUSH else 0)
    session.say(simple(1, errno.ENOSPC))
    assert session.only_failure().errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "number"),
    [(1, 1), (5, 5), (12, 12), (22, 22), (28, 28), (75, 75), (95, 95), (0, 22), (2, 22), (999, 22)],
)
def test_an_error_of_the_wire_is_an_errno(session: Session, error: int, number: int) -> None:
    session.ask(1, WRITE, 0, 512)
    session.say(session.chunk(1, ERROR, failure(error, b"a \x07 text")))
    assert session.only_failure().errno == number
    assert "a \\x07 text" in str(session.only_failure())


def test_an_error_with_an_offset_fails_a_read_and_its_data_may_follow(session: Session) -> None:
    reading(session)
    offset = struct.pack(">Q", 1010)
    session.say(session.chunk(1, ERROR_OFFSET, failure(5, b"bad") + offset, flags=0))
    session.say(session.chunk(1, DATA, data(1050, bytes(50)), flags=0))
    session.say(session.chunk(1, ERROR, failure(28, b"later"), flags=0))
    session.say(session.chunk(1, NONE))
    assert session.only_failure().errno == errno.EIO
    assert "bad" in str(session.only_failure())


def test_a_write_that_failed_before_its_last_chunk_has_failed(session: Session) -> None:
    session.ask(1, WRITE, 0, 512)
    session.say(session.chunk(1, ERROR, failure(28), flags=0))
    assert not session.ended
    session.say(session.chunk(1, NONE))
    assert session.only_failure().errno == errno.ENOSPC


def test_an_unknown_kind_of_error_fails_its_request_alone(session: Session) -> None:
    reading(session)
    session.ask(2, WRITE, 0, 1)
    session.say(session.chunk(1, 0x8077, failure(28, b"new") + b"more"))
    session.say(session.chunk(2, NONE))
    (_, failed), second = session.ended
    assert failed is not None
    assert failed.errno == errno.ENOSPC
    assert second == (2, None)


def test_bytes_that_are_missing_are_eio(session: Session) -> None:
    reading(session)
    session.say(session.chunk(1, DATA, data(1000, bytes(99))))
    assert session.only_failure().errno == errno.EIO


def test_a_read_that_is_done_without_bytes_is_eio(session: Session) -> None:
    reading(session)
    session.say(session.chunk(1, NONE))
    assert session.only_failure().errno == errno.EIO


def test_a_context_that_is_missing_is_eio(session: Session) -> None:
    session.ask(1, STATUS, 0, 4096)
    session.say(status(session, 1, 3, [(4096, 0)]))
    assert session.only_failure().errno == errno.EIO


def test_eshutdown_is_noticed(session: Session) -> None:
    session.ask(1, WRITE, 0, 512)
    session.say(session.chunk(1, ERROR, failure(108)))
    assert session.only_failure().errno == errno.ESHUTDOWN
    assert session.replies.shutting_down


def test_the_sessions_end_fails_everything_once(session: Session) -> None:
    for cookie in range(1, 5):
        session.ask(cookie, WRITE, 0, 512)
    session.say(session.chunk(3, NONE))
    reason = OSError(errno.ECONNRESET, "gone")
    session.replies.end(reason)
    session.replies.end(reason)
    assert session.ended == [(3, None), (1, reason), (2, reason), (4, reason)]
    assert session.replies.bytes_outstanding == 0


@pytest.mark.parametrize("cut", [0, 10, 31, 50, 5000, 69_000])
def test_a_forgotten_read_leaves_its_buffer_alone(session: Session, cut: int) -> None:
    reading(session, 0, 70_000)
    session.ask(2, WRITE, 0, 1)
    said = session.chunk(1, DATA, data(0, b"x" * 70_000)) + session.chunk(2, NONE)
    session.say(said[:cut])
    session.replies.forget(1)
    before = bytes(session.buffers[1])
    session.say(said[cut:], 20_000)
    assert session.buffers[1] == before
    assert session.ended == [(1, None), (2, None)]


# Section: servers that break the protocol


def broken(session: Session) -> dict[str, bytes]:
    """What no server may say, with READ 1 of 100 bytes at 1000, STATUS 2 and WRITE 3 pending."""
    say = session.chunk
    ext = session.shape is EXTENDED_REPLIES
    kind, other = (STATUS_EXT, STATUS_CHUNK) if ext else (STATUS_CHUNK, STATUS_EXT)
    head = struct.pack(">II", 3, 1) if ext else struct.pack(">I", 3)
    size = 16 if ext else 8
    found = {
        "magic": bytes(40),
        "a request": struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 0) + bytes(8),
        "an unknown cookie": say(9, NONE),
        "an unknown cookie's data": say(9, DATA, data(1000, b"x")),
        "an unknown cookie's error": say(9, ERROR, failure(5)),
        "a second end": say(3, NONE) + say(3, NONE),
        "NONE that is not the end": say(3, NONE, flags=0),
        "NONE with bytes": say(3, NONE, b"x"),
        "an unknown kind": say(3, 77),
        "data before the range": say(1, DATA, data(999, b"x")),
        "data behind the range": say(1, DATA, data(1099, b"xx")),
        "data far behind": say(1, DATA, data((1 << 64) - 1, b"x")),
        "no data": say(1, DATA, data(1000, b"")),
        "half an offset": say(1, DATA, b"1234") + bytes(40),
        "too much data": say(1, DATA, data(1000, bytes(101))),
        "data to a WRITE": say(3, DATA, data(0, b"x")),
        "a hole behind the range": say(1, HOLE, hole(1000, 101)),
        "an empty hole": say(1, HOLE, hole(1000, 0)),
        "half a hole": say(1, HOLE, b"x" * 11),
        "a hole to a STATUS": say(2, HOLE, hole(0, 512)),
        "overlapping data": say(1, DATA, data(1000, bytes(60)), flags=0)
        + say(1, DATA, data(1059, b"x")),
        "data under a hole": say(1, HOLE, hole(1010, 10), flags=0)
        + say(1, DATA, data(1000, bytes(20))),
        "the same data twice": 2 * say(1, DATA, data(1000, bytes(100)), flags=0),
        "an error of 5 bytes": say(3, ERROR, b"12345"),
        "an error's text too long": say(3, ERROR, failure(5, b"abc", claimed=4)),
        "an unknown error's text too long": say(3, 0x8999, failure(5, b"abc", claimed=4)),
        "an error of 1 MiB": say(3, ERROR, failure(5, bytes(1 << 15)) + bytes(1 << 20)),
        "an offset's text too long": say(3, ERROR_OFFSET, failure(5, bytes(8), claimed=8)),
        "an error outside": say(1, ERROR_OFFSET, failure(5) + struct.pack(">Q", 1100)),
        "endless errors": 1025 * say(3, ERROR, failure(5), flags=0),
        "status to a READ": say(1, kind, head + bytes(size)),
        "status of the other shape": say(2, other, bytes(24)),
        "status without extents": say(2, kind, head),
        "half an extent": say(2, kind, head + bytes(size + 4)),
        "an empty extent": status(session, 2, 3, [(5, 0), (0, 0)]),
        "an unknown context": status(session, 2, 4, [(5, 0)]),
        "a context twice": status(session, 2, 3, [(5, 0)], flags=0)
        + status(session, 2, 3, [(5, 0)]),
        "too many extents": say(2, kind, head + bytes(size) * ((1 << 20) + 1)),
    }  # fmt: skip
    if ext:
        found |= {
            "a simple reply": simple(3) + bytes(16),
            "a structured chunk": struct.pack(">IHHQI", 0x668E33EF, 1, 0, 3, 0) + bytes(12),
            "a wrong count": status(session, 2, 3, [(5, 0)], count=2),
            "another offset": struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, 3, 1, 0),
            "an error with another offset": struct.pack(">IHHQQQ", 0x6E8A278C, 1, ERROR, 3, 1, 6)
            + failure(5),
            "2^64 - 1 bytes": struct.pack(">IHHQQQ", 0x6E8A278C, 1, DATA, 1, 1000, (1 << 64) - 1)
            + bytes(8),
        }
    else:
        found |= {
            "a simple reply to READ": simple(1, 0, bytes(100)),
            "a simple reply to STATUS": simple(2),
            "an extended chunk": struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, 3, 0, 0),
        }
    return found


@pytest.mark.parametrize("shape", ["structured", "extended"])
@pytest.mark.parametrize(
    "what", broken(Session(EXTENDED_REPLIES)) | broken(Session(STRUCTURED_REPLIES))
)
def test_a_broken_server_is_left(shape: str, what: str) -> None:
    session = Session(SHAPES[shape])
    session.ask(1, READ, 1000, 100)
    session.ask(2, STATUS, 0, 1 << 20)
    session.ask(3, WRITE, 0, 512)
    said = broken(session).get(what)
    if said is None:
        return  # of the other shape
    with pytest.raises(ProtocolError) as caught:
        session.say(said)
    assert str(caught.value).isprintable()


def test_a_read_in_too_many_pieces_is_left(session: Session) -> None:
    session.ask(1, READ, 0, 1 << 20)
    said = [session.chunk(1, DATA, data(at, b"x"), flags=0) for at in range(0, 1 << 20, 2)]
    with pytest.raises(ProtocolError, match="pieces"):
        session.say(b"".join(said))


@pytest.mark.parametrize("what", ["chunk", "extended"])
def test_a_server_that_negotiated_nothing_sends_simple_replies_alone(what: str) -> None:
    session = Session(SIMPLE_REPLIES)
    session.ask(1, WRITE, 0, 1)
    magic = 0x668E33EF if what == "chunk" else 0x6E8A278C
    with pytest.raises(ProtocolError):
        session.say(struct.pack(">IHHQI", magic, 1, 0, 1, 0))


# Section: streams


def conversation(shape: str) -> tuple[Session, bytes]:
    """Requests, and good replies to them of all kinds."""
    session = Session(SHAPES[shape])
    rng = random.Random(11)
    for cookie, length in ((1, 300), (2, 20_000), (5, 600)):
        session.ask(cookie, READ, 512 * cookie, length)
    session.ask(3, WRITE, 0, 512)
    session.ask(6, TRIM, 512, 512)
    if shape == "simple":
        said = [
            simple(3), simple(2, 0, rng.randbytes(20_000)), simple(1, 5),
            simple(5, 0, rng.randbytes(600)), simple(6, 22),
        ]  # fmt: skip
        return session, b"".join(said)
    session.ask(4, STATUS, 0, 1 << 20)
    say = session.chunk
    said = [
        say(3, NONE),
        say(2, DATA, data(1024 + 100, rng.randbytes(19_900)), flags=0),
        status(session, 4, 8, [(5, 1), (7, 2)], flags=0),
        say(1, DATA, data(512, rng.randbytes(200)), flags=0),
        say(2, HOLE, hole(1024, 100)),
        say(1, ERROR_OFFSET, failure(5, b"text") + struct.pack(">Q", 600)),
        status(session, 4, 3, [(1 << 20, 1)]),
        say(5, HOLE, hole(5 * 512, 600), flags=0),
        say(5, NONE),
        say(6, ERROR, failure(22)),
    ]
    return session, b"".join(said)


def results(session: Session) -> tuple[object, ...]:
    ended = [(cookie, failure and str(failure)) for cookie, failure in session.ended]
    return ended, session.buffers, session.statuses, dict(session.replies.pending)


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_of_any_size_say_the_same(shape: str) -> None:
    whole, said = conversation(shape)
    whole.say(said)
    assert len(whole.ended) == len(whole.offsets)
    interesting = [*range(1, 100), *range(len(said) - 900, len(said))]
    for cut in interesting:
        session, _ = conversation(shape)
        session.say(said[:cut])
        session.say(said[cut:])
        assert results(session) == results(whole)
    for piece in (1, 2, 3, 19, 33, 1000):
        session, _ = conversation(shape)
        session.say(said, piece)
        assert results(session) == results(whole)


@pytest.mark.parametrize("shape", SHAPES)
@given(st.data())
def test_a_server_that_says_anything_is_understood_or_left(shape: str, draw: st.DataObject) -> None:
    session, said_well = conversation(shape)
    said = garbled(draw, said_well)
    text = ""
    try:
        session.say(said, draw.draw(st.sampled_from([17, 1000, 1 << 30])))
    except ProtocolError as exc:
        text = str(exc)
    assert text.isprintable()
    session.replies.end(OSError(errno.ECONNRESET, "gone"))
    assert sorted(cookie for cookie, _ in session.ended) == sorted(session.offsets)


@pytest.mark.parametrize("shape", SHAPES)
@given(st.binary(max_size=200))
def test_noise_is_left(shape: str, noise: bytes) -> None:
    session = Session(SHAPES[shape])
    session.ask(1, READ, 0, 512)
    try:
        session.say(noise)
    except ProtocolError:
        return
    assert len(session.replies.get_buffer()) > STAGE_BYTES - 200
