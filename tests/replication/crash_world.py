"""A standby whose process can die, or whose files can fail, at any operation on any file.

`Machine` is the host: it has the files, which outlive processes. `Life` drives one process after
the other and the model (replication_model) alike, and knows what may be found after a death: what
was acknowledged, and of the request or command that was cut short, what was before it or is after.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import random
from dataclasses import dataclass, field
from typing import Protocol

from replication_model import ModelDisk
from replication_support import Layout

from replnbd.block import BlockNode, Buffer, MemoryNode, PassThrough, read_bytes
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.qcow2 import LastEnd, check_image, create_qcow2, open_qcow2, read_header
from replnbd.replication import Durability, FailoverTarget, Group, Journal, Stage, StandbyDisk

PAGE = 4096
SIZE = 200 * 1024 + 512


class Machine:
    """The files of a host, and when an operation on them is to fail or to be the last."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.files: dict[str, MemoryNode] = {}
        self.operations = 0
        self.die_at: int | None = None
        self.fail_at: int | None = None
        self.dead = False
        self.failed = False
        self.process = 0

    def file(self, name: str) -> MortalFile:
        """A file as the present process has it open."""
        return MortalFile(self, self.files.setdefault(name, MemoryNode(name=name)))

    def next_process(self) -> None:
        """The process is gone; its files are not."""
        self.process += 1
        self.dead = self.failed = False
        self.die_at = self.fail_at = None
        self.operations = 0

    def tick(self) -> bool:
        """Count an operation of the present process; whether it is to fail."""
        self.operations += 1
        if self.operations == self.die_at:
            self.dead = True
        elif self.operations == self.fail_at:
            self.failed = True
        else:
            return False
        return True


class Mortal(Protocol):
    """What runs on a machine, one process after the other."""

    machine: Machine
    group: Group
    log: list[str]

    async def boot(self) -> None:
        """A process begins."""


async def revive(life: Mortal, *, odds: float, operations_max: int) -> None:
    """The next process; with these odds that dies, too, within so many operations, and the next."""
    machine = life.machine
    for attempt in range(6):
        # The process is gone, and what it does in the background.
        life.group.keeper._stopped = True
        machine.next_process()
        if attempt < 5 and machine.rng.random() < odds:
            machine.die_at = machine.rng.randrange(1, operations_max)
        try:
            await life.boot()
        except OSError:
            assert machine.dead
            continue
        if not machine.dead:
            break
    machine.die_at = None
    life.log.append("recovered")


