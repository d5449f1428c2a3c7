"""How TLS begins: what is sent too early, too late, twice, or is no TLS at all."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
import struct
import warnings
from collections.abc import Callable, Coroutine
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest
from peers.nbd_client import connect
from peers.nbd_wire import (
    ABORT,
    FIXED_NO_ZEROES,
    GO,
    GREETING,
    LIST,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    meta_context,
    option,
)
from server_wire import READ, STATUS, check_healthy, choose, on_both_loops, request, settled
from tls_wire import (
    RESET_ON_CLOSE,
    STARTTLS_ACK,
    Pki,
    TlsClient,
    leaving_nothing,
    serving_tls,
    tcp_port,
)
from tls_wire import pki as pki

from replnbd.block import MemoryNode
from replnbd.server import Export
from replnbd.server.limits import FAREWELL_TLS_S

MIB = 1 << 20
ACK, ERR_INVALID, ERR_TLS_REQD = 1, 0x80000003, 0x80000005
ALERT = b"\x15"
NEGOTIATED = option(STRUCTURED_REPLY) + meta_context(SET_META_CONTEXT, "e", "base:allocation")
INJECTED = NEGOTIATED + choose("e")[4:] + request(READ, 0, 512)
TIMEOUT_S = 0.2


async def expect_a_fresh_session(client: TlsClient) -> None:
    """Nothing is negotiated: READ gets a simple reply, and there are no contexts."""
    client.send(meta_context(SET_META_CONTEXT, "e", "base:allocation"))
    number, kind, text = await client.option_reply()
    assert (number, kind) == (SET_META_CONTEXT, ERR_INVALID)
    assert text == b"SET_META_CONTEXT before STRUCTURED_REPLY"
    client.send(choose("e")[4:])
    await client.chosen()
    assert await client.pread(0, 100) == bytes(100)
    client.send(request(STATUS, 0, 512, cookie=4))
    assert await client.reply() == (EINVAL, 4, b"")


@on_both_loops
async def test_what_was_negotiated_before_starttls_is_forgotten(short_dir: Path, pki: Pki) -> None:
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()):
        client = await TlsClient.connect(short_dir, "on")
        client.send_raw(FIXED_NO_ZEROES + NEGOTIATED)
        replies = await client.reader.readexactly(18 + 20 + 20 + 4 + len("base:allocation") + 20)
        assert replies.endswith(struct.pack(">QIII", 0x3E889045565A9, SET_META_CONTEXT, ACK, 0))
        client.send_raw(option(STARTTLS))
        assert await client.reader.readexactly(20) == STARTTLS_ACK
        await client.handshake(pki.context())
        await expect_a_fresh_session(client)
        await client.close()


@on_both_loops
async def test_clear_text_in_the_segment_of_starttls_is_never_interpreted(
    short_dir: Path, pki: Pki
) -> None:
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()):
        for listener in ("t", "on"):
            client = await TlsClient.connect(short_dir, listener)
            await client.starttls(behind=INJECTED)
            await client.handshake(pki.context())
            await expect_a_fresh_session(client)
            await client.close()


@on_both_loops
async def test_clear_text_behind_the_answer_to_starttls_ends_the_connection(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = MemoryNode(MIB)
    node.data[:] = b"\xee" * MIB
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        async with leaving_nothing(server, caplog):
            client = await (await TlsClient.connect(short_dir)).starttls()
            client.send_raw(INJECTED)
            assert b"\xee" * 16 not in await read_all(client)
            client.hang_up()
        assert "client 1 (unix): closed, TLS failed: wrong version number" in caplog.text
        node.data[:] = bytes(MIB)
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize(
    ("last_words", "logged"),
    [
        (b"", "left in the handshake"),
        (option(ABORT), "closed in the handshake: the client aborted"),
    ],
    ids=["just_hangs_up", "aborts"],
)
@on_both_loops
async def test_why_a_client_was_refused_is_in_the_log(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, last_words: bytes, logged: str
) -> None:
    caplog.set_level(logging.INFO)
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()) as server:
        client = await TlsClient.connect(short_dir)
        client.send_raw(choose("e") + last_words)
        text = b"TLS is required here"
        refusal = struct.pack(">QIII", 0x3E889045565A9, GO, ERR_TLS_REQD, len(text)) + text
        assert await client.reader.readexactly(18 + len(refusal)) == GREETING + refusal
        client.hang_up()
        await settled(lambda: not server._negotiations)
    said = [each.getMessage() for each in caplog.records if "client 1" in each.getMessage()]
    assert said == [f"client 1 (unix): {logged}, refused: TLS is required here"]


@pytest.mark.parametrize("listener", ["t", "on"])
@on_both_loops
async def test_a_second_starttls_is_refused_and_the_session_goes_on(
    short_dir: Path, pki: Pki, listener: str
) -> None:
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()):
        client = await (await TlsClient.connect(short_dir, listener)).starttls()
        await client.handshake(pki.context(), behind=option(STARTTLS) + choose("e")[4:])
        reply = await client.option_reply()
        assert reply == (STARTTLS, ERR_INVALID, b"STARTTLS is in effect already")
        await client.chosen()
        assert await client.pread(0, 100) == bytes(100)
        await client.close()


GARBAGE = {
    "zeroes": bytes(600),
    "HTTP": b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n" + bytes(600),
    "random bytes": random.Random(5).randbytes(100_000),
    "a record of 64 KiB": bytes.fromhex("160301ffff") + bytes(0xFFFF),
    "an empty record": bytes.fromhex("1603010000") * 200,
    "an alert": bytes.fromhex("15030100020128"),
    "a heartbeat": bytes.fromhex("1803020003014000") + bytes(600),
    "data": bytes.fromhex("1703030020") + bytes(0x20),
    "a Finished": bytes.fromhex("16030300101400000c") + bytes(12),
    "a hello of 16 MiB": bytes.fromhex("160301400001ffffff0303") + bytes(0x4000),
    "a hello of SSL 2": bytes.fromhex("802e0100020015000000100100800200800300800400800600")
    + bytes(60),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@on_both_loops
async def test_what_is_no_tls_ends_the_connection(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    caplog.set_level(logging.INFO)
    node = MemoryNode(MIB)
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        async with leaving_nothing(server, caplog):
            client = await (await TlsClient.connect(short_dir)).starttls()
            client.send_raw(garbage)
            answer = await read_all(client)
            assert answer[:1] in (b"", ALERT), answer
            client.hang_up()
        assert caplog.text.count("client 1 (unix): closed, TLS failed: ") == 1
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize("over_tcp", [False, True], ids=["unix", "tcp"])
@on_both_loops
async def test_who_is_refused_can_still_send_and_then_read_why(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, over_tcp: bool
) -> None:
    """In TLS 1.3 a client hears only then that its certificate is missing."""
    caplog.set_level(logging.INFO)
    tls = pki.tls(verify=True)
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=tls) as server:
        port = await tcp_port(server)
        async with leaving_nothing(server, caplog):
            client = await (
                TlsClient.connect_tcp(port) if over_tcp else TlsClient.connect(short_dir)
            )
            await (await client.starttls()).handshake(pki.context())
            await settled(lambda: "TLS failed" in caplog.text)
            for _ in range(10):
                client.send(option(LIST))
                await asyncio.sleep(0)
            with pytest.raises(ssl.SSLError, match="TLSV13_ALERT_CERTIFICATE_REQUIRED"):
                await client.receive(1)
            client.hang_up()
    assert "): closed, TLS failed: peer did not return a certificate" in caplog.text


@pytest.mark.parametrize("closing", [False, True])
@on_both_loops
async def test_who_is_refused_and_stays_is_left_behind(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, closing: bool
) -> None:
    caplog.set_level(logging.INFO)
    clock, export = asyncio.get_running_loop().time, Export("e", MemoryNode(MIB))
    async with (
        serving_tls(short_dir, export, tls=pki.tls(verify=True)) as server,
        leaving_nothing(server, caplog),
    ):
        client = await TlsClient.connect(short_dir)
        await (await client.starttls()).handshake(pki.context())
        await settled(lambda: "TLS failed" in caplog.text)
        assert len(server._negotiations) == 1
        begin_s = clock()
        if closing:
            await server.close(timeout_s=0.0)
        await settled(lambda: not server._negotiations)
        assert clock() - begin_s < (FAREWELL_TLS_S / 2 if closing else 2 * FAREWELL_TLS_S)
        client.hang_up()


def old_context(pki: Pki, version: str) -> ssl.SSLContext:
    """A client's that speaks an old version, and no other."""
    context = ssl.create_default_context(cafile=str(pki.authority.certificate))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@on_both_loops
