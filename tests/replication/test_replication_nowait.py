"""Requests of a replicated disk that are done at once, between others that wait: the view, the
secondary disk, drains and the commit are as if each request came after the other."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable

import pytest

from replnbd.block import BlockNode, Buffer, MemoryNode, RangeLock, read_bytes
from replnbd.events import EventBus
from replnbd.filters import CopyBeforeWrite, DelayNode
from replnbd.jobs import JobRegistry
from replnbd.qcow2 import Qcow2Node, check_image, create_qcow2, open_qcow2, read_header
from replnbd.replication import Group, Stage, StandbyDisk
from replnbd.replication.nodes import GateNode

SUB = 2048
CLUSTER = 65536


class Reluctant(DelayNode):
    """A file that at times does at once what it is asked for, and at times wants to wait."""

    def __init__(self, name: str, file: BlockNode, rng: random.Random) -> None:
        super().__init__(name, file)
        self.rng = rng
        self.eager = 0.7

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        return self.rng.random() < self.eager and self.file.pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.rng.random() < self.eager and self.file.pwrite_nowait(offset, data)


async def write_hurriedly(node: BlockNode, offset: int, data: Buffer) -> None:
    """Write as the server does."""
    if not node.pwrite_nowait(offset, data):
        await node.pwrite(offset, data)


async def read_hurriedly(node: BlockNode, offset: int, length: int) -> bytearray:
    """Read as the server does."""
    buffer = bytearray(length)
    if not node.pread_nowait(offset, memoryview(buffer)):
        await node.pread(offset, memoryview(buffer))
    return buffer


async def assert_sound(*files: MemoryNode) -> None:
    for file in files:
        copy = MemoryNode()
        copy.data[:] = file.data
        copy.size = len(copy.data)
        report = await check_image(copy, await read_header(copy))
        assert (report.corruptions, report.leaks) == (0, 0), report.findings


# Section: copy-before-write, step by step


class Steps:
    """What happens to the n-th step of a request, over all files: it waits, or it fails."""

    def __init__(self) -> None:
        self.left = -1
        self.fails = False

    def arm(self, nth: int, *, fails: bool) -> None:
        self.left, self.fails = nth, fails

    def disarm(self) -> bool:
        """Whether it has come to that step."""
        reached, self.left = self.left == 0, -1
        return reached

    def take(self) -> bool:
        """Whether this step may be done at once; OSError if it is to fail."""
        if self.left > 0:
            self.left -= 1
            if not self.left:
                if self.fails:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return False
        return True


class Stepping(DelayNode):
    """A file whose steps are counted."""

    def __init__(self, file: MemoryNode, steps: Steps) -> None:
        super().__init__(file.name, file)
        self.steps = steps

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        return self.steps.take() and self.file.pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.steps.take() and self.file.pwrite_nowait(offset, data)


class Copying:
    """A copy-before-write filter over files whose steps are counted, with something saved."""

    @classmethod
    async def create(cls, size: int, *, extended: bool) -> Copying:
        self = cls()
        self.steps = Steps()
        self.secondary, self.overlay = MemoryNode(name="secondary"), MemoryNode(name="hidden")
        self.secondary.data[:] = random.Random(size).randbytes(size)
        self.secondary.size = size
        await create_qcow2(
            self.overlay, size, cluster_size=CLUSTER, extended_l2=extended,
            backing_file="below", backing_format="raw",
        )  # fmt: skip
        below = Stepping(self.secondary, self.steps)
        self.hidden = await open_qcow2(Stepping(self.overlay, self.steps), backing=below)
        self.copy = CopyBeforeWrite("copy", below, self.hidden)
        self.view = bytes(self.secondary.data)
        await self.copy.pwrite(0, bytes(SUB))
        return self

    steps: Steps
    secondary: MemoryNode
    overlay: MemoryNode
    hidden: Qcow2Node
    copy: CopyBeforeWrite
    view: bytes


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (2 * CLUSTER, CLUSTER),  # the first touch of a cluster
        (2 * CLUSTER + 700, 9),  # of a part of a subcluster
        (SUB, 3 * SUB),  # beside what has been saved
        (0, 5),  # what has been saved
        (0, 2 * SUB),  # both
        (3 * CLUSTER - 3, 6),  # in two clusters
        (4 * CLUSTER + 500, 12),  # at the end of the disk
    ],
)
async def test_the_view_stands_whichever_step_waits_or_fails(
    extended: bool, fails: bool, offset: int, length: int
) -> None:
    size = 4 * CLUSTER + 512
    nth = 0
    reached = True
    while reached:
        nth += 1
        world = await Copying.create(size, extended=extended)
        before = bytes(world.secondary.data)
        data = random.Random(nth).randbytes(length)
        world.steps.arm(nth, fails=fails)
        error = None
        try:
            await write_hurriedly(world.copy, offset, data)
        except OSError as exc:
            error = exc.errno
        reached = world.steps.disarm()
        assert error == (errno.ENOSPC if reached and fails else None)
        after = before[:offset] + data + before[offset + length :]
        assert world.secondary.data == (before if error else after)
        assert await read_bytes(world.hidden, 0, size) == world.view
        assert world.copy.bytes_copied <= world.hidden.allocated_bytes
        # Again, and all of it: the same view still.
        await write_hurriedly(world.copy, offset, data)
        assert world.secondary.data == after
        for position in range(0, size, 5000):
            end = min(position + 5000, size)
            await write_hurriedly(world.copy, position, bytes(end - position))
        assert world.secondary.data == bytes(size)
        assert await read_bytes(world.hidden, 0, size) == world.view
        assert world.copy.bytes_copied == size, "each byte was saved once"
        await world.copy.flush()
        await assert_sound(world.overlay)
    assert nth > 1


# Section: gates


class Replica:
    """A running disk whose files at times wait, and what either side must read of it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.size = self.rng.choice((4 * CLUSTER + 1536, 1 << 20))
        self.primary = bytearray(self.rng.randbytes(self.size))
        self.view = bytearray(self.primary)
        self.flying: list[asyncio.Task[object]] = []

    async def build(self) -> None:
        rng = self.rng
        self.files = [MemoryNode(name=name) for name in ("secondary", "hidden", "active")]
        self.files[0].data[:] = self.primary
        self.files[0].size = self.size
        for file in self.files[1:]:
            cluster_size = rng.choice((4096, CLUSTER))
            await create_qcow2(
                file, self.size, cluster_size=cluster_size,
                extended_l2=cluster_size == CLUSTER and rng.random() < 0.7,
                backing_file="below", backing_format="raw",
            )  # fmt: skip
        self.slow = [Reluctant(file.name, file, rng) for file in self.files]
        hidden = await open_qcow2(self.slow[1], backing=self.slow[0], name="hidden")
        active = await open_qcow2(self.slow[2], backing=hidden, name="active")
        self.jobs = JobRegistry()
        self.disk = StandbyDisk(
            "d", "top", secondary=self.slow[0], hidden=hidden, active=active,
            bus=EventBus(), jobs=self.jobs,
        )  # fmt: skip
        self.group = Group([self.disk])
        await self.group.start()

    def fly(self, *sides: BlockNode) -> None:
        """Some requests of these sides, overlapping; they end as if in this order."""
        rng = self.rng
        for slow in self.slow:
            slow.eager = rng.choice((0.3, 0.8, 1.0))
        hot = rng.randrange(self.size)
        for _ in range(rng.randrange(1, 16)):
            node = rng.choice(sides)
            model = self.primary if node is self.disk.primary else self.view
            offset = rng.choice((rng.randrange(self.size), hot, hot & -SUB))
            length = min(rng.choice((1, 512, SUB, 4096, CLUSTER, 150_000)), self.size - offset)
            end = offset + length
            choice = rng.random()
            job: Awaitable[object]
            if choice < 0.4:
                job = self.read(node, offset, bytes(model[offset:end]))
            elif choice < 0.9:
                data = rng.randbytes(length)
                model[offset:end] = data
                job = write_hurriedly(node, offset, data)
            elif choice < 0.95:
                model[offset:end] = bytes(length)
                job = node.discard(offset, length)
            else:
                job = node.flush()
            self.flying.append(asyncio.ensure_future(job))

    async def read(self, node: BlockNode, offset: int, wanted: bytes) -> None:
        assert await read_hurriedly(node, offset, len(wanted)) == wanted

    async def land(self) -> None:
        await asyncio.gather(*self.flying)
        self.flying.clear()

    async def drain_begins(self, command: asyncio.Future[None]) -> None:
        """Until a command holds back what comes later, or has ended already."""
        held = self.disk._ranges.held
        while not (command.done() or any(end > 1 << 40 for _, end, _ in held.values())):
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(25))
async def test_both_sides_checkpoints_and_a_failover_in_any_mixture(seed: int) -> None:
    replica = Replica(seed)
    await replica.build()
    rng, disk = replica.rng, replica.disk
    for _ in range(6):
        replica.fly(disk.primary, disk.standby)
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        checkpoint = asyncio.ensure_future(replica.group.checkpoint())
        await replica.drain_begins(checkpoint)
        replica.view[:] = replica.primary
        replica.fly(disk.primary, disk.standby)
        await replica.land()
        await checkpoint
        assert await read_bytes(disk.primary, 0, replica.size) == replica.primary
        assert await read_bytes(disk.standby, 0, replica.size) == replica.view
        assert replica.files[0].data == replica.primary
    await asyncio.gather(disk.hidden.flush(), disk.active.flush())
    await assert_sound(*replica.files[1:])
    failover = asyncio.ensure_future(replica.group.failover())
    await replica.drain_begins(failover)
    while disk.stage is not Stage.DONE:
        replica.fly(disk.standby)
        await replica.land()
    await failover
    assert await read_bytes(disk.standby, 0, replica.size) == replica.view
    assert replica.files[0].data == replica.view
    await asyncio.gather(disk.hidden.flush(), disk.active.flush())
    await assert_sound(*replica.files[1:])


