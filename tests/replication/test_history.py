"""A disk's history, whose process may die at any operation on its file: the record is the one
before or the one after, and no mark is missing."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from crash_world import Machine

from replnbd.block import MemoryNode
from replnbd.block.digest import GRANULE
from replnbd.errors import ConfigError, ImageError
from replnbd.replication import History, Role, Stage
from replnbd.replication.history import MAP_START, HistoryRecord, file_bytes, read_record
from replnbd.replication.journal import Journal
from replnbd.replication.lineage import Lineage

COUNT = 5
SIZE = COUNT * GRANULE - 512


async def opened(machine: Machine, boot: str = "boot") -> History:
    return await History.open(machine.file("history"), SIZE, boot, Role.PRIMARY)


async def fresh(rng: random.Random) -> Machine:
    machine = Machine(rng)
    await machine.file("history").truncate(file_bytes(SIZE))
    return machine


async def lived(machine: Machine) -> History:
    """One that has been a primary in step, and has written since."""
    history = await opened(machine)
    await history.begin_pair(None)
    await history.in_step()
    await history.map.clear_everything()
    await history.step()
    await history.map.mark(GRANULE, 2 * GRANULE)
    return history


METHODS: dict[str, Callable[[History], Awaitable[object]]] = {
    "step": lambda h: h.step(),
    "begin_taking_over": lambda h: h.begin_taking_over("g"),
    "end_taking_over, happened": lambda h: h.end_taking_over(happened=True),
    "retract": lambda h: h.retract(),
    "begin_retracting": lambda h: h.begin_retracting(),
    "end_retracting, happened": lambda h: h.end_retracting(happened=True),
    "end_retracting, not": lambda h: h.end_retracting(happened=False),
    "forget": lambda h: h.forget(),
    "begin_pair": lambda h: h.begin_pair("nbd://there"),
    "begin_following": lambda h: h.begin_following("pair"),
    "end_following": lambda h: h.end_following(Lineage("g", ("f",))),
    "in_step": lambda h: h.in_step(),
    "demote": lambda h: h.demote(),
    "set_stage": lambda h: h.set_stage(Stage.RUNNING),
    "set_target": lambda h: h.set_target("nbd://there"),
    "close": lambda h: h.close(),
}

UNMARKS = ("begin_following", "end_following")
"""As of a copy: these clear the map, after the record that says so."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", METHODS)
async def test_a_death_leaves_the_record_before_or_the_one_after(method: str, fails: bool) -> None:
    """The n-th operation is the last, or fails, for every n."""
    done = False
    nth = 0
    while not done:
        nth += 1
        machine = await fresh(random.Random(nth))
        history = await lived(machine)
        before, marks = history.record, bytes(history.map.states[:])
        last = machine.operations + nth
        machine.die_at, machine.fail_at = (None, last) if fails else (last, None)
        try:
            await METHODS[method](history)
            done = True
        except OSError:
            assert machine.dead or machine.failed
            assert history.record == before or method in UNMARKS
        after = history.record
        if fails and not done:
            machine.fail_at = None
            await METHODS[method](history)  # tried again, it is as if nothing had been
            after = history.record
        machine.next_process()
        found = await opened(machine)
        # Random names differ, and the opening has said that the file is in use.
        assert msgspec.structs.replace(found.record, orderly=after.orderly) == after or (
            not done and not fails and one_step_from(before, found.record)
        ), (before, found.record)
        if method not in UNMARKS:
            for granule, state in enumerate(marks):
                assert state == 0 or found.map.states[granule], f"granule {granule} is not marked"
    assert nth > 1


def one_step_from(before: HistoryRecord, found: HistoryRecord) -> bool:
    """The record before, or a whole one after it."""
    if msgspec.structs.replace(found, orderly=before.orderly) == before:
        return True
    fields = msgspec.structs.asdict(before)
    changed = {
        name for name, value in msgspec.structs.asdict(found).items() if fields[name] != value
    }
    return changed <= {
        "lineage", "common", "pair", "foreign", "taking_over", "retracting", "syncing", "role",
        "stage", "to",
    }  # fmt: skip


@pytest.mark.parametrize("method", UNMARKS)
async def test_a_map_is_cleared_after_its_record(method: str) -> None:
    """Whoever dies in between has marks too many."""
    nth, done = 0, False
    while not done:
        nth += 1
        machine = await fresh(random.Random(nth))
        history = await lived(machine)
        before = history.record
        machine.die_at = machine.operations + nth
        try:
            await METHODS[method](history)
            done = True
        except OSError:
            assert machine.dead
        machine.next_process()
        found = await opened(machine)
        if msgspec.structs.replace(found.record, orderly=before.orderly) == before:
            assert found.map.behind == 2
    assert nth > 1


