"""What a server must make of any bytes at all: a second reading of the protocol, for the fuzzer to
compare replnbd with. It shares no code with it.

    meaning = hear(sent, exports)      of all that a client has sent after the greeting
    meaning.options                    how each option must end
    meaning.session                    the requests and their errors, if an export was chosen
    meaning.end                        how the connection goes on after all that

Where the protocol leaves a choice, this is what replnbd has chosen. `hear` is in
nbd_model_options.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum
from errno import EINVAL, ENOSPC, EPERM

from peers import nbd_wire as wire
from peers.nbd_answers import Asked
from peers.nbd_wire import PAYLOAD_BYTES_MAX, PAYLOAD_LEN, Shape

READ_ONLY, SEND_FUA, SEND_DF, SEND_CACHE, SEND_FAST_ZERO, STATUS_PAYLOAD = (
    1 << bit for bit in (1, 3, 7, 10, 11, 12)
)


class End(Enum):
    """What happens after the last byte."""

    OPEN = "the server waits for more"
    CLOSED = "the server has hung up"
    TLS = "the server waits for TLS to begin"


@dataclass(frozen=True)
class Facts:
    """An export, as clients are to find it. `refused`: to everybody; `needs_tls`: in clear text."""

    name: str
    size: int
    flags: int
    contexts: tuple[str, ...] = ()
    description: str = ""
    refused: bool = False
    needs_tls: bool = False


@dataclass(frozen=True)
class Option:
    """An option, and the ways in which it may end. `facts` and `flags`: what INFO or GO must tell;
    `contexts`: ids and names that an answer about them must have; `listed`: names and descriptions
    that LIST must; `asked`: information types."""

    number: int
    ends: frozenset[int]
    facts: Facts | None = None
    flags: int = 0
    contexts: tuple[tuple[int, str], ...] | None = None
    listed: tuple[tuple[str, str], ...] | None = None
    asked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Request:
    """A request: where its header is in the stream, and the error that answers it."""

    at: int
    cookie: int
    asked: Asked
    error: int
    payload: bytes = b""


@dataclass(frozen=True)
class Session:
    """The transmission phase of one export, as negotiated. `plain`: by EXPORT_NAME, whose answer
    has so many zeroes."""

    facts: Facts
    shape: Shape
    flags: int
    ids: tuple[int, ...]
    plain_zeroes: int | None = None
    requests: tuple[Request, ...] = ()


@dataclass
class Meaning:
    """All of it."""

    options: list[Option] = field(default_factory=list)
    session: Session | None = None
    end: End = End.OPEN
    used: int = 0
    """How many bytes the server has taken for something complete."""
    no_zeroes: bool = False
    """Whether the client has said so."""


# Section: the transmission phase


def hear_requests(sent: bytes, at: int, session: Session) -> tuple[list[Request], End, int]:
    """The requests in `sent` from `at` on: (requests, end, bytes taken)."""
    extended = session.shape is Shape.EXTENDED
    layout = struct.Struct(">IHHQQQ" if extended else ">IHHQQI")
    found: list[Request] = []
    while at + layout.size <= len(sent):
        magic, flags, command, cookie, offset, length = layout.unpack_from(sent, at)
        if magic != (0x21E41C71 if extended else 0x25609513) or command == wire.DISC:
            return found, End.CLOSED, at
        payload = (length if flags & PAYLOAD_LEN else 0) if extended else 0
        if not extended and command == wire.WRITE:
            payload = length
        asked = Asked(command, offset, length, flags)
        if payload > PAYLOAD_BYTES_MAX:
            found.append(Request(at, cookie, asked, request_error(asked, session)))
            return found, End.CLOSED, at
        end = at + layout.size + payload
        error = request_error(asked, session)
        if end > len(sent):
            if error:  # which is known before the payload has come
                found.append(Request(at, cookie, asked, error))
            return found, End.OPEN, at
        data = sent[end - payload : end]
        if not error and command == wire.STATUS:
            asked, error = _status(asked, data, session)
        found.append(Request(at, cookie, asked, error, data))
        at = end
    return found, End.OPEN, at


_FLAGS = {
    wire.READ: wire.FUA | wire.DF,
    wire.WRITE: wire.FUA,
    wire.FLUSH: wire.FUA,
    wire.TRIM: wire.FUA,
    wire.CACHE: wire.FUA,
    wire.ZEROES: wire.FUA | wire.NO_HOLE | wire.FAST_ZERO,
    wire.STATUS: wire.FUA | wire.REQ_ONE | PAYLOAD_LEN,
}


def request_error(asked: Asked, session: Session) -> int:
    """What answers a request whose payload nobody has looked at; 0 if it is valid."""
    command, offset, length, flags, _ = asked
    extended = session.shape is Shape.EXTENDED
    if command not in _FLAGS or (command == wire.CACHE and not session.flags & SEND_CACHE):
        return EINVAL
    if session.flags & READ_ONLY and command in (wire.WRITE, wire.TRIM, wire.ZEROES):
        return EPERM
    allowed = _FLAGS[command]
    offered = {
        wire.FUA: SEND_FUA, wire.DF: SEND_DF, wire.FAST_ZERO: SEND_FAST_ZERO,
        PAYLOAD_LEN: STATUS_PAYLOAD,
    }  # fmt: skip
    for flag, by in offered.items():
        if not session.flags & by:
            allowed &= ~flag
    if command == wire.WRITE and extended:
        allowed |= PAYLOAD_LEN
        if not flags & PAYLOAD_LEN:
            return EINVAL
    if flags & ~allowed:
        return EINVAL
    if command == wire.FLUSH:
        return EINVAL if offset or length else 0
    if command in (wire.READ, wire.WRITE) and length > PAYLOAD_BYTES_MAX:
        return EINVAL
    if command == wire.STATUS:
        if not session.ids:
            return EINVAL
        if flags & PAYLOAD_LEN:
            count, rest = divmod(length - 8, 4)
            return 0 if not rest and 0 < count <= len(session.ids) else EINVAL
        if not length:
            return EINVAL
    if offset + length > session.facts.size:
        return ENOSPC if command in (wire.WRITE, wire.ZEROES) else EINVAL
    return 0


def _status(asked: Asked, payload: bytes, session: Session) -> tuple[Asked, int]:
    """A valid BLOCK_STATUS as it is to be answered, and its error all the same."""
    if not asked.flags & PAYLOAD_LEN:
        return asked._replace(contexts=session.ids), 0
    (length,) = struct.unpack_from(">Q", payload)
    ids = struct.unpack_from(f">{len(payload) // 4 - 2}I", payload, 8)
    if len(set(ids)) < len(ids) or not set(ids) <= set(session.ids):
        return asked, EINVAL
    if not length or asked.offset + length > session.facts.size:
        return asked, EINVAL
    return asked._replace(length=length, contexts=ids), 0
