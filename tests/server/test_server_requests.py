"""Requests on a live server: what nodes are asked, what clients are told."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from server_wire import (
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    ZEROES,
    GatedNode,
    RawClient,
    choose,
    on_both_loops,
    request,
    serving,
    settled,
)

from replnbd.block import Buffer, MemoryNode
from replnbd.events import EventBus
from replnbd.server import Export
from replnbd.server.connection import State

MIB = 1 << 20


class FailingNode(MemoryNode):
    """Every operation raises `failure`."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__(MIB, name="failing0")
        self.failure = failure

    async def pread(self, offset: int, buffer: memoryview) -> None:
        raise self.failure

    async def pwrite(self, offset: int, data: Buffer) -> None:
        raise self.failure

    async def flush(self) -> None:
        await asyncio.sleep(0)
        raise self.failure

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        raise self.failure


@on_both_loops
async def test_what_is_written_is_read_back_at_any_size_and_alignment(short_dir: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    node = MemoryNode(40 * MIB)
    model = bytearray(40 * MIB)
    sizes = [1, 511, 4096, 32 * 1024, 32 * 1024 + 1, 65536, 65537, 256 * 1024 - 28, 256 * 1024]
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        for size in [*sizes, 300_000, MIB, 32 * MIB, 7]:
            offset = rng.randrange(len(model) - size + 1)
            data = rng.randbytes(size)
            model[offset : offset + size] = data
            await client.pwrite(offset, data)
            assert await client.pread(offset, size) == data
        await client.close()
    assert node.data == model


@on_both_loops
async def test_a_stream_of_mixed_requests_in_any_fragments_gives_the_same_disk(
    short_dir: Path,
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    node, model = MemoryNode(MIB), bytearray(MIB)
    stream, expected = bytearray(), bytearray()
    for cookie in range(400):
        length = rng.choice([0, 1, 100, 4096, 5000, 40_000, 70_000])
        offset = rng.randrange(MIB - length)
        command = rng.choice([READ, WRITE, TRIM, ZEROES])
        flags = rng.choice([0, 0, FUA])
        stream += request(command, offset, length, cookie=cookie, flags=flags)
        expected += struct.pack(">IIQ", 0x67446698, 0, cookie)
        if command == READ:
            expected += model[offset : offset + length]
        else:
            data = rng.randbytes(length) if command == WRITE else bytes(length)
            stream += data if command == WRITE else b""
            model[offset : offset + length] = data
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")

        async def send() -> None:
            position = 0
            while position < len(stream):
                size = rng.choice([1, 27, 28, 29, 1000, 50_000, 400_000])
                client.send(bytes(stream[position : position + size]))
                await client.writer.drain()
                await asyncio.sleep(0)
                position += size

        sending = asyncio.create_task(send())
        assert await client.receive(len(expected)) == expected
        await sending
        await client.close()
    assert node.data == model


@on_both_loops
async def test_overlapping_requests_on_a_slow_node_keep_their_own_bytes(short_dir: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    node = GatedNode(MIB)
    blocks = [rng.randbytes(8192) for _ in range(100)]
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        for index, block in enumerate(blocks):  # far more than one inbox
            client.send(request(WRITE, index * 8192, 8192, cookie=index) + block)
        await client.writer.drain()
        await node.wait_waiting(100)
        node.gate.set()
        for index in range(100):
            assert await client.reply() == (0, index, b"")
        node.gate.clear()
        for index in range(100):
            client.send(request(READ, index * 8192, 8192, cookie=index))
        await node.wait_waiting(100)
        node.gate.set()
        for index, block in enumerate(blocks):
            assert await client.reply(8192) == (0, index, block)
        await client.close()


@on_both_loops
async def test_a_quick_request_is_answered_while_slow_ones_wait(short_dir: Path) -> None:
    slow, quick = GatedNode(MIB), MemoryNode(MIB)
    quick.data[:4] = b"fast"
    export = Export("e", slow)
    async with serving(short_dir, export):
        client = await RawClient.open(short_dir, "e")
        slow.gate.clear()
        client.send(request(WRITE, 0, 4, cookie=1) + b"slow")
        await slow.wait_waiting(1)
        export.node = quick
        assert await client.pread(0, 4) == b"fast"
        slow.gate.set()
        assert await client.reply() == (0, 1, b"")
        assert slow.data[:4] == b"slow"
        await client.close()


@on_both_loops
async def test_fua_answers_after_operation_and_flush_in_that_order(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        for cookie, (command, payload) in enumerate(
            [(WRITE, b"x" * 10), (TRIM, b""), (ZEROES, b""), (READ, b"")]
        ):
            client.send(request(command, 0, 10, cookie=cookie, flags=FUA) + payload)
            assert (await client.reply(10 if command == READ else 0))[:2] == (0, cookie)
        assert node.calls == [
            "pwrite",
            "flush",
            "discard",
            "flush",
            "write_zeroes unmap=True fast=False",
            "flush",
            "pread",
        ]
        await client.close()


@on_both_loops
async def test_a_fua_write_whose_flush_fails_is_told_so(short_dir: Path) -> None:
    class NoFlush(MemoryNode):
        async def flush(self) -> None:
            raise OSError(errno.EIO, "lost")

    node = NoFlush(MIB)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        client.send(request(WRITE, 0, 1, cookie=1, flags=FUA) + b"x")
        assert await client.reply() == (errno.EIO, 1, b"")
        client.send(request(FLUSH, cookie=2))
        assert await client.reply() == (errno.EIO, 2, b"")
        await client.close()


@on_both_loops
async def test_flags_of_write_zeroes_reach_the_node(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        for flags in (0, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO):
            client.send(request(ZEROES, 0, 10, flags=flags))
            assert await client.reply() == (0, 0, b"")
        assert node.calls == [
            f"write_zeroes unmap={unmap} fast={fast}"
            for fast in (False, True)
            for unmap in (True, False)
        ]
        await client.close()


@on_both_loops
async def test_requests_of_length_0_succeed_without_the_node(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        for command in (READ, WRITE, TRIM, ZEROES):
            client.send(request(command, MIB, 0, cookie=command))
            assert await client.reply() == (0, command, b"")
        assert node.calls == []
        await client.close()


@on_both_loops
async def test_disc_lets_requests_in_flight_end_and_answers_them(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        client.send(request(WRITE, 0, 3, cookie=1) + b"abc" + request(DISC))
        await node.wait_waiting(1)
        node.gate.set()
        assert await client.reply() == (0, 1, b"")
        assert await client.at_end()
        assert node.data[:3] == b"abc"
        await client.close()
        await settled(lambda: not server.connections)


@on_both_loops
async def test_replies_of_a_batch_that_ends_in_disc_are_sent(short_dir: Path) -> None:
    async with serving(short_dir, Export("e", MemoryNode(MIB))):
        client = await RawClient.open(short_dir, "e")
        client.send(request(READ, 0, 5, cookie=1) + request(DISC) + request(READ, 0, 5, cookie=2))
        assert await client.reply(5) == (0, 1, bytes(5))
        assert await client.at_end()
        await client.close()


@on_both_loops
async def test_a_client_that_shuts_its_side_down_still_gets_its_answers(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        client.send(request(READ, 0, 5, cookie=1))
        client.writer.write_eof()
        await node.wait_waiting(1)
        node.gate.set()
        assert await client.reply(5) == (0, 1, bytes(5))
        assert await client.at_end()
        await client.close()


@on_both_loops
async def test_a_write_in_flight_ends_although_its_client_has_vanished(short_dir: Path) -> None:
    node = GatedNode(MIB)
    async with serving(short_dir, Export("e", node)) as server:
        client = await RawClient.open(short_dir, "e")
        node.gate.clear()
        client.send(request(WRITE, 0, 3) + b"abc" + request(READ, 0, 100))
        await node.wait_waiting(2)
        (connection,) = server.connections
        client.writer.transport.abort()
        await settled(lambda: connection.state is not State.SERVING)
        assert node.waiting == 2  # it was noticed, and nothing was cut short
        node.gate.set()
        await settled(lambda: not server.connections)
        assert node.data[:3] == b"abc"


@on_both_loops
async def test_requests_sent_along_with_go_are_served(short_dir: Path) -> None:
    async with serving(short_dir, Export("e", MemoryNode(MIB))):
        client = await RawClient.connect(short_dir)
        client.send(choose("e") + request(WRITE, 0, 2, cookie=1) + b"hi")
        client.send(request(READ, 0, 2, cookie=2))
        await client.receive(18 + 32 + 34 + 20)
        assert await client.reply() == (0, 1, b"")
        assert await client.reply(2) == (0, 2, b"hi")
        await client.close()


@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, ZEROES])
def test_node_errors_become_replies_events_and_one_log_line(
    short_dir: Path, command: int, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    async def scenario() -> None:
        bus = EventBus()
        bus.subscribe(lambda name, data: events.append((name, data)))
        node = FailingNode(OSError(errno.EDQUOT, "quota exceeded"))
        async with serving(short_dir, Export("e", node), bus=bus) as server:
            client = await RawClient.open(short_dir, "e")
            length = 0 if command == FLUSH else 4
            payload = b"data" if command == WRITE else b""
            for cookie in range(3):
                client.send(request(command, 0, length, cookie=cookie) + payload)
                assert await client.reply() == (errno.ENOSPC, cookie, b"")
            assert server.exports["e"].stats.errors == 3
            await client.close()

    asyncio.run(scenario())
    expected = {
        "device": "e",
        "node-name": "failing0",
        "operation": "read" if command == READ else "write",
        "action": "report",
        "nospace": True,
        "reason": "quota exceeded",
    }
    assert events == [("BLOCK_IO_ERROR", expected)] * 3
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "quota exceeded" in caplog.text


@pytest.mark.parametrize("command", [READ, FLUSH])
def test_a_bug_in_a_node_is_logged_and_answered_with_eio(
    short_dir: Path, command: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        node = FailingNode(ZeroDivisionError("a bug"))
        async with serving(short_dir, Export("e", node)):
            client = await RawClient.open(short_dir, "e")
            for cookie in range(2):
                client.send(request(command, 0, 4 if command == READ else 0, cookie=cookie))
                assert await client.reply() == (errno.EIO, cookie, b"")
            await client.close()

    asyncio.run(scenario())
    assert "Traceback" in caplog.text
    assert "ZeroDivisionError: a bug" in caplog.text


def test_a_fast_zero_that_cannot_be_fast_is_an_answer_and_no_error(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        export = Export("e", FailingNode(OSError(errno.ENOTSUP, "slow")))
        async with serving(short_dir, export):
            client = await RawClient.open(short_dir, "e")
            client.send(request(ZEROES, 0, 4, flags=FAST_ZERO))
            assert await client.reply() == (errno.ENOTSUP, 0, b"")
            await client.close()
        assert export.stats.errors == 0

    asyncio.run(scenario())
    assert caplog.text == ""


@on_both_loops
async def test_operations_and_bytes_are_counted(short_dir: Path) -> None:
    export = Export("e", MemoryNode(8 * MIB))
    async with serving(short_dir, export):
        client = await RawClient.open(short_dir, "e")
        await client.pwrite(0, bytes(4096))
        await client.pwrite(0, bytes(MIB))
        await client.pread(0, 4096)
        await client.pread(0, 2 * MIB)
        for command, length in ((FLUSH, 0), (TRIM, 4096), (ZEROES, MIB)):
            client.send(request(command, 0, length))
            assert (await client.reply())[0] == 0
        stats = export.stats
        assert (stats.reads, stats.bytes_read) == (2, 4096 + 2 * MIB)
        assert (stats.writes, stats.bytes_written) == (2, 4096 + MIB)
        assert (stats.flushes, stats.zeroes, stats.bytes_zeroed) == (1, 2, 4096 + MIB)
        assert len(export.connections) == 1
        await client.close()
