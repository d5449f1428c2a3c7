"""Requests that an image does at once: only what is sound and what nobody else is at work on; and
whatever it leaves to the coroutine is untouched."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from engine_helpers import (
    SHAPES,
    Failing,
    Reluctant,
    Shape,
    Suspending,
    World,
    assert_same,
    copy_of,
    make_image,
    qemu_img,
    read_hurriedly,
    write_hurriedly,
)

from replnbd.block import BlockNode, Buffer, FileNode, MemoryNode, PassThrough, read_bytes
from replnbd.qcow2 import Qcow2Node, check_image, open_qcow2, read_header, status

CLUSTER = 65536
SUB = 2048
COPIED = 1 << 63
EXTENDED = Shape(CLUSTER, extended_l2=True, size=1 << 20)
PLAIN = Shape(CLUSTER, size=1 << 20)
KINDS = pytest.mark.parametrize("shape", [EXTENDED, PLAIN], ids=str)

A, B, C = (bytes((letter,)) * CLUSTER for letter in b"abc")


def read_nowait(node: BlockNode, offset: int, length: int) -> bytes | None:
    """The bytes, or None if the node would have to wait."""
    buffer = bytearray(length)
    return bytes(buffer) if node.pread_nowait(offset, memoryview(buffer)) else None


async def findings(memory: MemoryNode) -> tuple[int, int]:
    """(corruptions, leaks) of an image in memory."""
    file = copy_of(memory)
    report = await check_image(file, await read_header(file))
    return report.corruptions, report.leaks


async def opened(shape: Shape, file: Callable[[MemoryNode], BlockNode] | None = None) -> Qcow2Node:
    """An image with "aaa..." in cluster 0 and "bbb..." in cluster 1, its L2 slice loaded."""
    memory = await make_image(shape)
    node = await open_qcow2(memory)
    await node.pwrite(0, A)
    await node.pwrite(CLUSTER, B)
    await node.close()
    memory = copy_of(memory)
    node = await open_qcow2(memory if file is None else file(memory), backing=MemoryNode(1 << 20))
    await read_bytes(node, CLUSTER, 1)
    # And a run of clusters to take one from.
    await node.pwrite(15 * CLUSTER, A)
    return node


# Section: everything at once


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cache_bytes", [0, 16 << 20])
async def test_requests_in_flight_end_as_if_one_came_after_the_other(
    shape: Shape, seed: int, cache_bytes: int
) -> None:
    """They overlap, and the file does some steps at once and waits in others."""
    memory = await make_image(shape)
    file = Reluctant(memory, seed)
    world = await World.create(
        file, shape.size, seed, backing=shape.backing, cache_bytes=cache_bytes
    )
    node, rng = world.node, world.rng
    at_once = 0

    async def write(offset: int, data: bytes) -> None:
        nonlocal at_once
        at_once += await write_hurriedly(node, offset, data)

    async def read(offset: int, wanted: bytes) -> None:
        assert_same(await read_hurriedly(node, offset, len(wanted)), wanted)

    for _ in range(10):
        file.eager = rng.choice((0.3, 0.7, 1.0))
        flying: list[asyncio.Task[object]] = []
        for _ in range(rng.randrange(1, 24)):
            offset, length = world.aligned_range() if rng.random() < 0.5 else world.range()
            length = min(length, rng.choice((shape.cluster_size, 4 * shape.cluster_size)))
            end = offset + length
            choice = rng.random()
            job: Awaitable[object]
            if choice < 0.6:
                data = rng.randbytes(length)
                world.model[offset:end] = data
                job = write(offset, data)
            elif choice < 0.9:
                job = read(offset, bytes(world.model[offset:end]))
            elif choice < 0.95:
                job = node.allocated(offset, length)
            else:
                job = node.flush()
            flying.append(asyncio.ensure_future(job))
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        await asyncio.gather(*flying)
        await world.verify()
        # Discards of the same bytes would take any order: they come alone.
        for _ in range(rng.randrange(4)):
            await world.step()
    await world.verify()
    await node.flush()
    assert await findings(memory) == (0, 0)
    assert at_once
    again = await open_qcow2(copy_of(memory), backing=world.backing)
    assert_same(await read_bytes(again, 0, shape.size), world.model)


@pytest.mark.parametrize("shape", [EXTENDED, PLAIN, SHAPES[6]], ids=str)
async def test_neighbours_that_allocate_and_free_at_the_same_time_share_nothing(
    shape: Shape,
) -> None:
    """Each writer has clusters of its own, in the same L2 slices and runs, and frees them again."""
    memory = await make_image(shape)
    file = Reluctant(memory, 4)
    node = await open_qcow2(file)
    size = shape.cluster_size
    writers = 5

    async def live(mine: int) -> None:
        rng = random.Random(mine)
        model: dict[int, bytes] = {}
        own = range(mine, min(shape.size // size, 60), writers)
        for _ in range(60):
            cluster = rng.choice(own)
            choice = rng.random()
            if choice < 0.5:
                model[cluster] = rng.randbytes(size)
                await write_hurriedly(node, cluster * size, model[cluster])
            elif choice < 0.7:
                model.pop(cluster, None)
                await node.discard(cluster * size, size)
            elif choice < 0.75:
                await node.flush()
            else:
                wanted = model.get(cluster, bytes(size))
                assert_same(await read_hurriedly(node, cluster * size, size), wanted)

    await asyncio.gather(*(live(n) for n in range(writers)))
    await node.flush()
    assert await findings(memory) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
async def test_a_cluster_of_subclusters_in_all_states_is_read_at_once(seed: int) -> None:
    """Data here, zeroes here, the backing's: in any pattern, from any byte to any other."""
    rng = random.Random(seed)
    memory = await make_image(EXTENDED)
    backing = MemoryNode(EXTENDED.size)
    await backing.pwrite(0, rng.randbytes(EXTENDED.size))
    node = await open_qcow2(memory, backing=backing)
    base = 3 * CLUSTER
    model = bytearray(await read_bytes(backing, base, CLUSTER))
    for sub in range(0, CLUSTER, SUB):
        choice = rng.randrange(3)
        if choice == 1:
            model[sub : sub + SUB] = rng.randbytes(SUB)
            await node.pwrite(base + sub, bytes(model[sub : sub + SUB]))
        elif choice == 2:
            model[sub : sub + SUB] = bytes(SUB)
            await node.write_zeroes(base + sub, SUB)
    for _ in range(100):
        start = rng.randrange(CLUSTER)
        end = rng.randrange(start, CLUSTER) + 1
        assert_same(read_nowait(node, base + start, end - start) or b"", model[start:end])


