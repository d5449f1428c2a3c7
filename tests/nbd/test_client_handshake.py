"""The client's handshake: what it says to which server, and what no server can do to it."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from garble import garbled
from handshake_support import (
    ACK,
    BASE,
    BITMAP,
    DIRECTORY,
    DISK,
    ERR_POLICY,
    ERR_SHUTDOWN,
    ERR_TLS_REQD,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FIXED,
    FIXED_NO_ZEROES,
    GO,
    GREETING,
    META_CONTEXT,
    REP_INFO,
    SET_META,
    STARTTLS,
    STRUCTURED_REPLY,
    choose,
    error,
    option,
    reply,
)
from hypothesis import given
from hypothesis import strategies as st

from replnbd.errors import ProtocolError
from replnbd.nbd import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    STRUCTURED_REPLIES,
    ClientHandshake,
    Handshake,
    ServerOffer,
    TlsMode,
)

ASKED_GO = choose(GO, "disk", 1, 2, 3)
EXPORT = reply(GO, REP_INFO, struct.pack(">HQH", 0, 12345, 0x96D))
GO_ACK = reply(GO, ACK)
NO_EXTENDED = error(EXTENDED_HEADERS, ERR_UNSUP, "")
NO_STRUCTURED = error(STRUCTURED_REPLY, ERR_UNSUP, "")
OLD = NO_EXTENDED + NO_STRUCTURED
"""To the first two options, of a server that has neither."""


def set_meta(name: str, *queries: str) -> bytes:
    strings = [name, *queries]
    packed = [struct.pack(">I", len(each)) + each.encode() for each in strings]
    return option(SET_META, packed[0] + struct.pack(">I", len(queries)) + b"".join(packed[1:]))


def context(number: int, name: str) -> bytes:
    return reply(SET_META, META_CONTEXT, struct.pack(">I", number) + name.encode())


def block_sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    return reply(GO, REP_INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))


def converse(handshake: ClientHandshake, said: bytes, pieces: Iterator[int] | None = None) -> bytes:
    """Let a server say `said`, in pieces; what the client says to it."""
    sent = bytearray()

    def advance() -> None:
        while (request := handshake.advance()) is not None:
            sent.extend(request)

    advance()
    while said and handshake.outcome is None:
        length = len(said) if pieces is None else next(pieces)
        handshake.receive(said[:length])
        said = said[length:]
        advance()
    return bytes(sent)


def outcome(said: bytes, *contexts: str) -> ServerOffer:
    handshake = ClientHandshake("disk", contexts=contexts)
    converse(handshake, said)
    assert handshake.outcome is not None
    return handshake.outcome


# Section: servers as they are


def test_a_server_that_has_everything_is_asked_for_everything() -> None:
    handshake = ClientHandshake("disk", contexts=(BASE, BITMAP, "x:none"))
    server = Handshake(DIRECTORY)
    sent = bytearray()
    while handshake.outcome is None:
        while (said := server.advance()) is not None:
            handshake.receive(said)
        while (request := handshake.advance()) is not None:
            sent += request
            server.receive(request)
    asked = option(EXTENDED_HEADERS) + set_meta("disk", BASE, BITMAP, "x:none") + ASKED_GO
    assert sent == FIXED_NO_ZEROES + asked
    offer = handshake.outcome
    assert offer.size == DISK.size
    assert offer.replies is EXTENDED_REPLIES
    assert offer.contexts == {BASE: 1, BITMAP: 3}
    assert (offer.name, offer.description) == ("disk", "a disk")
    assert server.outcome is not None
    assert server.outcome.contexts == (BASE, BITMAP)
    assert offer.transmission_flags == server.outcome.transmission_flags
    assert handshake.unconsumed == b""


def test_without_extended_headers_replies_are_structured() -> None:
    handshake = ClientHandshake("disk")
    said = GREETING + NO_EXTENDED + reply(STRUCTURED_REPLY, ACK) + EXPORT + GO_ACK
    sent = converse(handshake, said + b"early")
    assert sent == FIXED_NO_ZEROES + option(EXTENDED_HEADERS) + option(STRUCTURED_REPLY) + ASKED_GO
    assert handshake.outcome is not None
    assert handshake.outcome.replies is STRUCTURED_REPLIES
    assert handshake.unconsumed == b"early"


def test_without_structured_replies_there_are_no_contexts() -> None:
    offer = outcome(GREETING + OLD + EXPORT + GO_ACK, BASE)
    assert offer.replies is SIMPLE_REPLIES
    assert offer.contexts == {}


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_a_server_without_go_is_entered_by_name(no_zeroes: bool) -> None:
    handshake = ClientHandshake("disk")
    greeting = GREETING if no_zeroes else b"NBDMAGICIHAVEOPT\0\1"
    said = greeting + OLD + error(GO, ERR_UNSUP, "") + struct.pack(">QH", 4096, 1)
    said += b"" if no_zeroes else bytes(124)
    sent = converse(handshake, said + b"early")
    flags = FIXED_NO_ZEROES if no_zeroes else FIXED
    asked = option(EXTENDED_HEADERS) + option(STRUCTURED_REPLY) + ASKED_GO
    assert sent == flags + asked + option(EXPORT_NAME, b"disk")
    assert handshake.outcome is not None
    assert handshake.outcome.size == 4096
    assert handshake.unconsumed == b"early"


def test_a_server_that_refuses_contexts_is_entered_without() -> None:
    said = GREETING + reply(EXTENDED_HEADERS, ACK) + context(7, BASE)
    said += error(SET_META, ERR_POLICY, "") + EXPORT + GO_ACK
    assert outcome(said, BASE).contexts == {}


def test_block_sizes_are_told_and_unknown_information_is_ignored() -> None:
    more = reply(GO, REP_INFO, b"\0\x63what") + block_sizes(1, 4096, 0xFFFFFFFF)
    sizes = outcome(GREETING + OLD + more + EXPORT + GO_ACK).block_sizes
    assert (sizes.minimum, sizes.preferred, sizes.payload_max) == (1, 4096, 0xFFFFFFFF)


def test_what_a_server_tells_of_itself_is_harmless_to_show() -> None:
    text = b"\0\2\x1b[31mred\n\xff" + b"x" * 4000
    offer = outcome(GREETING + OLD + reply(GO, REP_INFO, text) + EXPORT + GO_ACK)
    assert offer.description.startswith("\\x1b[31mred\\n\ufffdxx")
    assert offer.description.isprintable()
    assert len(offer.description) < 400


# Section: TLS


def test_tls_comes_first_and_what_was_sent_before_is_forgotten() -> None:
    handshake = ClientHandshake("disk", tls=True)
    forged = reply(EXTENDED_HEADERS, ACK) + EXPORT + GO_ACK
    assert converse(handshake, GREETING + reply(STARTTLS, ACK) + forged) == (
        FIXED_NO_ZEROES + option(STARTTLS)
    )
    assert handshake.tls_wanted
    handshake.receive(forged)
    assert handshake.advance() is None
    handshake.tls_started()
    assert handshake.unconsumed == b""
    sent = converse(handshake, OLD + EXPORT + GO_ACK)
    assert sent == option(EXTENDED_HEADERS) + option(STRUCTURED_REPLY) + ASKED_GO
    assert handshake.outcome is not None
    assert handshake.outcome.replies is SIMPLE_REPLIES


@pytest.mark.parametrize("kind", [ERR_UNSUP, ERR_POLICY, 0x80000003, 0x80000004, 0x8FFFFFFF])
def test_a_refusal_of_tls_is_the_end(kind: int) -> None:
    handshake = ClientHandshake("disk", tls=True)
    with pytest.raises(OSError, match="STARTTLS"):
        converse(handshake, GREETING + error(STARTTLS, kind, "no") + OLD + EXPORT + GO_ACK)
    assert handshake.outcome is None


def test_a_server_does_both_sides_of_tls() -> None:
    handshake, server = ClientHandshake("disk", tls=True), Handshake(DIRECTORY, TlsMode.REQUIRE)
    while handshake.outcome is None:
        while (said := server.advance()) is not None:
            handshake.receive(said)
        while (request := handshake.advance()) is not None:
            server.receive(request)
        if handshake.tls_wanted:
            handshake.tls_started()
            server.tls_started()
    assert server.identity.secure


# Section: refusals


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (OLD + error(GO, ERR_UNKNOWN, "no such export"), errno.ENOENT),
        (OLD + error(GO, ERR_POLICY, "not you"), errno.EACCES),
        (OLD + error(GO, ERR_TLS_REQD, "not so"), errno.EACCES),
        (OLD + error(GO, ERR_SHUTDOWN, "bye"), errno.ESHUTDOWN),
        (OLD + error(GO, 0x80000003, "what"), errno.EINVAL),
        (OLD + error(GO, 0x80000008, "sizes"), errno.EINVAL),
        (OLD + error(GO, 0x8000000A, "more"), errno.ENOTSUP),
        (OLD + error(GO, 0x80001234, "unheard of"), errno.EIO),
        (error(EXTENDED_HEADERS, ERR_TLS_REQD, ""), errno.EACCES),
        (error(EXTENDED_HEADERS, ERR_SHUTDOWN, ""), errno.ESHUTDOWN),
        (NO_EXTENDED + error(STRUCTURED_REPLY, ERR_SHUTDOWN, ""), errno.ESHUTDOWN),
        (reply(EXTENDED_HEADERS, ACK) + error(SET_META, ERR_TLS_REQD, ""), errno.EACCES),
    ],
    ids=lambda value: value[-40:].hex() if isinstance(value, bytes) else None,
)
def test_a_refusal_is_an_oserror_with_the_servers_words(said: bytes, number: int) -> None:
    text = said[said.rindex(struct.pack(">Q", 0x3E889045565A9)) + 20 :].decode()
    with pytest.raises(OSError, match="the server refused") as caught:
        outcome(GREETING + said, BASE)
    assert caught.value.errno == number
    assert str(caught.value).endswith(text)


def test_a_refusals_words_are_harmless_and_short() -> None:
    words = "\x1b]0;owned\a\r\n" + "y" * 60000
    with pytest.raises(OSError, match="owned") as caught:
        outcome(GREETING + OLD + error(GO, ERR_POLICY, words))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


# Section: servers that break the protocol

BROKEN = {
    "no server": b"SSH-2.0-OpenSSH_9.2",
    "oldstyle": b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(16),
    "no fixed newstyle": b"NBDMAGICIHAVEOPT\0\2",
    "magic": GREETING + b"\0" * 20,
    "another option": GREETING + reply(STRUCTURED_REPLY, ACK),
    "too long a reply": GREETING + reply(EXTENDED_HEADERS, ERR_UNSUP, bytes(65537)),
    "an information to EXTENDED_HEADERS": GREETING + reply(EXTENDED_HEADERS, REP_INFO, bytes(12)),
    "an ACK with data": GREETING + reply(EXTENDED_HEADERS, ACK, b"!"),
    "no INFO_EXPORT": GREETING + OLD + GO_ACK,
    "a size of 2^63": GREETING
    + OLD
    + reply(GO, REP_INFO, struct.pack(">HQH", 0, 1 << 63, 1))
    + GO_ACK,
    "a size of 2^63 by name": GREETING
    + OLD
    + error(GO, ERR_UNSUP, "")
    + struct.pack(">QH", 1 << 63, 1),
    "a short INFO_EXPORT": GREETING + OLD + reply(GO, REP_INFO, bytes(11)),
    "a long INFO_EXPORT": GREETING + OLD + reply(GO, REP_INFO, bytes(13)),
    "an INFO of one byte": GREETING + OLD + reply(GO, REP_INFO, b"\0"),
    "a context to GO": GREETING + OLD + reply(GO, META_CONTEXT, bytes(12)),
    "no GO, but extended headers": GREETING
    + reply(EXTENDED_HEADERS, ACK)
    + error(GO, ERR_UNSUP, ""),
    "endless information": GREETING + OLD + EXPORT * 65,
    "block size 0": GREETING + OLD + block_sizes(0, 4096, 1 << 25),
    "block size 3": GREETING + OLD + block_sizes(3, 4096, 1 << 25),
    "preferred block size 5000": GREETING + OLD + block_sizes(1, 5000, 1 << 25),
    "preferred below minimum": GREETING + OLD + block_sizes(4096, 512, 1 << 25),
    "maximum below preferred": GREETING + OLD + block_sizes(512, 4096, 2048),
    "block size 128 KiB": GREETING + OLD + block_sizes(1 << 17, 1 << 17, 1 << 25),
    "a size that is no multiple": GREETING
    + OLD
    + block_sizes(512, 4096, 1 << 25)
    + EXPORT
    + GO_ACK,
}
WITH_CONTEXTS = {
    "a context not asked": context(1, "qemu:allocation-depth"),
    "an id twice": context(1, BASE) + context(1, BITMAP),
    "a name twice": context(1, BASE) + context(2, BASE),
    "not UTF-8": reply(SET_META, META_CONTEXT, bytes(4) + b"\xff"),
    "no id": reply(SET_META, META_CONTEXT, b"\0\0\0"),
    "an information": reply(SET_META, REP_INFO, bytes(12)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_server_is_left(what: str) -> None:
    with pytest.raises(ProtocolError):
        outcome(BROKEN[what])


@pytest.mark.parametrize("what", WITH_CONTEXTS)
def test_a_server_with_broken_contexts_is_left(what: str) -> None:
    with pytest.raises(ProtocolError):
        outcome(GREETING + reply(EXTENDED_HEADERS, ACK) + WITH_CONTEXTS[what], BASE, BITMAP)


# Section: streams

CONVERSATION = (
    GREETING
    + NO_EXTENDED
    + reply(STRUCTURED_REPLY, ACK)
    + context(9, BASE)
    + reply(SET_META, ACK)
    + block_sizes(1, 4096, 1 << 25)
    + EXPORT
    + GO_ACK
    + b"early"
)


def test_pieces_of_any_size_say_the_same() -> None:
    whole = ClientHandshake("disk", contexts=(BASE,))
    sent = converse(whole, CONVERSATION)
    for cut in range(1, len(CONVERSATION)):
        handshake = ClientHandshake("disk", contexts=(BASE,))
        assert converse(handshake, CONVERSATION, iter([cut, len(CONVERSATION)])) == sent
        assert handshake.outcome == whole.outcome
        assert b"early".startswith(handshake.unconsumed)


@given(st.data())
def test_a_server_that_says_anything_gets_an_error_or_an_offer(data: st.DataObject) -> None:
    handshake = ClientHandshake("disk", contexts=(BASE,))
    text = ""
    try:
        converse(handshake, garbled(data, CONVERSATION))
    except (OSError, ProtocolError) as exc:
        text = str(exc)
    assert text.isprintable()
    assert handshake.outcome is None or 0 <= handshake.outcome.size < 1 << 63
