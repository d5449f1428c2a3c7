"""Peers that do not read, ask for too much, or meet a slow disk: memory stays bounded."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path

import pytest
from server_wire import (
    CACHE,
    DISC,
    FLUSH,
    READ,
    WRITE,
    CountingNode,
    GatedNode,
    RawClient,
    check_healthy,
    on_both_loops,
    request,
    serving,
    settled,
    shrink_buffers,
)

from replnbd.block import MemoryNode
from replnbd.server import Export, NbdServer
from replnbd.server.connection import Connection
from replnbd.server.limits import (
    BATCH_BYTES_MAX,
    BATCH_REQUESTS_MAX,
    IN_FLIGHT_BYTES_MAX,
    IN_FLIGHT_MAX,
    PACKED_READ_MAX,
    UNSENT_BYTES_MAX,
)
from replnbd.server.slabs import INBOX_BYTES, OUTBOX_BYTES

MIB = 1 << 20


def only(server: NbdServer) -> Connection:
    (connection,) = server.connections
    return connection


def unsent(connection: Connection) -> int:
    return connection._transport.get_write_buffer_size()


@on_both_loops
async def test_a_client_that_never_reads_small_replies_is_not_read_from(short_dir: Path) -> None:
    node = MemoryNode(MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        shrink_buffers(client)
        connection = only(server)
        for _ in range(100):
            client.send(request(READ, 0, 4096) * 1000)  # 390 MiB of replies
        await settled(lambda: connection._reading_paused)
        assert unsent(connection) <= UNSENT_BYTES_MAX + OUTBOX_BYTES
        await check_healthy(short_dir, "e", node)
        assert connection._reading_paused
        for _ in range(100_000):  # and when it does read, nothing is missing
            assert await client.reply(4096) == (0, 0, bytes(4096))
        await client.close()


@on_both_loops
async def test_a_client_that_never_reads_large_replies_is_not_read_from(short_dir: Path) -> None:
    node = MemoryNode(32 * MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        connection = only(server)
        client.send(request(READ, 0, 32 * MIB) * 9000)  # in one inbox
        await settled(lambda: connection._reading_paused)
        assert unsent(connection) <= UNSENT_BYTES_MAX + 32 * MIB + 16
        await check_healthy(short_dir, "e", node)
        client.writer.transport.abort()
        await settled(lambda: not server.connections)


@on_both_loops
async def test_no_more_than_the_limit_of_small_requests_is_in_flight(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        total = 3 * IN_FLIGHT_MAX + 7
        for cookie in range(total):
            client.send(request(WRITE, cookie, 1, cookie=cookie) + bytes([cookie % 251]))
        await node.wait_waiting(IN_FLIGHT_MAX)
        connection = only(server)
        await settled(lambda: connection._reading_paused)
        assert node.waiting == IN_FLIGHT_MAX
        node.gate.set()
        replies = [await client.reply() for _ in range(total)]
        assert sorted(replies) == [(0, cookie, b"") for cookie in range(total)]
        assert node.data[:total] == bytes(cookie % 251 for cookie in range(total))
        await client.close()


@on_both_loops
async def test_no_more_than_the_limit_of_bytes_is_in_flight(short_dir: Path) -> None:
    node = GatedNode(8 * MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        count = 12
        for cookie in range(count):
            client.send(request(WRITE, 0, 8 * MIB, cookie=cookie) + bytes([cookie]) * (8 * MIB))
        await node.wait_waiting(IN_FLIGHT_BYTES_MAX // (8 * MIB))
        connection = only(server)
        await settled(lambda: connection._reading_paused)
        assert node.waiting == IN_FLIGHT_BYTES_MAX // (8 * MIB)
        node.gate.set()
        replies = sorted([await client.reply() for _ in range(count)])
        assert replies == [(0, cookie, b"") for cookie in range(count)]
        await client.close()


@on_both_loops
async def test_slow_writes_between_quick_ones_do_not_lose_a_byte(short_dir: Path) -> None:
    class EverySeventh(GatedNode):
        async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            if offset // 1000 % 7:
                await MemoryNode.pwrite(self, offset, data)
            else:
                await super().pwrite(offset, data)

    node = EverySeventh(MIB)
    model = bytearray(MIB)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        for index in range(800):
            data = bytes([index % 256, index // 256]) * 500
            model[index * 1000 : index * 1000 + 1000] = data
            client.send(request(WRITE, index * 1000, 1000, cookie=index) + data)
        await node.wait_waiting(115)
        node.gate.set()
        cookies = sorted([(await client.reply())[1] for _ in range(800)])
        assert cookies == list(range(800))
        assert node.data == model
        await client.close()


@on_both_loops
async def test_slow_reads_between_quick_ones_get_their_own_replies(short_dir: Path) -> None:
    class EverySeventh(GatedNode):
        async def pread(self, offset: int, buffer: memoryview) -> None:
            if offset // 4096 % 7:
                await MemoryNode.pread(self, offset, buffer)
            else:
                await super().pread(offset, buffer)

    node = EverySeventh(MIB)
    node.data[:] = b"".join(index.to_bytes(2, "big") * 2048 for index in range(256))
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        for _ in range(20):
            node.gate.clear()
            for index in range(256):
                client.send(request(READ, index * 4096, 4096, cookie=index))
            await node.wait_waiting(37)
            node.gate.set()
            seen = set()
            for _ in range(256):
                error, cookie, payload = await client.reply(4096)
                assert not error
                assert payload == cookie.to_bytes(2, "big") * 2048
                seen.add(cookie)
            assert seen == set(range(256))
        await client.close()


@on_both_loops
async def test_the_largest_requests_that_share_buffers_fill_them_exactly(short_dir: Path) -> None:
    node = MemoryNode(2 * MIB)
    node.data[:] = bytes(range(256)) * (2 * MIB // 256)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        for length in (PACKED_READ_MAX - 16, PACKED_READ_MAX, PACKED_READ_MAX + 1):
            client.send(request(READ, 7, length, cookie=length) * 9)
            for _ in range(9):
                assert await client.reply(length) == (0, length, bytes(node.data[7 : 7 + length]))
        for length in (INBOX_BYTES - 29, INBOX_BYTES - 28, INBOX_BYTES - 27, INBOX_BYTES):
            payload = bytes([length % 251]) * length
            client.send((request(WRITE, 5, length, cookie=length) + payload) * 3)
            for _ in range(3):
                assert await client.reply() == (0, length, b"")
            assert node.data[5 : 5 + length] == payload
        await client.close()


@on_both_loops
async def test_more_requests_at_once_than_a_turn_of_the_loop_may_take_are_all_answered(
    short_dir: Path,
) -> None:
    async with serving(short_dir, Export("e", MemoryNode(MIB))):
        client = await RawClient.open(short_dir, "e")
        total = 20 * BATCH_REQUESTS_MAX
        commands = (FLUSH, READ, WRITE, 99)
        client.send(b"".join(request(commands[n % 4], cookie=n) for n in range(total)))
        for n in range(total):
            assert await client.reply() == (errno.EINVAL if n % 4 == 3 else 0, n, b"")
        await client.close()


@on_both_loops
async def test_a_closing_connection_whose_client_does_not_read_ends_all_the_same(
    short_dir: Path,
) -> None:
    node = MemoryNode(32 * MIB)
    export = Export("e", node)
    async with serving(short_dir, export) as server:
        client = await RawClient.open(short_dir, "e")
        client.send(request(READ, 0, 32 * MIB) + request(DISC))
        connection = only(server)
        await settled(lambda: unsent(connection) > 0)
        await server.remove_export("e", "hard")
        assert not export.connections
        assert unsent(connection) > 0
        await server.close(timeout_s=0.05)
        assert not server.connections
        client.writer.transport.abort()


@pytest.mark.parametrize("end", ["hangs up", "is dropped"])
@on_both_loops
async def test_what_a_client_did_not_read_is_freed_when_it_goes(short_dir: Path, end: str) -> None:
    """At once: in a server at rest the collector may not come for hours."""
    async with serving(short_dir, Export("e", MemoryNode(32 * MIB))) as server:
        client = await RawClient.open(short_dir, "e")
        client.send(request(READ, 0, 32 * MIB) * 3)
        await settled(lambda: unsent(only(server)) > 0)
        gone = weakref.ref(only(server))
        gc.disable()
        try:
            if end == "is dropped":
                only(server).abort()
            client.writer.transport.abort()
            await settled(lambda: not server.connections)
            await settled(lambda: gone() is None)
        finally:
            gc.enable()


@on_both_loops
async def test_for_a_client_that_is_gone_little_is_read(short_dir: Path) -> None:
    node = CountingNode(32 * MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        requests = request(READ, 0, 32 * MIB) * 100
        # Before the server gets to see them.
        assert os.write(client.writer.get_extra_info("socket").fileno(), requests) == len(requests)
        client.writer.transport.abort()
        await settled(lambda: not server.connections)
        assert 0 < node.bytes_read <= 2 * BATCH_BYTES_MAX
        node.data[:] = bytes(32 * MIB)
        await check_healthy(short_dir, "e", node)


@on_both_loops
async def test_who_has_much_read_into_the_cache_leaves_the_loop_to_others(short_dir: Path) -> None:
    node, total = CountingNode(32 * MIB), 20
    async with serving(short_dir, Export("e", node), Export("other", MemoryNode(MIB))):
        client = await RawClient.open(short_dir, "e")
        bystander = await RawClient.open(short_dir, "other")
        client.send(request(CACHE, 0, 32 * MIB) * total)
        bystander.send(request(READ, 0, 10))
        assert await bystander.reply(10) == (0, 0, bytes(10))
        assert node.bytes_read <= 4 * BATCH_BYTES_MAX
        assert [await client.reply() for _ in range(total)] == [(0, 0, b"")] * total
        assert node.bytes_read == total * 32 * MIB
        await client.close()
        await bystander.close()