async def test_begin_pair_marks_everything_before_the_pair_is_another() -> None:
    nth, done = 0, False
    while not done:
        nth += 1
        machine = await fresh(random.Random(nth))
        history = await lived(machine)
        pair = history.record.pair
        machine.die_at = machine.operations + nth
        try:
            await history.begin_pair(None)
            done = True
        except OSError:
            assert machine.dead
        machine.next_process()
        found = await opened(machine)
        assert found.record.pair == pair or found.map.behind == COUNT
        assert found.map.behind >= 2


async def test_a_power_failure_drops_the_pair_and_nothing_else() -> None:
    machine = await fresh(random.Random(1))
    before = (await lived(machine)).record
    machine.next_process()
    found = await opened(machine, "another boot")
    assert found.record == msgspec.structs.replace(before, boot="another boot", pair=None)
    machine.next_process()
    assert (await opened(machine, "another boot")).record.pair is None


async def test_an_orderly_end_keeps_the_pair_over_a_boot() -> None:
    machine = await fresh(random.Random(1))
    history = await lived(machine)
    pair = history.record.pair
    await history.close()
    machine.next_process()
    found = await opened(machine, "another boot")
    assert found.record.pair == pair is not None
    assert not found.record.orderly
    assert found.map.behind == 2
    machine.next_process()
    assert (await opened(machine, "a third boot")).record.pair is None, "that was no orderly end"


async def test_a_reset_and_a_failover_that_have_not_happened_leave_the_lineage() -> None:
    machine = await fresh(random.Random(1))
    history = await lived(machine)
    lineage = history.record.lineage
    await history.begin_taking_over("g")
    assert history.record.lineage is not None
    assert history.record.lineage.generation == "g"
    await history.end_taking_over(happened=False)
    assert history.record.lineage == lineage
    await history.begin_retracting()
    await history.end_retracting(happened=False)
    assert history.record.lineage == lineage
    await history.begin_taking_over("h")
    await history.retract()  # of one that never heard that it had happened
    await history.end_taking_over(happened=False)
    assert history.record.lineage is not None
    assert history.record.lineage.generation == history.record.common


async def test_a_history_of_another_disk_is_one_clear_error() -> None:
    machine = await fresh(random.Random(1))
    await lived(machine)
    with pytest.raises(ConfigError, match=f"of {SIZE} bytes, and this one has 512"):
        await History.open(machine.file("history"), 512, "boot", Role.PRIMARY)


async def test_a_damaged_history_is_one_clear_error() -> None:
    machine = await fresh(random.Random(1))
    await lived(machine)
    file = machine.files["history"]
    for slot in range(4):
        file.data[slot << 16 | 100] ^= 1
    for read in (opened(machine), read_record(file)):
        with pytest.raises(ImageError, match="the history is damaged"):
            await read


async def test_one_damaged_slot_leaves_the_record_before() -> None:
    machine = await fresh(random.Random(1))
    history = await lived(machine)
    before = history.record
    await history.set_target("nbd://there")
    slot = history._records._newest[True]
    machine.files["history"].data[slot << 16 | 100] ^= 1
    machine.next_process()
    assert (await opened(machine)).record == before


async def test_a_file_of_another_kind_is_one_clear_error() -> None:
    for content in (b"QFI\xfb" + bytes(100), b"replnbdJ" + bytes(100)):
        machine = Machine(random.Random(1))
        machine.files["history"] = MemoryNode(file_bytes(SIZE))
        machine.files["history"].pwrite_nowait(1 << 16, content)
        with pytest.raises(ImageError, match="no record in it is whole"):
            await opened(machine)
    machine = Machine(random.Random(1))
    await lived(machine)
    with pytest.raises(ImageError, match="no record in it is whole: the journal is damaged"):
        await Journal(machine.file("history")).load()


async def test_the_map_is_behind_the_record() -> None:
    machine = await fresh(random.Random(1))
    await lived(machine)
    assert len(machine.files["history"].data) == file_bytes(SIZE) == MAP_START + COUNT
    assert list(machine.files["history"].data[MAP_START:]) == [0, 1, 1, 0, 0]
