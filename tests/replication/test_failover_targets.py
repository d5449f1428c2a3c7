"""Failover to each of the three states a standby has, and a journal that cannot be written."""

from __future__ import annotations

import asyncio
import random

import pytest
from replication_support import Built, Layout, build

from replnbd.block import MemoryNode, read_bytes
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import FaultNode
from replnbd.jobs import JobRegistry
from replnbd.replication import FailoverTarget, Group, Journal, Stage, keeper

SIZE = 1 << 20
AT_CHECKPOINT, LATEST, MINE = b"checkpoint", b"latest!!!!", b"mine"


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "RETRY_S", 0.001)


async def running() -> tuple[Group, list[Built], FaultNode]:
    """Two disks with a checkpoint, later writes of both sides, and a journal that can fail."""
    bus, jobs = EventBus(), JobRegistry()
    content = random.Random(1).randbytes(SIZE)
    built = [await build(f"d{n}", Layout(size=SIZE), bus, jobs, content) for n in range(2)]
    file = FaultNode("journal", MemoryNode())
    journal = Journal(file)
    group = Group([each.disk for each in built], journal)
    await group.start()
    for each in built:
        await each.disk.primary.pwrite(0, AT_CHECKPOINT)
    await group.checkpoint()
    for each in built:
        await each.disk.primary.pwrite(0, LATEST)
        await each.disk.standby.pwrite(4096, MINE)
    return group, built, file


EXPECTED = {
    FailoverTarget.STANDBY: (AT_CHECKPOINT, True),
    FailoverTarget.CHECKPOINT: (AT_CHECKPOINT, False),
    FailoverTarget.LATEST: (LATEST, False),
}


def content_of(target: FailoverTarget) -> bytearray:
    first, mine = EXPECTED[target]
    expected = bytearray(random.Random(1).randbytes(SIZE))
    expected[: len(first)] = first
    if mine:
        expected[4096 : 4096 + len(MINE)] = MINE
    return expected


@pytest.mark.parametrize("target", FailoverTarget)
async def test_the_disk_becomes_what_was_asked_for(target: FailoverTarget) -> None:
    group, built, _ = await running()
    generation = group.generation
    await group.failover(target)
    for each in built:
        assert await read_bytes(each.disk.standby, 0, SIZE) == content_of(target)
    await group.wait_committed()
    assert group.generation != generation
    for each in built:
        assert (each.disk.stage, each.disk.target) == (Stage.DONE, target)
        assert await read_bytes(each.disk.secondary, 0, SIZE) == content_of(target)
        with pytest.raises(OSError, match="fenced"):
            await each.disk.primary.pwrite(0, b"stale")
    await group.close()


async def test_without_a_target_it_is_the_standbys_view() -> None:
    group, built, _ = await running()
    await group.failover()
    await group.wait_committed()
    wanted = content_of(FailoverTarget.STANDBY)
    assert await read_bytes(built[0].disk.secondary, 0, SIZE) == wanted
    await group.close()


@pytest.mark.parametrize("target", [FailoverTarget.STANDBY, FailoverTarget.CHECKPOINT])
async def test_a_failed_commit_is_tried_again_with_the_same_target(target: FailoverTarget) -> None:
    group, built, _ = await running()
    for each in built:
        each.secondary_fault.fail("pwrite")
    await group.failover(target)
    generation = group.generation
    with pytest.raises(StateError, match="commit-d0"):
        await group.wait_committed()
    for each in built:
        each.secondary_fault.heal()
    other = FailoverTarget.LATEST
    text = f"the failover to '{target.value}' has begun on 'd1': it can only be tried again"
    with pytest.raises(StateError, match=text):
        await group.failover(other)
    await group.failover()
    await group.wait_committed()
    assert group.generation == generation
    for each in built:
        assert await read_bytes(each.disk.secondary, 0, SIZE) == content_of(target)
    await group.close()


async def test_the_latest_needs_no_view_that_belongs_together() -> None:
    group, built, _ = await running()
    built[1].overlay_faults[0].fail("pwrite", times=1)
    with pytest.raises(StateError, match="Failed to empty"):
        await group.checkpoint()
    if group._torn:
        with pytest.raises(StateError, match="make a good checkpoint first"):
            await group.failover()
    await group.failover(FailoverTarget.LATEST)
    await group.wait_committed()
    wanted = content_of(FailoverTarget.LATEST)
    for each in built:
        assert await read_bytes(each.disk.secondary, 0, SIZE) == wanted
    await group.close()


async def test_a_checkpoint_that_the_next_process_ends_mends_a_torn_group() -> None:
    group, _, journal = await running()
    group._torn = True
    journal.fail("pwrite", skip=1)  # the process dies when the checkpoint is recorded and made
    await group.checkpoint()
    record = await Journal(journal).load()
    assert record is not None
    assert [disk.emptying for disk in record.disks] == [["active", "hidden"]] * 2
    assert record.torn is False
    assert [disk.checkpoint_count for disk in record.disks] == [3, 3]
    journal.heal()
    await group.close()


# Section: a journal that cannot be written


async def views(built: list[Built]) -> list[bytearray]:
    return [await read_bytes(each.disk.standby, 0, SIZE) for each in built]


@pytest.mark.parametrize("command", ["checkpoint", "stop", "failover"])
async def test_a_command_that_cannot_be_recorded_has_not_begun(command: str) -> None:
    group, built, journal = await running()
    before, generation = await views(built), group.generation
    journal.fail("pwrite", times=1)
    with pytest.raises(StateError, match=r"^cannot write the journal: Input/output error"):
        await getattr(group, command)()
    assert [each.disk.stage for each in built] == [Stage.RUNNING] * 2
    assert [each.disk.promoted for each in built] == [False] * 2
    assert group.generation == generation
    assert await views(built) == before
    await getattr(group, command)()  # and can be tried again
    await group.wait_committed()
    await group.close()


async def test_while_the_journal_cannot_be_written_nobody_is_served() -> None:
    group, built, journal = await running()
    before = await views(built)
    journal.fail("pwrite")
    with pytest.raises(StateError, match="cannot write the journal"):
        await group.checkpoint()
    for each in built:
        for node in (each.disk.primary, each.disk.standby):
            with pytest.raises(OSError, match="nobody is served until it can"):
                await node.pwrite(0, b"x")
    with pytest.raises(StateError, match="the journal cannot be written"):
        await group.failover()
    journal.heal()
    while group.keeper.suspended is not None:
        await asyncio.sleep(0.001)  # by itself
    assert await views(built) == before
    await group.checkpoint()
    for view in await views(built):
        assert view[: len(LATEST)] == LATEST
    await group.close()


async def test_a_group_that_is_suspended_can_be_closed() -> None:
    group, _, journal = await running()
    journal.fail("*")
    with pytest.raises(StateError):
        await group.checkpoint()
    await group.close()
