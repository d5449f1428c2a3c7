"""Dirty bitmaps: all that has changed since the checkpoint, by whom, and little else."""

from __future__ import annotations

import random

import pytest
from replication_support import Built, Layout, build

from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import (
    FailoverTarget,
    Group,
    Stage,
    StandbyDisk,
    primary_changes,
    standby_changes,
)

SIZE = 1 << 20
SUBCLUSTER = 2048
EVERYTHING = [(SIZE, True)]


async def running(layout: Layout | None = None) -> tuple[Group, Built]:
    content = random.Random(3).randbytes(SIZE)
    built = await build("d", layout or Layout(size=SIZE), EventBus(), JobRegistry(), content)
    group = Group([built.disk])
    await group.start()
    return group, built


async def changed_bytes(disk: StandbyDisk, *, by_primary: bool) -> set[int]:
    """The subclusters that a bitmap shows as changed; asked for in odd pieces."""
    changes = primary_changes if by_primary else standby_changes
    marks = bytearray(SIZE)
    position = 0
    while position < SIZE:
        for length, changed in await changes(disk, position, min(300_001, SIZE - position)):
            assert length > 0
            marks[position : position + length] = bytes([changed]) * length
            position += length
    assert len(marks) == SIZE
    return {at for at in range(0, SIZE, SUBCLUSTER) if any(marks[at : at + SUBCLUSTER])}


@pytest.mark.parametrize("seed", range(6))
async def test_each_side_sees_its_own_changes_and_a_checkpoint_ends_them(seed: int) -> None:
    rng = random.Random(seed)
    group, built = await running()
    disk = built.disk
    for _ in range(3):
        written: dict[bool, set[int]] = {True: set(), False: set()}
        for _ in range(30):
            by_primary = rng.random() < 0.5
            node = disk.primary if by_primary else disk.standby
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 512, 4096, 70_000]), SIZE - offset)
            operation = rng.choice(["write", "write", "zero", "trim"])
            if operation == "write":
                await node.pwrite(offset, rng.randbytes(length))
            elif operation == "zero":
                await node.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            else:
                await node.discard(offset, length)
            first, last = offset // SUBCLUSTER, (offset + length - 1) // SUBCLUSTER
            written[by_primary] |= {at * SUBCLUSTER for at in range(first, last + 1)}
        assert await changed_bytes(disk, by_primary=True) == written[True], seed
        assert await changed_bytes(disk, by_primary=False) == written[False], seed
        await group.checkpoint()
        assert await changed_bytes(disk, by_primary=True) == set()
        assert await changed_bytes(disk, by_primary=False) == set()
    await group.close()


async def test_zeroing_what_is_zeroes_already_is_no_change() -> None:
    group, built = await running(Layout(size=SIZE, secondary_format="qcow2"))
    disk = built.disk
    await disk.primary.write_zeroes(0, SIZE)
    await group.checkpoint()
    await disk.primary.write_zeroes(0, SIZE)
    assert await changed_bytes(disk, by_primary=True) == set()
    await group.close()


async def test_where_nobody_keeps_account_everything_has_changed() -> None:
    group, built = await running()
    disk = built.disk
    await group.stop()
    assert disk.stage is Stage.DONE
    # The primary's writes pass by; the standby's stay in the active overlay.
    assert await primary_changes(disk, 0, SIZE) == EVERYTHING
    assert await standby_changes(disk, 0, SIZE) == [(SIZE, False)]
    await disk.standby.pwrite(4096, b"x")
    assert await changed_bytes(disk, by_primary=False) == {4096}
    await group.reset(force=True)
    assert group.disks[0].stage is Stage.NONE
    assert await primary_changes(disk, 0, SIZE) == EVERYTHING
    assert await standby_changes(disk, 0, SIZE) == EVERYTHING
    await group.start()
    await disk.primary.pwrite(0, b"x")
    await group.failover(FailoverTarget.STANDBY)
    assert await primary_changes(disk, 0, SIZE) == EVERYTHING
    assert await standby_changes(disk, 0, SIZE) == EVERYTHING
    await group.close()


async def test_an_answer_falls_short_of_what_would_take_long_to_look_at() -> None:
    size = 8 << 30
    built = await build("d", Layout(size, "qcow2"), EventBus(), JobRegistry())
    group = Group([built.disk])
    await group.start()
    assert await standby_changes(built.disk, 0, size) == [(size, False)]  # no table, nothing to do
    await built.disk.standby.write_zeroes(0, size)
    runs = await standby_changes(built.disk, 0, size)
    assert [changed for _, changed in runs] == [True] * len(runs)
    assert 0 < sum(length for length, _ in runs) <= 1 << 30
    await group.close()