async def test_a_read_of_several_states_leaves_what_must_wait_to_the_coroutine() -> None:
    memory = await make_image(EXTENDED)
    backing = Reluctant(MemoryNode(EXTENDED.size - SUB), 0)  # ends within the last cluster
    await backing.pwrite(0, b"b" * (EXTENDED.size - SUB))
    file = Reluctant(memory, 0)
    file.eager = backing.eager = 1.0
    node = await open_qcow2(file, backing=backing)
    last = EXTENDED.size - CLUSTER
    for place in (0, last):
        await node.pwrite(place + SUB, A[:SUB])
    wanted = b"b" * SUB + b"a" * SUB + b"b" * (CLUSTER - 2 * SUB)
    assert read_nowait(node, 0, CLUSTER) == wanted
    for slow in (file, backing):
        slow.eager = 0.0
        assert read_nowait(node, 0, CLUSTER) is None
        assert_same(await read_bytes(node, 0, CLUSTER), wanted)
        slow.eager = 1.0
    # Past the end of the backing there are zeroes, which only the coroutine knows.
    assert read_nowait(node, last, CLUSTER) is None
    assert_same(await read_bytes(node, last, CLUSTER), wanted[:-SUB] + bytes(SUB))


# Section: the n-th operation on the file fails


def consistent(got: bytes, before: bytes, after: bytes, offset: int, end: int) -> None:
    """Every byte of a range is as it was before an operation or as it is after it, and all others
    have not changed."""
    assert_same(got[:offset] + got[end:], before[:offset] + before[end:])
    for number in range(offset, end):
        assert got[number] in (before[number], after[number]), f"byte {number:#x} is neither"


