"""Fixed newstyle option haggling, the server's side, as a conversation without a wire.

    handshake = Handshake(directory)
    loop:   handshake.receive(bytes)                    what arrived, in any pieces
            while (reply := handshake.advance()) is not None: send(reply)
            handshake.outcome                           None, or how it ended

`advance` answers at most one option a time, so that the caller can stop while the peer does not
read. It raises ProtocolError where the protocol tells a server to drop the connection at once.
What arrived after the end is in `unconsumed`: the first requests of a client in a hurry.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

from replnbd.errors import ProtocolError
from replnbd.nbd import messages
from replnbd.nbd.constants import (
    BLOCK_SIZE_MIN,
    BLOCK_SIZE_PREFERRED,
    NAME_BYTES_MAX,
    OPTION_BYTES_MAX,
    OPTIONS_MAX,
    PAYLOAD_BYTES_MAX,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    option_name,
)
from replnbd.nbd.messages import InfoRequest, option_error, option_reply

_RESERVED_ZEROES = bytes(124)
_NAME_SHOWN_MAX = 64  # of a name the peer sent, in an error: it knows the rest


@dataclass(frozen=True, slots=True)
class ExportOffer:
    """What the handshake says of an export."""

    name: str
    description: str
    size: int
    transmission_flags: int
    refusal: str | None = None
    """Why nobody may use it now; such an export is not listed."""


class ExportDirectory(Protocol):
    """Where the handshake looks exports up, at the moment it is asked."""

    def offers(self) -> Iterable[ExportOffer]:
        """All exports, in the order to list them."""

    def offer(self, name: str) -> ExportOffer | None:
        """The export of that name, if there is one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a handshake ended: with an export to serve, or with none, and then close."""

    export: ExportOffer | None
    reason: str = ""


class Handshake:
    """One client's haggling. The first `advance` gives the greeting."""

    def __init__(self, directory: ExportDirectory) -> None:
        self._directory = directory
        self._received = bytearray()
        self._steps = self._converse()
        self.outcome: Outcome | None = None

    @property
    def unconsumed(self) -> bytes:
        """What was received and not needed."""
        return bytes(self._received)

    def receive(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take what arrived; then call `advance`."""
        self._received += chunk

    def advance(self) -> bytes | None:
        """The next reply to send, or None: more bytes are needed, or there is an `outcome`.

        Raises ProtocolError if the connection must be closed without an answer.
        """
        if self.outcome is not None:
            return None
        try:
            return next(self._steps)
        except StopIteration as stop:
            self.outcome, last_reply = stop.value
            return last_reply or None

    # The conversation. Each generator yields bytes to send, or None while it lacks bytes.

    def _converse(self) -> Generator[bytes | None, None, tuple[Outcome, bytes]]:
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        yield bytes(messages.GREETING.build({"handshake_flags": int(flags)}))
        client_flags = int.from_bytes((yield from self._read(4)), "big")
        # "the server MUST drop the TCP connection if the client sets an unknown flag"
        if client_flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
            raise ProtocolError(f"unknown client flags {client_flags:#x}")
        fixed = bool(client_flags & ClientFlag.FIXED_NEWSTYLE)
        for _ in range(OPTIONS_MAX):
            header = yield from self._read(messages.OPTION_HEADER_SIZE)
            option, length = messages.parse_option_header(header)
            if length > OPTION_BYTES_MAX:
                raise ProtocolError(f"{option_name(option)} with {length} bytes of data")
            if option == Option.EXPORT_NAME:
                return (yield from self._export_name(length, client_flags))
            if not fixed:
                # It does not know option replies: there is no answer it would understand.
                raise ProtocolError(f"{option_name(option)} without fixed newstyle")
            if option == Option.ABORT:
                # "a server SHOULD ignore any data sent by the client"
                yield from self._skip(length)
                return Outcome(None, "the client aborted"), option_reply(option, OptionReply.ACK)
            if option in (Option.INFO, Option.GO):
                outcome, reply = yield from self._info_or_go(option, length)
                if outcome is not None:
                    return outcome, reply
                yield reply
            elif option == Option.LIST:
                yield from self._skip(length)
                yield self._list(length)
            else:
                yield from self._skip(length)
                text = f"{option_name(option)} is not supported"
                yield option_error(option, OptionReply.ERR_UNSUP, text)
        raise ProtocolError(f"more than {OPTIONS_MAX} options")

    def _export_name(
        self, length: int, client_flags: int
    ) -> Generator[None, None, tuple[Outcome, bytes]]:
        if length > NAME_BYTES_MAX:
            raise ProtocolError(f"EXPORT_NAME with a name of {length} bytes")
        name = messages.decode_name((yield from self._read(length)))
        offer = self._directory.offer(name) if name is not None else None
        # "If the server is unwilling to allow the export, it MUST terminate the session."
        if offer is None:
            return Outcome(None, f"no export named {_shown(name)}"), b""
        if offer.refusal is not None:
            return Outcome(None, offer.refusal), b""
        fields = {"size": offer.size, "flags": offer.transmission_flags}
        reply = bytes(messages.EXPORT_NAME_REPLY.build(fields))
        if not client_flags & ClientFlag.NO_ZEROES:
            reply += _RESERVED_ZEROES
        return Outcome(offer), reply

    def _info_or_go(
        self, option: int, length: int
    ) -> Generator[None, None, tuple[Outcome | None, bytes]]:
        if length > messages.INFO_REQUEST_BYTES_MAX:
            yield from self._skip(length)
            text = f"{option_name(option)} is too long"
            return None, option_error(option, OptionReply.ERR_INVALID, text)
        request = messages.parse_info_request((yield from self._read(length)))
        if isinstance(request, str):
            text = f"{option_name(option)}: {request}"
            return None, option_error(option, OptionReply.ERR_INVALID, text)
        offer = self._directory.offer(request.name)
        if offer is None:
            text = f"there is no export named {_shown(request.name)}"
            return None, option_error(option, OptionReply.ERR_UNKNOWN, text)
        if offer.refusal is not None:
            return None, option_error(option, OptionReply.ERR_POLICY, offer.refusal)
        reply = _describe(option, offer, request) + option_reply(option, OptionReply.ACK)
        return (Outcome(offer) if option == Option.GO else None), reply

    def _list(self, length: int) -> bytes:
        if length:
            # "the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID"
            return option_error(Option.LIST, OptionReply.ERR_INVALID, "LIST takes no data")
        replies = []
        for offer in self._directory.offers():
            if offer.refusal is None:
                name, description = offer.name.encode(), offer.description.encode()
                fields = {"name_length": len(name), "name": name, "description": description}
                payload = bytes(messages.SERVER_REPLY.build(fields))
                replies.append(option_reply(Option.LIST, OptionReply.SERVER, payload))
        replies.append(option_reply(Option.LIST, OptionReply.ACK))
        return b"".join(replies)

    def _read(self, length: int) -> Generator[None, None, bytes]:
        while len(self._received) < length:
            yield None
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def _skip(self, length: int) -> Generator[None, None, None]:
        while length > len(self._received):
            length -= len(self._received)
            self._received.clear()
            yield None
        del self._received[:length]


def _describe(option: int, offer: ExportOffer, request: InfoRequest) -> bytes:
    """The INFO replies: EXPORT and BLOCK_SIZE always, texts to who asked for them."""
    export = {"size": offer.size, "flags": offer.transmission_flags}
    sizes = {
        "minimum": BLOCK_SIZE_MIN,
        "preferred": BLOCK_SIZE_PREFERRED,
        "maximum": PAYLOAD_BYTES_MAX,
    }
    items = [messages.INFO_EXPORT.build(export), messages.INFO_BLOCK_SIZE.build(sizes)]
    texts = ((Info.NAME, offer.name), (Info.DESCRIPTION, offer.description))
    for kind, text in texts:
        if kind in request.requests:
            items.append(messages.INFO_STRING.build({"type": int(kind), "text": text.encode()}))
    return b"".join(option_reply(option, OptionReply.INFO, bytes(item)) for item in items)


def _shown(name: str | None) -> str:
    if name is None:
        return "that (it is not UTF-8)"
    if len(name) > _NAME_SHOWN_MAX:
        return f"{name[:_NAME_SHOWN_MAX]!r}..."
    return repr(name)
