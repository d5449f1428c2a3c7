"""Fuzz targets on the protocol core, without a socket: bytes in, PeerError or AssertionError if
replnbd and the model disagree, any other exception if replnbd has a bug."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace

from fuzz_check import check_answers
from fuzz_sessions import NUMBERS, script
from nbd_model import End, Facts, Meaning, Session, request_error
from nbd_model_options import hear
from peers import nbd_wire as wire
from peers.nbd_answers import Answers, Asked
from peers.nbd_wire import Shape, Transcript

from replnbd.errors import ProtocolError
from replnbd.nbd import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    STRUCTURED_REPLIES,
    ClientIdentity,
    ExportOffer,
    Handshake,
    Replies,
    Request,
    RequestRules,
    TlsMode,
    parse_status_payload,
    unpack_extended_request,
    unpack_request,
)

REPLIES: dict[Shape, Replies] = {
    Shape.SIMPLE: SIMPLE_REPLIES,
    Shape.STRUCTURED: STRUCTURED_REPLIES,
    Shape.EXTENDED: EXTENDED_REPLIES,
}
WRITABLE = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x400 | 0x800
CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b", "x-replnbd:digest")
EXPORTS = [
    Facts("d", 1 << 18, WRITABLE, CONTEXTS, "a disk"),
    Facts("d-top", 1 << 18, 0x10F, CONTEXTS[:2]),
    Facts("n" * 4096, 2**63, 0x1, (), "d" * 4096),
    Facts("fenced", 512, WRITABLE, CONTEXTS[:1], refused=True),
    Facts("secret", 512, WRITABLE, CONTEXTS[:1], needs_tls=True),
]
BY_NAME = {each.name: each for each in EXPORTS}


class Directory:
    """EXPORTS, as the server would offer them."""

    def offers(self, client: ClientIdentity) -> Iterable[ExportOffer]:
        """All of them."""
        return [_offer(facts, client) for facts in EXPORTS]

    def offer(self, name: str, client: ClientIdentity) -> ExportOffer | None:
        """One of them."""
        return next((each for each in self.offers(client) if each.name == name), None)


def _offer(facts: Facts, client: ClientIdentity) -> ExportOffer:
    return ExportOffer(
        facts.name,
        facts.description,
        facts.size,
        facts.flags,
        "it is fenced" if facts.refused else None,
        facts.needs_tls and not client.secure,
        facts.contexts,
    )


def handshake(data: bytes) -> None:
    """A conversation, in one piece and in others, with and without TLS. The first byte says how;
    the rest is what a client sends after the greeting."""
    if not data:
        return
    mode = [TlsMode.OFF, TlsMode.OFF, TlsMode.ON, TlsMode.REQUIRE][data[0] & 3]
    sent, rng = data[1:], random.Random(data[0] >> 2)
    cuts = sorted(rng.randrange(len(sent) + 1) for _ in range(data[0] >> 2 & 7))
    shake = Handshake(Directory(), mode)
    meaning = hear(sent, BY_NAME, tls=mode.value)
    _converse(shake, sent, cuts, meaning, first=True)
    if meaning.end is End.TLS:
        assert shake.unconsumed == b""
        assert shake.tls_wanted
        shake.tls_started()
        after = sent[meaning.used :]
        _converse(
            shake, after, [], hear(after, BY_NAME, tls=mode.value, before=meaning), first=False
        )


def _converse(
    shake: Handshake, sent: bytes, cuts: list[int], meaning: Meaning, *, first: bool
) -> None:
    answered, dropped = bytearray(), False
    try:
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            shake.receive(sent[start:end])
            while (reply := shake.advance()) is not None:
                answered += reply
    except ProtocolError:
        dropped = True
    if first:
        assert answered[:18] == wire.GREETING
        del answered[:18]
    haggled = meaning
    if meaning.session is not None:  # which nobody serves here
        haggled = replace(meaning, session=replace(meaning.session, requests=()))
    check_answers(answered, haggled)
    outcome = shake.outcome
    if meaning.session is not None:
        assert outcome is not None
        assert outcome.export is not None
        assert outcome.export.name == meaning.session.facts.name
        assert outcome.replies is REPLIES[meaning.session.shape]
        assert outcome.transmission_flags == meaning.session.flags
        ids = tuple(outcome.export.contexts.index(name) + 1 for name in outcome.contexts)
        assert ids == meaning.session.ids
    else:
        assert (dropped or outcome is not None) == (meaning.end is End.CLOSED)
        assert outcome is None or outcome.export is None


def requests(data: bytes) -> None:
    """Headers of requests, as they lie on the wire, under rules that the first four bytes choose:
    the same error as the model, and a payload that is taken apart or refused."""
    if len(data) < 4:
        return
    facts = EXPORTS[data[0] % len(EXPORTS)]
    shape = list(Shape)[data[1] % 3]
    ids = tuple(range(1, 1 + data[2] % 4)) if shape is not Shape.SIMPLE else ()
    flags = facts.flags ^ (data[3] << 3)
    session = Session(facts, shape, flags, ids)
    rules = RequestRules(facts.size, flags, extended=shape is Shape.EXTENDED, contexts=len(ids))
    unpack = unpack_extended_request if shape is Shape.EXTENDED else unpack_request
    size = REPLIES[shape].request_size
    for at in range(4, len(data) - size + 1, size):
        _, command_flags, command, cookie, offset, length = unpack(data, at)
        refusal = rules.refusal(Request(command_flags, command, cookie, offset, length))
        error = request_error(Asked(command, offset, length, command_flags), session)
        if command != wire.DISC:
            assert (0 if refusal is None else refusal.error) == error
            assert refusal is None or refusal.text
    parsed = parse_status_payload(data)
    count, rest = divmod(len(data) - 8, 4)
    if count < 1 or rest:
        assert parsed is None
    else:
        (length,) = struct.unpack_from(">Q", data)
        assert parsed == (length, [each for (each,) in struct.iter_unpack(">I", data[8:])])


def sparse_reads(data: bytes) -> None:
    """A READ's reply round-trips: `data` grown to a disk with runs of zeroes, read at an offset
    that it says, is taken apart to the same bytes, and takes no more room than it was given."""
    if len(data) < 5:
        return
    rng = random.Random(data)
    offset = int.from_bytes(data[:3], "big")
    content = b"".join(
        bytes(byte * 37) if byte & 1 else bytes([byte or 1]) * (byte * 19 + 1) for byte in data[3:]
    )
    flags = rng.choice([0, wire.DF])
    at = rng.choice([0, 1, 512])
    for shape, replies in REPLIES.items():
        prefix = replies.read_prefix
        buffer = bytearray(b"\xaa" * at + bytes(prefix) + content + b"\xbb" * 64)
        size = replies.pack_read(buffer, at, flags, 7, offset, len(content))
        assert size <= prefix + len(content)
        assert buffer[:at] == b"\xaa" * at
        assert buffer[at + prefix + len(content) :] == b"\xbb" * 64
        answers = Answers(Transcript(buffer[at : at + size]), shape)
        answers.expect(7, Asked(wire.READ, offset, len(content), flags))
        answer = answers.next()
        assert answer is not None
        assert answer.data == content
        assert answer.wire_bytes == size


TARGETS: dict[str, Callable[[bytes], None]] = {
    "handshake": handshake,
    "requests": requests,
    "sparse_reads": sparse_reads,
}
"""By name."""


# Section: inputs


def _handshake_input(rng: random.Random, seeds: list[bytes]) -> bytes:
    sent = script(rng, EXPORTS, rng.choice(EXPORTS[:2]), seeds).sent
    return bytes([rng.randrange(256)]) + sent


def _requests_input(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = rng.randbytes(4)
    if rng.random() < 0.2:
        return data + rng.randbytes(rng.choice([0, 8, 12, 16, 64]))
    shape = list(Shape)[data[1] % 3]
    longest = 2**64 - 1 if shape is Shape.EXTENDED else 2**32 - 1
    for _ in range(rng.randrange(1, 6)):
        data += wire.request(
            rng.choice([*range(10), 65535]),
            rng.choice(NUMBERS),
            rng.choice(NUMBERS) & longest,
            flags=rng.choice([0, 1 << rng.randrange(16), rng.randrange(64)]),
            shape=shape,
        )
    return data


def _sparse_input(rng: random.Random, seeds: list[bytes]) -> bytes:
    return rng.randbytes(rng.choice([5, 10, 40, 200]))


INPUTS: dict[str, Callable[[random.Random, list[bytes]], bytes]] = {
    "handshake": _handshake_input,
    "requests": _requests_input,
    "sparse_reads": _sparse_input,
}
"""What to feed to each: of a generator, and with sessions to take pieces from."""