async def test_nothing_is_done_at_once_while_a_disk_is_drained() -> None:
    replica = Replica(1)
    await replica.build()
    disk = replica.disk
    for slow in replica.slow:
        slow.eager = 1.0
    buffer = memoryview(bytearray(SUB))
    await disk.primary.pwrite(0, b"x" * SUB)
    assert disk.primary.pwrite_nowait(0, b"y" * SUB)
    assert disk.standby.pread_nowait(0, buffer)
    async with disk.drained():
        written = disk.primary.bytes_written
        for gate in (disk.primary, disk.standby):
            assert not gate.pread_nowait(0, buffer)
            assert not gate.pwrite_nowait(0, bytes(SUB))
        assert disk.primary.bytes_written == written
    assert disk.primary.pread_nowait(0, buffer)
    assert buffer == b"y" * SUB
    assert disk.primary.bytes_written == 2 * SUB, "each write once"


async def test_a_side_waits_for_what_the_other_is_at_work_on() -> None:
    """The standby reads old data that the primary is about to overwrite."""
    replica = Replica(2)
    await replica.build()
    disk = replica.disk
    for slow in replica.slow:
        slow.eager = 0.0
    buffer = memoryview(bytearray(SUB))
    writing = asyncio.ensure_future(disk.primary.pwrite(SUB, b"x" * SUB))
    await asyncio.sleep(0)
    for slow in replica.slow:
        slow.eager = 1.0
    assert not disk.standby.pread_nowait(SUB, buffer)
    assert not disk.primary.pwrite_nowait(SUB + 7, b"later")
    await writing
    assert await read_hurriedly(disk.standby, SUB, SUB) == replica.view[SUB : 2 * SUB]


