"""Standbys on storage that loses its power (power_storage), and what must be on it afterwards.

A life is one daemon after the other over the same files; each ends by a power failure, a kill or
in an orderly way, at any system call. Requests of both sides are in flight together.

Promised is: of the secondary disk, and of a promoted one, every byte is the last one flushed, or
one that was written since. So it is with the view, if its durability is "power"; what it showed at
the last checkpoint counts as flushed. A view with "process" is refused after a power failure.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import random
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from power_storage import Storage

from replnbd import DiskConfig
from replnbd.block import BlockNode, MemoryNode, read_bytes
from replnbd.daemon import Config, Daemon, ServerConfig, check_config
from replnbd.errors import ReplnbdError, StateError
from replnbd.qcow2 import (
    LastEnd,
    allocation,
    check_image,
    create_qcow2,
    empty,
    read_header,
    reclaim,
)
from replnbd.replication import FailoverTarget, Stage, StandbyDisk

SIZE = 200 * 1024 + 512

Side = Literal["primary", "standby"]


@dataclass(eq=False)
class Write:
    """Bytes that a side has written and not flushed yet."""

    offset: int
    data: bytes
    side: Side
    answered: bool = False

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + len(self.data)

    def without(self, later: Write) -> list[Write]:
        """The parts of it that a later one has not overwritten."""
        if later.end <= self.offset or self.end <= later.offset:
            return [self]
        assert self.answered
        head = self.data[: max(0, later.offset - self.offset)]
        tail = self.data[max(0, later.end - self.offset) :]
        parts = [(self.offset, head), (self.end - len(tail), tail)]
        return [Write(offset, data, self.side, True) for offset, data in parts if data]


@dataclass
class History:
    """An array of bytes: what is flushed, and what was written since, in order."""

    flushed: bytearray
    writes: list[Write] = field(default_factory=list)
    unknown: bool = False
    """Nobody knows how far the commit of a view got that was lost then."""

    def latest(self) -> bytearray:
        """With every answered write."""
        content = bytearray(self.flushed)
        for write in self.writes:
            if write.answered:
                content[write.offset : write.end] = write.data
        return content

    def copy(self) -> History:
        """Another one that begins like this."""
        return History(bytearray(self.flushed), list(self.writes))

    def flush(self, writes: list[Write]) -> None:
        """These are durable, now if not before."""
        left: list[Write] = []
        for write in self.writes:
            if write in writes:
                self.flushed[write.offset : write.end] = write.data
                left = [part for earlier in left for part in earlier.without(write)]
            else:
                left.append(write)
        self.writes = left

    def go_on(self, found: bytes, *, durable: bool) -> None:
        """This is what is there after the end of a process: `durable`, or in the page cache."""
        if durable or self.unknown:
            self.flushed, self.writes, self.unknown = bytearray(found), [], False
        for write in self.writes:
            if not write.answered:
                write.data, write.answered = found[write.offset : write.end], True

    def fault(self, found: bytes, *, power: bool) -> str | None:
        """What is wrong with `found`, after a power failure or the death of a process."""
        base = self.flushed if power else self.latest()
        if self.unknown or found == base:
            return None
        possible: dict[int, set[int]] = {}
        for write in self.writes:
            if power or not write.answered:
                for at, value in enumerate(write.data, write.offset):
                    possible.setdefault(at, set()).add(value)
        wrong = [
            at
            for at in range(len(base))
            if found[at] != base[at] and found[at] not in possible.get(at, ())
        ]
        if not wrong:
            return None
        return f"{len(wrong)} bytes from {wrong[0]:#x} to {wrong[-1]:#x}"


@dataclass
class ModelDisk:
    """One disk; `view` is None in stage none, and where it is lost."""

    durability: str
    secondary: History
    view: History | None = None
    stage: str = "none"
    promoted: bool = False

    def command(self, name: str, target: FailoverTarget) -> None:
        """What a command of the group makes of it."""
        if name in ("start", "checkpoint"):
            self.view = History(self.secondary.latest())
            self.stage = "running"
        elif name == "stop":
            self.view = self.secondary.copy()
            self.stage = "done"
        elif name == "failover" and self.stage == "running":
            if target is FailoverTarget.LATEST:
                self.view = self.secondary.copy()
            elif target is FailoverTarget.CHECKPOINT:
                assert self.view is not None
                self.view.writes = []
                self.view.flushed[:] = self.checkpoint
            self.stage, self.promoted = "failover", True
        elif name == "wait" and self.stage in ("failover", "failover-failed"):
            self.stage = "done"
        elif name == "reset":
            if self.promoted:
                self.secondary = self.view or History(bytearray(), unknown=True)
            self.view, self.stage, self.promoted = None, "none", False
        if name in ("start", "checkpoint"):
            assert self.view is not None
            self.checkpoint = bytes(self.view.flushed)

    checkpoint: bytes = b""
    """What the last one showed."""


class PowerLife:
    """See the head of this file. AssertionError where a promise is not kept."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.storage = Storage(folder, rng)
        self.log: list[str] = []
        """What was done, for whoever has to understand a failure."""
        self.models: list[ModelDisk] = []
        self.tables: list[DiskConfig] = []
        for number in range(rng.choice([1, 1, 2])):
            self._make_disk(folder, number)
        self._tuning = {
            (empty, "_PAGE"): rng.choice([4096, 8]),
            (allocation, "_RUN_BYTES"): rng.choice([0, 8 << 20]),
            (allocation, "_RUN_CLUSTERS_MIN"): rng.choice([2, 8]),
            (allocation, "_RELEASED_MAX"): rng.choice([2, 512]),
            (reclaim, "_PAUSE"): 0,  # for what depends on time cannot be repeated
        }
        self.lost = 0
        """Views that were refused."""
        self.kept = 0
        """Views that were whole after a power failure."""

    def _make_disk(self, folder: Path, number: int) -> None:
        rng = self.rng
        content = rng.randbytes(SIZE)
        format_: Literal["raw", "qcow2"] = rng.choice(["raw", "qcow2"])
        durability: Literal["process", "power"] = rng.choice(["process", "power", "power"])
        cluster_size = rng.choice([512, 4096, 16384, 65536])
        image = content
        if format_ == "qcow2":
            full = rng.random() < 0.5
            image = _qcow2(content if full else b"", cluster_size, rng)
            content = content if full else bytes(SIZE)
        self.storage.add(f"secondary{number}", image)
        if rng.random() < 0.5:
            for layer in ("hidden", "active"):
                overlay = _qcow2(b"", rng.choice([512, 4096, 16384, 65536]), rng, backing="below")
                self.storage.add(f"{layer}{number}", overlay)
        self.tables.append(
            DiskConfig(
                name=f"d{number}",
                mode="secondary",
                top_id=f"top{number}",
                secondary=f"secondary{number}",
                format=format_,
                hidden=f"hidden{number}",
                active=f"active{number}",
                durability=durability,
            )
        )
        self.models.append(ModelDisk(durability, History(bytearray(content))))
        self.log.append(f"disk {format_} {durability} {cluster_size}")
        self._config = check_config(
            Config(server=ServerConfig(listen=[], control=None), disk=self.tables), folder
        )

    def run(self, failures: int) -> None:
        """One process after the other, until so many have ended by a power failure."""
        end = "orderly"
        while failures:
            found = end
            end = self.rng.choice(["power"] * 6 + ["kill"] * 3 + ["orderly"])
            self.storage.off_at = self.rng.randrange(1, 300) if end != "orderly" else None
            self.log.append(f"-- after {found} end, until {end} at {self.storage.off_at}")
            with ExitStack() as stack:
                stack.enter_context(self.storage.patched())
                for (module, name), value in self._tuning.items():
                    stack.enter_context(mock.patch.object(module, name, value))
                asyncio.run(self._process(found))
                # What is left of the process must not come to its end within the next one.
                del self.daemon
                gc.collect()
            if end == "power":
                self.storage.power_fails()
                failures -= 1
            else:
                self.storage.process_ends()
            if found == "power" and not self.recovered:
                end = "power"  # it is still that from which the next one recovers

    def lines(self) -> str:
        """The end of the log."""
        return "\n".join(["", *self.log[:2], "...", *self.log[-40:]])

    # Section: one process

    async def _process(self, found: str) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        self.recovered = False
        self.daemon = Daemon(self._config)
        try:
            await self.daemon.open()
        except Exception:
            assert self.storage.off, self.lines()
            return
        try:
            await self._compare(found)
        except OSError:
            assert self.storage.off, self.lines()
            return
        self.recovered = True
        for _ in range(60):
            self.before = copy.deepcopy(self.models)
            try:
                await self._step()
            except (OSError, ReplnbdError):
                assert self.storage.off, self.lines()
            if self.storage.off:
                return
        self.before = copy.deepcopy(self.models)
        if self.storage.off_at is None:
            await self.daemon.close()
            assert not self.storage.off
            await self._check_images()

    @property
    def _stage(self) -> str:
        stages = {model.stage for model in self.models}
        if self._lost:
            return "lost promoted" if self.models[0].promoted else f"lost {stages.pop()}"
        return "failover" if "failover" in stages else stages.pop()

    @property
    def _lost(self) -> bool:
        return any(model.view is None and model.stage != "none" for model in self.models)

    async def _step(self) -> None:
        commands = {
            "none": ["start"],
            "running": ["checkpoint", "checkpoint", "checkpoint", "checkpoint", "stop", "failover"],
            "failover": ["wait"],
            "done": ["reset"],
            "lost running": ["checkpoint", "stop", "latest"],
            "lost done": ["reset"],
            "lost promoted": ["reset"],
        }[self._stage]
        if self.rng.random() < 0.2 or self._stage == "lost promoted":
            await self._command(self.rng.choice(commands))
        else:
            await self._requests()

    async def _command(self, name: str) -> None:
        target = self.rng.choice(list(FailoverTarget))
        if name == "latest":
            name, target = "failover", FailoverTarget.LATEST
        self.log.append(f"{name} {target.value if name == 'failover' else ''}")
        for model in self.models:
            model.command(name, target)
        group = self.daemon.standby_group
        if self.storage.off_at is not None and self.rng.random() < 0.5:
            self.storage.off_at = self.storage.calls + self.rng.randrange(1, 40)  # amid it
        if name == "failover":
            await group.failover(target)
        elif name == "reset":
            with suppress(StateError):  # some commits cannot end
                await group.wait_committed()
            await group.reset(force=True)
        elif name == "wait":
            await group.wait_committed()
        elif name == "checkpoint":
            await asyncio.gather(group.checkpoint(), *self._writes_amid_a_checkpoint())
            await self._see_views()
        else:
            await getattr(group, name)()
        for model, disk in zip(self.models, group.disks, strict=True):
            if model.secondary.unknown:
                model.secondary = History(bytearray(await read_bytes(disk.primary, 0, SIZE)))

    def _writes_amid_a_checkpoint(self) -> list[Coroutine[Any, Any, None]]:
        """Of the primary; the view may have each of them, or not."""
        coroutines = []
        for model, before, disk in zip(
            self.models, self.before, self.daemon.standby_group.disks, strict=True
        ):
            offset = self.rng.randrange(SIZE - 4096)
            length = self.rng.choice([0, 512, 700, 4096])
            if not length:
                continue
            data = self.rng.randbytes(length)
            self.log.append(f"{disk.name} primary write {offset:#x}+{length:#x} amid it")
            assert model.view is not None
            model.view.writes.append(Write(offset, data, "primary"))
            write = Write(offset, data, "primary")
            model.secondary.writes.append(write)
            before.secondary.writes.append(Write(offset, data, "primary"))
            coroutines.append(self._pwrite_soon(disk, write))
        return coroutines

    async def _pwrite_soon(self, disk: StandbyDisk, write: Write) -> None:
        for _ in range(self.rng.randrange(12)):
            await asyncio.sleep(0)
        await disk.primary.pwrite(write.offset, write.data)
        write.answered = True

    async def _see_views(self) -> None:
        """What a checkpoint shows is certain from now on."""
        for model, disk in zip(self.models, self.daemon.standby_group.disks, strict=True):
            view = bytes(await read_bytes(disk.standby, 0, SIZE))
            assert model.view is not None
            fault = model.view.fault(view, power=False)
            assert fault is None, (fault, self.lines())
            model.view.go_on(view, durable=True)
            model.checkpoint = view

    async def _requests(self) -> None:
        """Some at once, that do not overlap, and flushes."""
        rng = self.rng
        taken: list[tuple[int, str, int, int]] = []
        running = []
        for _ in range(rng.choice([1, 2, 6, 12])):
            number = rng.randrange(len(self.models))
            model, disk = self.models[number], self.daemon.standby_group.disks[number]
            sides: list[Side] = ["primary", "standby"]
            if model.stage == "none" or (model.view is None and not model.promoted):
                sides.remove("standby")
            if model.promoted or model.stage == "done":
                sides.remove("primary")
            if not sides:
                continue
            side = rng.choice(sides)
            if rng.random() < 0.15:
                running.append(asyncio.ensure_future(self._flush(model, disk, side)))
                continue
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 700, 2048, 4096, 30000, 70000]), SIZE - offset)
            place = "both" if model.promoted else side
            if any(
                each[:2] == (number, place) and each[2] < offset + length and offset < each[3]
                for each in taken
            ):
                continue
            taken.append((number, place, offset, offset + length))
            running.append(asyncio.ensure_future(self._write(model, disk, side, offset, length)))
        results = await asyncio.gather(*running, return_exceptions=True)
        for failure in results:
            if failure is not None:
                raise failure

    async def _write(
        self, model: ModelDisk, disk: StandbyDisk, side: Side, offset: int, length: int
    ) -> None:
        rng = self.rng
        operation = rng.choice(["write", "write", "write", "zero", "keep", "trim"])
        data = rng.randbytes(length) if operation == "write" else bytes(length)
        write = Write(offset, data, side)
        self.log.append(f"{disk.name} {side} {operation} {offset:#x}+{length:#x}")
        history = model.secondary if side == "primary" else model.view
        assert history is not None
        history.writes.append(write)
        node: BlockNode = disk.primary if side == "primary" else disk.standby
        if operation == "write":
            await node.pwrite(offset, data)
        elif operation == "trim":
            await node.discard(offset, length)
        else:
            await node.write_zeroes(offset, length, unmap=operation == "zero")
        write.answered = True

    async def _flush(self, model: ModelDisk, disk: StandbyDisk, side: Side) -> None:
        self.log.append(f"{disk.name} {side} flush")
        history = model.secondary if side == "primary" else model.view
        assert history is not None
        every = model.promoted or side == "primary"
        covered = [
            write for write in history.writes if write.answered and (every or write.side == side)
        ]
        await (disk.primary if side == "primary" else disk.standby).flush()
        history.flush(covered)

    # Section: what is found

    async def _compare(self, found: str) -> None:
        """The disks are what they were before the step that was cut short, or after it."""
        # One that fails before the next process has begun changes nothing.
        power = found == "power" and self.daemon.status()["recovered-from"] != LastEnd.ORDERLY
        disks = self.daemon.standby_group.disks
        shown = [await self._observe(disk) for disk in disks]
        faults: list[list[str | None]] = []
        for models in (self.models, getattr(self, "before", self.models)):
            faults.append(
                [
                    self._fault(model, disk, sides, power=power)
                    for model, disk, sides in zip(models, disks, shown, strict=True)
                ]
            )
            if not any(faults[-1]):
                break
        else:
            raise AssertionError(f"{faults} after {found}, {self.lines()}")
        self.models = copy.deepcopy(models)
        for model, disk, (secondary, view) in zip(self.models, disks, shown, strict=True):
            if secondary is not None:
                model.secondary.go_on(secondary, durable=found != "kill")
            if view is not None:
                assert model.view is not None
                # A checkpoint was cut short, and has happened: it is whole.
                amid = model.stage == "running" and any(
                    write.side == "primary" for write in model.view.writes
                )
                if amid:
                    model.checkpoint = view
                model.view.go_on(view, durable=amid or found != "kill")
                self.kept += power
            if disk.lost is not None:
                model.view = None
                self.lost += power
            model.stage = disk.stage.value

    async def _observe(self, disk: StandbyDisk) -> tuple[bytes | None, bytes | None]:
        """What the primary reads and what the standby does; None: nothing."""
        secondary = None if disk.promoted else bytes(await read_bytes(disk.primary, 0, SIZE))
        if disk.stage is Stage.NONE:
            return secondary, None
        try:
            return secondary, bytes(await read_bytes(disk.standby, 0, SIZE))
        except OSError:
            self.storage.check()
            assert disk.lost is not None
            return secondary, None

    def _fault(
        self,
        model: ModelDisk,
        disk: StandbyDisk,
        shown: tuple[bytes | None, bytes | None],
        *,
        power: bool,
    ) -> str | None:
        secondary, view = shown
        stage = disk.stage.value
        family = ("failover", "failover-failed", "done")
        if disk.promoted != model.promoted or (
            stage not in family if model.promoted else stage != model.stage
        ):
            return f"stage {stage}, not {model.stage}"
        if secondary is not None:
            fault = model.secondary.fault(secondary, power=power)
            if fault:
                return f"secondary disk: {fault}"
        if view is not None:
            if model.view is None:
                return "a lost view is shown"
            if power and model.durability == "process" and not model.promoted:
                return "a view is shown that cannot be trusted"
            fault = model.view.fault(view, power=power)
            if fault:
                return f"view: {fault}"
        elif stage != "none" and model.view is not None and not power:
            return "the view is lost"
        elif stage != "none" and model.view is not None and model.durability == "power":
            return "the view is lost, although it is to survive"
        return None

    async def _check_images(self) -> None:
        for table in self._config.disk:
            for path in (table.hidden, table.active):
                assert path is not None
                memory = MemoryNode(name=path)
                await memory.pwrite(0, Path(path).read_bytes())
                report = await check_image(memory, await read_header(memory))
                assert report.clean, (path, report.findings, self.lines())


def _qcow2(
    content: bytes, cluster_size: int, rng: random.Random, backing: str | None = None
) -> bytes:
    """An image as a file."""

    async def make() -> bytes:
        from replnbd.qcow2 import open_qcow2

        version = rng.choice([2, 3, 3, 3])
        file = MemoryNode(name="image")
        await create_qcow2(
            file,
            SIZE,
            cluster_size=cluster_size,
            version=version,
            extended_l2=version == 3 and cluster_size >= 16384 and rng.random() < 0.5,
            backing_file=backing,
            backing_format="raw" if backing else None,
        )
        if content:
            node = await open_qcow2(file)
            await node.pwrite(0, content)
            await node.close()
        return bytes(file.data)

    return asyncio.run(make())
