"""What hostile clients do to TLS: state from before it, clear text behind it, half of it, an end in
the middle of it. Everybody else is served, and nothing is left of them."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EINVAL
from typing import NamedTuple

import pytest
from hostile_support import CONTENT, SIZE, Victim, replnbd
from peers import Authority, RawClient
from peers import nbd_wire as wire
from peers.conversation import SHAPES, TOUCHED, Conversation
from peers.nbd_client import NbdClient
from peers.nbd_wire import (
    ABORT,
    ERR_INVALID,
    ERR_TLS_REQD,
    EXTENDED_HEADERS,
    FIXED,
    GO,
    INFO,
    LIST,
    READ,
    REP_ACK,
    SET_META_CONTEXT,
    STARTTLS,
    STATUS,
    STRUCTURED_REPLY,
    StreamEnd,
    choose,
    meta_context,
    option,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SEND_DF = 0x80
STRUCTURED = option(STRUCTURED_REPLY)
CONTEXT = meta_context(SET_META_CONTEXT, "d", "base:allocation")


class Secured(NamedTuple):
    """A server whose TCP listener offers TLS (`on`) or demands it (`required`)."""

    victim: Victim
    on: tuple[str, int]
    required: tuple[str, int]
    context: ssl.SSLContext

    @contextlib.contextmanager
    def client(self, *, required: bool = False, before: bytes = b"") -> Iterator[RawClient]:
        """A client with TLS, and nothing negotiated. `before` comes in one packet with STARTTLS."""
        with RawClient(self.required if required else self.on) as client:
            client.send(FIXED)
            client.start_tls(self.context, "localhost", before=before)
            yield client


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("v")
    authority = Authority(folder / "ca")
    server = authority.issue("server", "localhost")
    table = f'[tls]\ncertificate = "{server.certificate}"\nkey = "{server.key}"'
    listen = ["nbd://127.0.0.1:0?tls=on", "nbds://127.0.0.1:0"]
    context = ssl.create_default_context(cafile=str(authority.certificate))
    with replnbd(folder, listen=listen, tables=[table]) as victim:
        on, required = (("127.0.0.1", port) for port in victim.ports)
        yield Secured(victim, on, required, context)


def serves(client: RawClient) -> None:
    """A session like any other, with nothing that was not asked for in it."""
    client.go("d", client_flags=b"")
    assert not client.flags & SEND_DF
    assert client.ask(READ, 0, SIZE).data == CONTENT
    assert client.ask(STATUS, 0, 512).error == EINVAL
    client.finish()


@pytest.mark.parametrize(
    "clear", [STRUCTURED, option(EXTENDED_HEADERS), STRUCTURED + CONTEXT, choose(INFO, "d")]
)
def test_nothing_that_was_negotiated_in_clear_text_counts_under_tls(
    secured: Secured, clear: bytes
) -> None:
    """CVE-2021-3716."""
    with secured.victim.checked(), RawClient(secured.on) as client:
        client.send(FIXED + clear)
        for number in (STRUCTURED_REPLY, EXTENDED_HEADERS, SET_META_CONTEXT, INFO):
            if option(number)[:12] in clear:
                assert wire.read_option_replies(client, number)[-1].kind == REP_ACK
        client.start_tls(secured.context, "localhost")
        serves(client)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    "injected", [STRUCTURED, STRUCTURED + CONTEXT + choose(GO, "d"), option(STARTTLS), bytes(8000)]
)
def test_clear_text_behind_starttls_is_nobodys(
    secured: Secured, injected: bytes, required: bool
) -> None:
    with (
        secured.victim.checked(),
        secured.client(required=required, before=injected) as client,
    ):
        serves(client)


def test_starttls_twice_is_invalid_and_the_session_goes_on(secured: Secured) -> None:
    """CVE-2019-14851."""
    with secured.victim.checked(), secured.client() as client:
        client.send(option(STARTTLS) * 2)
        for _ in range(2):
            assert wire.read_option_replies(client, STARTTLS)[-1].kind == ERR_INVALID
        serves(client)


@pytest.mark.parametrize("number", [LIST, INFO, GO, STRUCTURED_REPLY, EXTENDED_HEADERS, 99])
def test_in_clear_text_nothing_is_told_where_tls_is_required(secured: Secured, number: int) -> None:
    with secured.victim.checked(), RawClient(secured.required) as client:
        client.send(FIXED + option(number, choose(GO, "d")[16:] if number in (INFO, GO) else b""))
        assert wire.read_option_replies(client, number)[-1].kind == ERR_TLS_REQD
        client.send(option(ABORT))
        assert wire.read_option_replies(client, ABORT)[-1].kind == REP_ACK
        assert client.receive_rest() == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        STRUCTURED,
        b"\x16\x03\x01\xff\xff" + bytes(100),
        b"\x16\x03\x01\x00\x05\x01\x00\xff\xff\xff",
        bytes(100_000),
        b"\x17\x03\x03\x00\x20" + bytes(32),
        b"\x15\x03\x03\x00\x02\x02\x28",
    ],
    ids=[
        "nothing",
        "an option",
        "a record too long",
        "a hello too long",
        "zeroes",
        "data",
        "alert",
    ],
)
def test_what_is_no_tls_ends_the_connection(secured: Secured, sent: bytes) -> None:
    with secured.victim.checked(), RawClient(secured.on) as client:
        client.send(FIXED)
        client.option(STARTTLS)
        try:
            client.send(sent)
            client.hang_up()
        except OSError:
            pass  # it has hung up already
        assert len(client.receive_rest()) < 100  # an alert, at most


def client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_hello_cut_after_any_byte(secured: Secured, reset: bool) -> None:
    hello = client_hello(secured.context)
    with secured.victim.checked():
        for length in range(0, len(hello), 1 if reset else 3):
            with RawClient(secured.on) as client:
                client.send(FIXED)
                client.option(STARTTLS)
                client.send(hello[:length])
                if reset:
                    client.reset()
                else:
                    client.hang_up()
                    client.receive_rest()


def test_a_client_hello_byte_by_byte_is_as_good_as_another(secured: Secured) -> None:
    with secured.victim.checked(), RawClient(secured.on) as client:
        client.send(FIXED)
        client.option(STARTTLS)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = secured.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                for byte in outgoing.read():
                    client.send(bytes([byte]))
                incoming.write(client.sock.recv(1 << 16))
        tls.write(choose(GO, "nosuch") + option(ABORT))
        for byte in outgoing.read():
            client.send(bytes([byte]))
        answered, ack = b"", struct.pack(">QIII", 0x3E889045565A9, ABORT, REP_ACK, 0)
        while not answered.endswith(ack):
            try:
                answered += tls.read(1 << 16)
            except ssl.SSLWantReadError:
                incoming.write(client.sock.recv(1 << 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_session_under_tls_that_breaks_off_after_any_message_or_in_it(
    secured: Secured, shape: wire.Shape
) -> None:
    """No close_notify: a stream cut by anybody on the way. No half of a message has happened."""
    conversation = Conversation.of(shape, "d", CONTENT)
    flags = len(wire.FIXED)  # which were sent in clear text
    lengths = {end + n for end in conversation.ends for n in (-1, 0)}
    lengths |= set(range(flags, len(conversation.sent), 16))
    with secured.victim.checked():
        keeper = NbdClient(secured.victim.address, "d")
        secured.victim.descriptors += 1
        for length in sorted(length for length in lengths if length >= flags):
            with secured.client() as client:
                client.send(conversation.sent[flags:length])
                client.reset()
            secured.victim.settle()
            messages = conversation.complete(length)
            disk = keeper.pread(0, SIZE)
            assert disk == CONTENT or disk in conversation.disks[:messages]
            keeper.pwrite(0, CONTENT[:TOUCHED])
        keeper.close()
        secured.victim.descriptors -= 1


def test_an_end_without_close_notify_costs_no_time(secured: Secured) -> None:
    """nbd PR 173: the end of the stream was taken for a reason to try again, for ever."""
    process = secured.victim.process
    with secured.victim.checked(), ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(secured.client())
            client.go("d", client_flags=b"")
            raw = socket.socket(fileno=client.sock.detach())
            raw.shutdown(socket.SHUT_WR)
            stack.enter_context(raw)
        before, begin = process.cpu_s, time.monotonic()
        stack.close()
        secured.victim.settle()
        assert process.cpu_s - before < 0.5
        assert time.monotonic() - begin < 5


def test_clients_stuck_in_the_tls_handshake_are_sent_away_in_time(secured: Secured) -> None:
    hello = client_hello(secured.context)
    with secured.victim.checked(), ExitStack() as stack:
        begin = time.monotonic()
        stuck = []
        for number in range(60):
            client = stack.enter_context(RawClient(secured.required))
            client.send(FIXED)
            client.option(STARTTLS)
            client.send(hello[: number * 4])
            stuck.append(client)
        secured.victim.healthy()
        for client in stuck:
            client.receive_rest()
        assert 9 < time.monotonic() - begin < 30


def test_options_under_tls_are_as_hostile_as_in_clear_text(secured: Secured) -> None:
    for sent in (
        option(99, length=2**32 - 1),
        option(wire.EXPORT_NAME, length=2**31 - 1),
        b"IHAVENOT" + bytes(8),
        wire.request(READ, 0, 512),
    ):
        with secured.victim.checked(), secured.client() as client:
            client.send(sent)
            with pytest.raises(StreamEnd):
                wire.read_option_reply(client)
