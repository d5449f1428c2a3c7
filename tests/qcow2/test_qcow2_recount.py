"""Giving leaks back fast: exactly those that a check finds, and nothing at all where the check
finds anything worse."""

from __future__ import annotations

import random

import pytest
from engine_helpers import SHAPES, Recording, Shape, World, assert_same, copy_of, make_image

from replnbd.block import MemoryNode, read_bytes
from replnbd.errors import ImageError
from replnbd.qcow2 import LastEnd, check_image, open_qcow2, read_header
from replnbd.qcow2.recount import recount

pytestmark = pytest.mark.slow

# Of 2 MiB clusters a check takes 10 s.
SIMPLE = [each for each in SHAPES if each.refcount_bits == 16 and each.cluster_size < 1 << 20]


async def agrees_with_the_check(state: MemoryNode) -> int | None:
    """Give the leaks of a state back, in a copy; the check must agree before and after."""
    before = await check_image(copy_of(state), await read_header(state))
    file = copy_of(state)
    leaks = await recount(file, await read_header(file), file.size, only_leaks=True)
    if leaks is None:
        assert file.data == state.data
        return None
    assert before.corruptions == 0, before.findings
    assert leaks == before.leaks
    after = await check_image(file, await read_header(file))
    assert after.clean
    return leaks


async def used_image(shape: Shape, seed: int) -> tuple[MemoryNode, World]:
    """One that was written to, and flushed."""
    memory = await make_image(shape)
    world = await World.create(memory, shape.size, seed, backing=shape.backing)
    for _ in range(15):
        await world.step()
    await world.node.flush()
    return memory, world


@pytest.mark.parametrize("shape", SIMPLE[::2], ids=str)
async def test_what_a_death_leaves_is_given_back(shape: Shape) -> None:
    file = Recording(await make_image(shape))
    world = await World.create(file, shape.size, 7, backing=shape.backing)
    found: list[int | None] = []
    for _ in range(10):
        file.states.clear()
        await world.step()
        content = bytes(world.model)
        states = file.states[:: 1 + len(file.states) // 8]
        found += [await agrees_with_the_check(state) for state in states]
        if file.states:
            last = file.states[-1]
            node = await open_qcow2(last, backing=world.backing, last_end=LastEnd.PROCESS_DEATH)
            assert_same(await read_bytes(node, 0, shape.size), content)
            assert (await check_image(last, await read_header(last))).clean
    assert any(found)  # some had leaks
    assert None not in found


@pytest.mark.parametrize("shape", SIMPLE[1:6:2], ids=str)
@pytest.mark.parametrize("seed", range(2))
async def test_anything_worse_than_a_leak_is_left_to_the_check(shape: Shape, seed: int) -> None:
    """Bits of the metadata flipped at random."""
    print("seed", seed)
    rng = random.Random(seed)
    memory, world = await used_image(shape, seed)
    host = world.node._host
    places = sorted(host.metadata)
    refused = 0
    for _ in range(60):
        state = copy_of(memory)
        for _ in range(rng.choice([1, 1, 2])):
            place = rng.choice(places[1:]) + rng.randrange(min(512, shape.cluster_size))
            if place < len(state.data):
                state.data[place] ^= 1 << rng.randrange(8)
        try:
            refused += await agrees_with_the_check(state) is None
        except ImageError:
            refused += 1  # not even the check takes it
    assert refused


async def test_snapshots_and_large_files_are_left_to_the_check() -> None:
    shape = SIMPLE[0]
    memory = await make_image(shape)
    header = await read_header(memory)
    assert await recount(memory, header, memory.size, only_leaks=True) == 0
    assert await recount(memory, header, shape.cluster_size << 27, only_leaks=True) is None


@pytest.mark.parametrize("shape", SIMPLE[::3], ids=str)
@pytest.mark.parametrize("seed", range(3))
async def test_refcounts_that_a_power_failure_left_wrong_are_made_exact(
    shape: Shape, seed: int
) -> None:
    """Any of them, too low or too high; the content stays what it is."""
    print("seed", seed)
    rng = random.Random(seed)
    file, world = await used_image(shape, seed)
    content = bytes(world.model)
    refcounts = world.node._image.allocator.refcounts  # type: ignore[union-attr]
    state = copy_of(file)
    for offset in refcounts.table:
        for _ in range(20 if offset else 0):
            place = offset + 2 * rng.randrange(shape.cluster_size // 2)
            state.data[place : place + 2] = bytes((0, rng.randrange(3)))
    header = await read_header(state)
    before = await check_image(copy_of(state), header)
    wrong = await recount(state, header, state.size, only_leaks=False)
    assert wrong
    assert not before.clean
    assert (await check_image(state, header)).clean
    assert await recount(state, header, state.size, only_leaks=False) == 0
    node = await open_qcow2(state, backing=world.backing)
    assert_same(await read_bytes(node, 0, shape.size), content)