async def test_versions_before_tls_1_2_get_an_alert(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    caplog.set_level(logging.INFO)
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()):
        client = await (await TlsClient.connect(short_dir)).starttls()
        with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"):
            await client.handshake(old_context(pki, version))
        assert await client.reader.read() == b""
        assert "client 1 (unix): closed, TLS failed: unsupported protocol" in caplog.text
        client.hang_up()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@on_both_loops
async def test_versions_from_tls_1_2_on_are_spoken(short_dir: Path, pki: Pki, version: str) -> None:
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()):
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context(version=version))
        assert client.tls is not None
        assert client.tls.version() == version.replace("_", ".")
        assert await client.pread(0, 100) == bytes(100)
        await client.close()


async def nothing_more(client: TlsClient, pki: Pki) -> None:
    """STARTTLS, and not a byte of TLS."""
    await client.starttls()


async def half_a_hello(client: TlsClient, pki: Pki) -> None:
    """The first half of what begins TLS."""
    await client.starttls()
    client.begin(pki.context())
    hello = await client.step()
    client.send_raw(hello[: len(hello) // 2])


async def a_hello(client: TlsClient, pki: Pki) -> None:
    """All of the hello, and no answer to the server's."""
    await client.starttls()
    client.begin(pki.context())
    client.send_raw(await client.step())


async def all_of_tls(client: TlsClient, pki: Pki) -> None:
    """TLS, and then no option."""
    await client.starttls()
    await client.handshake(pki.context())


Phase = Callable[[TlsClient, Pki], Coroutine[Any, Any, None]]
PHASES: list[Phase] = [nothing_more, half_a_hello, a_hello, all_of_tls]


@pytest.mark.parametrize("phase", PHASES)
@on_both_loops
async def test_the_deadline_of_the_handshake_covers_tls(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, phase: Phase
) -> None:
    caplog.set_level(logging.INFO)
    node, begin_s = MemoryNode(MIB), asyncio.get_running_loop().time()
    serving = serving_tls(
        short_dir, Export("e", node), tls=pki.tls(), handshake_timeout_s=TIMEOUT_S
    )
    async with serving as server:
        async with leaving_nothing(server, caplog):
            client = await TlsClient.connect(short_dir)
            await asyncio.sleep(TIMEOUT_S / 4)  # the loop's own limit for TLS begins later
            await phase(client, pki)
            await read_all(client)
            assert asyncio.get_running_loop().time() - begin_s < 10 * TIMEOUT_S
            client.hang_up()
        assert "client 1 (unix): no export chosen within 0.2 s: closed" in caplog.text


@pytest.mark.parametrize("over_tcp", [False, True], ids=["unix", "tcp"])
@on_both_loops
async def test_who_hangs_up_behind_starttls_leaves_nothing(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture, over_tcp: bool
) -> None:
    """The ACK cannot be sent any more, and TLS begins on a closed transport."""
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()) as server:
        address = ("127.0.0.1", await tcp_port(server)) if over_tcp else short_dir / "t"
        async with leaving_nothing(server, caplog):
            with connect(address) as sock:
                sock.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(sock, 18) == GREETING
                sock.sendall(FIXED_NO_ZEROES + option(STARTTLS))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


@on_both_loops
async def test_close_ends_clients_in_every_phase_of_tls(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()) as server,
        leaving_nothing(server, caplog),
    ):
        clients = [await TlsClient.connect(short_dir) for _ in range(4 * len(PHASES) + 4)]
        for index, client in enumerate(clients[:-4]):
            await PHASES[index % len(PHASES)](client, pki)
        for client in clients[-4:]:
            await client.go("e", pki.context())
        await server.close(timeout_s=0.5)
        assert not server.connections
        for client in clients:
            await read_all(client)
            client.hang_up()


async def read_all(client: TlsClient) -> bytes:
    """What the server sends until it closes, as it is."""
    try:
        return await client.reader.read()
    except ConnectionResetError:
        return b""