@KINDS
@pytest.mark.parametrize("torn", ["none", "half", "all"])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (2 * CLUSTER, CLUSTER),  # the first touch of a cluster
        (2 * CLUSTER + SUB, 2 * SUB),  # of a part of one
        (14 * CLUSTER + SUB, 3 * SUB),  # of subclusters beside and upon some that have data
        (CLUSTER + 700, 5000),  # a rewrite
    ],
)
async def test_a_write_that_fails_at_once_harms_nothing(
    shape: Shape, torn: str, lasting: bool, offset: int, length: int
) -> None:
    end = offset + length
    nth = 0
    failed = True
    while failed:
        nth += 1
        memories: list[MemoryNode] = []

        def failing(memory: MemoryNode, memories: list[MemoryNode] = memories) -> BlockNode:
            memories.append(memory)
            return Failing(memory)

        node = await opened(shape, failing)
        memory, file = memories[0], node.file
        assert isinstance(file, Failing)
        await node.pwrite(14 * CLUSTER, C[: 2 * SUB])
        before = bytes(await read_bytes(node, 0, node.size))
        data = random.Random(nth).randbytes(length)
        after = before[:offset] + data + before[end:]
        file.arm(nth, errno.ENOSPC, torn, lasting=lasting)
        error = None
        try:
            await write_hurriedly(node, offset, data)
        except OSError as exc:
            error = exc.errno
        failed = file.disarm()
        assert error == (errno.ENOSPC if failed else None)
        assert (await findings(memory))[0] == 0
        got = bytes(await read_bytes(node, 0, node.size))
        consistent(got, before, after, offset, end)
        if not failed:
            assert got == after
        # What the file says is sound as well: new, old, or something of both.
        other = await open_qcow2(copy_of(memory), backing=node.backing)
        got = bytes(await read_bytes(other, 0, node.size))
        consistent(got, before, after, offset, end)
        # The next one succeeds.
        assert await write_hurriedly(node, offset, data) or shape is PLAIN
        assert read_nowait(node, offset, length) == data
        assert_same(await read_bytes(node, 0, node.size), after)
        await node.flush()
        corruptions, leaks = await findings(memory)
        # A store that may have reached the file keeps its cluster.
        assert (corruptions, leaks) == (0, 0) or (lasting and (corruptions, leaks) == (0, 1))
    assert nth > 1


class Unrestored(Failing):
    """A file of which the first failing write reaches the disk, and no later one."""

    def _error(self) -> OSError:
        self.torn = "none"
        return super()._error()


@KINDS
async def test_a_cluster_that_the_file_may_refer_to_is_not_given_to_another(shape: Shape) -> None:
    """The store of the entry reaches the file and fails, and so does taking it back."""
    node = await opened(shape, Unrestored)
    file = node.file
    assert isinstance(file, Unrestored)
    file.arm(2, errno.EIO, "all", lasting=True)
    with pytest.raises(OSError, match="Input/output"):
        node.pwrite_nowait(2 * CLUSTER, C)
    file.disarm()
    await node.flush()
    assert isinstance(file.file, MemoryNode)
    restarted = await open_qcow2(copy_of(file.file), backing=node.backing)
    assert await read_bytes(restarted, 2 * CLUSTER, CLUSTER) == C
    for number in range(3, 12):
        assert node.pwrite_nowait(number * CLUSTER, A) or number == 3
        await node.pwrite(number * CLUSTER, A)
    restarted = await open_qcow2(copy_of(file.file), backing=node.backing)
    assert await read_bytes(restarted, 2 * CLUSTER, CLUSTER) == C


# Section: False means that nothing has happened


class Refusing(PassThrough):
    """A file that does no more than `left` writes at once."""

    left = 1 << 30

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        self.left -= 1
        return self.left >= 0 and self.file.pwrite_nowait(offset, data)


