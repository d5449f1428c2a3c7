"""The group: all disks or none, and errors that are kept until the next good command."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from replication_support import Built, Layout, build

from replnbd.block import read_bytes
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import Group, Stage

SIZE = 1 << 20


async def two_disks(*, sizes: tuple[int, int] = (SIZE, SIZE)) -> tuple[Group, list[Built]]:
    bus, jobs = EventBus(), JobRegistry()
    built = [
        await build(f"d{number}", Layout(size=size), bus, jobs, random.randbytes(size))
        for number, size in enumerate(sizes)
    ]
    return Group([each.disk for each in built]), built


async def contents(built: list[Built]) -> list[bytearray]:
    return [await read_bytes(each.disk.secondary, 0, each.disk.secondary.size) for each in built]


async def test_a_start_that_one_disk_refuses_starts_none_and_can_be_tried_again() -> None:
    group, built = await two_disks()
    before = await contents(built)
    for number in (0, 1):
        hidden = built[number].disk.hidden
        backing, hidden.backing = hidden.backing, None
        with pytest.raises(StateError, match=r"^Hidden disk doesn't have backing file$"):
            await group.start()
        hidden.backing = backing
        assert [each.disk.stage for each in built] == [Stage.NONE, Stage.NONE]
        assert group.error() == "Block replication is not running"
    await group.start()
    assert [each.disk.stage for each in built] == [Stage.RUNNING, Stage.RUNNING]
    assert group.error() is None
    assert await contents(built) == before
    await group.close()


async def write_both_sides(built: list[Built]) -> None:
    for each in built:
        await each.disk.standby.pwrite(4096, b"standby")
        await each.disk.primary.pwrite(8192, b"primary")


async def test_a_checkpoint_that_reached_one_disk_alone_is_not_promoted() -> None:
    group, built = await two_disks()
    await group.start()
    await write_both_sides(built)
    # The disks come last first; the second one fails when the other's overlay is empty already.
    built[0].overlay_faults[1].fail("pwrite", times=1)
    with pytest.raises(StateError, match=r"^Failed to empty d0-active: Input/output error"):
        await group.checkpoint()
    assert group.error() == "I/O error occurred"
    with pytest.raises(StateError, match=r"did not reach all disks.*make a good checkpoint first"):
        await group.failover()
    assert [each.disk.stage for each in built] == [Stage.RUNNING, Stage.RUNNING]
    await group.checkpoint()
    assert group.error() is None
    views = [await read_bytes(each.disk.standby, 0, SIZE) for each in built]
    assert views == await contents(built)
    await group.failover()
    await group.wait_committed()
    assert await contents(built) == views
    await group.close()


async def test_a_checkpoint_that_reached_no_disk_leaves_failover_possible() -> None:
    group, built = await two_disks()
    await group.start()
    await write_both_sides(built)
    views = [await read_bytes(each.disk.standby, 0, SIZE) for each in built]
    built[1].overlay_faults[1].fail("pwrite", times=1)
    with pytest.raises(StateError, match=r"^Failed to empty d1-active: Input/output error"):
        await group.checkpoint()
    await group.failover()
    await group.wait_committed()
    assert await contents(built) == views
    await group.close()


async def test_a_checkpoint_prepares_all_overlays_before_it_empties_one() -> None:
    """A long L1 table is replaced by another one: making that one may fail, and nothing is torn."""
    bus, jobs = EventBus(), JobRegistry()
    layout = Layout(size=20 << 20, cluster_size=512, extended_l2=False)
    built = [await build(f"d{number}", layout, bus, jobs) for number in range(2)]
    group = Group([each.disk for each in built])
    await group.start()
    await write_both_sides(built)
    views = [await read_bytes(each.disk.standby, 0, layout.size) for each in built]
    # The disks come last first, active overlays before hidden ones: this one is prepared last.
    built[0].overlay_faults[0].fail("pwrite", times=1)
    with pytest.raises(StateError, match=r"^Failed to empty d0-hidden: Input/output error"):
        await group.checkpoint()
    assert [await read_bytes(each.disk.standby, 0, layout.size) for each in built] == views
    await group.failover()
    await group.wait_committed()
    assert await contents(built) == views
    await group.close()


async def test_a_command_whose_caller_gives_up_is_done_whole() -> None:
    bus, jobs = EventBus(), JobRegistry()
    for turns in range(40):
        built = [
            await build(f"t{turns}d{n}", Layout(size=SIZE, suspends=True), bus, jobs)
            for n in (0, 1)
        ]
        group = Group([each.disk for each in built])
        await group.start()
        await write_both_sides(built)
        for command in (group.checkpoint, group.failover):
            caller = asyncio.create_task(command())
            for _ in range(turns):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.wait([caller])
        with contextlib.suppress(StateError):
            await group.start()  # has its turn when the others have ended
        states = {(each.disk.checkpoint_count, each.disk.promoted) for each in built}
        assert len(states) == 1, f"cancelled after {turns} turns: {states}"
        if turns:  # 0: the caller has not even begun
            assert states == {(2, True)}
        await group.wait_committed()
        await group.close()


async def test_after_the_end_commands_are_refused() -> None:
    group, built = await two_disks()
    await group.start()
    closing = asyncio.create_task(group.close())
    failover = asyncio.create_task(group.failover())
    await closing
    with pytest.raises(StateError, match=r"^replnbd is shutting down$"):
        await failover
    assert [each.disk.stage for each in built] == [Stage.RUNNING, Stage.RUNNING]


async def test_lengths_that_differ_are_refused_before_anything_is_done() -> None:
    group, built = await two_disks()
    built[1].disk.active.size -= 512
    with pytest.raises(
        StateError, match=r"^Active disk, hidden disk, secondary disk's length are not the same$"
    ):
        await group.start()
    assert built[0].disk.stage is Stage.NONE
    built[1].disk.active.size += 512
    await group.start()
    await group.close()


@pytest.mark.parametrize("role", ["active", "hidden"])
async def test_an_overlay_without_backing_is_refused_in_the_words_of_qemu(role: str) -> None:
    group, built = await two_disks()
    overlay = getattr(built[1].disk, role)
    backing, overlay.backing = overlay.backing, None
    with pytest.raises(StateError, match=f"^{role.title()} disk doesn't have backing file$"):
        await group.start()
    overlay.backing = backing
    await group.start()
    await group.close()


async def test_a_failed_checkpoint_is_told_until_the_next_good_one() -> None:
    group, built = await two_disks()
    await group.start()
    for each in built:
        await each.disk.standby.pwrite(4096, b"standby")
        await each.disk.primary.pwrite(8192, b"primary")
    built[1].overlay_faults[1].fail("*", times=1)
    with pytest.raises(StateError, match=r"^Failed to empty d1-active: Input/output error"):
        await group.checkpoint()
    assert group.error() == "I/O error occurred"
    assert built[1].disk.error is not None
    await group.checkpoint()
    assert group.error() is None
    for each in built:
        view = await read_bytes(each.disk.standby, 0, SIZE)
        assert view == await read_bytes(each.disk.secondary, 0, SIZE)
    await group.close()


async def test_what_overlays_hold_before_a_start_is_not_thrown_away_unasked() -> None:
    group, built = await two_disks()
    await built[1].disk.active.pwrite(0, b"of an earlier run")
    with pytest.raises(StateError, match=r"the overlays of 'd1' hold data of an earlier run"):
        await group.start()
    with pytest.raises(
        StateError, match=r"the overlays of 'd1' hold data that is in no disk, which a reset"
    ):
        await group.reset()
    found = await read_bytes(built[1].disk.active, 0, 17)
    assert found == b"of an earlier run"
    await group.reset(force=True)
    await group.start()
    await group.close()


async def test_a_failover_can_be_retried_until_it_succeeds_and_then_all_disks_are_done() -> None:
    group, built = await two_disks()
    await group.start()
    views = []
    for each in built:
        await each.disk.standby.pwrite(1000, random.randbytes(100_000))
        await each.disk.primary.pwrite(50_000, random.randbytes(300_000))
        views.append(await read_bytes(each.disk.standby, 0, SIZE))
    built[1].secondary_fault.fail("pwrite", skip=1)
    await group.failover()
    with pytest.raises(StateError, match=r"^'d1': commit-d1: Input/output error"):
        await group.wait_committed()
    assert [each.disk.stage for each in built] == [Stage.DONE, Stage.FAILOVER_FAILED]
    assert group.error() == "I/O error occurred"
    built[1].secondary_fault.heal()
    await group.failover()
    await group.wait_committed()
    assert [each.disk.stage for each in built] == [Stage.DONE, Stage.DONE]
    assert group.error() is None
    assert await contents(built) == views
    await group.close()
