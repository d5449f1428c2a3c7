"""How many clients a listener and an export take, and when a place is free again."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from server_wire import (
    DISC,
    WRITE,
    GatedNode,
    RawClient,
    choose,
    on_both_loops,
    request,
    serving,
    settled,
)

from replnbd.block import MemoryNode
from replnbd.events import EventBus
from replnbd.nbd import ClientIdentity
from replnbd.nbd import constants as c
from replnbd.server import Export, NbdServer
from replnbd.server.connection import State

SIZE = 1 << 20
FULL = "export 'e' has 1 of 1 connections in use"
CLIENT_FLAGS = struct.pack(">I", 3)
REP_ACK, REP_SERVER, REP_INFO, REP_ERR_POLICY = 1, 2, 3, 0x80000002


def single(node: MemoryNode | None = None) -> Export:
    """An export for one client at a time."""
    return Export("e", node or MemoryNode(SIZE), connections_max=1)


async def haggling(folder: Path, name: str = "s") -> RawClient:
    """A client that has been greeted, and has said no more than its flags."""
    client = await RawClient.connect(folder, name)
    client.send(CLIENT_FLAGS)
    await client.receive(18)
    return client


async def ask(client: RawClient, option: bytes) -> tuple[int, list[bytes]]:
    """Send an option; the type of its last reply, and the payloads of all."""
    client.send(option)
    payloads = []
    while True:
        _, _, kind, length = struct.unpack(">QIII", await client.receive(20))
        payloads.append(await client.receive(length))
        if kind not in (REP_SERVER, REP_INFO):
            return kind, payloads


def go(export: str = "e") -> bytes:
    return choose(export)[len(CLIENT_FLAGS) :]


def info(export: str = "e") -> bytes:
    return go(export).replace(struct.pack(">I", c.Option.GO), struct.pack(">I", c.Option.INFO), 1)


LIST = b"IHAVEOPT" + struct.pack(">II", c.Option.LIST, 0)
EXPORT_NAME = b"IHAVEOPT" + struct.pack(">II", c.Option.EXPORT_NAME, 1) + b"e"


# Section: exports


@on_both_loops
async def test_one_client_too_many_is_told_so_whatever_it_asks(short_dir: Path) -> None:
    async with serving(short_dir, single()):
        first = await RawClient.open(short_dir, "e")
        second = await haggling(short_dir)
        for option in (info(), go(), go()):
            assert await ask(second, option) == (REP_ERR_POLICY, [FULL.encode()])
        second.send(EXPORT_NAME)  # "it MUST terminate the session"
        assert await second.at_end()
        await first.pwrite(0, b"undisturbed")
        for client in (first, second):
            await client.close()


@on_both_loops
async def test_a_full_export_is_listed(short_dir: Path) -> None:
    async with serving(short_dir, single(), Export("other", MemoryNode(1))):
        first = await RawClient.open(short_dir, "e")
        second = await haggling(short_dir)
        kind, listed = await ask(second, LIST)
        assert kind == REP_ACK
        assert listed == [struct.pack(">I", 1) + b"e", struct.pack(">I", 5) + b"other", b""]
        for client in (first, second):
            await client.close()


@on_both_loops
async def test_who_waits_in_the_handshake_gets_the_place_of_who_leaves(short_dir: Path) -> None:
    async with serving(short_dir, single()) as server:
        clients = [await haggling(short_dir) for _ in range(3)]
        # All have been told that there is a place, and one gets it.
        for client in clients:
            assert (await ask(client, info()))[0] == REP_ACK
        assert [(await ask(client, go()))[0] for client in clients] == [
            REP_ACK,
            REP_ERR_POLICY,
            REP_ERR_POLICY,
        ]
        first, second, third = clients
        await first.close()
        await settled(lambda: not server.connections)
        assert [(await ask(client, go()))[0] for client in (third, second)] == [
            REP_ACK,
            REP_ERR_POLICY,
        ]
        await third.pwrite(0, b"in its place")
        for client in (second, third):
            await client.close()


@on_both_loops
async def test_gos_that_arrive_together_do_not_take_one_place_twice(short_dir: Path) -> None:
    async with serving(short_dir, Export("e", MemoryNode(SIZE), connections_max=3)) as server:
        clients = [await haggling(short_dir) for _ in range(10)]
        for client in clients:
            client.send(go())
        kinds = [(await ask(client, b""))[0] for client in clients]
        assert kinds.count(REP_ACK) == 3
        assert kinds.count(REP_ERR_POLICY) == 7
        assert len(server.exports["e"].connections) == 3
        for client in clients:
            await client.close()


@pytest.mark.parametrize("lost", [False, True], ids=["it hangs up", "its connection is lost"])
@on_both_loops
async def test_a_place_is_free_once_the_last_write_of_who_has_vanished_has_ended(
    short_dir: Path, lost: bool
) -> None:
    """Else the write of a dead primary might land on top of its successor's."""
    node = GatedNode(SIZE)
    async with serving(short_dir, single(node)) as server:
        first = await RawClient.open(short_dir, "e")
        node.gate.clear()
        first.send(request(WRITE, 0, 5) + b"stale")
        await node.wait_waiting(1)
        (connection,) = server.connections
        if lost:
            connection.abort()
        else:
            first.writer.transport.abort()
        await settled(lambda: connection.state is (State.CLOSED if lost else State.DRAINING))
        second = await haggling(short_dir)
        assert await ask(second, go()) == (REP_ERR_POLICY, [FULL.encode()])
        node.gate.set()
        await settled(lambda: not server.connections)
        assert (await ask(second, go()))[0] == REP_ACK
        await second.pwrite(0, b"fresh")
        assert node.data[:5] == b"fresh"
        for client in (first, second):
            await client.close()


