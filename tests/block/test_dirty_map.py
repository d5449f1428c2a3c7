"""DirtyMap against a model of one state a granule: what is not CLEAN is marked in the file, always,
and nothing is unmarked that was written since the turn."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from replnbd.block import DirtyMap, FileNode, MemoryNode, PassThrough
from replnbd.block.digest import GRANULE
from replnbd.block.dirty_map import BEHIND, CLEAN, FRESH, SENT
from replnbd.block.node import Buffer
from replnbd.filters import DelayNode, FaultNode

START = 4096
"""Where the map begins in the file."""

SHORT = 513
"""Bytes of a last granule that is none."""


class UncertainFile(PassThrough):
    """Any store may have to wait, and one that waits may reach the file early or late."""

    def __init__(self, file: MemoryNode, rng: random.Random) -> None:
        super().__init__("uncertain", file)
        self.rng = rng

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.rng.random() < 0.7 and self.file.pwrite_nowait(offset, data)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        await self.file.pwrite(offset, data)
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)


class Walk:
    """A map, its file, and what each granule must be."""

    def __init__(self, seed: int, *, uncertain: bool) -> None:
        self.rng = random.Random(seed)
        count = self.rng.choice([1, 2, 7, 40])
        self.size = count * GRANULE - self.rng.choice([0, GRANULE - SHORT])
        self.memory = MemoryNode(START + count)
        self.file = UncertainFile(self.memory, self.rng) if uncertain else self.memory
        self.map = DirtyMap(self.size, self.file, START)
        self.model = [CLEAN] * count
        self.written = [0] * count
        """How often each granule was marked."""
        self.turns: list[tuple[set[int], list[int]]] = []
        """What `turn` gave, and `written` then."""
        self.tasks: set[asyncio.Task[None]] = set()

    def draw(self) -> tuple[int, int]:
        offset = self.rng.randrange(self.size)
        longest = self.rng.choice([1, 4096, 3 * GRANULE, self.size])
        return offset, self.rng.randrange(1, min(longest, self.size - offset) + 1)

    @staticmethod
    def granules(offset: int, length: int) -> range:
        return range(offset // GRANULE, (offset + length - 1) // GRANULE + 1)

    def check(self) -> None:
        states = list(self.map.states[:])
        assert states == self.model
        for granule, state in enumerate(states):
            marked = self.memory.data[START + granule]
            assert state == CLEAN or marked, f"granule {granule} is {state}, and not marked"
        assert self.map.behind == states.count(BEHIND)
        assert self.map.unproven == states.count(FRESH) + states.count(SENT)
        assert self.map.dirty == len(states) - states.count(CLEAN)
        assert self.map.behind_bytes <= self.size

    # Section: steps

    def mark_nowait(self) -> None:
        offset, length = self.draw()
        if self.map.mark_nowait(offset, length):
            self.marked(offset, length)

    def marked(self, offset: int, length: int) -> None:
        for granule in self.granules(offset, length):
            assert self.memory.data[START + granule], "it may be written now, and is not marked"
            self.written[granule] += 1
            if self.model[granule] != BEHIND:
                self.model[granule] = FRESH

    def mark(self) -> None:
        offset, length = self.draw()

        async def mark() -> None:
            await self.map.mark(offset, length)
            self.marked(offset, length)

        self.tasks.add(asyncio.get_running_loop().create_task(mark()))

    def fall_behind(self) -> None:
        offset, length = self.draw()
        marked = [g for g in self.granules(offset, length) if self.model[g] != CLEAN]
        if len(marked) == len(self.granules(offset, length)):
            self.map.fall_behind(offset, length)
            for granule in marked:
                self.model[granule] = BEHIND

    def all_fall_behind(self) -> None:
        self.map.all_fall_behind()
        self.model = [state if state == CLEAN else BEHIND for state in self.model]

    def take(self) -> None:
        offset, length = self.draw()
        self.map.take(offset, length)
        for granule in self.granules(offset, length):
            if self.model[granule] == BEHIND:
                self.model[granule] = FRESH
                self.written[granule] += 1

    def turn(self) -> None:
        granules = self.map.turn()
        self.model = [SENT if state == FRESH else state for state in self.model]
        assert granules == {g for g, state in enumerate(self.model) if state == SENT}
        self.turns = [*self.turns[-1:], (granules, list(self.written))]

    def clear(self) -> None:
        """The newest turn, as provers that take turns do."""
        if not self.turns:
            return
        granules, written = self.turns[-1]
        self.map.clear(granules)
        for granule, state in enumerate(self.map.states[:]):
            if state != self.model[granule]:
                assert state == CLEAN
                assert granule in granules
                assert self.model[granule] == SENT
                assert self.written[granule] == written[granule], "it was written since the turn"
                self.model[granule] = CLEAN

    def found_equal(self) -> None:
        found = self.map.next_behind(0, GRANULE * self.rng.choice([1, 3, 100]))
        if found is None:
            return
        self.map.found_equal(*found)
        for granule in self.granules(*found):
            state = self.map.states[granule]
            assert state in (CLEAN, FRESH)
            self.model[granule] = state

    def reload(self) -> None:
        """Whoever comes next knows the file alone; here, it is only looked at."""
        again = DirtyMap(self.size, self.memory, START)

        async def load() -> None:
            await again.load()

        with pytest.raises(StopIteration):
            load().send(None)
        for granule, state in enumerate(self.model):
            assert again.states[granule] in (CLEAN, BEHIND)
            assert state == CLEAN or again.states[granule] == BEHIND
        assert again.behind == list(again.states[:]).count(BEHIND) == again.dirty

    def queries(self) -> None:
        offset, length = self.draw()
        states = self.model
        assert self.map.is_behind(offset, length) is any(
            states[g] == BEHIND for g in self.granules(offset, length)
        )
        runs_max = self.rng.choice([1, 2, 1000])
        runs = self.map.runs(offset, length, runs_max)
        assert runs == naive_runs(states, offset, length)[:runs_max]
        start = self.rng.randrange(len(states)) * GRANULE
        longest = GRANULE * self.rng.choice([1, 2, 1000])
        found = self.map.next_behind(start, longest)
        assert found == naive_next(states, self.size, start, longest)
        assert self.map.next_behind(self.size, longest) is None

    async def run(self, steps: int) -> None:
        actions: list[Callable[[], None]] = [
            self.mark_nowait, self.mark_nowait, self.mark, self.fall_behind, self.take, self.turn,
            self.clear, self.found_equal, self.reload, self.queries,
        ]  # fmt: skip
        for _ in range(steps):
            self.rng.choice([*actions, self.all_fall_behind] if _ % 9 == 0 else actions)()
            if self.rng.random() < 0.5:
                await asyncio.sleep(0)
            self.check()
            self.tasks = {task for task in self.tasks if not done_well(task)}
        while self.tasks:
            await asyncio.sleep(0)
            self.check()
            self.tasks = {task for task in self.tasks if not done_well(task)}


def done_well(task: asyncio.Task[None]) -> bool:
    if task.done():
        task.result()
    return task.done()


def naive_runs(states: list[int], offset: int, length: int) -> list[tuple[int, bool]]:
    runs: list[tuple[int, bool]] = []
    for granule in Walk.granules(offset, length):
        begin, end = granule * GRANULE, (granule + 1) * GRANULE
        count = min(end, offset + length) - max(begin, offset)
        dirty = states[granule] != CLEAN
        if runs and runs[-1][1] is dirty:
            count += runs.pop()[0]
        runs.append((count, dirty))
    return runs


def naive_next(
    states: list[int], size: int, offset: int, length_max: int
) -> tuple[int, int] | None:
    for granule in range(offset // GRANULE, len(states)):
        if states[granule] == BEHIND:
            stop = granule
            most = granule + length_max // GRANULE
            while stop < min(len(states), most) and states[stop] == BEHIND:
                stop += 1
            return granule * GRANULE, min(stop * GRANULE, size) - granule * GRANULE
    return None


@pytest.mark.parametrize("seed", range(16))
async def test_a_walk_over_a_file_that_never_waits(seed: int) -> None:
    print("seed", seed)
    await Walk(seed, uncertain=False).run(200)


@pytest.mark.parametrize("seed", range(100, 124))
async def test_a_walk_over_a_file_whose_stores_wait_and_land_at_any_moment(seed: int) -> None:
    print("seed", seed)
    await Walk(seed, uncertain=True).run(200)


# Section: what marks or unmarks everything


@pytest.mark.parametrize("seed", range(12))
async def test_marking_and_clearing_everything_leaves_no_granule_in_two_states(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    walk = Walk(seed, uncertain=True)
    await walk.run(60)
    everything: list[Callable[[], Awaitable[None]]] = [
        walk.map.mark_everything,
        walk.map.clear_everything,
    ]
    for _ in range(10):
        state, action = rng.choice([*zip((BEHIND, CLEAN), everything, strict=True)])
        task = asyncio.ensure_future(action())
        while not task.done():
            offset, length = walk.draw()
            if rng.random() < 0.5 and walk.map.mark_nowait(offset, length):
                walk.marked(offset, length)
            await asyncio.sleep(0)
        walk.model = list(walk.map.states[:])
        walk.check()
        if state == BEHIND:
            assert set(walk.model) == {BEHIND}
        await walk.run(20)


async def test_a_store_of_everything_that_fails_leaves_what_can_be_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("replnbd.block.dirty_map._LOAD_BYTES", 4)
    memory = MemoryNode(16)
    file = FaultNode("fault", memory)
    dirty = DirtyMap(16 * GRANULE, file, 0)
    for operation in (dirty.mark_everything, dirty.clear_everything):
        await dirty.mark(2 * GRANULE, 12 * GRANULE)
        file.fail("pwrite", errno.ENOSPC, offset=8, length=1)
        with pytest.raises(OSError, match="No space"):
            await operation()
        file.heal()
        states = list(dirty.states[:])
        assert dirty.behind == states.count(BEHIND)
        assert dirty.unproven == states.count(FRESH) + states.count(SENT)
        for granule in dirty.turn():
            assert states[granule] in (FRESH, SENT)
        for granule, state in enumerate(states):
            assert state == CLEAN or memory.data[granule]


async def test_what_is_marked_while_everything_is_cleared_stays_marked() -> None:
    memory = MemoryNode(8)
    dirty = DirtyMap(8 * GRANULE, DelayNode("slow", memory), 0)
    await dirty.mark(0, 8 * GRANULE)
    clearing = asyncio.ensure_future(dirty.clear_everything())
    await asyncio.sleep(0)
    await asyncio.gather(dirty.mark(GRANULE, 1), clearing)
    assert list(dirty.states[:]) == [CLEAN, FRESH] + [CLEAN] * 6
    assert list(memory.data) == [0, 1] + [0] * 6


# Section: files that fail or are slow


async def test_a_mark_that_cannot_be_stored_is_an_error_and_marks_nothing() -> None:
    memory = MemoryNode(4)
    file = FaultNode("fault", memory)
    dirty = DirtyMap(4 * GRANULE, file, 0)
    file.fail("pwrite", errno.EIO)
    assert not dirty.mark_nowait(0, 1)
    with pytest.raises(OSError, match="injected"):
        await dirty.mark(0, 2 * GRANULE)
    assert list(dirty.states[:]) == [CLEAN] * 4
    assert not any(memory.data)
    file.heal()
    await dirty.mark(0, 2 * GRANULE)
    assert list(memory.data) == [1, 1, 0, 0]


async def test_what_cannot_be_unmarked_stays_marked() -> None:
    memory = MemoryNode(4)
    file = FaultNode("fault", memory)
    dirty = DirtyMap(4 * GRANULE, file, 0)
    await dirty.mark(0, 4 * GRANULE)
    granules = dirty.turn()
    file.fail("pwrite", errno.EIO)
    dirty.clear(granules)
    assert list(dirty.states[:]) == [SENT] * 4
    file.heal()
    dirty.clear(granules)
    assert list(dirty.states[:]) == [CLEAN] * 4
    assert not any(memory.data)


async def test_a_clear_does_not_pass_a_mark_that_waits() -> None:
    """Unmarked by a store that passes it, a granule would be written without a mark."""
    memory = MemoryNode(4)
    slow = DelayNode("slow", memory)
    dirty = DirtyMap(4 * GRANULE, slow, 0)
    await dirty.mark(0, GRANULE)
    granules = dirty.turn()
    marking = asyncio.ensure_future(dirty.mark(0, 2 * GRANULE))
    await asyncio.sleep(0)
    dirty.clear(granules)
    assert dirty.states[0] == SENT
    assert not dirty.mark_nowait(3 * GRANULE, 1)
    await marking
    assert list(dirty.states[:]) == [FRESH, FRESH, CLEAN, CLEAN]
    assert list(memory.data) == [1, 1, 0, 0]


async def test_nothing_is_found_equal_in_the_file_while_a_mark_waits() -> None:
    """The mark may have landed, and would be unmarked; it is told as done after that."""

    class Landing(MemoryNode):
        async def pwrite(self, offset: int, data: Buffer) -> None:
            MemoryNode.pwrite_nowait(self, offset, data)
            await asyncio.sleep(0)

        def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
            return not any(data) and MemoryNode.pwrite_nowait(self, offset, data)

    memory = Landing(4)
    dirty = DirtyMap(4 * GRANULE, memory, 0)
    await dirty.mark_behind(0, GRANULE)
    marking = asyncio.ensure_future(dirty.mark(0, 2 * GRANULE))
    await asyncio.sleep(0)
    dirty.found_equal(0, GRANULE)
    await marking
    assert list(dirty.states[:]) == [FRESH, FRESH, CLEAN, CLEAN]
    assert list(memory.data) == [1, 1, 0, 0]


async def test_a_mark_that_is_cancelled_holds_up_nobody() -> None:
    memory = MemoryNode(4)
    dirty = DirtyMap(4 * GRANULE, DelayNode("slow", memory, 60.0), 0)
    marking = asyncio.ensure_future(dirty.mark(0, GRANULE))
    await asyncio.sleep(0)
    marking.cancel()
    await asyncio.wait([marking])
    assert dirty.states[0] == CLEAN
    dirty.clear(set())
    async with asyncio.timeout(1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await dirty.mark(0, GRANULE)


async def test_what_falls_behind_after_it_was_found_equal_is_marked_again() -> None:
    """An older write to it was still on its way, and is refused."""
    memory = MemoryNode(2)
    dirty = DirtyMap(2 * GRANULE, memory, 0)
    await dirty.mark_behind(0, GRANULE)
    dirty.found_equal(0, GRANULE)
    assert list(memory.data) == [0, 0]
    dirty.fall_behind(0, GRANULE)
    assert list(memory.data) == [1, 0]
    assert dirty.behind == 1


# Section: large disks


async def test_a_clean_disk_of_16_tib_costs_little(tmp_path: Path) -> None:
    size = 16 << 40
    path = tmp_path / "map"
    with path.open("wb") as file:
        file.truncate(size // GRANULE)
    before = resident_bytes()
    node = FileNode.open(path)
    dirty = DirtyMap(size, node, 0)
    began = time.thread_time()
    await dirty.load()
    assert dirty.next_behind(0, 1 << 30) is None
    assert dirty.runs(0, size, 10) == [(size, False)]
    await dirty.clear_everything()
    await dirty.mark(size - 1, 1)
    assert dirty.next_behind(0, 1 << 30) is None
    dirty.all_fall_behind()
    assert dirty.next_behind(0, 1 << 30) == (size - GRANULE, GRANULE)
    assert time.thread_time() - began < 5
    assert resident_bytes() - before < 32 << 20
    await node.close()


async def test_everything_of_a_large_disk_is_marked_without_holding_up_the_loop(
    tmp_path: Path,
) -> None:
    size = 2 << 40
    path = tmp_path / "map"
    with path.open("wb") as file:
        file.truncate(size // GRANULE)
    node = FileNode.open(path)
    dirty = DirtyMap(size, node, 0)
    await dirty.mark_everything()
    again = DirtyMap(size, node, 0)
    longest_s, last = 0.0, time.thread_time()
    loading = asyncio.ensure_future(again.load())
    while not loading.done():
        await asyncio.sleep(0)
        longest_s, last = max(longest_s, time.thread_time() - last), time.thread_time()
    assert again.behind == size // GRANULE
    assert longest_s < 0.5
    await dirty.clear_everything()
    assert dirty.dirty == 0
    assert path.read_bytes() == bytes(size // GRANULE)
    await node.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
