"""Standbys with histories, and their sources, on a machine whose process can die at any operation
(crash_world): what differs between the two is marked on one side or the other, always."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from crash_world import SIZE, Machine, make_files, revive
from replication_support import Layout

from replnbd.block import BlockNode, read_bytes
from replnbd.block.digest import GRANULE
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.qcow2 import LastEnd, open_qcow2
from replnbd.replication import (
    Durability,
    FailoverTarget,
    Group,
    History,
    Journal,
    Role,
    Stage,
    StandbyDisk,
)
from replnbd.replication.history import file_bytes
from replnbd.replication.lineage import Claim, Lineage, Plan, new_name, plan

COUNT = -(-SIZE // GRANULE)


@dataclass
class Source:
    """A primary, which does not die: what it has, and what it knows."""

    rng: random.Random
    data: bytearray
    lineage: Lineage = field(default_factory=lambda: Lineage(new_name()))
    pair: str | None = None
    common: str | None = None
    """The generation in which the standby was told that it is in step."""
    marks: set[int] = field(default_factory=lambda: set(range(COUNT)))
    syncing: bool = False
    """Begun, and not ended: of the process that it was begun with."""
    in_step: bool = False

    @property
    def claim(self) -> Claim:
        return Claim(self.lineage, self.pair)

    def write(self) -> tuple[int, bytes]:
        """Here, and marked; the range, and what was written."""
        offset = self.rng.randrange(SIZE)
        length = min(self.rng.choice([1, 512, 4096, GRANULE]), SIZE - offset)
        data = self.rng.randbytes(length)
        self.marks |= set(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))
        self.data[offset : offset + length] = data
        return offset, data


class PeerLife:
    """Processes one after the other, with sources that go on."""

    def __init__(self, seed: int, disks: int) -> None:
        self.rng = random.Random(seed)
        self.machine = Machine(self.rng)
        self.layouts = [Layout.draw(self.rng, SIZE) for _ in range(disks)]
        self.sources = [Source(self.rng, bytearray(self.rng.randbytes(SIZE))) for _ in range(disks)]
        self.log: list[str] = []
        self.resets = 0
        self.failovers = 0

    async def begin(self) -> None:
        contents = [self.rng.randbytes(SIZE) for _ in self.layouts]
        await make_files(self.machine, self.layouts, contents)
        await self.boot()

    async def boot(self) -> None:
        """What `replnbd serve` does; OSError if it dies."""
        bus, jobs = EventBus(), JobRegistry()
        disks = [await self._open(number, bus, jobs) for number in range(len(self.layouts))]
        journal = Journal(self.machine.file("journal"))
        record = await journal.load()
        self.group = Group(disks, journal)
        for source in self.sources:
            source.syncing = source.in_step = False
        await self.group.open(record)

    async def _open(self, number: int, bus: EventBus, jobs: JobRegistry) -> StandbyDisk:
        layout = self.layouts[number]
        power = layout.durability is Durability.POWER
        secondary: BlockNode = self.machine.file(f"secondary{number}")
        if layout.secondary_format == "qcow2":
            secondary = await open_qcow2(secondary, power_safe=True)
        overlays = []
        below = secondary
        for layer in ("hidden", "active"):
            overlay = await open_qcow2(
                self.machine.file(f"{layer}{number}"),
                backing=below,
                power_safe=power,
                last_end=LastEnd.PROCESS_DEATH,
            )
            overlays.append(overlay)
            below = overlay

        async def history() -> History:
            return await History.open(
                self.machine.file(f"history{number}"), SIZE, "boot", Role.STANDBY
            )

        async def make() -> History:
            await self.machine.file(f"history{number}").truncate(file_bytes(SIZE))
            return await history()

        known = len(self.machine.files[f"history{number}"].data) if self._has(number) else 0
        return StandbyDisk(
            f"d{number}", f"top{number}", secondary=secondary, hidden=overlays[0],
            active=overlays[1], durability=layout.durability, bus=bus, jobs=jobs,
            history=await history() if known else None, make_history=make,
        )  # fmt: skip

    def _has(self, number: int) -> bool:
        return f"history{number}" in self.machine.files

    # Section: steps

    async def step(self) -> None:
        """One thing that is possible now."""
        number = self.rng.randrange(len(self.sources))
        source, disk = self.sources[number], self.group.disks[number]
        actions = [self.source_writes, self.source_writes]
        if not source.syncing and not source.in_step:
            actions += [self.begin_sync] * 3
        elif source.syncing:
            actions += [self.copy, self.copy, self.end_sync]
        if disk.stage not in (Stage.NONE,):
            actions.append(self.standby_writes)
        self.log.append("")
        if self.rng.random() < 0.3:
            await self.command()
            return
        action = self.rng.choice(actions)
        self.log[-1] = f"{action.__name__} {number} {disk.stage.value}"
        await action(source, disk)

    async def source_writes(self, source: Source, disk: StandbyDisk) -> None:
        """Sent where it may be, and else the source goes on alone."""
        way = source.syncing or source.in_step
        if not way and source.common == source.lineage.generation:
            source.lineage = source.lineage.step()
        before = set(source.marks)
        offset, data = source.write()
        touched = source.marks - before
        if not way:
            return
        behind = any(
            g in before for g in range(offset // GRANULE, (offset + len(data) - 1) // GRANULE + 1)
        )
        if not behind:
            await disk.primary.pwrite(offset, data)
            source.marks -= touched

    async def standby_writes(self, source: Source, disk: StandbyDisk) -> None:
        offset = self.rng.randrange(SIZE)
        length = min(self.rng.choice([1, 512, 4096, GRANULE]), SIZE - offset)
        if self.rng.random() < 0.3:
            await disk.standby.write_zeroes(offset, length)
        else:
            await disk.standby.pwrite(offset, self.rng.randbytes(length))

    async def begin_sync(self, source: Source, disk: StandbyDisk) -> None:
        decided = plan(source.claim, disk.peer.claim)
        if not isinstance(decided, Plan) or disk.promoted:
            try:
                await disk.peer.begin_sync(source.claim, Plan.INCREMENTAL)
            except StateError:
                assert disk.promoted, (decided, self.log[-20:])
                return
            raise AssertionError(f"{decided}: and it let itself be overwritten")
        if decided is Plan.FULL:
            source.pair, source.marks = new_name(), set(range(COUNT))
        else:
            history = disk.peer.history
            assert history is not None
            source.marks |= {g for g in range(COUNT) if history.map.states[g]}
        await disk.peer.begin_sync(source.claim, decided)
        source.syncing = True

    async def copy(self, source: Source, disk: StandbyDisk) -> None:
        if source.marks:
            granule = self.rng.choice(sorted(source.marks))
            await disk.primary.pwrite(granule * GRANULE, source.data[granule * GRANULE :][:GRANULE])
            source.marks.discard(granule)

    async def end_sync(self, source: Source, disk: StandbyDisk) -> None:
        while source.marks:
            await self.copy(source, disk)
        source.common = source.lineage.generation
        await disk.peer.end_sync(source.lineage, disk.primary.writes_failed)
        source.syncing, source.in_step = False, True

    async def command(self) -> None:
        """One of the group's. What does not fit the stage, or the syncs, is refused."""
        group, rng = self.group, self.rng
        names = ["start", "start", "checkpoint", "stop", "failover", "failover", "wait", "reset"]
        name = rng.choice(names)
        target = rng.choice(list(FailoverTarget))
        self.log[-1] = f"{name} {target.value} {[disk.stage.value for disk in group.disks]}"
        try:
            if name == "start":
                await group.start()
            elif name == "checkpoint":
                await group.checkpoint()
            elif name == "stop":
                await group.stop()
            elif name == "failover":
                await group.failover(target)
                if all(disk.promoted for disk in group.disks):
                    self.failovers += 1
                    for source in self.sources:
                        source.syncing = source.in_step = False
            elif name == "wait":
                await group.wait_committed()
            else:
                await group.reset(force=any(disk.stage is not Stage.NONE for disk in group.disks))
                self.resets += 1
                for disk, source in zip(group.disks, self.sources, strict=True):
                    if self.machine.dead:
                        break
                    decided = plan(source.claim, disk.peer.claim)
                    assert isinstance(decided, Plan), (decided, self.log[-20:])
        except StateError as exc:
            if self.machine.dead:
                raise
            self.log[-1] += f" refused: {exc}"

    # Section: what is found

    async def run(self, steps: int) -> bool:
        """So many steps, or as many as the machine lets. Whether it has died."""
        for _ in range(steps):
            try:
                await self.step()
            except (OSError, StateError):
                assert self.machine.dead, self.log[-12:]
            if self.machine.dead:
                return True
            await self.check()
        return False

    async def recover(self) -> None:
        """The next process, and if that one dies too, the next."""
        await revive(self, odds=0.4, operations_max=20)
        await self.check()

    async def check(self) -> None:
        """The laws."""
        for number, (disk, source) in enumerate(zip(self.group.disks, self.sources, strict=True)):
            history = disk.peer.history
            if history is None:
                continue
            where = (number, disk.stage.value, history.record, source.claim, self.log[-16:])
            lineage = history.record.lineage
            assert not history.record.taking_over, where
            assert not history.record.retracting, where
            if lineage is not None:
                known = (source.lineage.generation, *source.lineage.ancestors)
                assert (lineage.generation not in known) is disk.promoted, where
            elif disk.promoted:
                raise AssertionError(f"taken over, and of no generation: {where}")
            if source.pair is not None and history.record.pair == source.pair:
                await self._compare(disk, source, where)

    async def _compare(self, disk: StandbyDisk, source: Source, where: object) -> None:
        """What differs is marked on a side."""
        node = disk.standby if disk.promoted else disk.primary
        found = bytes(await read_bytes(node, 0, SIZE))
        history = disk.peer.history
        assert history is not None
        marks = self.machine.files[f"history{where[0]}"].data[file_bytes(0) :]  # type: ignore[index]
        for granule in range(COUNT):
            start = granule * GRANULE
            if found[start : start + GRANULE] != source.data[start : start + GRANULE]:
                marked = granule < len(marks) and marks[granule]
                assert granule in source.marks or marked, (granule, where)
