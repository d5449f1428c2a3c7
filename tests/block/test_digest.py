"""Digests of granules: what is hashed, what need not be, and how an answer is cut."""

from __future__ import annotations

import os
import random
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import pytest

from replnbd.block import (
    GRANULE,
    STATUS_EXTENTS_MAX,
    BlockNode,
    Extent,
    FileNode,
    MemoryNode,
    PassThrough,
    digest_of,
    digests,
)
from replnbd.block.digest import HASHED_BYTES_MAX
from replnbd.filters import FaultNode


class Sparse(PassThrough):
    """Knows its zeroes in blocks of `block` bytes, and counts what is read."""

    def __init__(self, file: MemoryNode, block: int, extents_max: int = STATUS_EXTENTS_MAX) -> None:
        super().__init__("sparse", file)
        self._bytes = file.data
        self._block = block
        self._extents_max = extents_max
        self.bytes_read = 0

    async def pread(self, offset: int, buffer: memoryview) -> None:
        self.bytes_read += len(buffer)
        await super().pread(offset, buffer)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        end = offset + length
        while offset < end:
            stop = min(offset - offset % self._block + self._block, end)
            zero = not any(self._bytes[offset:stop])
            if extents and extents[-1].zero == zero:
                extents[-1] = Extent(extents[-1].length + stop - offset, zero, 0)
            elif len(extents) == self._extents_max:
                break
            else:
                extents.append(Extent(stop - offset, zero, 0))
            offset = stop
        return extents


class Void(MemoryNode):
    """`size` zeroes, that nobody may read."""

    def __init__(self, size: int) -> None:
        super().__init__(name="void")
        self.size = size

    async def pread(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError("read")

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, zero=True, depth=0)]


def pieces(data: bytes | bytearray, offset: int, length: int) -> list[tuple[int, int]]:
    """(length, digest) of each granule, or of what the range has of it."""
    found = []
    end = offset + length
    while offset < end:
        stop = min(offset - offset % GRANULE + GRANULE, end)
        raw = blake2b(data[offset:stop], digest_size=8).digest()
        found.append((stop - offset, int.from_bytes(raw, "big")))
        offset = stop
    return found


def cut(runs: list[tuple[int, int]], offset: int) -> list[tuple[int, int]]:
    """Runs, taken apart into pieces."""
    found = []
    for length, value in runs:
        end = offset + length
        while offset < end:
            stop = min(offset - offset % GRANULE + GRANULE, end)
            found.append((stop - offset, value))
            offset = stop
    return found


async def all_digests(node: BlockNode, offset: int, length: int) -> list[tuple[int, int]]:
    """Of a whole range, asked again and again; in pieces."""
    found: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        runs = await digests(node, offset, end - offset)
        assert all(a[1] != b[1] for a, b in pairwise(runs))
        covered = sum(count for count, _ in runs)
        assert 0 < covered <= end - offset
        found += cut(runs, offset)
        offset += covered
        assert offset == end or not offset % GRANULE
    return found


def spotted(rng: random.Random, size: int, block: int) -> MemoryNode:
    """A disk of which some blocks are not zero."""
    node = MemoryNode(size)
    for at in range(0, size, block):
        if rng.random() < 0.3:
            node.data[at : at + block] = rng.randbytes(len(node.data[at : at + block]))
    return node


def test_a_digest_is_blake2b_of_eight_bytes() -> None:
    # RFC 7693's function; the number is what `b2sum -l 64` prints.
    assert digest_of(b"") == 0xE4A6A0577479B2B4
    assert digest_of(bytes(GRANULE)) == digest_of(memoryview(bytearray(GRANULE)))


@pytest.mark.parametrize("block", [512, 4096, GRANULE, 3 * GRANULE])
@pytest.mark.parametrize("extents_max", [1, 2, 3, STATUS_EXTENTS_MAX])
async def test_every_piece_of_an_answer_has_the_digest_of_its_bytes(
    block: int, extents_max: int
) -> None:
    rng = random.Random(block * extents_max)
    size = 20 * GRANULE + 700
    for _ in range(3):
        memory = spotted(rng, size, block)
        node = Sparse(memory, block, extents_max)
        assert await all_digests(node, 0, size) == pieces(memory.data, 0, size)
        for _ in range(10):
            offset = rng.randrange(size)
            length = rng.randrange(size - offset) + 1
            assert await all_digests(node, offset, length) == pieces(memory.data, offset, length)


async def test_a_hole_of_a_tebibyte_is_one_run_that_is_not_read() -> None:
    assert await digests(Void(1 << 40), 0, 1 << 40) == [(1 << 40, digest_of(bytes(GRANULE)))]


async def test_a_hole_that_ends_within_a_granule_has_another_digest_there() -> None:
    node = Void((1 << 40) + 5)
    whole, rest = digest_of(bytes(GRANULE)), digest_of(bytes(5))
    assert await digests(node, 0, node.size) == [(1 << 40, whole), (5, rest)]
    assert await digests(node, GRANULE - 3, GRANULE) == [
        (3, digest_of(bytes(3))),
        (GRANULE - 3, digest_of(bytes(GRANULE - 3))),
    ]
    assert await digests(node, 3, 5) == [(5, rest)]


async def test_zeroes_are_zeroes_whether_they_are_known_or_read() -> None:
    memory = MemoryNode(4 * GRANULE)
    node = Sparse(memory, GRANULE)
    assert await digests(memory, 0, memory.size) == await digests(node, 0, memory.size)
    assert node.bytes_read == 0


async def test_only_granules_with_data_are_read_and_of_them_few_for_one_answer() -> None:
    size = 4 * HASHED_BYTES_MAX
    memory = MemoryNode(size)
    memory.data[size // 4 :] = os.urandom(size - size // 4)
    node = Sparse(memory, GRANULE)
    runs = await digests(node, 0, size)
    assert sum(length for length, _ in runs) == size // 4 + HASHED_BYTES_MAX
    assert node.bytes_read == HASHED_BYTES_MAX


async def test_a_file_and_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    data = bytearray(8 * GRANULE + 100)
    data[3 * GRANULE + 5 : 3 * GRANULE + 9] = b"data"
    with path.open("wb") as file:
        file.truncate(len(data))
        file.seek(3 * GRANULE + 5)
        file.write(b"data")
    node = FileNode.open(path)
    try:
        assert await all_digests(node, 0, len(data)) == pieces(data, 0, len(data))
    finally:
        await node.close()


async def test_a_read_that_fails_fails_the_answer() -> None:
    node = FaultNode("fault", MemoryNode(GRANULE))
    node.fail("pread")
    with pytest.raises(OSError, match="Input/output error"):
        await digests(node, 0, GRANULE)