@on_both_loops
async def test_a_place_is_free_once_who_says_goodbye_has_its_last_answer(short_dir: Path) -> None:
    """It may take its time to hang up."""
    node = GatedNode(SIZE)
    async with serving(short_dir, single(node)):
        first = await RawClient.open(short_dir, "e")
        node.gate.clear()
        first.send(request(WRITE, 0, 4) + b"last" + request(DISC))
        await node.wait_waiting(1)
        second = await haggling(short_dir)
        assert (await ask(second, go()))[0] == REP_ERR_POLICY
        node.gate.set()
        assert await first.reply() == (0, 0, b"")
        assert await first.at_end()
        assert (await ask(second, go()))[0] == REP_ACK
        for client in (first, second):
            await client.close()


@pytest.mark.parametrize(("most", "offered"), [(None, True), (1, False), (2, True)])
@pytest.mark.parametrize("writable", [True, False])
async def test_several_connections_are_not_offered_where_only_one_may_come(
    most: int | None, offered: bool, writable: bool
) -> None:
    export = Export("e", MemoryNode(SIZE), writable=writable, connections_max=most)
    assert (
        bool(export.offer(ClientIdentity()).transmission_flags & c.TransmissionFlag.CAN_MULTI_CONN)
        is offered
    )


@on_both_loops
async def test_a_fence_is_what_a_full_export_says_first(short_dir: Path) -> None:
    async with serving(short_dir, single()) as server:
        first = await RawClient.open(short_dir, "e")
        second = await haggling(short_dir)
        await server.fence("e", "failover is under way")
        assert await ask(second, go()) == (REP_ERR_POLICY, [b"failover is under way"])
        server.unfence("e")
        assert await first.at_end()
        assert (await ask(second, go()))[0] == REP_ACK
        for client in (first, second):
            await client.close()


# Section: listeners


@on_both_loops
async def test_each_listener_has_places_of_its_own_handshakes_included(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = NbdServer(EventBus(), listener_connections_max=2)
    server.add_export(Export("e", MemoryNode(SIZE)))
    for name in ("s", "t"):
        await server.listen(f"nbd+unix:///?socket={short_dir}/{name}")
    served = await RawClient.open(short_dir, "e")
    waiting = await haggling(short_dir)
    refused = await RawClient.connect(short_dir)
    assert await refused.at_end()
    said = "2 clients connected on nbd+unix:///?socket={}/s, the most allowed: refused 1 so far"
    assert said.format(short_dir) in caplog.text
    others = [await haggling(short_dir, "t") for _ in range(2)]
    # A place is free again, be it of one that was served or of one that was not.
    for leaving in (served, waiting):
        await leaving.close()
        await settled(lambda: len(server._negotiations) + len(server.connections) == 3)
        others.append(await haggling(short_dir))
        assert (await ask(others[-1], go()))[0] == REP_ACK
    for client in (refused, *others):
        await client.close()
    await server.close()


@on_both_loops
async def test_all_listeners_together_have_a_limit_too(short_dir: Path) -> None:
    server = NbdServer(EventBus(), connections_max=3)
    for name in ("s", "t"):
        await server.listen(f"nbd+unix:///?socket={short_dir}/{name}")
    clients = [await haggling(short_dir, name) for name in ("s", "t", "s")]
    clients.append(await RawClient.connect(short_dir, "t"))
    assert await clients[3].at_end()
    for client in clients:
        await client.close()
    await server.close()
