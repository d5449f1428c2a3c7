"""The handshake's messages as a client sends and reads them; their layout is in `messages`.

A server's text reaches logs and terminals: `shown` makes it harmless first.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from construct import Construct, ConstructError

from replnbd.errors import ProtocolError
from replnbd.nbd import constants as c
from replnbd.nbd import messages
from replnbd.nbd.constants import Info, Option, OptionReply, option_name

OPTION_REPLY_SIZE = 20
OPTION_REPLY_BYTES_MAX = 64 << 10
"""Of one option reply's data. The longest with a meaning is a name or a text of 4096 bytes."""

TEXT_SHOWN_MAX = 256
"""Characters of a server's text in an error of ours."""

BLOCK_SIZE_MIN_MAX = 1 << 16
""" "This value MUST be a power of 2, MUST NOT be larger than 2^16"."""

_ERRNO = {
    OptionReply.ERR_UNSUP: errno.ENOTSUP,
    OptionReply.ERR_POLICY: errno.EACCES,
    OptionReply.ERR_INVALID: errno.EINVAL,
    OptionReply.ERR_PLATFORM: errno.ENOTSUP,
    OptionReply.ERR_TLS_REQD: errno.EACCES,
    OptionReply.ERR_UNKNOWN: errno.ENOENT,
    OptionReply.ERR_SHUTDOWN: errno.ESHUTDOWN,
    OptionReply.ERR_BLOCK_SIZE_REQD: errno.EINVAL,
    OptionReply.ERR_TOO_BIG: errno.EINVAL,
    OptionReply.ERR_EXT_HEADER_REQD: errno.ENOTSUP,
}


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Size constraints of an export (proto.md, "Size constraints"); their defaults."""

    minimum: int = c.BLOCK_SIZE_MIN
    preferred: int = c.BLOCK_SIZE_PREFERRED
    payload_max: int = c.PAYLOAD_BYTES_MAX


def pack_option(option: Option, payload: bytes = b"") -> bytes:
    """An option."""
    header = messages.OPTION_HEADER.build({"option": int(option), "length": len(payload)})
    return bytes(header) + payload


def pack_go(export: str) -> bytes:
    """The data of GO, which asks for all we understand."""
    name = export.encode()
    wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    fields = {
        "name_length": len(name),
        "name": name,
        "count": len(wanted),
        "requests": b"".join(kind.to_bytes(2, "big") for kind in wanted),
    }
    return bytes(messages.INFO_REQUEST.build(fields))


def pack_meta_context(export: str, contexts: tuple[str, ...]) -> bytes:
    """The data of SET_META_CONTEXT."""
    name = export.encode()
    queries = [query.encode() for query in contexts]
    fields = {
        "name_length": len(name),
        "name": name,
        "count": len(queries),
        "queries": b"".join(len(query).to_bytes(4, "big") + query for query in queries),
    }
    return bytes(messages.META_CONTEXT_REQUEST.build(fields))


def parse_greeting(greeting: bytes) -> int:
    """The server's handshake flags. ProtocolError if it speaks no fixed newstyle."""
    if not greeting.startswith(c.MAGIC_INIT):
        raise ProtocolError(f"this is no NBD server: it begins with {greeting[:8]!r}")
    try:
        flags = int(messages.GREETING.parse(greeting).handshake_flags)
    except ConstructError:
        raise ProtocolError("the server speaks oldstyle NBD, which names no exports") from None
    if not flags & c.HandshakeFlag.FIXED_NEWSTYLE:
        raise ProtocolError(f"the server speaks no fixed newstyle (handshake flags {flags:#x})")
    return flags


def parse_option_reply(header: bytes, option: Option) -> tuple[int, int]:
    """(reply type, length of the data). ProtocolError if it answers no `option`, or too much."""
    try:
        fields = messages.OPTION_REPLY.parse(header)
    except ConstructError:
        raise ProtocolError(f"option reply magic is {header[:8].hex()}") from None
    if fields.option != option:
        raise ProtocolError(f"{option_name(fields.option)} answered, {option.name} was sent")
    if fields.length > OPTION_REPLY_BYTES_MAX:
        raise ProtocolError(f"{option.name} answered by {fields.length} bytes")
    return int(fields.reply), int(fields.length)


def refusal(option: Option, reply: int, text: bytes) -> OSError:
    """The error that an error reply means to a caller."""
    try:
        kind, number = OptionReply(reply).name, _ERRNO[OptionReply(reply)]
    except (ValueError, KeyError):
        kind, number = f"error {reply:#x}", errno.EIO
    said = f": {shown(text)}" if text else ""
    hint = "; it wants TLS" if reply == OptionReply.ERR_TLS_REQD else ""
    return OSError(number, f"the server refused {option.name} ({kind}{hint}){said}")


def parse_export(payload: bytes) -> tuple[int, int]:
    """(size, transmission flags) of INFO_EXPORT."""
    fields = _parse(messages.INFO_EXPORT, payload, "INFO_EXPORT")
    return check_size(fields.size), int(fields.flags)


def check_size(size: int) -> int:
    """A size that a disk can have: offsets are 63 bits, in files and in QEMU."""
    if size > c.SIZE_MAX:
        raise ProtocolError(f"an export of {size} bytes")
    return size


def parse_block_sizes(payload: bytes) -> BlockSizes:
    """INFO_BLOCK_SIZE. `payload_max` may be more than we ever send."""
    fields = _parse(messages.INFO_BLOCK_SIZE, payload, "INFO_BLOCK_SIZE")
    minimum, preferred, maximum = fields.minimum, fields.preferred, fields.maximum
    sane = (
        _is_power_of_two(minimum)
        and _is_power_of_two(preferred)
        and minimum <= BLOCK_SIZE_MIN_MAX
        and minimum <= preferred <= maximum
    )
    if not sane:
        raise ProtocolError(f"block sizes are {minimum}, {preferred} and {maximum}")
    return BlockSizes(minimum, preferred, maximum)


def parse_context(payload: bytes) -> tuple[int, str]:
    """(id, name) of a META_CONTEXT reply."""
    fields = _parse(messages.META_CONTEXT_REPLY, payload, "META_CONTEXT")
    name = messages.decode_name(fields.name)
    if name is None:
        raise ProtocolError("a metadata context's name is too long, or not UTF-8")
    return int(fields.id), name


def shown(text: bytes) -> str:
    """A server's text for people: one line, without control characters, not too long."""
    decoded = text[: 4 * TEXT_SHOWN_MAX].decode(errors="replace")
    cut = decoded[:TEXT_SHOWN_MAX]
    printable = "".join(each if each.isprintable() else _escaped(each) for each in cut)
    return printable + "..." if len(decoded) > TEXT_SHOWN_MAX else printable


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def _parse(layout: Construct, payload: bytes, name: str) -> Construct:
    try:
        fields = layout.parse(payload)
    except ConstructError:
        raise ProtocolError(f"{name} of {len(payload)} bytes") from None
    if layout.build(fields) != payload:
        raise ProtocolError(f"{name} of {len(payload)} bytes")
    return fields
