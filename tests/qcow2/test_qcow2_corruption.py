"""Entries that lie: each fails the request with EIO, marks the image corrupt, and nothing that
was sound is overwritten."""

from __future__ import annotations

import errno
import struct

import pytest
from engine_helpers import Shape, copy_of, make_image

from replnbd.block import MemoryNode, read_bytes
from replnbd.errors import ImageError
from replnbd.qcow2 import Qcow2Node, open_qcow2, read_header

COPIED = 1 << 63
SHAPE = Shape(65536, size=1 << 30)
EXTENDED = Shape(65536, extended_l2=True, size=1 << 30)


def word(memory: MemoryNode, offset: int) -> int:
    return int(struct.unpack_from(">Q", memory.data, offset)[0])


def put(memory: MemoryNode, offset: int, value: int) -> None:
    struct.pack_into(">Q", memory.data, offset, value)


async def written(shape: Shape) -> tuple[MemoryNode, int, int]:
    """(image with two clusters of data, place of its L1 table, place of its L2 table)."""
    memory = await make_image(shape)
    node = await open_qcow2(memory)
    await node.pwrite(0, b"a" * 65536)
    await node.pwrite(65536, b"b" * 65536)
    await node.close()
    memory = copy_of(memory)
    header = await read_header(memory)
    l1 = header.l1_table_offset
    return memory, l1, word(memory, l1) & ~COPIED


async def assert_found_corrupt(memory: MemoryNode, what: str) -> Qcow2Node:
    """Reading and writing cluster 0 fail; the corrupt bit is on disk; all writes are refused."""
    node = await open_qcow2(memory)
    before = bytes(memory.data)
    with pytest.raises(OSError, match=what) as caught:
        await read_bytes(node, 0, 4096)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="corrupt") as caught:
        await node.pwrite(0, b"c" * 4096)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="corrupt"):
        await node.discard(1 << 20, 65536)
    assert (await read_header(memory)).corrupt
    after = bytes(memory.data)
    assert after[:79] + after[80:] == before[:79] + before[80:], "nothing but the bit has changed"
    return node


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (COPIED | 0x50000 | 1 << 56, "reserved bits"),
        (COPIED | 0x50000 | 4, "reserved bits"),
        (COPIED | 0x50200, "not aligned"),
        (COPIED | 1 << 40, "beyond the end"),
        (COPIED | 0x10000, "points to metadata"),
        (1 << 62 | 1 << 40, "beyond the end"),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, EXTENDED], ids=str)
async def test_a_bad_l2_entry_is_found(shape: Shape, entry: int, what: str) -> None:
    memory, _, l2 = await written(shape)
    put(memory, l2, entry)
    node = await assert_found_corrupt(memory, what)
    # What is sound can still be read.
    assert await read_bytes(node, 65536, 65536) == b"b" * 65536


async def test_the_l2_entry_bfffffffffff0000_of_iotest_080_is_found() -> None:
    memory, _, l2 = await written(SHAPE)
    put(memory, l2, 0xBFFFFFFFFFFF0000)
    await assert_found_corrupt(memory, "L2 entry 0xbfffffffffff0000 at guest offset 0x0")


async def test_a_subcluster_both_allocated_and_zero_is_found() -> None:
    memory, _, l2 = await written(EXTENDED)
    put(memory, l2 + 8, 0xFFFFFFFF | 1 << 32)
    await assert_found_corrupt(memory, "both allocated and zero")


async def test_a_zero_flag_in_version_2_is_found() -> None:
    memory, _, l2 = await written(Shape(65536, version=2, size=1 << 30))
    put(memory, l2, word(memory, l2) | 1)
    node = await open_qcow2(memory)
    with pytest.raises(OSError, match="reserved bits"):
        await read_bytes(node, 0, 512)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (COPIED | 0x50000 | 1 << 56, "reserved bits"),
        (COPIED | 0x50200, "not aligned"),
        (COPIED | 1 << 40, "beyond the end"),
        (COPIED, "offset 0"),
    ],
)
async def test_a_bad_l1_entry_is_found(entry: int, what: str) -> None:
    memory, l1, _ = await written(SHAPE)
    put(memory, l1, entry)
    await assert_found_corrupt(memory, what)


@pytest.mark.parametrize("shape", [SHAPE, EXTENDED], ids=str)
async def test_a_refcount_of_zero_does_not_let_metadata_be_overwritten(shape: Shape) -> None:
    """The refcounts call everything free: the first allocation would take the header."""
    memory, _, _ = await written(shape)
    header = await read_header(memory)
    block = word(memory, header.refcount_table_offset)
    memory.data[block : block + 65536] = bytes(65536)
    sound = bytes(memory.data)
    node = await open_qcow2(memory)
    with pytest.raises(OSError, match="would overwrite metadata"):
        await node.pwrite(1 << 20, b"c" * 65536)
    assert bytes(memory.data)[80:] == sound[80:]
    assert await read_bytes(node, 0, 65536) == b"a" * 65536


async def test_freeing_a_cluster_that_counts_as_free_is_found() -> None:
    memory, _, l2 = await written(SHAPE)
    header = await read_header(memory)
    block = word(memory, header.refcount_table_offset)
    cluster = (word(memory, l2) & ~COPIED) >> 16
    struct.pack_into(">H", memory.data, block + cluster * 2, 0)
    node = await open_qcow2(memory)
    await node.discard(0, 65536)
    with pytest.raises(OSError, match="refcount of the cluster"):
        await node.flush()
    assert (await read_header(memory)).corrupt


@pytest.mark.parametrize("entry", [0x200, 1 << 40, 0x10000])
async def test_a_bad_refcount_table_is_refused_for_writing(entry: int) -> None:
    memory, _, _ = await written(SHAPE)
    header = await read_header(memory)
    put(
        memory,
        header.refcount_table_offset,
        entry | header.refcount_table_offset * (entry == 0x10000),
    )
    with pytest.raises(ImageError, match="refcount table entry 0"):
        await open_qcow2(memory)
    node = await open_qcow2(memory, read_only=True)
    assert await read_bytes(node, 0, 65536) == b"a" * 65536


async def test_an_image_marked_corrupt_can_only_be_read() -> None:
    memory, _, _ = await written(SHAPE)
    memory.data[79] |= 2
    with pytest.raises(ImageError, match="marked corrupt"):
        await open_qcow2(memory)
    node = await open_qcow2(memory, read_only=True)
    assert await read_bytes(node, 65536, 512) == b"b" * 512
    with pytest.raises(OSError, match="read-only") as caught:
        await node.pwrite(0, b"x")
    assert caught.value.errno == errno.EROFS


async def test_unknown_autoclear_bits_are_cleared_by_the_first_writer() -> None:
    memory, _, _ = await written(SHAPE)
    memory.data[88:96] = struct.pack(">Q", 1 << 40 | 2)
    await open_qcow2(memory, read_only=True)
    assert (await read_header(memory)).autoclear_features
    await open_qcow2(memory)
    assert not (await read_header(memory)).autoclear_features
