"""Random operations against a bytearray, over all shapes of images; QEMU's check after each run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine_helpers import SHAPES, Shape, World, copy_of, make_image, qemu_img, qemu_options

from replnbd.block import FileNode, each_extent, read_bytes
from replnbd.qcow2 import open_qcow2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
async def test_every_byte_is_as_the_model_says(shape: Shape, seed: int) -> None:
    print("seed", seed)
    file = await make_image(shape)
    world = await World.create(file, shape.size, seed, backing=shape.backing)
    for _ in range(40):
        await world.step()
        offset, length = world.range()
        assert await read_bytes(world.node, offset, length) == world.model[offset:][:length]
    await world.verify()
    used = world.node.allocated_bytes
    await world.node.close()
    world.node = await open_qcow2(copy_of(file), backing=world.backing)
    await world.verify()
    assert world.node.allocated_bytes == used


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_block_status_never_calls_data_zeroes(shape: Shape) -> None:
    world = await World.create(await make_image(shape), shape.size, 7, backing=shape.backing)
    for _ in range(40):
        await world.step()
        offset, length = world.range()
        extents = [extent async for extent in each_extent(world.node, offset, length)]
        assert sum(extent.length for extent in extents) == length
        for extent in extents:
            if extent.zero:
                assert not any(world.model[offset : offset + extent.length])
            offset += extent.length


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_allocated_knows_each_subcluster(shape: Shape) -> None:
    """Against a set of the subclusters that were written, zeroed or dropped."""
    world = await World.create(await make_image(shape), shape.size, 8, backing=True)
    node = world.node
    unit = node.granularity
    units = -(-node.size // unit)
    rng = random.Random(8)
    expected: set[int] = set()
    for _ in range(60):
        operation, offset, length = world.choose()
        data = rng.randbytes(length)
        await world.apply(operation, offset, length, data)
        touched = range(offset // unit, (offset + length - 1) // unit + 1)
        if operation == "empty":
            expected.clear()
        elif operation == "drop":
            expected.difference_update(touched)
        elif operation == "write":
            expected.update(touched)
        else:
            # Past the end of the backing zeroes need not be stored where they are read anyway.
            assert world.backing is not None
            expected.update(touched)
            for number in (touched[0], touched[-1]):
                here, _ = await node.allocated(number * unit, 1)
                if not here and number * unit + unit > world.backing.size:
                    expected.discard(number)
        number = rng.randrange(units)
        start = number * unit
        here, length = await node.allocated(start, node.size - start)
        assert here == (number in expected)
        assert length >= 1
        last = (start + length - 1) // unit
        assert all((n in expected) == here for n in range(number, last + 1))


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("maker", ["qemu", "replnbd"])
async def test_qemu_img_finds_nothing_after_any_flush(
    shape: Shape, maker: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    if maker == "qemu":
        qemu_img("create", "-q", "-f", "qcow2", "-o", qemu_options(shape), path, str(shape.size))
    else:
        path.write_bytes((await make_image(shape)).data)
    world = await World.create(FileNode.open(path), shape.size, 3, backing=shape.backing)
    for _ in range(6):
        for _ in range(12):
            await world.step()
        await world.node.flush()
        qemu_img("check", "-q", "-U", path)
    await world.verify()
    await world.node.close()
    qemu_img("check", "-q", path)


@pytest.mark.interop
@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.backing], ids=str)
async def test_qemu_reads_what_was_written(shape: Shape, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes((await make_image(shape)).data)
    world = await World.create(FileNode.open(path), shape.size, 5, backing=False)
    for _ in range(40):
        await world.step()
    await world.node.close()
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert raw.read_bytes()[: shape.size] == world.model


@pytest.mark.interop
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.backing], ids=str)
async def test_qemu_reads_the_chain_as_we_do(shape: Shape, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    below = tmp_path / "below.raw"
    size = shape.size
    below.write_bytes(random.Random(9).randbytes(size // 2))
    qemu_img(
        *("create", "-q", "-f", "qcow2", "-o", qemu_options(shape)),
        *("-b", below, "-F", "raw", path, str(size)),
    )
    backing = FileNode.open(below, read_only=True)
    node = await open_qcow2(FileNode.open(path), backing=backing)
    base = below.read_bytes().ljust(size, b"\0")
    world = World(node, backing, base, 9)
    for _ in range(40):
        await world.step()
    await node.close()
    await backing.close()
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert raw.read_bytes()[:size] == world.model
