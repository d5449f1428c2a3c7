"""The process dies after any single operation on the file: what the file holds then is an image
without corruption, every byte of it from before or after the request that was cut short."""

from __future__ import annotations

import pytest
from engine_helpers import SHAPES, Recording, Shape, World, make_image

from replnbd.block import read_bytes
from replnbd.qcow2 import check_image, open_qcow2, read_header

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
@pytest.mark.parametrize("seed", range(2))
async def test_every_state_on_the_way_is_old_or_new(shape: Shape, seed: int) -> None:
    print("seed", seed)
    file = Recording(await make_image(shape))
    world = await World.create(file, shape.size, seed, backing=shape.backing)
    looked_at = 0
    for number in range(40):
        file.states.clear()
        before = bytes(world.model)
        if number % 8 == 7:
            await world.node.flush()
            operation = "flush"
        else:
            operation, offset, length = world.choose()
            if number % 13 == 12:
                operation = "empty"
            data = world.rng.randbytes(length)
            world.model = world.expected(operation, offset, length, data)
            await world.apply(operation, offset, length, data)
        after = bytes(world.model)
        for state in file.states[:: 1 + len(file.states) // 12]:
            report = await check_image(state, await read_header(state))
            assert report.corruptions == 0, (operation, report.findings)
            node = await open_qcow2(state, backing=world.backing)
            got = bytes(await read_bytes(node, 0, shape.size))
            if operation == "empty":
                assert got in (before, after)
            elif got not in (before, after):
                assert all(g in (b, a) for g, b, a in zip(got, before, after, strict=True))
            looked_at += 1
    assert looked_at > 40


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6], SHAPES[12]], ids=str)
async def test_what_survives_a_crash_can_be_written_to(shape: Shape) -> None:
    """Leaks and all: nothing is used twice afterwards."""
    file = Recording(await make_image(shape))
    world = await World.create(file, shape.size, 21, backing=shape.backing)
    for _ in range(12):
        await world.step()
    for state in file.states[-60::7]:
        survivor = await open_qcow2(state, backing=world.backing)
        model = bytes(await read_bytes(survivor, 0, shape.size))
        other = World(survivor, world.backing, world.base, 5)
        other.model[:] = model
        for _ in range(15):
            await other.step()
        await other.verify()
        await survivor.flush()
        report = await check_image(state, await read_header(state))
        assert report.corruptions == 0