async def test_a_write_during_a_commit_is_never_done_at_once() -> None:
    """It has to be split between the overlays and the disk; the twin of the filter below would
    write to the top overlay alone."""
    replica = Replica(3)
    await replica.build()
    disk = replica.disk
    await disk.standby.pwrite(0, b"s" * CLUSTER)
    async with disk.drained():
        disk.fail_over()
    target = disk.standby.target
    for slow in replica.slow:
        slow.eager = 1.0
    assert not target.pwrite_nowait(0, b"t" * SUB)
    assert not target.pwrite_nowait(3 * CLUSTER, b"t" * SUB)
    while disk.stage is not Stage.DONE:
        await asyncio.sleep(0)
    assert disk.standby.pwrite_nowait(0, b"t" * SUB)
    assert replica.files[0].data[:CLUSTER] == b"t" * SUB + b"s" * (CLUSTER - SUB)


async def test_a_fenced_side_is_refused_by_the_coroutine() -> None:
    replica = Replica(4)
    await replica.build()
    async with replica.disk.drained():
        replica.disk.fail_over()
    assert not replica.disk.primary.pwrite_nowait(0, b"x")
    with pytest.raises(OSError, match="fenced"):
        await replica.disk.primary.pwrite(0, b"x")
    while replica.disk.stage is not Stage.DONE:
        await asyncio.sleep(0)


class Vast(MemoryNode):
    """Has nothing in it, and makes zeroes of any part of that at once."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 1 << 44
        self.zeroed: list[tuple[int, int]] = []

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self.zeroed.append((offset, length))

    async def discard(self, offset: int, length: int) -> None:
        self.zeroed.append((offset, length))


@pytest.mark.parametrize("operation", ["write_zeroes", "discard"])
async def test_long_zeroing_gives_everybody_else_a_turn_every_64_mib(operation: str) -> None:
    node = Vast()
    gate = GateNode("gate", node.size, node, RangeLock())
    start, length = 12345, 1 << 30
    zeroing = asyncio.ensure_future(getattr(gate, operation)(start, length))
    turns = 0
    while not zeroing.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= length // (64 << 20)
    position = start
    for offset, count in node.zeroed:
        assert offset == position
        position += count
    assert position == start + length
    assert gate.bytes_written == length
