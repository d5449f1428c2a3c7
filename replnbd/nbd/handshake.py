"""Fixed newstyle option haggling, the server's side, as a conversation without a wire.

    handshake = Handshake(directory)
    loop:   handshake.receive(bytes)                    what arrived, in any pieces
            while (reply := handshake.advance()) is not None: send(reply)
            handshake.outcome                           None, or how it ended
            handshake.tls_wanted                        True: upgrade, then `tls_started`

`advance` answers at most one option a time, so that the caller can stop while the peer does not
read. It raises ProtocolError where the protocol tells a server to drop the connection at once.
What arrived after the end is in `unconsumed`: the first requests of a client in a hurry.

What an option changes, and what that needs:

    STARTTLS            forgets all that was negotiated, and what arrived behind it in clear text
    STRUCTURED_REPLY    needs: no EXTENDED_HEADERS
    EXTENDED_HEADERS    goes before STRUCTURED_REPLY; after it there is no EXPORT_NAME
    SET_META_CONTEXT    needs either; replaces what was set, even when it fails; counts for a GO to
                        the same export only
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from replnbd.errors import ProtocolError
from replnbd.nbd import constants as c
from replnbd.nbd import messages
from replnbd.nbd.constants import (
    NAME_BYTES_MAX,
    OPTION_BYTES_MAX,
    OPTIONS_MAX,
    ClientFlag,
    HandshakeFlag,
    Option,
    OptionReply,
    TransmissionFlag,
    option_name,
)
from replnbd.nbd.directory import ClientIdentity, ExportDirectory, ExportOffer, TlsMode
from replnbd.nbd.messages import describe_export, option_error, option_reply
from replnbd.nbd.metadata import list_contexts, set_contexts
from replnbd.nbd.replies import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    STRUCTURED_REPLIES,
    Replies,
)

_RESERVED_ZEROES = bytes(124)
_NAME_SHOWN_MAX = 64  # of a name the peer sent, in an error: it knows the rest

_PAYLOAD_MAX = {
    Option.INFO: messages.INFO_REQUEST_BYTES_MAX,
    Option.GO: messages.INFO_REQUEST_BYTES_MAX,
    Option.LIST_META_CONTEXT: messages.META_CONTEXT_BYTES_MAX,
    Option.SET_META_CONTEXT: messages.META_CONTEXT_BYTES_MAX,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a handshake ended: with an export to serve, or with none, and then close."""

    export: ExportOffer | None
    reason: str = ""
    replies: Replies = SIMPLE_REPLIES
    transmission_flags: int = 0
    """As the client was told."""
    contexts: tuple[str, ...] = ()
    """Of `export.contexts`, those that BLOCK_STATUS answers for."""


Reply = Generator[None, None, bytes]
"""A step of the conversation: yields None while it lacks bytes, and returns what to send."""


