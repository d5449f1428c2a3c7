"""Clients that say nothing, or take none of their replies: who is dropped, and who is not.

That somebody is not dropped is seen when somebody else is, who has been there for less long.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest
from server_wire import (
    READ,
    WRITE,
    GatedNode,
    RawClient,
    check_healthy,
    on_both_loops,
    request,
    serving,
    settled,
)

from replnbd.block import MemoryNode
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer

pytestmark = pytest.mark.slow

MIB = 1 << 20
IDLE_S = 0.3
LONG_S = 60.0


@pytest.fixture(autouse=True)
def _all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def dropped(caplog: pytest.LogCaptureFixture, why: str) -> int:
    """How many clients the log says were dropped for that reason."""
    lines = [record.getMessage() for record in caplog.records]
    return sum(line.endswith(f" (unix): dropped from export e: {why}") for line in lines)


@on_both_loops
async def test_who_says_nothing_is_dropped_and_its_place_is_free(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = Export("e", MemoryNode(MIB), connections_max=1)
    async with serving(short_dir, export, idle_timeout_s=IDLE_S):
        client = await RawClient.open(short_dir, "e")
        await client.pwrite(0, b"spoken")
        assert await client.at_end()
        assert dropped(caplog, "nothing came from it for 0.3 s") == 1
        successor = await RawClient.open(short_dir, "e")
        assert await successor.pread(0, 6) == b"spoken"
        for each in (client, successor):
            await each.close()


@on_both_loops
async def test_who_waits_for_an_answer_is_not_idle(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node), idle_timeout_s=IDLE_S):
        waiting = await RawClient.open(short_dir, "e")
        node.gate.clear()
        waiting.send(request(WRITE, 0, 4, cookie=7) + b"slow")
        await node.wait_waiting(1)
        for _ in range(2):
            idle = await RawClient.open(short_dir, "e")
            assert await idle.at_end()
            await idle.close()
        node.gate.set()
        assert await waiting.reply() == (0, 7, b"")
        assert await waiting.at_end()
        await waiting.close()


@on_both_loops
async def test_who_asks_now_and_then_is_not_idle(short_dir: Path) -> None:
    async with serving(short_dir, Export("e", MemoryNode(MIB)), idle_timeout_s=1.0):
        talking = await RawClient.open(short_dir, "e")
        idle = await RawClient.open(short_dir, "e")
        end = asyncio.create_task(idle.at_end())
        while not end.done():
            await talking.pread(0, 1)
            await asyncio.sleep(0.01)
        assert await talking.pread(0, 1) == b"\0"
        for each in (talking, idle):
            await each.close()


@pytest.mark.parametrize("sent", [0, 1000, 32 * MIB - 1])
@on_both_loops
async def test_a_write_whose_payload_never_comes_is_not_waited_for(
    short_dir: Path, sent: int
) -> None:
    node = MemoryNode(32 * MIB)
    async with serving(short_dir, Export("e", node), idle_timeout_s=IDLE_S) as server:
        client = await RawClient.open(short_dir, "e")
        client.send(request(WRITE, 0, 32 * MIB) + b"x" * sent)
        assert await client.at_end()
        await client.close()
        await settled(lambda: not server.connections)
        assert not any(node.data)


@on_both_loops
async def test_who_takes_none_of_its_replies_is_dropped(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = MemoryNode(32 * MIB)
    async with serving(short_dir, Export("e", node), write_timeout_s=IDLE_S) as server:
        client = await RawClient.open(short_dir, "e")
        (connection,) = server.connections
        client.send(request(READ, 0, 32 * MIB))
        await settled(lambda: connection.unsent_bytes > 0)
        await settled(lambda: not server.connections)
        assert dropped(caplog, "it took none of its replies for 0.3 s") == 1
        await check_healthy(short_dir, "e", node)
        client.writer.transport.abort()


@pytest.mark.parametrize("over", ["unix", "tcp"])
@on_both_loops
async def test_who_takes_its_replies_slowly_is_not_dropped(short_dir: Path, over: str) -> None:
    """For longer than both deadlines, a little at a time."""
    node = MemoryNode(32 * MIB)
    options: dict[str, Any] = {"write_timeout_s": 1.0, "idle_timeout_s": 1.0}
    async with serving(short_dir, Export("e", node), **options) as server:
        if over == "unix":
            slow = await RawClient.open(short_dir, "e")
        else:
            (uri,) = await server.listen("nbd://127.0.0.1:0")
            port = int(uri.rpartition(":")[2])
            slow = RawClient(*await asyncio.open_connection("127.0.0.1", port))
            await slow.enter("e")
        slow.send(request(READ, 0, 32 * MIB, cookie=3))
        began = asyncio.get_running_loop().time()
        assert await slow.receive(16) == struct.pack(">IIQ", 0x67446698, 0, 3)
        for _ in range(128):
            assert await slow.receive(MIB // 4) == bytes(MIB // 4)
            await asyncio.sleep(0.015)
        assert asyncio.get_running_loop().time() - began > 1.5
        assert await slow.pread(0, 1) == b"\0"
        await slow.close()


@on_both_loops
async def test_whose_replies_wait_has_the_time_to_take_them_and_no_less(short_dir: Path) -> None:
    """It is not read from meanwhile, so that nothing can come from it."""
    node = MemoryNode(32 * MIB)
    options: dict[str, Any] = {"idle_timeout_s": IDLE_S, "write_timeout_s": LONG_S}
    async with serving(short_dir, Export("e", node), **options) as server:
        stalled = await RawClient.open(short_dir, "e")
        (connection,) = server.connections
        stalled.send(request(READ, 0, 32 * MIB, cookie=1) + request(READ, 0, 5, cookie=2))
        await settled(lambda: connection.unsent_bytes > 0)
        for _ in range(2):
            idle = await RawClient.open(short_dir, "e")
            assert await idle.at_end()
            await idle.close()
        assert await stalled.reply(32 * MIB) == (0, 1, bytes(32 * MIB))
        assert await stalled.reply(5) == (0, 2, bytes(5))
        assert await stalled.at_end()
        await stalled.close()


@on_both_loops
async def test_a_quiet_client_stays_for_ever_unless_a_time_is_set(short_dir: Path) -> None:
    async with serving(short_dir, Export("e", MemoryNode(MIB)), write_timeout_s=0.05):
        client = await RawClient.open(short_dir, "e")
        await asyncio.sleep(0.5)  # a hundred looks
        assert await client.pread(0, 1) == b"\0"
        await client.close()


@on_both_loops
async def test_a_server_without_clients_does_not_look(short_dir: Path) -> None:
    server = NbdServer(EventBus(), idle_timeout_s=IDLE_S)
    server.add_export(Export("e", MemoryNode(MIB)))
    await server.listen(f"nbd+unix:///?socket={short_dir}/s")
    client = await RawClient.open(short_dir, "e")
    assert server._deadlines._timer is not None
    await client.close()
    await settled(lambda: not server.connections)
    assert server._deadlines._timer is None
    await server.close()
