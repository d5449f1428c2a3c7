"""The handshake's messages, described with construct and wrapped in plain Python at once.

Option (16 bytes, then its data)            Option reply (20 bytes, then its data)
    0  "IHAVEOPT"                               0  u64  magic 0x0003e889045565a9
    8  u32  option                              8  u32  the option it answers
   12  u32  length of the data                 12  u32  reply type
                                               16  u32  length of the data
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from construct import (
    Bytes,
    Const,
    ConstructError,
    GreedyBytes,
    Int16ub,
    Int32ub,
    Int64ub,
    Struct,
    Terminated,
    this,
)

from replnbd.errors import ProtocolError
from replnbd.nbd import constants as c
from replnbd.nbd.directory import ExportOffer
from replnbd.nbd.texts import wire_text

GREETING = Struct(
    "magic" / Const(c.MAGIC_INIT),
    "option_magic" / Const(c.MAGIC_OPTION),
    "handshake_flags" / Int16ub,
)
OPTION_HEADER = Struct(
    "magic" / Const(c.MAGIC_OPTION),
    "option" / Int32ub,
    "length" / Int32ub,
)
OPTION_REPLY = Struct(
    "magic" / Const(c.MAGIC_OPTION_REPLY, Int64ub),
    "option" / Int32ub,
    "reply" / Int32ub,
    "length" / Int32ub,
)
INFO_REQUEST = Struct(
    "name_length" / Int32ub,
    "name" / Bytes(this.name_length),
    "count" / Int16ub,
    # 65,535 of them as an Array would take construct 60 ms, and one peer may send 32 such options.
    "requests" / Bytes(2 * this.count),
    Terminated,
)
SERVER_REPLY = Struct(
    "name_length" / Int32ub,
    "name" / Bytes(this.name_length),
    "description" / GreedyBytes,
)
INFO_EXPORT = Struct(
    "type" / Const(int(c.Info.EXPORT), Int16ub), "size" / Int64ub, "flags" / Int16ub
)
INFO_STRING = Struct("type" / Int16ub, "text" / GreedyBytes)
INFO_BLOCK_SIZE = Struct(
    "type" / Const(int(c.Info.BLOCK_SIZE), Int16ub),
    "minimum" / Int32ub,
    "preferred" / Int32ub,
    "maximum" / Int32ub,
)
EXPORT_NAME_REPLY = Struct("size" / Int64ub, "flags" / Int16ub)
META_CONTEXT_REQUEST = Struct(
    "name_length" / Int32ub,
    "name" / Bytes(this.name_length),
    "count" / Int32ub,
    "queries" / GreedyBytes,  # a count that was made up must not make a loop
)
META_CONTEXT_QUERY = Struct("length" / Int32ub, "query" / Bytes(this.length))
META_CONTEXT_REPLY = Struct("id" / Int32ub, "name" / GreedyBytes)

assert GREETING.sizeof() == 18
assert OPTION_HEADER.sizeof() == 16
assert OPTION_REPLY.sizeof() == 20
assert INFO_EXPORT.sizeof() == 12
assert INFO_BLOCK_SIZE.sizeof() == 14
assert EXPORT_NAME_REPLY.sizeof() == 10

OPTION_HEADER_SIZE = 16
INFO_REQUEST_BYTES_MAX = 4 + c.NAME_BYTES_MAX + 2 + 2 * 0xFFFF
"""What INFO or GO can take at most; more cannot be valid, and is never buffered."""

META_CONTEXT_BYTES_MAX = 128 << 10
"""Of LIST_META_CONTEXT and SET_META_CONTEXT: 30 queries of the longest kind; ERR_TOO_BIG beyond."""


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """The data of INFO and GO: which export, and what the client wants to know of it."""

    name: str
    requests: frozenset[int]


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def parse_option_header(header: bytes) -> tuple[int, int]:
    """(option, length). ProtocolError if the magic is wrong: the peer is out of step."""
    try:
        fields = OPTION_HEADER.parse(header)
    except ConstructError:
        raise ProtocolError(
            f"option magic is {header[:8].hex()}, not {c.MAGIC_OPTION.hex()}"
        ) from None
    return fields.option, fields.length


def parse_info_request(payload: bytes) -> InfoRequest | str:
    """The request, or why it is invalid."""
    try:
        fields = INFO_REQUEST.parse(payload)
    except ConstructError:
        return "the lengths in it do not fit the option's length"
    name = decode_name(fields.name)
    if name is None:
        return f"the export name is longer than {c.NAME_BYTES_MAX} bytes, or not UTF-8"
    return InfoRequest(name, frozenset(struct.unpack(f">{fields.count}H", fields.requests)))


def parse_meta_context_request(payload: bytes) -> MetaContextRequest | str:
    """The request, or why it is invalid. At most QUERIES_MAX queries are looked at: the caller
    refuses a request that has more."""
    try:
        fields = META_CONTEXT_REQUEST.parse(payload)
    except ConstructError:
        return "the lengths in it do not fit the option's length"
    name = decode_name(fields.name)
    if name is None:
        return f"the export name is longer than {c.NAME_BYTES_MAX} bytes, or not UTF-8"
    rest = fields.queries
    queries = []
    for _ in range(min(fields.count, c.QUERIES_MAX + 1)):
        try:
            item = META_CONTEXT_QUERY.parse(rest)
        except ConstructError:
            return "the lengths in it do not fit the option's length"
        query = decode_name(item.query)
        if query is None or ":" not in query:
            return f"a query is longer than {c.NAME_BYTES_MAX} bytes, not UTF-8, or has no colon"
        queries.append(query)
        rest = rest[4 + item.length :]
    if rest and fields.count <= c.QUERIES_MAX:
        return "there are bytes behind its last query"
    return MetaContextRequest(name, tuple(queries))


def meta_context(number: int, name: str) -> bytes:
    """The payload of a META_CONTEXT reply."""
    return bytes(META_CONTEXT_REPLY.build({"id": number, "name": name.encode()}))


def decode_name(name: bytes) -> str | None:
    """An export name from the wire, or None if it can be none."""
    if len(name) > c.NAME_BYTES_MAX:
        return None
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


def option_reply(option: int, reply: c.OptionReply, payload: bytes = b"") -> bytes:
    """One reply to an option."""
    fields = {"option": option, "reply": int(reply), "length": len(payload)}
    return bytes(OPTION_REPLY.build(fields)) + payload


def option_error(option: int, reply: c.OptionReply, text: str) -> bytes:
    """An error reply, with a text "suitable for display to the user" of legal length."""
    return option_reply(option, reply, wire_text(text))


def describe_export(option: int, offer: ExportOffer, flags: int, request: InfoRequest) -> bytes:
    """The INFO replies of INFO and GO: EXPORT and BLOCK_SIZE always, texts to who asked for them.
    `flags`: the transmission flags, as they are for this client."""
    sizes = {
        "minimum": c.BLOCK_SIZE_MIN,
        "preferred": c.BLOCK_SIZE_PREFERRED,
        "maximum": c.PAYLOAD_BYTES_MAX,
    }
    items = [
        INFO_EXPORT.build({"size": offer.size, "flags": flags}),
        INFO_BLOCK_SIZE.build(sizes),
    ]
    texts = ((c.Info.NAME, offer.name), (c.Info.DESCRIPTION, offer.description))
    for kind, text in texts:
        if kind in request.requests:
            items.append(INFO_STRING.build({"type": int(kind), "text": text.encode()}))
    return b"".join(option_reply(option, c.OptionReply.INFO, bytes(item)) for item in items)