class Handshake:
    """One client's haggling. The first `advance` gives the greeting."""

    def __init__(self, directory: ExportDirectory, tls: TlsMode = TlsMode.OFF) -> None:
        self._directory = directory
        self._tls = tls
        self._received = bytearray()
        self._steps = self._converse()
        self._identity = ClientIdentity()
        self.outcome: Outcome | None = None
        self.tls_wanted = False
        """STARTTLS was acknowledged: the caller upgrades, then calls `tls_started`."""
        self.shutting_down = False
        """Set by the caller: every option but ABORT is answered by ERR_SHUTDOWN."""
        self.refusal = ""
        """Why the client did not get what it asked for last, as it was told."""
        # What was negotiated
        self._replies: Replies = SIMPLE_REPLIES
        self._contexts: tuple[str, tuple[str, ...]] = ("", ())
        """Export name and contexts of the last SET_META_CONTEXT."""

    @property
    def identity(self) -> ClientIdentity:
        """What is known of the client."""
        return self._identity

    @property
    def unconsumed(self) -> bytes:
        """What was received and not needed."""
        return bytes(self._received)

    def receive(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take what arrived; then call `advance`."""
        if not self.tls_wanted:  # plain text behind STARTTLS is nobody's (CVE-2021-3716)
            self._received += chunk

    def tls_started(self, names: frozenset[str] = frozenset()) -> None:
        """The connection is encrypted from here on; `names` are the client's, by certificate."""
        assert self.tls_wanted
        self.tls_wanted = False
        self._identity = ClientIdentity(secure=True, names=names)

    def advance(self) -> bytes | None:
        """The next reply to send, or None: more bytes are needed, or there is an `outcome`.

        Raises ProtocolError if the connection must be closed without an answer.
        """
        if self.outcome is not None or self.tls_wanted:
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
            payload: bytes | None = None
            if length > _PAYLOAD_MAX.get(option, 0):  # type: ignore[call-overload]
                yield from self._skip(length)
            else:
                payload = yield from self._read(length)
            if option == Option.ABORT:
                # "a server SHOULD ignore any data sent by the client"
                return Outcome(None, "the client aborted"), option_reply(option, OptionReply.ACK)
            refusal = self._refuse_early(option)
            if refusal is not None:
                yield refusal
            elif option == Option.GO:
                offer, reply = self._info_or_go(option, payload)
                if offer is not None:
                    return self._chosen(offer), reply
                yield reply
            else:
                yield self._answer(option, payload)
        raise ProtocolError(f"more than {OPTIONS_MAX} options")

    def _refuse_early(self, option: int) -> bytes | None:
        """What forbids any option at this time, if something does."""
        if self.shutting_down:
            return self._refuse(option, OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        if self._in_clear_text and option != Option.STARTTLS:
            return self._refuse(option, OptionReply.ERR_TLS_REQD, "TLS is required here")
        return None

    def _refuse(self, option: int, reply: OptionReply, text: str) -> bytes:
        self.refusal = text
        return option_error(option, reply, text)

    @property
    def _in_clear_text(self) -> bool:
        return self._tls is TlsMode.REQUIRE and not self._identity.secure

    def _answer(self, option: int, payload: bytes | None) -> bytes:
        """The reply to an option that does not end the haggling. `payload`: None if too long."""
        if option == Option.INFO:
            return self._info_or_go(option, payload)[1]
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._meta_context(option, payload)
        answers = {
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.EXTENDED_HEADERS: self._extended_headers,
        }
        answer = answers.get(option)  # type: ignore[call-overload]
        if answer is None:
            text = f"{option_name(option)} is not supported"
            return option_error(option, OptionReply.ERR_UNSUP, text)
        if payload is None:
            # "the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID"
            text = f"{option_name(option)} takes no data"
            return option_error(option, OptionReply.ERR_INVALID, text)
        reply: bytes = answer()
        return reply

    # Choosing an export

    def _export_name(
        self, length: int, client_flags: int
    ) -> Generator[None, None, tuple[Outcome, bytes]]:
        if length > NAME_BYTES_MAX:
            raise ProtocolError(f"EXPORT_NAME with a name of {length} bytes")
        name = messages.decode_name((yield from self._read(length)))
        # "If the server is unwilling to allow the export, it MUST terminate the session."
        if self._in_clear_text or self.shutting_down:
            return Outcome(None, "EXPORT_NAME without TLS, or at the server's end"), b""
        if self._replies is EXTENDED_REPLIES:
            return Outcome(None, "EXPORT_NAME after EXTENDED_HEADERS"), b""
        offer = self._directory.offer(name, self._identity) if name is not None else None
        if offer is None:
            return Outcome(None, f"no export named {_shown(name)}"), b""
        if offer.refusal is not None or offer.needs_tls:
            return Outcome(None, offer.refusal or f"export {_shown(name)} needs TLS"), b""
        outcome = self._chosen(offer)
        fields = {"size": offer.size, "flags": outcome.transmission_flags}
        reply = bytes(messages.EXPORT_NAME_REPLY.build(fields))
        if not client_flags & ClientFlag.NO_ZEROES:
            reply += _RESERVED_ZEROES
        return outcome, reply

    def _info_or_go(self, option: int, payload: bytes | None) -> tuple[ExportOffer | None, bytes]:
        """The export, if GO may go there, and the reply."""
        if payload is None:
            text = f"{option_name(option)} is too long"
            return None, option_error(option, OptionReply.ERR_INVALID, text)
        request = messages.parse_info_request(payload)
        if isinstance(request, str):
            text = f"{option_name(option)}: {request}"
            return None, option_error(option, OptionReply.ERR_INVALID, text)
        found = self._find(option, request.name)
        if isinstance(found, bytes):
            return None, found
        flags = self._transmission_flags(found)
        reply = describe_export(option, found, flags, request) + option_reply(
            option, OptionReply.ACK
        )
        return found, reply

    def _find(self, option: int, name: str) -> ExportOffer | bytes:
        """An export that the client may use, or the error to send."""
        offer = self._directory.offer(name, self._identity)
        if offer is None:
            text = f"there is no export named {_shown(name)}"
            return self._refuse(option, OptionReply.ERR_UNKNOWN, text)
        if offer.needs_tls:
            # "MUST NOT send NBD_REP_ERR_TLS_REQD in response to any option other than" these, nor
            # to any where TLS is not offered
            wanted = option in (Option.INFO, Option.GO) and self._tls is TlsMode.ON
            kind = OptionReply.ERR_TLS_REQD if wanted else OptionReply.ERR_POLICY
            return self._refuse(option, kind, f"export {_shown(offer.name)} needs TLS")
        if offer.refusal is not None:
            return self._refuse(option, OptionReply.ERR_POLICY, offer.refusal)
        return offer

    def _contexts_for(self, offer: ExportOffer) -> tuple[str, ...]:
        """What SET_META_CONTEXT has selected, if it was for this export."""
        name, contexts = self._contexts
        return contexts if name == offer.name else ()

    def _transmission_flags(self, offer: ExportOffer) -> int:
        flags, contexts = offer.transmission_flags, self._contexts_for(offer)
        if offer.writers not in (None, *contexts):
            flags = flags & ~c.WRITER_FLAGS | TransmissionFlag.READ_ONLY
        if self._replies is not SIMPLE_REPLIES:
            flags |= TransmissionFlag.SEND_DF
        if self._replies is EXTENDED_REPLIES and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return int(flags)

    def _chosen(self, offer: ExportOffer) -> Outcome:
        return Outcome(
            offer,
            replies=self._replies,
            transmission_flags=self._transmission_flags(offer),
            contexts=self._contexts_for(offer),
        )

    # Everything else

    def _list(self) -> bytes:
        replies = []
        for offer in self._directory.offers(self._identity):
            if offer.refusal is None and not offer.needs_tls:
                name, description = offer.name.encode(), offer.description.encode()
                fields = {"name_length": len(name), "name": name, "description": description}
                payload = bytes(messages.SERVER_REPLY.build(fields))
                replies.append(option_reply(Option.LIST, OptionReply.SERVER, payload))
        replies.append(option_reply(Option.LIST, OptionReply.ACK))
        return b"".join(replies)

    def _structured_reply(self) -> bytes:
        option = Option.STRUCTURED_REPLY
        if self._replies is EXTENDED_REPLIES:
            text = "extended headers are in use"
            return option_error(option, OptionReply.ERR_EXT_HEADER_REQD, text)
        if self._replies is STRUCTURED_REPLIES:
            return _repeated(option)
        self._replies = STRUCTURED_REPLIES
        return option_reply(option, OptionReply.ACK)

    def _extended_headers(self) -> bytes:
        if self._replies is EXTENDED_REPLIES:
            return _repeated(Option.EXTENDED_HEADERS)
        self._replies = EXTENDED_REPLIES
        return option_reply(Option.EXTENDED_HEADERS, OptionReply.ACK)

    def _starttls(self) -> bytes:
        if self._tls is TlsMode.OFF:
            text = "TLS is not offered here"
            return self._refuse(Option.STARTTLS, OptionReply.ERR_POLICY, text)
        if self._identity.secure:
            return _repeated(Option.STARTTLS)
        self._replies = SIMPLE_REPLIES
        self._contexts = ("", ())
        self.refusal = ""
        self._received.clear()
        self.tls_wanted = True
        return option_reply(Option.STARTTLS, OptionReply.ACK)

    def _meta_context(self, option: int, payload: bytes | None) -> bytes:
        if option == Option.SET_META_CONTEXT:
            # "replaces all previously-set metadata contexts (including when this command fails)"
            self._contexts = ("", ())
            if self._replies is SIMPLE_REPLIES:
                text = "SET_META_CONTEXT before STRUCTURED_REPLY"
                return option_error(option, OptionReply.ERR_INVALID, text)
        if payload is None:
            text = f"{option_name(option)} is too long"
            return option_error(option, OptionReply.ERR_TOO_BIG, text)
        request = messages.parse_meta_context_request(payload)
        if isinstance(request, str):
            text = f"{option_name(option)}: {request}"
            return option_error(option, OptionReply.ERR_INVALID, text)
        if len(request.queries) > c.QUERIES_MAX:
            text = f"{option_name(option)} with more than {c.QUERIES_MAX} queries"
            return option_error(option, OptionReply.ERR_TOO_BIG, text)
        found = self._find(option, request.name)
        if isinstance(found, bytes):
            return found
        if option == Option.LIST_META_CONTEXT:
            # "The metadata context ID in these replies is reserved and SHOULD be set to zero"
            answers = [(0, name) for name in list_contexts(found.contexts, request.queries)]
        else:
            selected = set_contexts(found.contexts, request.queries)
            self._contexts = (found.name, selected)
            answers = [(found.contexts.index(name) + 1, name) for name in selected]
        replies = [
            option_reply(option, OptionReply.META_CONTEXT, messages.meta_context(number, name))
            for number, name in answers
        ]
        return b"".join(replies) + option_reply(option, OptionReply.ACK)

    # Bytes

    def _read(self, length: int) -> Reply:
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


def _repeated(option: Option) -> bytes:
    # "if it does, the server MAY fail the repeated message with NBD_REP_ERR_INVALID"
    return option_error(option, OptionReply.ERR_INVALID, f"{option.name} is in effect already")


def _shown(name: str | None) -> str:
    if name is None:
        return "that (it is not UTF-8)"
    if len(name) > _NAME_SHOWN_MAX:
        return f"{name[:_NAME_SHOWN_MAX]!r}..."
    return repr(name)
