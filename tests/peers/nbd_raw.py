"""An NBD client that sends exactly what it is told to, and takes answers apart without trust."""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import termios
from types import TracebackType
from typing import Self

from peers import nbd_wire as wire
from peers.nbd_answers import Answer, Answers, Asked
from peers.nbd_client import Address, connect
from peers.nbd_wire import OptionReply, Shape, StreamEnd
from peers.process import PeerError, wait_until

HANDSHAKE_OPTION = {
    Shape.STRUCTURED: wire.STRUCTURED_REPLY,
    Shape.EXTENDED: wire.EXTENDED_HEADERS,
}


class RawClient:
    """A connection of which the greeting was read, and nothing sent.

    `go` makes it a session like any other; until then it is yours. Every wait has a deadline.
    """

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        self.sock = connect(address, timeout_s=timeout_s)
        self.shape = Shape.SIMPLE
        self.size = self.flags = 0
        self.contexts: dict[str, int] = {}
        """Ids of the metadata contexts that were selected, by name."""
        self._cookie = 0
        self._answers = Answers(self, Shape.SIMPLE)
        try:
            greeting = self.receive(18)
            if greeting != wire.GREETING:
                raise PeerError(f"greeting {bytes(greeting)!r}")
        except BaseException:
            self.close()
            raise

    # Section: bytes

    def send(self, data: bytes) -> None:
        """All of it; what the server does with it is not waited for."""
        self.sock.sendall(data)

    def receive(self, length: int) -> bytearray:
        """Exactly `length` bytes, or StreamEnd."""
        received = bytearray(length)
        view, filled = memoryview(received), 0
        while filled < length:
            try:
                count = self.sock.recv_into(view[filled:])
            except ConnectionResetError:
                count = 0
            if not count:
                raise StreamEnd(length, length - filled)
            filled += count
        return received

    def receive_rest(self) -> bytes:
        """Everything until the server closes."""
        received = bytearray()
        try:
            while part := self.sock.recv(1 << 16):
                received += part
        except ConnectionResetError:
            pass
        return bytes(received)

    def wait_taken(self) -> None:
        """Until the server has read all that was sent (a unix socket's: TCP tells less)."""
        wait_until(lambda: not self._unread(), "the server to read", interval_s=0.0002)

    def _unread(self) -> int:
        raw = fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", raw)[0])

    # Section: TLS

    def start_tls(self, context: ssl.SSLContext, name: str, *, before: bytes = b"") -> None:
        """STARTTLS, and TLS with the server called `name`. `before` are options that go with it in
        one packet, in clear text and unread. PeerError if STARTTLS is refused, ssl.SSLError or
        OSError if TLS fails."""
        self.option(wire.STARTTLS, more=before)
        self.sock = context.wrap_socket(self.sock, server_hostname=name)

    # Section: a session

    def go(
        self,
        export: str,
        shape: Shape = Shape.SIMPLE,
        *contexts: str,
        client_flags: bytes = wire.FIXED_NO_ZEROES,
    ) -> Self:
        """Into the transmission phase of `export`, with these metadata contexts. PeerError if
        anything of that is refused."""
        self.send(client_flags)
        if shape in HANDSHAKE_OPTION:
            self.option(HANDSHAKE_OPTION[shape])
        if contexts:
            replies = self.option(
                wire.SET_META_CONTEXT, wire.meta_context(0, export, *contexts)[16:]
            )
            for reply in replies[:-1]:
                (number,) = struct.unpack_from(">I", reply.payload)
                self.contexts[reply.payload[4:].decode()] = number
        for reply in self.option(wire.GO, wire.choose(0, export)[16:]):
            if reply.kind == wire.REP_INFO and reply.payload[:2] == b"\0\0":
                self.size, self.flags = struct.unpack_from(">QH", reply.payload, 2)
        self.transmit(shape)
        return self

    def option(self, number: int, data: bytes = b"", *, more: bytes = b"") -> list[OptionReply]:
        """An option, and its replies; PeerError if it is refused. `more` is sent along."""
        self.send(wire.option(number, data) + more)
        replies = wire.read_option_replies(self, number)
        if replies[-1].error:
            raise PeerError(f"option {number}: {replies[-1].kind:#x} {replies[-1].payload!r}")
        return replies

    def transmit(self, shape: Shape) -> None:
        """What comes from now on are answers in this shape."""
        self.shape = shape
        self._answers = Answers(self, shape)

    def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Answer:
        """One valid request, and its answer."""
        cookie = self.begin(command, offset, length, flags=flags, data=data)
        answer = self.answer()
        if answer is None or answer.cookie != cookie:
            raise PeerError(f"expected an answer to {cookie}, got {answer}")
        return answer

    def begin(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> int:
        """Send a request, and `data` behind it; its cookie. DISC is not waited for."""
        self._cookie += 1
        length = len(data) if data else length
        if data and self.shape is Shape.EXTENDED:
            flags |= wire.PAYLOAD_LEN
        header = wire.request(
            command, offset, length, cookie=self._cookie, flags=flags, shape=self.shape
        )
        if command != wire.DISC:
            self.expect(self._cookie, Asked(command, offset, length, flags))
        self.send(header + data)
        return self._cookie

    def expect(self, cookie: int, asked: Asked) -> None:
        """What you have sent yourself is answered, too. A BLOCK_STATUS is about all selected
        contexts unless it says otherwise."""
        if asked.command == wire.STATUS and not asked.contexts:
            asked = asked._replace(contexts=tuple(self.contexts.values()))
        self._answers.expect(cookie, asked)

    def answer(self) -> Answer | None:
        """The next answer; None where the server has closed instead."""
        return self._answers.next()

    # Section: the end

    def finish(self) -> None:
        """DISC; the server must close, with nothing more to say."""
        self.begin(wire.DISC)
        if rest := self.receive_rest():
            raise PeerError(f"{len(rest)} bytes after DISC")
        self.close()

    def hang_up(self) -> None:
        """Send no more (a FIN); what the server has to say can still be read."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close at once, with unread bytes on both sides lost: over TCP a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
