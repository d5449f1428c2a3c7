"""Exports come, go and are fenced; the server stops, whatever its clients are doing."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine
from errno import ESHUTDOWN
from pathlib import Path
from typing import Any

import pytest
from server_wire import (
    FLUSH,
    READ,
    WRITE,
    GatedNode,
    RawClient,
    check_healthy,
    choose,
    on_both_loops,
    request,
    serving,
    settled,
    uri,
)

from replnbd.block import MemoryNode
from replnbd.errors import ConfigError, StateError
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer
from replnbd.server.connection import State

SIZE = 1 << 20
ERR_POLICY, ERR_UNKNOWN = 0x80000002, 0x80000006


async def refusal(folder: Path, export: str) -> tuple[int, str]:
    """Reply type and text that GO gets."""
    client = await RawClient.connect(folder)
    client.send(choose(export))
    await client.receive(18)
    _, _, kind, length = struct.unpack(">QIII", await client.receive(20))
    text = (await client.receive(length)).decode()
    await client.close()
    return kind, text


@on_both_loops
async def test_a_fence_ends_the_writes_in_flight_and_lets_no_other_in(short_dir: Path) -> None:
    node, other = GatedNode(SIZE), MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node), Export("other", other)) as server:
        client = await RawClient.open(short_dir, "e")
        bystander = await RawClient.open(short_dir, "other")
        node.gate.clear()
        client.send(request(WRITE, 0, 3, cookie=1) + b"abc")
        await node.wait_waiting(1)
        fencing = asyncio.create_task(server.fence("e", "failover is under way"))
        await asyncio.sleep(0)
        client.send(request(WRITE, 0, 3, cookie=2) + b"xyz")
        assert await refusal(short_dir, "e") == (ERR_POLICY, "failover is under way")
        assert not fencing.done()
        node.gate.set()
        await fencing
        assert not server.exports["e"].connections
        assert await client.reply() == (ESHUTDOWN, 2, b"")
        assert await client.reply() == (0, 1, b"")
        assert await client.at_end()
        assert node.data[:3] == b"abc"
        assert node.calls == ["pwrite"]
        await bystander.pwrite(0, b"served")
        server.unfence("e")
        node.data[:3] = bytes(3)
        await check_healthy(short_dir, "e", node)
        await bystander.close()
        await client.close()


@on_both_loops
async def test_a_fence_refuses_what_was_received_but_not_begun(short_dir: Path) -> None:
    node = GatedNode(SIZE)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        for _ in range(500):  # 128 begin, the rest waits in the inbox
            client.send(request(WRITE, 0, 1) + b"a")
        await node.wait_waiting(128)
        fencing = asyncio.create_task(server.fence("e", "why"))
        await asyncio.sleep(0)
        node.gate.set()
        await fencing
        assert len(node.calls) == 128
        replies = [await client.reply() for _ in range(500)]
        assert replies.count((0, 0, b"")) == 128
        assert replies.count((ESHUTDOWN, 0, b"")) == 372
        assert await client.at_end()
        await client.close()


@pytest.mark.parametrize("suspends", [False, True])
@on_both_loops
async def test_a_fence_raised_from_within_a_write_lets_no_other_begin(
    short_dir: Path, suspends: bool
) -> None:
    class Fencing(MemoryNode):
        calls = 0

        async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            self.calls += 1
            fenced.append(server.fence("e", "why"))
            if suspends:
                await asyncio.sleep(0)

    node = Fencing(SIZE)
    fenced: list[Coroutine[Any, Any, None]] = []
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        writes = [request(WRITE, 0, 1, cookie=cookie) + b"x" for cookie in range(10)]
        client.send(b"".join([request(READ, 0, 5, cookie=99), *writes]))
        assert await client.reply(5) == (0, 99, bytes(5))
        replies = {await client.reply() for _ in range(10)}
        assert replies == {(0, 0, b""), *((ESHUTDOWN, cookie, b"") for cookie in range(1, 10))}
        assert await client.at_end()
        assert node.calls == 1
        for each in fenced:
            await each
        await client.close()


@on_both_loops
async def test_a_fence_waits_for_the_writes_of_a_client_that_has_vanished(short_dir: Path) -> None:
    node = GatedNode(SIZE)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        client.send(request(WRITE, 0, 3) + b"abc")
        await node.wait_waiting(1)
        (connection,) = server.connections
        connection.abort()
        assert await client.at_end()
        await settled(lambda: connection.state is State.CLOSED)
        fencing = asyncio.create_task(server.fence("e", "why"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not fencing.done()
        node.gate.set()
        await fencing
        assert node.data[:3] == b"abc"
        assert not server.exports["e"].connections
        await client.close()


@on_both_loops
async def test_removing_an_export_safely_wants_it_unused(short_dir: Path) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        with pytest.raises(StateError, match="export 'e' still in use"):
            await server.remove_export("e", "safe")
        assert await client.pread(0, 1) == b"\0"
        await client.close()
        await settled(lambda: not server.connections)
        await server.remove_export("e", "safe")
        assert (await refusal(short_dir, "e"))[0] == ERR_UNKNOWN


@on_both_loops
async def test_removing_an_export_the_hard_way_answers_and_disconnects(short_dir: Path) -> None:
    node = GatedNode(SIZE)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        idle = await RawClient.open(short_dir, "e")
        node.gate.clear()
        client.send(request(READ, 0, 3, cookie=1))
        await node.wait_waiting(1)
        removing = asyncio.create_task(server.remove_export("e", "hard"))
        assert await idle.at_end()
        node.gate.set()
        await removing
        assert await client.reply(3) == (0, 1, bytes(3))
        assert await client.at_end()
        assert "e" not in server.exports
        for each in (client, idle):
            await each.close()


@on_both_loops
async def test_unknown_and_taken_export_names_are_refused_in_qemu_s_words(short_dir: Path) -> None:
    async with serving(short_dir, Export("e", MemoryNode(SIZE))) as server:
        with pytest.raises(StateError, match="NBD server already has export named 'e'"):
            server.add_export(Export("e", MemoryNode(1)))
        with pytest.raises(StateError, match="Export 'x' is not found"):
            await server.remove_export("x")
        with pytest.raises(StateError, match="Export 'x' is not found"):
            await server.fence("x", "why")
        with pytest.raises(StateError, match="Export 'x' is not found"):
            server.unfence("x")


@pytest.mark.parametrize(
    ("name", "description", "said"),
    [("n" * 4097, "", "name"), ("e", "d" * 4097, "description"), ("a\0b", "", "zero byte")],
)
def test_names_the_protocol_cannot_carry_are_refused(
    name: str, description: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Export(name, MemoryNode(1), description)


@on_both_loops
async def test_an_export_of_a_node_of_no_bytes_can_be_used(short_dir: Path) -> None:
    async with serving(short_dir, Export("", MemoryNode(0))):
        client = await RawClient.open(short_dir, "")
        client.send(request(FLUSH, cookie=5))
        assert await client.reply() == (0, 5, b"")
        await client.close()


@on_both_loops
async def test_close_ends_clients_in_every_phase_within_its_time(short_dir: Path) -> None:
    node = GatedNode(32 << 20)
    server = NbdServer(EventBus())
    server.add_export(Export("e", node))
    await server.listen(uri(short_dir))
    conversation = choose("e")
    haggling = [await RawClient.connect(short_dir) for _ in range(0, len(conversation), 5)]
    for index, client in enumerate(haggling):
        client.send(conversation[: index * 5])
        await client.receive(18)
    idle = await RawClient.open(short_dir, "e")
    deaf = await RawClient.open(short_dir, "e")
    deaf.send(request(READ, 0, 32 << 20) * 3)
    halfway = await RawClient.open(short_dir, "e")
    halfway.send(request(WRITE, 0, 1 << 20) + bytes(1000))
    busy = await RawClient.open(short_dir, "e")
    await settled(lambda: len(node.calls) == 1)
    node.gate.clear()
    busy.send(request(WRITE, 0, 3, cookie=9) + b"abc")
    await node.wait_waiting(1)
    closing = asyncio.create_task(server.close(timeout_s=0.2))
    await asyncio.sleep(0)
    node.gate.set()
    await closing
    assert not server.connections
    assert await busy.reply() == (0, 9, b"")
    for client in (busy, idle, halfway, *haggling):
        assert await client.at_end()
    assert not (short_dir / "s").exists()
    for client in (busy, idle, deaf, halfway, *haggling):
        client.writer.transport.abort()
        await client.close()


@on_both_loops
async def test_close_does_not_wait_for_ever_for_a_dead_disk(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = GatedNode(SIZE)
    server = NbdServer(EventBus())
    server.add_export(Export("e", node))
    await server.listen(uri(short_dir))
    client = await RawClient.open(short_dir, "e")
    node.gate.clear()
    client.send(request(READ, 0, 1))
    await node.wait_waiting(1)
    await server.close(timeout_s=0.05)
    assert "operations of 1 clients had not ended" in caplog.text
    node.gate.set()
    await settled(lambda: not server.connections)
    await client.close()


@on_both_loops
async def test_a_closed_server_cannot_listen_again(short_dir: Path) -> None:
    server = NbdServer(EventBus())
    await server.close()
    with pytest.raises(StateError, match="NBD server not running"):
        await server.listen(uri(short_dir))
