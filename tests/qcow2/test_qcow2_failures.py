"""The n-th operation on the file fails, for n = 1, 2, 3, ...: the request fails with that error,
nothing else is lost, and the requests after it work."""

from __future__ import annotations

import errno

import pytest
from engine_helpers import SHAPES, Failing, Shape, World, assert_same, copy_of, make_image

from replnbd.block import MemoryNode, read_bytes
from replnbd.qcow2 import check_image, open_qcow2, read_header

pytestmark = pytest.mark.slow


async def findings(memory: MemoryNode) -> tuple[int, int]:
    """(corruptions, leaks) of an image in memory."""
    file = copy_of(memory)
    report = await check_image(file, await read_header(file))
    return report.corruptions, report.leaks


def consistent(got: bytes, before: bytes, after: bytes) -> None:
    """Every byte is as it was before an operation, or as it is after it."""
    for number, byte in enumerate(got):
        assert byte in (before[number], after[number]), f"byte {number:#x} is neither"


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
@pytest.mark.parametrize("torn", ["none", "half", "all"])
async def test_a_failed_request_harms_nothing(shape: Shape, torn: str) -> None:
    seed = 11
    print("seed", seed)
    memory = await make_image(shape)
    file = Failing(memory)
    world = await World.create(file, shape.size, seed, backing=shape.backing)
    failures = 0
    empty_failed = False
    for nth in range(1, 40):
        operation, offset, length = world.choose()
        data = world.rng.randbytes(length)
        after = world.expected(operation, offset, length, data)
        code = (errno.EIO, errno.ENOSPC)[nth % 2]
        file.arm(world.rng.randint(1, 8), code, torn)
        try:
            await world.apply(operation, offset, length, data)
            error = 0
        except OSError as exc:
            error = exc.errno or -1
        reached = file.disarm()
        failed = bool(error)
        assert error in (0, code)
        failures += failed
        # Once the image is empty, a make_empty does not fail any more: it leaks.
        empty_failed = empty_failed or (reached and operation == "empty")
        got = await read_bytes(world.node, 0, shape.size)
        if failed:
            consistent(bytes(got), bytes(world.model), bytes(after))
            world.model = got
        else:
            assert_same(got, after)
            world.model = after
        if failed and nth % 3 == 0:
            corruptions, _ = await findings(memory)
            assert corruptions == 0
    assert failures > 2
    if not empty_failed:
        await world.node.flush()
        assert await findings(memory) == (0, 0)
    # What a make_empty that failed half-way leaves counted, the next one recounts.
    await world.node.make_empty()
    world.model[:] = world.base
    for _ in range(5):
        await world.step()
    await world.node.flush()
    assert await findings(memory) == (0, 0)
    await world.verify()
    again = await open_qcow2(copy_of(memory), backing=world.backing)
    assert_same(await read_bytes(again, 0, shape.size), world.model)


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
async def test_a_disk_that_is_gone_for_good_leaves_a_sound_image(shape: Shape) -> None:
    """Every operation fails from some point on, as when the cable is pulled: what the file has
    then is an image without corruption, and each byte old or new."""
    for nth in range(1, 12):
        memory = await make_image(shape)
        file = Failing(memory)
        world = await World.create(file, shape.size, nth, backing=shape.backing)
        for _ in range(4):
            await world.step()
        before = bytes(world.model)
        operation, offset, length = world.choose()
        data = world.rng.randbytes(length)
        after = bytes(world.expected(operation, offset, length, data))
        file.arm(nth % 9 + 1, errno.EIO, ("none", "half", "all")[nth % 3], lasting=True)
        try:
            await world.apply(operation, offset, length, data)
        except OSError:
            pass
        corruptions, _ = await findings(memory)
        assert corruptions == 0, (nth, operation)
        node = await open_qcow2(copy_of(memory), backing=world.backing, read_only=True)
        consistent(bytes(await read_bytes(node, 0, shape.size)), before, after)


async def test_flush_tries_again_what_could_not_be_given_back() -> None:
    shape = Shape(65536, extended_l2=True, size=1 << 20)
    memory = await make_image(shape)
    file = Failing(memory)
    world = await World.create(file, shape.size, 1, backing=True)
    await world.node.pwrite(0, bytes(range(256)) * 4096)
    await world.node.drop(0, 1 << 20)
    # The rest of the run is the first store; two holes are punched before the next one.
    for nth in (1, 3):
        file.arm(nth, errno.EIO, "none")
        with pytest.raises(OSError, match="Input/output"):
            await world.node.flush()
        file.disarm()
    await world.node.flush()
    assert await findings(memory) == (0, 0)
