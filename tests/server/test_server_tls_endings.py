"""Clients that leave in the middle of TLS: operations end, and nothing of them is left."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from server_wire import (
    READ,
    WRITE,
    CountingNode,
    GatedNode,
    check_healthy,
    choose,
    on_both_loops,
    request,
    settled,
)
from tls_wire import Pki, TlsClient, leaving_nothing, serving_tls, tcp_port
from tls_wire import pki as pki

from replnbd.block import MemoryNode
from replnbd.server import Export
from replnbd.server.connection import State
from replnbd.server.limits import BATCH_BYTES_MAX

MIB = 1 << 20
IN_FLIGHT = 10
CLOSES = 200
_libc = ctypes.CDLL(None)
PAGE = os.sysconf("SC_PAGE_SIZE")


def end_tls(client: TlsClient) -> None:
    """close_notify, and the connection stays open."""
    client.notify()


def end_tls_and_hang_up(client: TlsClient) -> None:
    """close_notify, then a FIN."""
    client.notify()
    client.writer.close()


def shut_down(client: TlsClient) -> None:
    """A FIN, and the client still reads."""
    client.writer.write_eof()


WAYS: list[Callable[[TlsClient], None]] = [
    TlsClient.hang_up,
    TlsClient.reset,
    shut_down,
    end_tls,
    end_tls_and_hang_up,
]
RUDE = WAYS[:2]


async def begin(port: int, context: ssl.SSLContext) -> tuple[TlsClient, bytes]:
    """A client that has its ACK, and its hello."""
    client = await (await TlsClient.connect_tcp(port)).starttls()
    client.begin(context)
    return client, await client.step()


@pytest.mark.slow
@pytest.mark.parametrize(("certificate", "step"), [(False, 1), (True, 41)])
@pytest.mark.parametrize("leave", RUDE)
@on_both_loops
async def test_who_leaves_at_any_byte_of_the_tls_handshake_leaves_nothing(
    short_dir: Path,
    pki: Pki,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[[TlsClient], None],
    certificate: bool,
    step: int,
) -> None:
    node, context = MemoryNode(MIB), pki.context(certificate=certificate)
    tls = pki.tls(verify=certificate)
    async with serving_tls(short_dir, Export("e", node), tls=tls) as server:
        port = await tcp_port(server)
        async with leaving_nothing(server, caplog):
            cut = left_out = 0
            while not left_out:
                client, hello = await begin(port, context)
                client.send_raw(hello[:cut])
                if cut > len(hello):
                    last = await client.step()
                    client.send_raw(last[: cut - len(hello)])
                    left_out = max(0, cut - len(hello) - len(last))
                leave(client)
                await settled(lambda: not server._negotiations)
                cut += step
            assert cut > (1000 if certificate else 300)
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize("leave", WAYS)
@on_both_loops
async def test_operations_of_who_leaves_end_and_so_does_all_else(
    short_dir: Path,
    pki: Pki,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[[TlsClient], None],
) -> None:
    node, context = GatedNode(MIB), pki.context()
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        port = await tcp_port(server)
        async with leaving_nothing(server, caplog):
            client = await (await TlsClient.connect_tcp(port)).go("e", context)
            node.gate.clear()
            for index in range(IN_FLIGHT):
                client.send(request(WRITE, index * 4096, 4096) + bytes([index + 1]) * 4096)
                client.send(request(READ, index * 4096, 4096))
            await node.wait_waiting(2 * IN_FLIGHT)
            leave(client)
            await settled(lambda: [each.state for each in server.connections] == [State.CLOSED])
            node.gate.set()
            await settled(lambda: not server.connections)
            client.hang_up()
        assert node.calls.count("pwrite") == node.calls.count("pread") == IN_FLIGHT
        written = b"".join(bytes([index + 1]) * 4096 for index in range(IN_FLIGHT))
        assert node.data == written + bytes(MIB - len(written))


@pytest.mark.parametrize("leave", WAYS)
@on_both_loops
async def test_long_replies_to_who_leaves_are_forgotten_at_once(
    short_dir: Path,
    pki: Pki,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[[TlsClient], None],
) -> None:
    """Not when the collector comes: in a server at rest that may take hours."""
    node, context = MemoryNode(32 * MIB), pki.context()
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        port = await tcp_port(server)
        async with leaving_nothing(server, caplog):
            client = await (await TlsClient.connect_tcp(port)).go("e", context)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(request(READ, 0, 32 * MIB) * 3)
            await settled(lambda: max(each.unsent_bytes for each in server.connections) > 16 * MIB)
            assert server._pool.bytes > 32 * MIB
            gc.disable()
            try:
                leave(client)
                client.hang_up()
                await settled(lambda: not server.connections)
                await settled(lambda: server._pool.bytes < MIB)
            finally:
                gc.enable()


@pytest.mark.parametrize("leave", [*RUDE, shut_down])
@on_both_loops
async def test_who_leaves_at_any_byte_of_a_record_has_written_nothing(
    short_dir: Path,
    pki: Pki,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[[TlsClient], None],
) -> None:
    node, context = MemoryNode(MIB), pki.context()
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        port = await tcp_port(server)
        async with leaving_nothing(server, caplog):
            cut, whole = 0, 1
            while cut < whole:
                client = await (await TlsClient.connect_tcp(port)).go("e", context)
                record = client.encrypt(request(WRITE, 0, 3) + b"abc")
                client.send_raw(record[:cut])
                whole = len(record)
                leave(client)
                await settled(lambda: not server.connections)
                client.hang_up()
                cut += 5
        assert node.data == bytes(MIB)
        await check_healthy(short_dir, "e", node)


@on_both_loops
async def test_for_a_client_that_is_gone_little_is_read(short_dir: Path, pki: Pki) -> None:
    node = CountingNode(32 * MIB)
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        client = await (await TlsClient.connect_tcp(await tcp_port(server))).go("e", pki.context())
        requests = client.encrypt(request(READ, 0, 32 * MIB) * 100)
        # Before the server gets to see them.
        assert os.write(client.writer.get_extra_info("socket").fileno(), requests) == len(requests)
        client.reset()
        await settled(lambda: not server.connections)
        assert 0 < node.bytes_read <= 4 * BATCH_BYTES_MAX
        await check_healthy(short_dir, "e", node)


@pytest.mark.slow
@on_both_loops
async def test_200_who_leave_at_any_time_cost_no_memory(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    rng, context, node = random.Random(11), pki.context(), MemoryNode(MIB)
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        port = await tcp_port(server)
        for _ in range(CLOSES // 4):  # what is allocated once is, then
            await come_and_go(port, context, rng)
        async with leaving_nothing(server, caplog):
            await settled(lambda: not server.connections and not server._negotiations)
            before = resident_bytes()
            for _ in range(CLOSES):
                await come_and_go(port, context, rng)
        assert resident_bytes() - before < MIB
        node.data[:] = bytes(MIB)
        await check_healthy(short_dir, "e", node)


async def come_and_go(port: int, context: ssl.SSLContext, rng: random.Random) -> None:
    """A client that leaves in its hello, or behind any later step, with replies on their way."""
    client, hello = await begin(port, context)
    steps = rng.randrange(4)
    if steps:
        client.send_raw(hello)
        client.send_raw(await client.step())
    else:
        client.send_raw(hello[: rng.randrange(len(hello))])
    if steps > 1:
        client.send(choose("e")[4:])
    if steps > 2:
        await client.chosen()
        client.send(request(READ, 0, MIB) * rng.randrange(9) + request(WRITE, 0, 4096))
        client.send(rng.randbytes(rng.randint(1, 4096)))
    rng.choice(RUDE)(client)


def resident_bytes() -> int:
    """Memory that this process needs, the clients' included: what is free is given back first."""
    gc.collect()
    _libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
