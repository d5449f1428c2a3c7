"""A client's host that vanishes without a farewell: its connection is found dead, and its place is
free, whatever the connection was doing. A living client is never taken for a dead one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from server_wire import READ, WRITE, GatedNode, RawClient, on_both_loops, request, settled
from two_hosts import TwoHosts

from replnbd.events import EventBus
from replnbd.server import Export, NbdServer, deadlines, limits

pytestmark = pytest.mark.slow

MIB = 1 << 20
GIVEN_UP_S = 2.5


@pytest.fixture(autouse=True)
def _in_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A tenth of the time: what the kernel can count, it counts in whole seconds."""
    monkeypatch.setattr(limits, "KEEPALIVE_IDLE_S", 1)
    monkeypatch.setattr(limits, "KEEPALIVE_INTERVAL_S", 1)
    monkeypatch.setattr(limits, "KEEPALIVE_PROBES", 2)
    monkeypatch.setattr(deadlines, "UNACKNOWLEDGED_S", GIVEN_UP_S)
    caplog.set_level("INFO")


@asynccontextmanager
async def serving(
    hosts: TwoHosts, node: GatedNode, *, places: int = 1
) -> AsyncIterator[tuple[NbdServer, RawClient]]:
    """A server on one host that takes so many clients, and on the other the first of them."""
    server = NbdServer(EventBus())
    server.add_export(Export("e", node, connections_max=places))
    listener = hosts.listen()
    listener.setblocking(False)
    await server.listen_on(listener)
    client = await connected(hosts, server)
    try:
        yield server, client
    finally:
        client.writer.transport.abort()
        await server.close()


async def connected(hosts: TwoHosts, server: NbdServer) -> RawClient:
    """A client on the other host."""
    port = int(server.uris[0].rpartition(":")[2])
    client = RawClient(*await asyncio.open_connection(sock=hosts.connect(port)))
    await client.enter("e")
    return client


def unacknowledged(sock: socket.socket) -> bool:
    """Whether the client's host has not yet confirmed all that was sent to it."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return struct.unpack_from("=I", info, 24) != (0,)  # tcpi_unacked


@on_both_loops
async def test_the_host_of_an_idle_client_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    with TwoHosts() as hosts:
        async with serving(hosts, GatedNode(MIB)) as (server, client):
            await client.pwrite(0, b"spoken")
            (connection,) = server.connections
            sock = connection._transport.get_extra_info("socket")
            await settled(lambda: not unacknowledged(sock))
            hosts.vanish()
            await settled(lambda: not server.connections)
            assert server.exports["e"].full is None
            assert "connection to export e lost: [Errno 110]" in caplog.text  # by keepalive


@pytest.mark.parametrize("reply_bytes", [0, 4096, 32 * MIB])
@on_both_loops
async def test_the_host_of_a_client_whose_reply_is_on_its_way_is_missed(
    caplog: pytest.LogCaptureFixture, reply_bytes: int
) -> None:
    node = GatedNode(32 * MIB)
    with TwoHosts() as hosts:
        async with serving(hosts, node) as (server, client):
            node.gate.clear()
            if reply_bytes:
                client.send(request(READ, 0, reply_bytes))
            else:
                client.send(request(WRITE, 0, 4) + b"last")
            await node.wait_waiting(1)
            hosts.vanish()
            node.gate.set()
            await settled(lambda: not server.connections)
            assert server.exports["e"].full is None
            assert "dropped from export e: its host has been gone for 2.5 s" in caplog.text


@on_both_loops
async def test_a_living_client_is_not_taken_for_a_dead_one() -> None:
    """TCP_USER_TIMEOUT would take one that reads nothing; its time is that of slow readers, here
    the default's minute. And one that says nothing has all the time there is."""
    node = GatedNode(32 * MIB)
    with TwoHosts() as hosts:
        async with serving(hosts, node, places=2) as (server, client):
            (connection,) = server.connections
            client.send(request(READ, 0, 32 * MIB, cookie=1))
            await settled(lambda: connection.unsent_bytes > 0)
            quiet = await connected(hosts, server)
            await asyncio.sleep(2 * GIVEN_UP_S)
            assert await client.reply(32 * MIB) == (0, 1, bytes(32 * MIB))
            await quiet.pwrite(0, b"awake")
            quiet.writer.transport.abort()


@on_both_loops
async def test_tcp_connections_are_asked_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # as they are
    server = NbdServer(EventBus())
    server.add_export(Export("e", GatedNode(MIB)))
    (uri,) = await server.listen("nbd://127.0.0.1:0")
    port = int(uri.rpartition(":")[2])
    client = RawClient(*await asyncio.open_connection("127.0.0.1", port))
    await client.enter("e")
    (connection,) = server.connections
    sock = connection._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle_s, interval_s, probes = (sock.getsockopt(socket.IPPROTO_TCP, each) for each in options)
    assert idle_s + interval_s * probes < 30
    # Else the kernel would drop slow readers, too.
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
    await client.close()
    await server.close()
