"""A whole session in bytes, message by message: what the disk is after each, and what is answered.

For tests that cut it, and split it, everywhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from peers import nbd_wire as wire
from peers.nbd_answers import Answer, Answers, Asked
from peers.nbd_wire import PAYLOAD_LEN, Shape, StreamEnd, Transcript
from peers.process import PeerError

SHAPES = [Shape.STRUCTURED, Shape.EXTENDED]
CONTEXTS = ("base:allocation", "qemu:allocation-depth")
TOUCHED = 8192
"""All that a conversation changes is before this offset."""


@dataclass
class Conversation:
    """`sent`, of which the handshake are the first bytes; `ends` says where each message ends, and
    `disks` what the disk is when the server has had all messages up to there."""

    shape: Shape
    sent: bytes = b""
    handshake_bytes: int = 0
    ends: list[int] = field(default_factory=list)
    disks: list[bytes] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    """Requests by cookie, which is their number in `ends`."""

    @classmethod
    def of(cls, shape: Shape, export: str, disk: bytes, *, long: int = 0) -> Conversation:
        """Every option of a usual handshake, and every command; writes that overlap. `long`: one
        more WRITE and READ of so many bytes, behind TOUCHED."""
        self = cls(shape)
        self._message(wire.FIXED_NO_ZEROES, disk)
        negotiate = {
            Shape.STRUCTURED: wire.option(wire.STRUCTURED_REPLY),
            Shape.EXTENDED: wire.option(wire.EXTENDED_HEADERS),
        }
        self._message(negotiate[shape], disk)
        self._message(wire.meta_context(wire.SET_META_CONTEXT, export, *CONTEXTS), disk)
        self._message(wire.choose(wire.GO, export, wire.INFO_BLOCK_SIZE), disk)
        self.handshake_bytes = len(self.sent)
        ids = tuple(range(1, len(CONTEXTS) + 1))
        self._request(Asked(wire.WRITE, 100, 300), bytes(range(1, 251)) + b"\xff" * 50)
        self._request(Asked(wire.READ, 0, 700))
        self._request(Asked(wire.WRITE, 390, 120), b"a" * 120)
        self._request(Asked(wire.FLUSH))
        self._request(Asked(wire.TRIM, 4096, 1024))
        self._request(Asked(wire.CACHE, 0, 8192))
        self._request(Asked(wire.ZEROES, 380, 50, wire.FUA))
        self._request(Asked(wire.READ, 3000, 5000, wire.DF))
        self._request(Asked(wire.STATUS, 0, len(disk), contexts=ids))
        if shape is Shape.EXTENDED:
            payload = struct.pack(">QI", len(disk), ids[0])
            self._request(
                Asked(wire.STATUS, 0, len(disk), contexts=ids[:1]), payload, flags=PAYLOAD_LEN
            )
        if long:
            self._request(Asked(wire.WRITE, TOUCHED, long), bytes(range(1, 256)) * (long // 255))
            self._request(Asked(wire.READ, TOUCHED, long))
        self._request(Asked(wire.READ, 1 << 63, 1))
        self._message(wire.request(wire.DISC, shape=shape), self.disks[-1])
        return self

    def _message(self, data: bytes, disk: bytes) -> None:
        self.sent += data
        self.ends.append(len(self.sent))
        self.disks.append(disk)

    def _request(self, asked: Asked, payload: bytes = b"", *, flags: int = 0) -> None:
        cookie = len(self.ends)
        self.asked[cookie] = asked
        if payload and self.shape is Shape.EXTENDED:
            flags |= PAYLOAD_LEN
        header = wire.request(
            asked.command,
            asked.offset,
            len(payload) or asked.length,
            cookie=cookie,
            flags=asked.flags | flags,
            shape=self.shape,
        )
        disk = bytearray(self.disks[-1])
        if asked.command in (wire.WRITE, wire.TRIM, wire.ZEROES):
            content = payload or bytes(asked.length)
            disk[asked.offset : asked.offset + asked.length] = content
        self._message(header + payload, bytes(disk))

    def complete(self, length: int) -> int:
        """How many messages are in the first `length` bytes."""
        return sum(end <= length for end in self.ends)

    def answers(self, received: bytes, messages: int) -> list[Answer]:
        """The answers in `received`, what came after the greeting, taken apart: exactly those to
        the requests among the first `messages`. PeerError if there are others."""
        source = Transcript(received)
        options = (wire.STRUCTURED_REPLY, wire.SET_META_CONTEXT, wire.GO)
        if self.shape is Shape.EXTENDED:
            options = (wire.EXTENDED_HEADERS, *options[1:])
        found = []
        try:
            for option in options[: max(messages - 1, 0)]:
                wire.read_option_replies(source, option)
            answers = Answers(source, self.shape)
            for cookie, asked in self.asked.items():
                if cookie < messages:
                    answers.expect(cookie, asked)
            while answer := answers.next():
                found.append(answer)
        except StreamEnd as end:
            raise PeerError(f"{end} after {messages} messages") from None
        if answers.pending:
            raise PeerError(f"no answers to {answers.pending} after {messages} messages")
        return found
