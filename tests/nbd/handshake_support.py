"""A client's options and our replies in bytes, and conversations made of them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

from replnbd.errors import ProtocolError
from replnbd.nbd import ClientIdentity, ExportOffer, Handshake, TlsMode

# The bytes below are packed by hand, from proto.md: the code under test packs with construct.

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
FIXED, FIXED_NO_ZEROES = struct.pack(">I", 1), struct.pack(">I", 3)
NOT_FIXED = struct.pack(">I", 0)
EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED_REPLY = range(1, 9)
LIST_META, SET_META, EXTENDED_HEADERS = 9, 10, 11
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = (
    0x80000000 + n for n in range(1, 8)
)
ERR_TOO_BIG, ERR_EXT_HEADER_REQD = 0x80000009, 0x8000000A
BASE, DEPTH, BITMAP = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"

LONG_NAME = "n" * 4096
DISK = ExportOffer("disk", "a disk", 12345, 0x96D, contexts=(BASE, DEPTH, BITMAP))
PLAIN = ExportOffer("plain", "", 1 << 40, 0x10F)
FENCED = ExportOffer("fenced", "", 4096, 0x96D, "failover is under way")
LONG = ExportOffer(LONG_NAME, "d" * 4096, 1, 1)
DEFAULT = ExportOffer("", "the default export", 7, 1)


class Directory:
    """The exports of these tests."""

    def __init__(self, *offers: ExportOffer) -> None:
        self.by_name = {each.name: each for each in offers}

    def offers(self, client: ClientIdentity) -> Iterable[ExportOffer]:
        return [self._seen_by(client, each) for each in self.by_name.values()]

    def offer(self, name: str, client: ClientIdentity) -> ExportOffer | None:
        found = self.by_name.get(name)
        return None if found is None else self._seen_by(client, found)

    def _seen_by(self, client: ClientIdentity, offer: ExportOffer) -> ExportOffer:
        return replace(offer, needs_tls=False) if client.secure else offer


DIRECTORY = Directory(DISK, PLAIN, FENCED, LONG)


def option(number: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    claimed = len(payload) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", number, claimed) + payload


def choose(number: int, name: str | bytes, *requests: int) -> bytes:
    name = name.encode() if isinstance(name, str) else name
    body = struct.pack(">I", len(name)) + name + struct.pack(">H", len(requests))
    return option(number, body + b"".join(struct.pack(">H", each) for each in requests))


def reply(number: int, kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(payload)) + payload


def error(number: int, kind: int, text: str) -> bytes:
    return reply(number, kind, text.encode())


def details(number: int, offer: ExportOffer, *texts: tuple[int, str], more_flags: int = 0) -> bytes:
    items = [
        struct.pack(">HQH", 0, offer.size, offer.transmission_flags | more_flags),
        struct.pack(">HIII", 3, 1, 4096, 32 << 20),
        *(struct.pack(">H", kind) + text.encode() for kind, text in texts),
    ]
    return b"".join(reply(number, REP_INFO, item) for item in items) + reply(number, ACK)


def meta(number: int, export: str, *queries: str | bytes, count: int | None = None) -> bytes:
    """LIST_META_CONTEXT or SET_META_CONTEXT."""
    body = struct.pack(">I", len(export.encode())) + export.encode()
    body += struct.pack(">I", len(queries) if count is None else count)
    for query in queries:
        query = query.encode() if isinstance(query, str) else query
        body += struct.pack(">I", len(query)) + query
    return option(number, body)


def contexts(number: int, *found: tuple[int, str]) -> bytes:
    """The reply to one of them."""
    items = [
        reply(number, META_CONTEXT, struct.pack(">I", each) + name.encode()) for each, name in found
    ]
    return b"".join(items) + reply(number, ACK)


def listed(offer: ExportOffer) -> bytes:
    name = offer.name.encode()
    return reply(LIST, SERVER, struct.pack(">I", len(name)) + name + offer.description.encode())


@dataclass
class Case:
    """A client's bytes, our bytes after the greeting, and the end: an export, or why there is none.

    `dropped`: the handshake must raise ProtocolError, with this in its text.
    """

    name: str
    sent: bytes
    answer: bytes = b""
    chosen: ExportOffer | None = None
    ended: str | None = None
    dropped: str | None = None
    unconsumed: bytes = b""
    tls: TlsMode = TlsMode.OFF


def drain(handshake: Handshake) -> bytes:
    answer = b""
    while (part := handshake.advance()) is not None:
        answer += part
    return answer


def converse(
    pieces: Iterable[bytes], tls: TlsMode = TlsMode.OFF
) -> tuple[bytes, Handshake, ProtocolError | None]:
    handshake = Handshake(DIRECTORY, tls)
    answer = b""
    try:
        for piece in (b"", *pieces):
            handshake.receive(piece)
            while (part := handshake.advance()) is not None:
                answer += part
    except ProtocolError as exc:
        return answer, handshake, exc
    return answer, handshake, None


def check(case: Case, pieces: Iterable[bytes]) -> None:
    answer, handshake, dropped = converse(pieces, case.tls)
    assert answer == GREETING + case.answer
    if case.dropped is not None:
        assert dropped is not None
        assert case.dropped in str(dropped)
        return
    assert dropped is None
    assert handshake.outcome is not None
    assert handshake.outcome.export == case.chosen
    assert (case.ended or "") in handshake.outcome.reason
    assert handshake.unconsumed == case.unconsumed
