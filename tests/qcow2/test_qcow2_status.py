"""block_status of a chain: whole, in layers, and cheap on huge disks and full ones."""

from __future__ import annotations

import random

from replnbd.block import BlockNode, Extent, MemoryNode, PassThrough, each_extent
from replnbd.qcow2 import Qcow2Node, create_qcow2, open_qcow2

TIB = 1 << 40
MIB = 1 << 20
CLUSTER = 65536


class Holes(PassThrough):
    """A sparse file without data, that counts how often it is asked."""

    def __init__(self, size: int) -> None:
        super().__init__("holes", MemoryNode())
        self.size = size
        self.asked = 0

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        self.asked += 1
        return [Extent(length, zero=True, depth=0)]


async def overlay(backing: BlockNode | None, size: int) -> Qcow2Node:
    file = MemoryNode(name="overlay")
    below = "below" if backing is not None else None
    await create_qcow2(
        file, size, extended_l2=True, backing_file=below, backing_format="raw" if below else None
    )
    return await open_qcow2(file, backing=backing)


async def test_an_empty_pair_over_a_sparse_disk_of_16_tib_is_one_extent_and_one_question() -> None:
    disk = Holes(16 * TIB)
    hidden = await overlay(disk, disk.size)
    active = await overlay(hidden, disk.size)
    assert await active.block_status(0, disk.size) == [Extent(disk.size, zero=True, depth=2)]
    assert disk.asked == 1
    await active.close()
    await hidden.close()


async def test_a_write_in_16_tib_is_found_at_its_place() -> None:
    disk = Holes(16 * TIB)
    hidden = await overlay(disk, disk.size)
    active = await overlay(hidden, disk.size)
    await hidden.pwrite(5 * TIB, b"h" * 2048)
    await active.pwrite(9 * TIB + 2048, b"a" * 2048)
    extents = [extent async for extent in each_extent(active, 0, disk.size)]
    merged: list[tuple[int, bool, int]] = []
    for length, zero, depth in extents:
        if merged and merged[-1][1:] == (zero, depth):
            length += merged.pop()[0]
        merged.append((length, zero, depth))
    assert merged == [
        (5 * TIB, True, 2),
        (2048, False, 1),
        (4 * TIB, True, 2),
        (2048, False, 0),
        (7 * TIB - 4096, True, 2),
    ]
    assert disk.asked < 20
    await active.close()
    await hidden.close()


async def test_one_answer_looks_at_a_bounded_part_of_a_full_disk() -> None:
    node = await overlay(None, 1024 * MIB)
    for cluster in range(0, 1024 * MIB, CLUSTER):
        await node.write_zeroes(cluster, CLUSTER, unmap=False)
    (extent,) = await node.block_status(0, node.size)
    assert 256 * MIB <= extent.length < node.size
    assert sum([each.length async for each in each_extent(node, 0, node.size)]) == node.size
    await node.close()


async def test_a_backing_that_falls_short_makes_the_answer_short_not_wrong() -> None:
    class Short(PassThrough):
        async def block_status(self, offset: int, length: int) -> list[Extent]:
            return [Extent(min(length, 5000), zero=offset % 10_000 == 0, depth=0)]

    file = MemoryNode()
    await file.truncate(MIB)
    node = await overlay(Short("short", file), MIB)
    assert await node.block_status(0, MIB) == [Extent(5000, zero=True, depth=1)]
    await node.pwrite(CLUSTER, b"x" * CLUSTER)
    position = 0
    async for extent in each_extent(node, 0, MIB):
        inside = CLUSTER <= position < 2 * CLUSTER
        assert extent.depth == (0 if inside else 1)
        position += extent.length
    assert position == MIB
    await node.close()


async def test_beyond_a_shorter_backing_nobody_decides() -> None:
    rng = random.Random(1)
    file = MemoryNode()
    await file.pwrite(0, rng.randbytes(MIB))
    node = await overlay(file, 2 * MIB)
    assert await node.block_status(MIB - 4096, 8192) == [
        Extent(4096, zero=False, depth=1),
        Extent(4096, zero=True, depth=-1),
    ]
    await node.close()
