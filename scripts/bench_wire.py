"""The other floor, the wire: a server that takes every request, answers it, and touches no disk.

One loop on one connection at a time: receive, unpack, pack, send; a READ gets bytes that lie ready.
What fio, the kernel's sockets and Python cost is in it, and nothing else: no server with one loop
can be much faster with this client on this machine. Run as a process of its own.
"""

from __future__ import annotations

import socket
import sys

from replnbd.nbd import ClientIdentity, ExportOffer, Handshake, Replies
from replnbd.nbd.constants import CMD_DISC, CMD_READ, CMD_WRITE
from replnbd.nbd.constants import TransmissionFlag as Flag

FLAGS = int(Flag.HAS_FLAGS | Flag.SEND_FLUSH)
BUFFER_SIZE = 8 << 20  # bytes: replies to what four requests of 1 MiB ask for, twice
SEND_BUFFER = 512 << 10  # of a unix socket, as replnbd's


class Anything:
    """The directory of a server with one disk, whatever it is called."""

    def __init__(self, size: int) -> None:
        self.size = size

    def offers(self, client: ClientIdentity) -> list[ExportOffer]:
        """None to list."""
        return []

    def offer(self, name: str, client: ClientIdentity) -> ExportOffer:
        """What was asked for."""
        return ExportOffer(name, "", self.size, FLAGS)


def haggle(client: socket.socket, size: int) -> tuple[Replies, bytes]:
    """The handshake: the shape of replies, and what came after. EOFError if the client leaves."""
    handshake = Handshake(Anything(size))
    while True:
        while (reply := handshake.advance()) is not None:
            client.sendall(reply)
        if handshake.outcome:
            return handshake.outcome.replies, handshake.unconsumed
        received = client.recv(4096)
        if not received:
            raise EOFError
        handshake.receive(received)


def answer(client: socket.socket, shape: Replies, early: bytes) -> None:
    """All requests until DISC or the end of the stream."""
    # What is read is not zeroes: it would be sent as holes.
    inbox, outbox = bytearray(BUFFER_SIZE), bytearray(b"\xff" * BUFFER_SIZE)
    received, replies = memoryview(inbox), memoryview(outbox)
    inbox[: len(early)] = early
    start, end = 0, len(early)
    while count := client.recv_into(received[end:]):
        end += count
        at = 0
        while end - start >= shape.request_size:
            _, flags, command, cookie, offset, length = shape.unpack_request(inbox, start)
            if command == CMD_DISC:
                return
            size = shape.request_size + (length if command == CMD_WRITE else 0)
            if end - start < size:
                break
            start += size
            if command == CMD_READ:
                at += shape.pack_read(outbox, at, flags, cookie, offset, length)
            else:
                shape.pack_ack(outbox, at, cookie, offset)
                at += shape.ack_size
        client.sendall(replies[:at])
        received[: end - start] = received[start:end]
        start, end = 0, end - start


def main(place: str, size: int) -> None:
    """Serve one client after the other. `place`: a TCP port, or the path of a unix socket."""
    if place.isdigit():
        listener = socket.create_server(("127.0.0.1", int(place)))
    else:
        listener = socket.create_server(place, family=socket.AF_UNIX)
    while True:
        client, _ = listener.accept()
        with client:
            if place.isdigit():
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            try:
                answer(client, *haggle(client, size))
            except (EOFError, ConnectionError):
                pass  # the next one, then


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
