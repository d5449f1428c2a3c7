"""Reads whose replies are short, because they are holes: what they hold on to meanwhile is bounded
just as that of others, however many come at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from peers import RawClient
from peers.nbd_answers import Asked
from peers.nbd_wire import READ, Shape, request
from server_wire import on_both_loops, serving

from replnbd.block import MemoryNode
from replnbd.server import Export
from replnbd.server.slabs import Pool, Slab

MIB = 1 << 20


class CountingPool(Pool):
    """Knows how many bytes are out, and how many were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.out = self.most = 0

    def take(self, size: int) -> Slab:
        slab = super().take(size)
        self.out += len(slab.buffer)
        self.most = max(self.most, self.out)
        return slab

    def give(self, slab: Slab | None) -> None:
        if slab is not None and slab.pooled:
            self.out -= len(slab.buffer)
        super().give(slab)


@pytest.mark.parametrize("data_bytes", [0, MIB])
@pytest.mark.parametrize("shape", [Shape.STRUCTURED, Shape.EXTENDED])
@on_both_loops
async def test_a_batch_of_sparse_reads_holds_no_more_than_a_few(
    short_dir: Path, shape: Shape, data_bytes: int
) -> None:
    node = MemoryNode(32 * MIB)
    node.data[:data_bytes] = b"x" * data_bytes
    pool = CountingPool()

    def client() -> None:
        with RawClient(short_dir / "s").go("e", shape) as client:
            asked = Asked(READ, 0, 32 * MIB)
            headers = []
            for cookie in range(1000, 1012):
                client.expect(cookie, asked)
                headers.append(request(READ, 0, 32 * MIB, cookie=cookie, shape=shape))
            client.send(b"".join(headers))
            for _ in headers:
                answer = client.answer()
                assert answer is not None
                assert answer.data[:data_bytes] == node.data[:data_bytes]
                assert answer.holes == ((data_bytes, 32 * MIB - data_bytes),)
            client.finish()

    async with serving(short_dir, Export("e", node)) as server:
        server._pool = pool
        await asyncio.to_thread(client)
    assert pool.most <= 34 * MIB
    assert pool.out <= 2 * MIB  # what the connection used last is nobody's any more