class MortalFile(PassThrough):
    """A file of a Machine. An operation that fails has done any part of its work, page by page."""

    def __init__(self, machine: Machine, file: MemoryNode) -> None:
        super().__init__(file.name, file)
        self.machine = machine
        self._process = machine.process

    @property
    def _dead(self) -> bool:
        return self.machine.dead or self._process != self.machine.process

    def _check(self) -> None:
        if self._dead:
            raise OSError(errno.EIO, "the process is dead")

    async def pread(self, offset: int, buffer: memoryview) -> None:
        self._check()
        await self.file.pread(offset, buffer)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        self._check()
        return self.file.pread_nowait(offset, buffer)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.pwrite_nowait(offset, data)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        self._check()
        if self.machine.tick():
            cut = self._cut(offset, len(data))
            if cut:
                self.file.pwrite_nowait(offset, memoryview(data)[:cut])
            raise OSError(errno.EIO, "injected")
        return self.file.pwrite_nowait(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self._check()
        if self.machine.tick():
            cut = self._cut(offset, length)
            if cut:
                await self.file.write_zeroes(offset, cut)
            raise OSError(errno.EIO, "injected")
        await self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def truncate(self, size: int) -> None:
        self._check()
        if self.machine.tick():
            raise OSError(errno.EIO, "injected")
        await self.file.truncate(size)
        self.size = size

    async def flush(self) -> None:
        self._check()
        if self.machine.tick():
            raise OSError(errno.EIO, "injected")

    def _cut(self, offset: int, length: int) -> int:
        """How much of a store was done: nothing, all, or up to the end of some page."""
        ends = range(PAGE - offset % PAGE, length, PAGE)
        return self.machine.rng.choice(
            [0, length, *self.machine.rng.sample(ends, min(len(ends), 2))]
        )


async def make_files(machine: Machine, layouts: list[Layout], contents: list[bytes]) -> None:
    """The images of fresh disks, and no journal."""
    for number, (layout, content) in enumerate(zip(layouts, contents, strict=True)):
        secondary = machine.files.setdefault(f"secondary{number}", MemoryNode(name="secondary"))
        if layout.secondary_format == "qcow2":
            await create_qcow2(secondary, SIZE)
            node: BlockNode = await open_qcow2(secondary)
            await node.pwrite(0, content)
            await node.close()
        else:
            await secondary.truncate(SIZE)
            await secondary.pwrite(0, content)
        for layer in ("hidden", "active"):
            file = machine.files.setdefault(f"{layer}{number}", MemoryNode(name=layer))
            await create_qcow2(
                file,
                SIZE,
                cluster_size=layout.cluster_size,
                extended_l2=layout.extended_l2,
                backing_file="below",
                backing_format="raw",
            )


@dataclass
class Life:
    """Processes one after the other on a Machine, and the model of their disks."""

    machine: Machine
    layouts: list[Layout]
    models: list[ModelDisk] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """What was done, for whoever has to understand a failure."""

    @classmethod
    async def begin(cls, seed: int, disks: int) -> Life:
        """Fresh disks full of noise, and a first process."""
        rng = random.Random(seed)
        layouts = [Layout.draw(rng, SIZE) for _ in range(disks)]
        machine = Machine(rng)
        contents = [rng.randbytes(SIZE) for _ in layouts]
        await make_files(machine, layouts, contents)
        life = cls(machine, layouts)
        await life.boot()
        for disk, content in zip(life.group.disks, contents, strict=True):
            model = ModelDisk(SIZE, disk.active.granularity)
            model.secondary[:] = content
            life.models.append(model)
        return life

    async def boot(self) -> None:
        """A process: what `replnbd serve` does with files and journal. OSError if it dies."""
        bus, jobs = EventBus(), JobRegistry()
        disks = []
        for number, layout in enumerate(self.layouts):
            secondary: BlockNode = self.machine.file(f"secondary{number}")
            if layout.secondary_format == "qcow2":
                secondary = await open_qcow2(secondary, power_safe=True)
            hidden = await open_qcow2(
                self.machine.file(f"hidden{number}"),
                backing=secondary,
                power_safe=layout.durability is Durability.POWER,
                last_end=LastEnd.PROCESS_DEATH,
            )
            active = await open_qcow2(
                self.machine.file(f"active{number}"),
                backing=hidden,
                power_safe=layout.durability is Durability.POWER,
                last_end=LastEnd.PROCESS_DEATH,
            )
            disks.append(
                StandbyDisk(
                    f"d{number}", f"top{number}", secondary=secondary, hidden=hidden,
                    active=active, durability=layout.durability, bus=bus, jobs=jobs,
                )
            )  # fmt: skip
        journal = Journal(self.machine.file("journal"))
        record = await journal.load()
        self.group = Group(disks, journal)
        await self.group.open(record)

    # Section: one step, on disks and model

    @property
    def stage(self) -> str:
        """Of the model's group."""
        stages = {model.stage for model in self.models}
        for stage in ("failover-failed", "failover"):  # commits end one by one
            if stage in stages:
                return stage
        return stages.pop()

    async def step(self) -> None:
        """Something that is possible now. Afterwards, if the machine is well, it has happened."""
        rng = self.machine.rng
        commands = {
            "none": ["start"],
            "running": ["checkpoint", "checkpoint", "checkpoint", "stop", "failover"],
            "failover": ["wait"],
            "failover-failed": ["failover"],
            "done": ["reset"],
        }[self.stage]
        if self.stage == "running" and self.group._torn:
            commands = ["checkpoint"]  # what a failover asks for
        self.before = copy.deepcopy(self.models)
        self.touched: tuple[int, int, int] | None = None
        if rng.random() < 0.25:
            await self.command(rng.choice(commands))
        else:
            await self.request()

    async def command(self, name: str) -> None:
        """One of the group's commands."""
        rng, group = self.machine.rng, self.group
        target = rng.choice(list(FailoverTarget))
        if name == "failover" and self.stage == "failover-failed":
            target = group.disks[0].target
        self.log.append(f"{name} {target.value if name == 'failover' else ''}")
        for model in self.models:
            self.model_command(model, name, target)
        if name == "start":
            await group.start()
        elif name == "checkpoint":
            await group.checkpoint()
        elif name == "stop":
            await group.stop()
        elif name == "failover":
            await group.failover(target)
        elif name == "reset":
            await group.reset(force=True)
        elif name == "wait":
            await group.wait_committed()

    def model_command(self, model: ModelDisk, name: str, target: FailoverTarget) -> None:
        """The same, for one disk of the model."""
        if name in ("start", "checkpoint", "stop"):
            model.take_checkpoint()
            model.stage = "done" if name == "stop" else "running"
        elif name == "failover":
            if model.stage == "running":
                if target is FailoverTarget.LATEST:
                    model.take_checkpoint()
                elif target is FailoverTarget.CHECKPOINT:
                    model.active.clear()
            if model.stage in ("running", "failover-failed"):
                model.stage, model.promoted = "failover", True
        elif name == "reset":
            model.active.clear()
            model.stage, model.promoted = "none", False
        elif name == "wait" and model.stage == "failover":
            model.committed()

    async def request(self) -> None:
        """A write, zeroes, a trim or a flush of either side."""
        rng = self.machine.rng
        number = rng.randrange(len(self.models))
        model, disk = self.models[number], self.group.disks[number]
        standby = rng.random() < 0.5
        if model.promoted:
            standby = True
        elif model.stage == "none":
            standby = False
        node = disk.standby if standby else disk.primary
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 512, 700, 2048, 4096, 30000, 70000]), SIZE - offset)
        operation = rng.choice(["write", "write", "write", "zero", "keep", "trim", "flush"])
        side = "standby" if standby else "primary"
        self.log.append(f"{side}{number} {operation} {offset:#x}+{length:#x}")
        if operation == "flush":
            await node.flush()
            return
        data = rng.randbytes(length) if operation == "write" else bytes(length)
        self.touched = (number, offset, offset + length)
        (model.standby_writes if standby else model.primary_writes)(offset, data)
        if operation == "write":
            await node.pwrite(offset, data)
        elif operation == "trim":
            await node.discard(offset, length)
        else:
            await node.write_zeroes(offset, length, unmap=operation == "zero")

    # Section: what is found

    async def run(self, steps: int) -> bool:
        """So many steps, or as many as the machine lets. Whether it has had its fault."""
        for _ in range(steps):
            try:
                await self.step()
            except (OSError, StateError):
                assert self.machine.dead or self.machine.failed, self.log[-12:]
            if self.machine.dead or self.machine.failed:
                return True
        return False

    async def recover(self) -> None:
        """The next process, and if that one dies too, the next; then all bytes are compared."""
        await revive(self, odds=0.3, operations_max=30)
        await self.check_images()
        await self.compare()
        for disk, model in zip(self.group.disks, self.models, strict=True):
            # A crash came before it was recorded that this had been committed, or the commit failed
            # before the crash.
            committed_too_late = model.stage == "done" and disk.stage is not Stage.DONE
            if committed_too_late or disk.stage is Stage.FAILOVER_FAILED:
                commit_again(model, disk.stage.value)

    async def check_images(self) -> None:
        """No overlay has anything worse than a leak."""
        for number in range(len(self.layouts)):
            for layer in ("hidden", "active"):
                content = self.machine.files[f"{layer}{number}"]
                file = MemoryNode(name=layer)
                file.data, file.size = bytearray(content.data), content.size
                report = await check_image(file, await read_header(file))
                assert report.corruptions == 0, (report.findings, self.log[-12:])

    async def compare(self) -> None:
        """The disks are the model as it was before the last step, or as it is after it: all of
        them if that was a command, each byte of its range if it was a request."""
        found = await self.observe()
        if self.touched is None:
            if not matches(found, self.models):
                assert matches(found, self.before), self.log[-12:]
                self.models = self.before
            return
        number, start, end = self.touched
        for index, (stage, *sides) in enumerate(found):
            old, new = self.before[index], self.models[index]
            assert same_stage(stage, new), (index, stage, self.log[-12:])
            shown = ((old.secondary, new.secondary), (old.view(), new.view()))
            for got, (was, shall) in zip(sides, shown, strict=True):
                if got is None:
                    continue
                low, high = (start, end) if index == number else (0, 0)
                assert got[:low] + got[high:] == was[:low] + was[high:], (index, self.log[-12:])
                for place in range(low, high):
                    assert got[place] in (was[place], shall[place]), (hex(place), self.log[-12:])
        await self.adopt(number)

    async def adopt(self, number: int) -> None:
        """A request was cut short: what is there now, checked already, is what counts."""
        _, secondary, view = (await self.observe())[number]
        model, disk = self.before[number], self.group.disks[number]
        self.models[number] = model
        if secondary is not None:
            model.secondary = bytearray(secondary)
        if view is None:
            return
        if model.promoted:  # the commit moves what is allocated
            model.secondary, model.checkpoint = bytearray(view), bytearray(view)
            model.active.clear()
            return
        for index in range(-(-SIZE // model.granule)):
            begin = index * model.granule
            part = bytearray(view[begin : begin + model.granule])
            if (await disk.active.allocated(begin, len(part)))[0]:
                model.active[index] = part

    async def compare_after_failure(self) -> None:
        """The process lives on: each disk is as before the step that failed or as after it, all
        of them if it was told as done."""
        while self.group.keeper.suspended:
            await asyncio.sleep(0.001)
        self.log.append("failed")
        if self.touched is not None:
            await self.compare()
        else:
            for index, found in enumerate(await self.observe()):
                # Overlays are emptied one by one: a store that fails leaves some disks where they
                # were, some at the last checkpoint, and some moved on. The group is torn then.
                halfway = copy.deepcopy(self.before[index])
                halfway.active.clear()
                moved = copy.deepcopy(self.before[index])
                moved.take_checkpoint()
                torn = [halfway, moved] if self.group._torn or len(self.models) == 1 else []
                choices = [*torn, self.before[index], self.models[index]]
                fitting = [model for model in choices if matches([found], [model])]
                assert fitting, (index, found[0], self.log[-12:])
                self.models[index] = fitting[-1]
                if found[0] == "failover-failed":
                    commit_again(self.models[index], found[0])
        self.before, self.touched = copy.deepcopy(self.models), None

    async def observe(self) -> list[tuple[str, bytes | None, bytes | None]]:
        """(stage, what the primary reads, what the standby reads) of each disk; None: nothing."""
        found = []
        for disk in self.group.disks:
            primary = None if disk.promoted else bytes(await read_bytes(disk.primary, 0, SIZE))
            standby = None
            if disk.stage is not Stage.NONE:
                standby = bytes(await read_bytes(disk.standby, 0, SIZE))
            found.append((disk.stage.value, primary, standby))
        return found


def commit_again(model: ModelDisk, stage: str) -> None:
    """The view is to be committed, all of it: that is the same as what is left of it."""
    model.checkpoint = model.view()
    model.active.clear()
    model.stage = stage


def same_stage(stage: str, model: ModelDisk) -> bool:
    """A commit may end at any time; and that it has ended may be recorded too late for a crash."""
    if model.promoted:
        return stage in ("failover", "failover-failed", "done")
    return stage == model.stage


def matches(found: list[tuple[str, bytes | None, bytes | None]], models: list[ModelDisk]) -> bool:
    """Whether the disks are what the models say."""
    return all(
        same_stage(stage, model)
        and primary in (None, model.secondary)
        and standby in (None, model.view())
        for (stage, primary, standby), model in zip(found, models, strict=True)
    )