@KINDS
@pytest.mark.parametrize("left", [0, 1])
async def test_a_file_that_wants_to_wait_costs_no_clusters(shape: Shape, left: int) -> None:
    node = await opened(shape, lambda memory: Refusing("r", memory))
    file = node.file
    assert isinstance(file, Refusing)
    allocator = node._image.allocator
    assert allocator is not None
    before = allocator.spare_clusters
    for number in range(2, 10):
        file.left = left
        assert not node.pwrite_nowait(number * CLUSTER, A)
        assert read_nowait(node, number * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert (allocator.spare_clusters, allocator.released) == (before, [])
    file.left = left
    await node.pwrite(2 * CLUSTER, C)
    assert allocator.spare_clusters == before - 1
    assert read_nowait(node, 2 * CLUSTER, CLUSTER) == C


@KINDS
async def test_a_first_touch_waits_for_who_changes_metadata_and_a_rewrite_does_not(
    shape: Shape,
) -> None:
    node = await opened(shape)
    memory = node.file
    assert isinstance(memory, MemoryNode)
    async with node._host.lock:
        before = bytes(memory.data)
        assert not node.pwrite_nowait(2 * CLUSTER, C)
        assert bytes(memory.data) == before
        assert node.pwrite_nowait(CLUSTER, C)
        assert read_nowait(node, CLUSTER, CLUSTER) == C
    assert node.pwrite_nowait(2 * CLUSTER, C)


@KINDS
async def test_whoever_is_suspended_keeps_its_clusters_to_itself(shape: Shape) -> None:
    node = await opened(shape, lambda memory: Reluctant(memory, 1))
    file = node.file
    assert isinstance(file, Reluctant)
    file.eager = 0.0
    for _ in range(20):
        file.eager = 0.0
        slow = asyncio.ensure_future(node.pwrite(2 * CLUSTER, C))
        await asyncio.sleep(0)
        file.eager = 1.0
        if not slow.done():
            assert not node.pwrite_nowait(2 * CLUSTER, B)
            assert read_nowait(node, 2 * CLUSTER, 512) is None
        assert node.pwrite_nowait(CLUSTER, A)
        assert read_nowait(node, CLUSTER, CLUSTER) == A
        assert not node.pwrite_nowait(3 * CLUSTER, B[:512]), "half a subcluster has to be filled"
        await slow
        assert read_nowait(node, 2 * CLUSTER, CLUSTER) == C
        await node.discard(2 * CLUSTER, CLUSTER)


async def test_a_reader_that_is_suspended_holds_back_writes_and_no_reads() -> None:
    node = await opened(EXTENDED, lambda memory: Suspending(memory, 3))
    file = node.file
    assert isinstance(file, Suspending)
    node.file = node._image.file = node._host.file = held = Held("h", file.file)
    buffer = memoryview(bytearray(CLUSTER))
    reading = asyncio.ensure_future(node.pread(0, buffer))
    await asyncio.sleep(0)
    held.hurried = True
    assert not node.pwrite_nowait(0, C)
    assert not node.pwrite_nowait(CLUSTER - SUB, C[:SUB])
    assert node.pwrite_nowait(CLUSTER, C)
    assert read_nowait(node, 0, CLUSTER) == A
    emptied = asyncio.ensure_future(node.make_empty())
    await asyncio.sleep(0)
    assert read_nowait(node, CLUSTER, CLUSTER) is None, "a drain that waits is not overtaken"
    assert not node.pwrite_nowait(CLUSTER, A)
    held.go_on.set()
    await asyncio.gather(reading, emptied)
    assert buffer == A
    assert read_nowait(node, CLUSTER, CLUSTER) == bytes(CLUSTER)


class Held(PassThrough):
    """A file whose reads wait for `go_on`, unless it is `hurried`."""

    def __init__(self, name: str, file: BlockNode) -> None:
        super().__init__(name, file)
        self.go_on = asyncio.Event()
        self.hurried = False

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self.go_on.wait()
        await self.file.pread(offset, buffer)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        return self.hurried and self.file.pread_nowait(offset, buffer)


@KINDS
async def test_a_flush_that_gives_the_run_back_leaves_none_to_take_from(shape: Shape) -> None:
    """Whatever is touched first while the flush is under way: refcounts are exact after the next,
    and no cluster that was given back is in use."""
    node = await opened(shape, lambda memory: Reluctant(memory, 7))
    file = node.file
    assert isinstance(file, Reluctant)
    file.eager = 0.0
    for number in range(2, 14):
        flush = asyncio.ensure_future(node.flush())
        for _ in range(number):
            await asyncio.sleep(0)
        file.eager = 1.0
        await write_hurriedly(node, number * CLUSTER, bytes((number,)) * CLUSTER)
        file.eager = 0.0
        await flush
        assert isinstance(file.file, MemoryNode)
        assert (await findings(file.file))[0] == 0
    await node.flush()
    assert isinstance(file.file, MemoryNode)
    assert await findings(file.file) == (0, 0)
    for number in range(2, 14):
        assert read_nowait(node, number * CLUSTER, 8) in (None, bytes((number,)) * 8)
        assert await read_bytes(node, number * CLUSTER, 8) == bytes((number,)) * 8


# Section: what is not sound, or not ours, is left to who can say why


def put(memory: MemoryNode, offset: int, *values: int) -> None:
    struct.pack_into(f">{len(values)}Q", memory.data, offset, *values)


async def lying(shape: Shape, entry: int, bitmap: int) -> tuple[Qcow2Node, MemoryNode]:
    """An image whose cluster 0 has this entry; a bitmap only if there are any."""
    memory = (await opened(shape)).file
    assert isinstance(memory, MemoryNode)
    memory = copy_of(memory)
    (l1,) = struct.unpack_from(">Q", memory.data, (await read_header(memory)).l1_table_offset)
    put(memory, l1 & ~COPIED, entry, *((bitmap,) if shape.extended_l2 else ()))
    node = await open_qcow2(memory, backing=MemoryNode(1 << 20))
    # Load the slice, and take a run, by requests to what is sound.
    assert await read_bytes(node, CLUSTER, CLUSTER) == B
    await node.pwrite(13 * CLUSTER, A)
    return node, memory


LIES = [
    (COPIED | 0x50000 | 1 << 56, 0xFFFFFFFF),
    (COPIED | 0x50000 | 4, 0xFFFFFFFF),
    (COPIED | 0x50200, 0xFFFFFFFF),
    (COPIED | 0x50200, 0),
    (COPIED | 1 << 40, 0xFFFFFFFF),
    (COPIED | 1 << 40, 0),
    (COPIED | 0x10000, 0xFFFFFFFF),
    (COPIED | 0x10000, 0),
    (1 << 62 | 1 << 40, 0),
]


@KINDS
@pytest.mark.parametrize(("entry", "bitmap"), LIES)
async def test_nothing_is_read_from_or_written_to_where_an_entry_lies(
    shape: Shape, entry: int, bitmap: int
) -> None:
    node, memory = await lying(shape, entry, bitmap)
    before = bytes(memory.data)
    if bitmap or not shape.extended_l2:
        assert read_nowait(node, 0, 4096) is None
    for offset, length in ((0, CLUSTER), (SUB, SUB), (700, 100)):
        assert not node.pwrite_nowait(offset, C[:length])
        assert bytes(memory.data) == before
    with pytest.raises(OSError, match="corrupt") as caught:
        await node.pwrite(0, C)
    assert caught.value.errno == errno.EIO
    assert not node.pwrite_nowait(CLUSTER, C), "a corrupt image is not written to any more"
    assert not node.pwrite_nowait(12 * CLUSTER, C)
    after = bytes(memory.data)
    assert after[:79] + after[80:] == before[:79] + before[80:], "nothing but the bit has changed"
    assert read_nowait(node, CLUSTER, CLUSTER) == B


@pytest.mark.parametrize(
    ("entry", "bitmap"), [(COPIED | 0x40000, 3 << 32 | 1), (0, 1), (COPIED, 1), (0, 1 << 32 | 1)]
)
async def test_a_first_touch_does_not_build_on_a_bitmap_that_lies(entry: int, bitmap: int) -> None:
    node, memory = await lying(EXTENDED, entry, bitmap)
    before = bytes(memory.data)
    assert not node.pwrite_nowait(8 * SUB, C[:SUB])
    assert bytes(memory.data) == before
    with pytest.raises(OSError, match="corrupt"):
        await node.pwrite(8 * SUB, C[:SUB])


async def test_an_entry_that_is_nothing_but_the_copied_flag_is_unallocated() -> None:
    """As QEMU has it. If it counted as allocated, copy-before-write would save nothing there."""
    for shape in (EXTENDED, PLAIN):
        node, _ = await lying(shape, COPIED, 0)
        assert read_nowait(node, 0, CLUSTER) == bytes(CLUSTER)
        assert node.copy_up_nowait(0, CLUSTER) != 0
        await node.copy_up(0, CLUSTER)
        assert node.copy_up_nowait(0, CLUSTER) == 0
        assert read_nowait(node, 0, CLUSTER) == bytes(CLUSTER)
        node, _ = await lying(shape, COPIED, 0)
        await write_hurriedly(node, 0, C)
        assert read_nowait(node, 0, CLUSTER) == C


async def test_an_image_opened_read_only_is_read_and_not_written() -> None:
    for shape in (EXTENDED, PLAIN):
        memory = (await opened(shape)).file
        assert isinstance(memory, MemoryNode)
        before = bytes(memory.data)
        node = await open_qcow2(memory, backing=MemoryNode(1 << 20), read_only=True)
        await read_bytes(node, 0, 1)
        assert read_nowait(node, 0, CLUSTER) == A
        for offset in (0, 3 * CLUSTER):
            assert not node.pwrite_nowait(offset, C)
            with pytest.raises(OSError, match="read-only"):
                await node.pwrite(offset, C)
        assert bytes(memory.data) == before


@KINDS
async def test_what_a_snapshot_shares_is_copied_first(shape: Shape, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    node = await opened(shape)
    await node.flush()
    assert isinstance(node.file, MemoryNode)
    path.write_bytes(node.file.data)
    qemu_img("snapshot", "-c", "then", path)
    node = await open_qcow2(FileNode.open(path))
    await read_bytes(node, 0, 1)
    for offset, length in ((0, CLUSTER), (CLUSTER + SUB, SUB), (2 * CLUSTER, CLUSTER)):
        before = path.read_bytes()
        assert not node.pwrite_nowait(offset, C[:length])
        assert path.read_bytes() == before
    assert read_nowait(node, 0, CLUSTER) == A
    await node.pwrite(CLUSTER + SUB, C[:SUB])
    # The L2 table is the image's own now; the data of cluster 0 still is not.
    assert not node.pwrite_nowait(0, C)
    assert node.pwrite_nowait(CLUSTER + SUB, A[:SUB])
    await node.pwrite(0, C)
    await node.close()
    assert "No errors" in qemu_img("check", path).stdout
    qemu_img("snapshot", "-a", "then", path)
    node = await open_qcow2(FileNode.open(path))
    assert await read_bytes(node, 0, 2 * CLUSTER) == A + B
    await node.close()


@KINDS
async def test_what_is_compressed_is_inflated_by_the_coroutine(
    shape: Shape, tmp_path: Path
) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(A + B + bytes(14 * CLUSTER))
    options = "extended_l2=on" if shape.extended_l2 else "compat=1.1"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    node = await open_qcow2(FileNode.open(path))
    assert await read_bytes(node, 0, 512) == A[:512]
    before = path.read_bytes()
    assert read_nowait(node, 0, 512) is None
    assert node.copy_up_nowait(0, CLUSTER) <= 0
    assert not node.pwrite_nowait(0, C)
    assert not node.pwrite_nowait(SUB, C[:SUB])
    assert path.read_bytes() == before
    await node.pwrite(SUB, C[:SUB])
    assert read_nowait(node, 0, CLUSTER) == A[:SUB] + C[:SUB] + A[2 * SUB :]
    await node.close()
    assert "No errors" in qemu_img("check", path).stdout


@pytest.mark.parametrize("extended", [False, True])
async def test_the_ends_of_the_disk_and_of_its_backing(extended: bool) -> None:
    """The disk ends within a subcluster, and the backing earlier still."""
    size = 2 * CLUSTER + 3 * SUB + 512
    below = MemoryNode(CLUSTER + 700)
    below.data[:] = b"x" * below.size
    memory = await make_image(Shape(CLUSTER, extended_l2=extended, size=size))
    node = await open_qcow2(memory, backing=below)
    await node.pwrite(2 * CLUSTER, b"-")
    model = bytearray(size)
    model[: below.size] = below.data
    model[2 * CLUSTER] = ord("-")
    assert read_nowait(node, CLUSTER, 700) == b"x" * 700
    for offset, length in ((CLUSTER, 701), (CLUSTER + 700, 1)):
        assert await read_hurriedly(node, offset, length) == model[offset : offset + length]
    # The last bytes are no whole subcluster: the coroutine's business, the first time.
    tail = size - 512
    assert node.pwrite_nowait(tail, A[:512]) is not extended
    assert not node.pwrite_nowait(CLUSTER + 512, A[:512])
    for offset, length in ((tail, 512), (CLUSTER + 512, 512), (size - 5, 5), (CLUSTER + SUB, SUB)):
        model[offset : offset + length] = B[:length]
        await write_hurriedly(node, offset, B[:length])
    assert_same(await read_bytes(node, 0, size), model)
    assert read_nowait(node, tail, 512) == bytes(model[tail:])
    await node.flush()
    assert await findings(memory) == (0, 0)


async def test_the_zero_bits_of_what_is_written_are_cleared() -> None:
    """Zero with its space kept, and zero without: written in part, at once and not."""
    for unmap in (False, True):
        node = await opened(EXTENDED)
        backing = node.backing
        assert isinstance(backing, MemoryNode)
        backing.data[:] = b"x" * backing.size
        await node.write_zeroes(0, CLUSTER, unmap=unmap)
        assert node.copy_up_nowait(0, CLUSTER) == 0
        assert node.pwrite_nowait(SUB, C[:SUB]) is not unmap
        await node.pwrite(SUB, C[:SUB])
        got = await read_hurriedly(node, 0, CLUSTER)
        assert got == bytes(SUB) + C[:SUB] + bytes(CLUSTER - 2 * SUB)
        assert read_nowait(node, SUB, SUB) == C[:SUB]
        memory = node.file
        assert isinstance(memory, MemoryNode)
        await node.flush()
        assert await findings(memory) == (0, 0)


# Section: copying up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_copying_up_changes_nothing_but_what_is_allocated(shape: Shape) -> None:
    memory = await make_image(shape)
    file = Reluctant(memory, 12)
    world = await World.create(file, shape.size, 12, backing=shape.backing)
    node = world.node
    for _ in range(60):
        await world.step()
        file.eager = world.rng.choice((0.5, 1.0))
        for _ in range(6):
            offset, length = world.aligned_range()
            length = min(length, shape.cluster_size - offset % shape.cluster_size)
            before = await status.allocated(node._image, offset, length)
            copied = node.copy_up_nowait(offset, length)
            after = await status.allocated(node._image, offset, length)
            if copied < 0:
                assert after == before
                if before == (False, length):
                    await node.copy_up(offset, length)
                    assert await status.allocated(node._image, offset, length) == (True, length)
            else:
                assert before == (not copied, length)
                assert copied in (0, length)
                assert after == (True, length)
        await world.verify()
    await node.flush()
    assert await findings(memory) == (0, 0)


@KINDS
@pytest.mark.parametrize("torn", ["none", "half", "all"])
async def test_copying_up_that_fails_at_once_leaves_what_was(shape: Shape, torn: str) -> None:
    nth = 0
    failed = True
    while failed:
        nth += 1
        node = await opened(shape, Failing)
        file, backing = node.file, node.backing
        assert isinstance(file, Failing)
        assert isinstance(backing, MemoryNode)
        backing.data[:] = random.Random(nth).randbytes(backing.size)
        shown = bytes(await read_bytes(node, 0, node.size))
        file.arm(nth, errno.ENOSPC, torn)
        error = None
        try:
            assert node.copy_up_nowait(5 * CLUSTER, CLUSTER) == CLUSTER
        except OSError as exc:
            error = exc.errno
        failed = file.disarm()
        assert error == (errno.ENOSPC if failed else None)
        assert_same(await read_bytes(node, 0, node.size), shown)
        allocated = await status.allocated(node._image, 5 * CLUSTER, CLUSTER)
        assert allocated == (not failed, CLUSTER)
        await node.flush()
        assert isinstance(file.file, MemoryNode)
        assert await findings(file.file) == (0, 0)
    assert nth > 2


async def test_copies_in_flight_do_not_share_a_buffer() -> None:
    """Many first touches of copy-before-write, some at once while others wait in the file."""
    shape = Shape(CLUSTER, extended_l2=True, size=4 << 20)
    memory = await make_image(shape)
    file = Reluctant(memory, 5)
    world = await World.create(file, shape.size, 5, backing=True)
    node, rng = world.node, world.rng

    async def copy(offset: int) -> None:
        if node.copy_up_nowait(offset, SUB) < 0:
            allocated, _ = await node.allocated(offset, SUB)
            if not allocated:
                await node.copy_up(offset, SUB)

    subclusters = list(range(shape.size // SUB))
    rng.shuffle(subclusters)
    while subclusters:
        file.eager = rng.choice((0.0, 0.5, 0.9))
        taken = [subclusters.pop() for _ in range(min(64, len(subclusters)))]
        await asyncio.gather(*(copy(number * SUB) for number in taken))
    assert isinstance(node.backing, MemoryNode)
    node.backing.data[:] = bytes(node.backing.size)
    await world.verify()
    await node.flush()
    assert await findings(memory) == (0, 0)
