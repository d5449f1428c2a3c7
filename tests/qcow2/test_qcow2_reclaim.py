"""What an emptied image had in use: taken again with stale bytes in it, or given back meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine_helpers import (
    Failing,
    Recording,
    Shape,
    Suspending,
    World,
    assert_same,
    make_image,
    qemu_img,
)

from replnbd.block import FileNode, MemoryNode, PassThrough, read_bytes
from replnbd.qcow2 import Qcow2Node, check_image, create_image, open_qcow2, read_header, reclaim

MIB = 1 << 20

LONG_L1 = Shape(512, size=20 * MIB, backing=False)
"""Its L1 table takes more than a page: make_empty switches to another one."""


class Held(PassThrough):
    """A file that cuts itself only once `release` is set."""

    def __init__(self, file: FileNode | MemoryNode) -> None:
        super().__init__(file.name, file)
        self.asked = asyncio.Event()
        self.release = asyncio.Event()

    async def truncate(self, size: int) -> None:
        self.asked.set()
        await self.release.wait()
        await super().truncate(size)


@asynccontextmanager
async def overlay(path: Path, size: int) -> AsyncIterator[Qcow2Node]:
    """An open overlay as replnbd makes them, checked by QEMU at its end."""
    await create_image(path, size)
    node = await open_qcow2(FileNode.open(path))
    yield node
    await node.close()
    qemu_img("check", "-q", path)


def space(path: Path) -> int:
    return path.stat().st_blocks * 512


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def reclaimed(node: Qcow2Node) -> None:
    """Nothing is being given back any more."""
    await eventually(lambda: node._reclaimer is None or node._reclaimer._task is None)


async def fill(node: Qcow2Node, clusters: int, byte: bytes = b"\xaa") -> None:
    """Write 4 KiB to each of so many clusters, in a random order."""
    size = node.header.cluster_size
    for number in random.Random(clusters).sample(range(clusters), clusters):
        await node.pwrite(number * size, byte * 4096)


async def check_memory(memory: MemoryNode) -> None:
    report = await check_image(memory, await read_header(memory))
    assert (report.corruptions, report.leaks) == (0, 0), report.findings


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,compat=0.10",
        "cluster_size=2M",
        "cluster_size=2M,extended_l2=on",
    ],
)
async def test_stale_bytes_of_recycled_clusters_are_never_seen(
    options: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    size = 5 * MIB + 1536
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    node = await open_qcow2(FileNode.open(path))
    world = World(node, None, bytes(size), 3)
    for _ in range(3):
        await node.pwrite(0, b"\xaa" * size)
        before = space(path)
        await node.make_empty(keep_space=True)
        qemu_img("check", "-q", "-U", path)
        assert space(path) >= before - MIB // 4  # the file system's own blocks count, too
        world.model[:] = bytes(size)
        await world.verify()
        for _ in range(60):
            offset, length = world.range()
            length = min(length, 9000)
            data = world.rng.randbytes(length)
            await node.pwrite(offset, data)
            world.model[offset : offset + length] = data
        await world.verify()
        for _ in range(20):
            await world.step()
        await world.verify()
    await node.close()
    qemu_img("check", "-q", path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    assert_same(raw.read_bytes(), world.model)


async def test_disk_use_is_bounded_by_the_largest_interval(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    rng = random.Random(7)
    async with overlay(path, 1 << 30) as node:
        most = 0
        for interval in range(12):
            for cluster in rng.sample(range(1 << 14), 100 if interval % 3 else 300):
                await node.pwrite(cluster << 16, bytes([interval + 1]) * 65536)
            if interval == 0:
                most = space(path)
            await node.make_empty(keep_space=True)
            assert space(path) <= most + (1 << 20)


async def test_space_that_is_not_needed_any_more_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.qcow2"
    monkeypatch.setattr(reclaim, "KEEP_S", 0.0)
    async with overlay(path, 1 << 30) as node:
        await fill(node, 600)
        await node.make_empty(keep_space=True)
        assert space(path) >= 600 * 4096
        await fill(node, 10)
        await node.make_empty(keep_space=True)
        # What was needed in this period or the one before is kept: that was the large one.
        await reclaimed(node)
        assert space(path) >= 600 * 4096
        await fill(node, 10)
        await node.make_empty(keep_space=True)
        # An interval needs 8 MiB at least: as much is taken at once.
        await eventually(lambda: space(path) < 200 * 4096)
        await fill(node, 600)
        await node.make_empty()
        await eventually(lambda: space(path) <= 256 << 10 and path.stat().st_size <= 256 << 10)


async def test_what_a_close_has_left_comes_back_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    async with overlay(path, 1 << 30) as node:
        await fill(node, 600)
        await node.make_empty()
    assert space(path) >= 300 * 4096
    qemu_img("check", "-q", path)
    node = await open_qcow2(FileNode.open(path))
    await node.make_empty()
    await eventually(lambda: space(path) <= 256 << 10)
    await node.close()


async def test_make_empty_and_requests_do_not_wait_for_the_file_to_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    await create_image(path, 1 << 30)
    file = Held(FileNode.open(path))
    node = await open_qcow2(file)
    await fill(node, 600)
    await node.make_empty()
    assert not any(await read_bytes(node, 0, MIB))
    await node.pwrite(0, b"new" * 1000)
    await file.asked.wait()
    # The step under way holds what allocates, and nothing else.
    await node.pwrite(0, b"NEW" * 1000)
    assert await read_bytes(node, 0, 3000) == b"NEW" * 1000
    qemu_img("check", "-q", "-U", "-r", "leaks", path, ok=(0, 1))
    others = [
        asyncio.create_task(node.flush()),
        asyncio.create_task(node.pwrite(MIB, b"more")),
        asyncio.create_task(node.make_empty()),
        asyncio.create_task(node.pwrite(0, b"last")),
    ]
    await asyncio.sleep(0)
    closing = asyncio.create_task(node.close())
    file.release.set()
    await asyncio.gather(*others, closing)
    qemu_img("check", "-q", path)
    node = await open_qcow2(FileNode.open(path))
    assert await read_bytes(node, 0, MIB + 4) == b"last".ljust(MIB + 4, b"\0")
    await node.close()


@pytest.mark.parametrize("seed", range(4))
async def test_writes_while_the_file_is_cut_are_all_there(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    size = 96 * MIB
    async with overlay(path, size) as node:
        rng = random.Random(seed)
        for _ in range(3):
            model = bytearray(size)
            await fill(node, size >> 16)
            await node.make_empty(keep_space=rng.random() < 0.3)

            async def write(slots: list[int], model: bytearray = model) -> None:
                for slot in slots:
                    offset = (slot << 16) + rng.randrange(60000)
                    data = rng.randbytes(rng.randint(1, 5000))
                    model[offset : offset + len(data)] = data
                    await node.pwrite(offset, data)
                    await asyncio.sleep(0)
                    if slot % 50 == 0:
                        await node.flush()

            slots = rng.sample(range((size >> 16) - 1), rng.choice([40, 1000]))
            await asyncio.gather(*(write(slots[n::4]) for n in range(4)))
            assert_same(await read_bytes(node, 0, size), model)
            await node.make_empty()


@pytest.mark.parametrize("shape", [Shape(4096, size=4 * MIB), Shape(512, size=MIB)], ids=str)
async def test_reclaim_amid_suspended_requests(shape: Shape) -> None:
    memory = await make_image(shape)
    world = await World.create(Suspending(memory, 2), shape.size, 2, backing=True)
    for round_ in range(6):
        await world.node.pwrite(0, b"\xaa" * shape.size)
        await world.node.make_empty(keep_space=round_ % 2 == 0)
        world.model[:] = world.base
        for _ in range(8):
            await world.step()
        await world.verify()
    await world.node.close()
    await check_memory(memory)


@pytest.mark.parametrize("shape", [Shape(4096, size=4 * MIB), LONG_L1], ids=str)
async def test_every_state_while_space_is_given_back_is_sound(shape: Shape) -> None:
    file = Recording(await make_image(shape))
    node = await open_qcow2(file)
    for _ in range(3):
        for number in range(0, shape.size // 32768, 20):
            await node.pwrite(number * 32768, b"\xaa" * 600)
        full = bytes(await read_bytes(node, 0, shape.size))
        await node.flush()
        file.states.clear()
        await node.make_empty()
        await check_memory(file.memory)
        await node.pwrite(5000, b"new")
        await reclaimed(node)
        for state in file.states:
            report = await check_image(state, await read_header(state))
            assert report.corruptions == 0, report.findings
            survivor = await open_qcow2(state, read_only=True)
            got = bytes(await read_bytes(survivor, 0, shape.size))
            assert got == full or got.strip(b"\0") in (b"", b"new")
    await node.close()
    await check_memory(file.memory)


async def test_a_long_l1_table_does_not_move_up_the_file() -> None:
    memory = await make_image(LONG_L1)
    node = await open_qcow2(memory)
    sizes = []
    for _ in range(6):
        await node.pwrite(0, b"\xaa" * (4 * MIB))
        await node.make_empty()
        await check_memory(memory)
        await reclaimed(node)
        sizes.append(len(memory.data))
        assert not any(await read_bytes(node, 0, 4 * MIB))
    assert max(sizes) < 64 << 10
    await node.close()


@pytest.mark.parametrize("shape", [Shape(65536, extended_l2=True, size=4 * MIB), LONG_L1], ids=str)
@pytest.mark.parametrize("torn", ["none", "half", "all"])
async def test_an_operation_that_fails_costs_no_more_than_space(shape: Shape, torn: str) -> None:
    """The n-th one from a make_empty on, up to the end of the reclaim."""
    memory = await make_image(shape)
    file = Failing(memory)
    node = await open_qcow2(file)
    failed = 0
    for nth in range(1, 40):
        content = random.Random(nth).randbytes(MIB)
        await node.pwrite(0, content)
        file.arm(nth, errno.EIO, torn)
        try:
            await node.make_empty()
            content = bytes(MIB)
        except OSError:
            failed += 1
        await reclaimed(node)
        file.disarm()
        assert_same(await read_bytes(node, 0, MIB), content)
        report = await check_image(memory, await read_header(memory))
        assert report.corruptions == 0
    assert failed
    await node.make_empty()
    await check_memory(memory)
    await node.pwrite(100, b"works")
    assert await read_bytes(node, 100, 5) == b"works"
    await node.close()
    await check_memory(memory)


LIFE = """
    import asyncio, sys
    from replnbd.block import FileNode
    from replnbd.qcow2 import open_qcow2

    async def main(path):
        node = await open_qcow2(FileNode.open(path))
        while True:
            for cluster in range(500):
                await node.pwrite(cluster * 65536 * 3, b"x" * 4096)
            await node.make_empty()
            print("empty", flush=True)
            for cluster in range(300):
                await node.pwrite(cluster * 65536, b"y" * 4096)
                await asyncio.sleep(0)
            await asyncio.sleep(0.03)
            await node.make_empty(keep_space=True)

    asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.interop
async def test_an_image_survives_kill_9_while_its_space_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    await create_image(path, 1 << 30)
    for number in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LIFE), os.fspath(path)],
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            for _ in range(1 + number % 3):
                await asyncio.to_thread(process.stdout.readline)
            await asyncio.sleep(random.Random(number).random() * 0.1)
        finally:
            process.kill()
            process.communicate()
        # 3: leaks and nothing worse.
        qemu_img("check", "-q", path, ok=(0, 3))
        node = await open_qcow2(FileNode.open(path))
        allowed = {b"": 0, b"x": 0, b"y": 0}
        for cluster in range(1500):
            allowed[bytes(await read_bytes(node, cluster << 16, 4096)).strip(b"\0")[:1]] += 1
        assert allowed[b"x"] == 0 or allowed[b"y"] == 0
        await node.make_empty()
        await node.close()
        qemu_img("check", "-q", path)
