"""Fixed newstyle option haggling, the client's side, as a conversation without a wire.

    handshake = ClientHandshake("disk", contexts=("base:allocation",), tls=True)
    loop:   while (request := handshake.advance()) is not None: send(request)
            handshake.outcome                           None, or what the server offers
            handshake.tls_wanted                        True: upgrade, then `tls_started`
            handshake.receive(bytes)                    what arrived, in any pieces

`advance` raises ProtocolError when the server breaks the protocol, and OSError when it refuses:
ENOENT for an export it does not have, EACCES for one we may not use or not without TLS, ESHUTDOWN,
and so on; the text is the server's. After an OSError, `ABORT` may be sent before hanging up.
What arrived after the end is in `unconsumed`.

The order of options, and what a refusal means:

    STARTTLS            only if TLS is wanted, and first: nothing else is said in clear text; a
                        refusal is the end, whatever its reason, for it may be an attacker's
    EXTENDED_HEADERS    without it: STRUCTURED_REPLY; without that: simple replies
    SET_META_CONTEXT    without it: no block status
    GO                  without it (a server from before 2017): EXPORT_NAME

No server makes us keep more than one reply of OPTION_REPLY_BYTES_MAX.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from replnbd.errors import ProtocolError
from replnbd.nbd import client_messages as messages
from replnbd.nbd import constants as c
from replnbd.nbd.client_messages import BlockSizes, pack_option, refusal
from replnbd.nbd.constants import HandshakeFlag, Info, Option, OptionReply
from replnbd.nbd.messages import EXPORT_NAME_REPLY
from replnbd.nbd.replies import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    STRUCTURED_REPLIES,
    Replies,
)

ABORT = pack_option(Option.ABORT)
"""The soft disconnect of a client in the handshake; its answer need not be waited for."""

REPLIES_MAX = 64
"""To one option. GO brings four kinds of INFO, and SET_META_CONTEXT one for each that was asked."""

_GREETING_SIZE = 18
_EXPORT_NAME_REPLY_SIZE = 10
_RESERVED_ZEROES = 124
# What no other option will change.
_FINAL = (OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN)


@dataclass(frozen=True, slots=True)
class ServerOffer:
    """What a server said of the export that the transmission phase is about."""

    size: int
    transmission_flags: int
    replies: Replies
    """Which of the three shapes the conversation has from now on."""
    block_sizes: BlockSizes = field(default_factory=BlockSizes)
    contexts: dict[str, int] = field(default_factory=dict)
    """Ids of the metadata contexts that were selected, by name."""
    name: str = ""
    """The canonical name, if the server told it; harmless to show, as the next."""
    description: str = ""


Step = Generator[bytes | None, None, None]
Bytes = Generator[bytes | None, None, bytes]
"""Steps of the conversation: they yield bytes to send, or None while they lack some."""


class ClientHandshake:
    """One haggling for `export`. `contexts`: names of metadata contexts that are wanted."""

    def __init__(self, export: str, *, contexts: tuple[str, ...] = (), tls: bool = False) -> None:
        self._export = export
        self._wanted = contexts
        self._tls = tls
        self._received = bytearray()
        self._steps = self._converse()
        self.outcome: ServerOffer | None = None
        self.tls_wanted = False
        """STARTTLS was acknowledged: the caller upgrades, then calls `tls_started`."""
        # What was negotiated
        self._replies: Replies = SIMPLE_REPLIES
        self._contexts: dict[str, int] = {}
        # What was told
        self._size_and_flags: tuple[int, int] | None = None
        self._block_sizes = BlockSizes()
        self._name = self._description = ""

    @property
    def unconsumed(self) -> bytes:
        """What was received and not needed."""
        return bytes(self._received)

    def receive(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take what arrived; then call `advance`."""
        if not self.tls_wanted:  # clear text behind STARTTLS is nobody's (CVE-2021-3716)
            self._received += chunk

    def tls_started(self) -> None:
        """The connection is encrypted, and the server verified, from here on."""
        assert self.tls_wanted
        self.tls_wanted = False

    def advance(self) -> bytes | None:
        """What to send next, or None: more bytes are needed, or there is an `outcome`."""
        if self.outcome is not None or self.tls_wanted:
            return None
        try:
            return next(self._steps)
        except StopIteration as stop:
            self.outcome = stop.value
            return None

    # The conversation

    def _converse(self) -> Generator[bytes | None, None, ServerOffer]:
        flags = messages.parse_greeting((yield from self._read(_GREETING_SIZE)))
        # "Clients MUST NOT set any other flags", nor one that the server did not.
        client_flags = flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        yield int(client_flags).to_bytes(4, "big")
        if self._tls:
            yield from self._starttls()
        yield from self._choose_replies()
        if self._wanted and self._replies is not SIMPLE_REPLIES:
            yield from self._set_contexts()
        yield from self._go(bool(client_flags & HandshakeFlag.NO_ZEROES))
        if self._size_and_flags is None:
            raise ProtocolError("GO was acknowledged without INFO_EXPORT")
        size, transmission_flags = self._size_and_flags
        if size % self._block_sizes.minimum:
            # QEMU's client refuses it, too: the last bytes cannot be reached.
            raise ProtocolError(
                f"the export's size, {size}, is no multiple of its minimum block size,"
                f" {self._block_sizes.minimum}"
            )
        return ServerOffer(
            size,
            transmission_flags,
            self._replies,
            self._block_sizes,
            self._contexts,
            self._name,
            self._description,
        )

    def _starttls(self) -> Step:
        refused = yield from self._ask(Option.STARTTLS)
        if refused is not None:
            raise refusal(Option.STARTTLS, *refused)
        self._received.clear()
        self.tls_wanted = True
        yield None  # until `tls_started`

    def _choose_replies(self) -> Step:
        offers = (
            (Option.EXTENDED_HEADERS, EXTENDED_REPLIES),
            (Option.STRUCTURED_REPLY, STRUCTURED_REPLIES),
        )
        for option, replies in offers:
            refused = yield from self._ask(option)
            if refused is None:
                self._replies = replies
                return
            _raise_if_final(option, refused)

    def _set_contexts(self) -> Step:
        option = Option.SET_META_CONTEXT
        found: dict[str, int] = {}

        def take(reply: int, payload: bytes) -> None:
            if reply != OptionReply.META_CONTEXT:
                raise _unexpected(option, reply)
            number, name = messages.parse_context(payload)
            if name not in self._wanted:
                raise ProtocolError(f"metadata context {messages.shown(name.encode())} not asked")
            if name in found or number in found.values():
                raise ProtocolError(f"metadata context {name}, id {number}, selected twice")
            found[name] = number

        data = messages.pack_meta_context(self._export, self._wanted)
        refused = yield from self._ask(option, data, take)
        if refused is None:
            self._contexts = found
        else:  # of an export that is not there GO tells better
            _raise_if_final(option, refused)

    def _go(self, no_zeroes: bool) -> Step:
        refused = yield from self._ask(Option.GO, messages.pack_go(self._export), self._take_info)
        if refused is None:
            return
        if refused[0] != OptionReply.ERR_UNSUP:
            raise refusal(Option.GO, *refused)
        if self._replies is EXTENDED_REPLIES:
            # "the server MUST NOT fail NBD_OPT_GO with NBD_REP_ERR_UNSUP"
            raise ProtocolError("GO is not supported, but EXTENDED_HEADERS was")
        yield pack_option(Option.EXPORT_NAME, self._export.encode())
        fields = EXPORT_NAME_REPLY.parse((yield from self._read(_EXPORT_NAME_REPLY_SIZE)))
        if not no_zeroes:
            yield from self._read(_RESERVED_ZEROES)
        self._block_sizes = BlockSizes()
        self._size_and_flags = messages.check_size(fields.size), int(fields.flags)

    def _take_info(self, reply: int, payload: bytes) -> None:
        if reply != OptionReply.INFO or len(payload) < 2:
            raise _unexpected(Option.GO, reply)
        kind = int.from_bytes(payload[:2], "big")
        if kind == Info.EXPORT:
            self._size_and_flags = messages.parse_export(payload)
        elif kind == Info.BLOCK_SIZE:
            self._block_sizes = messages.parse_block_sizes(payload)
        elif kind == Info.NAME:
            self._name = messages.shown(payload[2:])
        elif kind == Info.DESCRIPTION:
            self._description = messages.shown(payload[2:])
        # "MUST ignore information types that it does not recognize"

    # Options and bytes

    def _ask(
        self,
        option: Option,
        data: bytes = b"",
        take: Callable[[int, bytes], None] | None = None,
    ) -> Generator[bytes | None, None, tuple[int, bytes] | None]:
        """Send an option and read its replies, of which `take` gets all but the last.

        Returns None if it was acknowledged, else (reply type, text) of the refusal.
        """
        yield pack_option(option, data)
        for _ in range(REPLIES_MAX):
            header = yield from self._read(messages.OPTION_REPLY_SIZE)
            reply, length = messages.parse_option_reply(header, option)
            payload = yield from self._read(length)
            if reply & c.REPLY_ERROR_BIT:
                return reply, payload
            if reply == OptionReply.ACK:
                if payload:
                    raise ProtocolError(f"{option.name} acknowledged with {length} bytes")
                return None
            if take is None:
                raise _unexpected(option, reply)
            take(reply, payload)
        raise ProtocolError(f"more than {REPLIES_MAX} replies to {option.name}")

    def _read(self, length: int) -> Bytes:
        while len(self._received) < length:
            yield None
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken


def _raise_if_final(option: Option, refused: tuple[int, bytes]) -> None:
    if refused[0] in _FINAL:
        raise refusal(option, *refused)


def _unexpected(option: Option, reply: int) -> ProtocolError:
    return ProtocolError(f"{option.name} answered by reply type {reply}")
