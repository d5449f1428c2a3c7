"""Whatever way a node goes about a READ or WRITE, at once or not, well or not: each request gets
one answer, its own, and is counted once."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from server_wire import READ, WRITE, RawClient, on_both_loops, request, serving

from replnbd.block import Buffer, MemoryNode
from replnbd.events import EventBus
from replnbd.server import Export

MIB = 1 << 20
BLOCK = 4096

AT_ONCE, EAGERLY, LATER = "at once", "without suspending", "later"
FAILURES: dict[str, Callable[[], BaseException]] = {
    "EIO": lambda: OSError(errno.EIO, "Input/output error"),
    "ENOSPC": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "bug": lambda: ValueError("a bug"),
    # In a coroutine it would have become a RuntimeError; it must not mean "done".
    "bug of iteration": StopIteration,
    "cancelled": asyncio.CancelledError,
}
CODES = {"EIO": 5, "ENOSPC": 28, "bug": 5, "bug of iteration": 5, "cancelled": 108}


class PlannedNode(MemoryNode):
    """Each block has a plan: when its requests end, and how."""

    def __init__(self, plans: dict[int, tuple[str, str | None]], size: int = MIB) -> None:
        super().__init__(size, name="planned0")
        self.plans = plans

    def _fail(self, plan: tuple[str, str | None]) -> None:
        if plan[1] is not None:
            raise FAILURES[plan[1]]()

    def _at_once(self, offset: int) -> bool:
        plan = self.plans.get(offset // BLOCK, (AT_ONCE, None))
        if plan[0] == AT_ONCE:
            self._fail(plan)
        return plan[0] == AT_ONCE

    async def _carry_out(self, offset: int) -> None:
        plan = self.plans[offset // BLOCK]
        assert plan[0] != AT_ONCE
        if plan[0] == LATER:
            for _ in range(3):
                await asyncio.sleep(0)
        self._fail(plan)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = b"?" * len(buffer)  # "`buffer` may have changed"
        return self._at_once(offset) and super().pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self._at_once(offset) and super().pwrite_nowait(offset, data)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self._carry_out(offset)
        MemoryNode.pread_nowait(self, offset, buffer)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._carry_out(offset)
        MemoryNode.pwrite_nowait(self, offset, data)


PLANS = [
    (when, failure)
    for when in (AT_ONCE, EAGERLY, LATER)
    for failure in (None, *FAILURES)
    if not (when != AT_ONCE and failure == "bug of iteration")
]


@on_both_loops
async def test_one_after_the_other_is_answered_as_it_went(short_dir: Path) -> None:
    node = PlannedNode(dict(enumerate(PLANS)))
    export = Export("e", node)
    async with serving(short_dir, export):
        client = await RawClient.open(short_dir, "e")
        for block, (_, failure) in enumerate(PLANS):
            code = CODES[failure] if failure else 0
            data = bytes([block + 1]) * BLOCK
            client.send(request(WRITE, block * BLOCK, BLOCK, cookie=block) + data)
            assert await client.reply() == (code, block, b"")
            client.send(request(READ, block * BLOCK, BLOCK, cookie=block))
            assert await client.reply(BLOCK) == (code, block, b"" if code else data)
            stored = node.data[block * BLOCK : (block + 1) * BLOCK]
            assert stored == (bytes(BLOCK) if code else data)
        good = sum(failure is None for _, failure in PLANS)
        stats = export.stats
        assert (stats.reads, stats.bytes_read) == (good, good * BLOCK)
        assert (stats.writes, stats.bytes_written) == (good, good * BLOCK)
        assert stats.errors == 2 * (len(PLANS) - good)
        await client.close()


@on_both_loops
@pytest.mark.parametrize("share", [0.05, 0.5])
async def test_a_stream_of_all_kinds_gets_each_answer_once(
    short_dir: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches that fill the outbox, with failures and suspensions in any place of them."""
    caplog.set_level(logging.CRITICAL)  # a traceback for each bug
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    blocks = 3000
    plans = {b: rng.choice(PLANS) for b in range(blocks) if rng.random() < share}
    node = PlannedNode(plans, blocks * BLOCK)
    node.data[:] = rng.randbytes(len(node.data))
    model = bytearray(node.data)
    export = Export("e", node)
    bus = EventBus()
    events: list[str] = []
    bus.subscribe(lambda name, _: events.append(name))
    stream = bytearray()
    expected: dict[int, tuple[int, bytes]] = {}
    counts = {READ: [0, 0], WRITE: [0, 0]}
    for block in range(blocks):
        offset = block * BLOCK + rng.randrange(64)
        length = rng.choice([1, 100, 4000])
        _, failure = plans.get(block, (AT_ONCE, None))
        code = CODES[failure] if failure else 0
        command = rng.choice([READ, WRITE])
        stream += request(command, offset, length, cookie=block)
        if not code:
            counts[command][0] += 1
            counts[command][1] += length
        if command == READ:
            expected[block] = code, b"" if code else bytes(model[offset : offset + length])
        else:
            data = rng.randbytes(length)
            stream += data
            if not code:
                model[offset : offset + length] = data
            expected[block] = code, b""
    lengths = {cookie: len(payload) for cookie, (_, payload) in expected.items()}
    async with serving(short_dir, export, bus=bus):
        client = await RawClient.open(short_dir, "e")

        async def send() -> None:
            position = 0
            while position < len(stream):
                size = rng.choice([29, 5000, 60_000, 400_000])
                client.send(bytes(stream[position : position + size]))
                await client.writer.drain()
                position += size

        sending = asyncio.create_task(send())
        for _ in range(blocks):
            magic, error, cookie = struct.unpack(">IIQ", await client.receive(16))
            assert magic == 0x67446698
            payload = b"" if error else await client.receive(lengths[cookie])
            assert (error, payload) == expected.pop(cookie)
        await sending
        await client.close()
    assert not expected
    assert node.data == model
    stats = export.stats
    assert [stats.reads, stats.bytes_read] == counts[READ]
    assert [stats.writes, stats.bytes_written] == counts[WRITE]
    assert stats.errors == blocks - stats.reads - stats.writes
    in_order = sum(plans.get(b, ("", None))[1] in ("EIO", "ENOSPC") for b in range(blocks))
    assert events.count("BLOCK_IO_ERROR") == in_order


@on_both_loops
async def test_a_fence_from_within_a_request_that_is_done_at_once_ends_the_batch(
    short_dir: Path,
) -> None:
    """It is answered, what came before it as well, and nothing behind it is begun."""
    exports: list[Export] = []

    class Fencing(MemoryNode):
        def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
            if data == b"fence":
                for connection in list(exports[0].connections):
                    connection.finish()
            return super().pwrite_nowait(offset, data)

    node = Fencing(MIB)
    exports.append(Export("e", node))
    async with serving(short_dir, exports[0]):
        client = await RawClient.open(short_dir, "e")
        batch = request(WRITE, 0, 5, cookie=1) + b"first"
        batch += request(WRITE, 5, 5, cookie=2) + b"fence"
        batch += request(WRITE, 10, 5, cookie=3) + b"later"
        client.send(batch)
        assert [(await client.reply())[1] for _ in range(2)] == [1, 2]
        assert await client.at_end()
        await client.close()
    assert node.data[:15] == b"firstfence" + bytes(5)
