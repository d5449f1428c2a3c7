"""Many requests in flight on a file that suspends each of its operations."""

from __future__ import annotations

import asyncio
import random

import pytest
from engine_helpers import SHAPES, Shape, Suspending, World, assert_same, copy_of, make_image

from replnbd.block import read_bytes
from replnbd.qcow2 import Qcow2Node, check_image, open_qcow2, read_header

STRIPE = 1536
"""Bytes: neighbours share subclusters of 2 KiB, clusters and L2 slices."""


async def check_clean(memory_of: object) -> None:
    from replnbd.block import MemoryNode

    assert isinstance(memory_of, MemoryNode)
    file = copy_of(memory_of)
    report = await check_image(file, await read_header(file))
    assert (report.corruptions, report.leaks) == (0, 0), report.findings


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cache_bytes", [0, 16 << 20])
async def test_neighbours_do_not_disturb_each_other(shape: Shape, cache_bytes: int) -> None:
    """Writers own every n-th stripe each, so all of them touch the same clusters all the time."""
    seed = 31
    print("seed", seed)
    memory = await make_image(shape)
    world = await World.create(
        Suspending(memory, seed), shape.size, seed, backing=shape.backing, cache_bytes=cache_bytes
    )
    node, model = world.node, world.model
    writers = 6
    stripes = min(shape.size // STRIPE, 96)

    async def write(mine: int) -> None:
        rng = random.Random(seed * 100 + mine)
        own = range(mine, stripes, writers)
        for _ in range(12):
            offset = rng.choice(own) * STRIPE
            choice = rng.random()
            if choice < 0.6:
                data = rng.randbytes(STRIPE)
                await node.pwrite(offset, data)
                model[offset : offset + STRIPE] = data
            elif choice < 0.8:
                await node.write_zeroes(offset, STRIPE, unmap=choice < 0.7)
                model[offset : offset + STRIPE] = bytes(STRIPE)
            elif choice < 0.95:
                assert_same(await read_bytes(node, offset, STRIPE), model[offset : offset + STRIPE])
            else:
                await node.flush()

    async def look() -> None:
        for _ in range(6):
            await read_bytes(node, 0, min(shape.size, 1 << 17))
            await node.allocated(0, shape.size)
            await node.block_status(0, shape.size)

    await asyncio.gather(*(write(n) for n in range(writers)), look())
    await world.verify()
    await node.flush()
    await check_clean(memory)


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
async def test_overlapping_requests_end_in_one_of_their_values(shape: Shape) -> None:
    memory = await make_image(shape)
    world = await World.create(Suspending(memory, 5), shape.size, 5, backing=shape.backing)
    rng = random.Random(6)
    unit = 512
    area = min(shape.size, 1 << 18) // unit
    possible: list[set[int]] = [set() for _ in range(area)]
    requests = []
    for value in range(1, 40):
        first = rng.randrange(area)
        count = rng.randint(1, min(area - first, 200))
        for number in range(first, first + count):
            possible[number].add(value if value % 5 else 0)
        if value % 5:
            requests.append(world.node.pwrite(first * unit, bytes([value]) * (count * unit)))
        else:
            requests.append(world.node.discard(first * unit, count * unit))
    await asyncio.gather(*requests)
    got = await read_bytes(world.node, 0, area * unit)
    for number in range(area):
        block = got[number * unit : (number + 1) * unit]
        if possible[number]:
            assert set(block) == {block[0]}, "one request's bytes, whole"
            assert block[0] in possible[number]
        else:
            assert block == world.base[number * unit : (number + 1) * unit]
    await world.node.flush()
    await check_clean(memory)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6], SHAPES[14]], ids=str)
async def test_make_empty_waits_for_requests_and_they_for_it(shape: Shape) -> None:
    """What was asked for before is gone, what was asked for after is there."""
    memory = await make_image(shape)
    world = await World.create(Suspending(memory, 9), shape.size, 9, backing=shape.backing)
    node = world.node
    size = node.header.cluster_size
    for _ in range(5):
        old = [asyncio.create_task(node.pwrite(n * size, b"old!" * 64)) for n in range(6)]
        await asyncio.sleep(0)
        emptied = asyncio.create_task(node.make_empty())
        await asyncio.sleep(0)
        new = [
            asyncio.create_task(node.pwrite(n * size + 4096 % size, b"new!" * 64)) for n in range(3)
        ]
        await asyncio.gather(*old, emptied, *new)
        expected = bytearray(world.base)
        for n in range(3):
            start = n * size + 4096 % size
            expected[start : start + 256] = b"new!" * 64
        assert_same(await read_bytes(node, 0, shape.size), expected)
        await node.flush()
        await check_clean(memory)


async def test_slices_that_are_wanted_at_once_are_loaded_once() -> None:
    shape = Shape(512, size=1 << 20)
    memory = await make_image(shape)
    node = await open_qcow2(memory)
    await node.pwrite(0, b"x" * (1 << 20))
    await node.close()
    node = await open_qcow2(Suspending(memory, 1))
    assert isinstance(node, Qcow2Node)
    reads = 0
    file = node.file
    plain = file.pread

    async def counted(offset: int, buffer: memoryview) -> None:
        nonlocal reads
        if len(buffer) == 512 and any(
            entry & 0xFFFFFFFFFFFE00 == offset for entry in node._mapping.l1
        ):
            reads += 1
        await plain(offset, buffer)

    file.pread = counted  # type: ignore[method-assign]
    await asyncio.gather(*(read_bytes(node, n * 100, 100) for n in range(100)))
    assert reads == 1
