"""A Hypothesis state machine against the bytearray model: all stages, one to three disks,
overlapping concurrent requests, unaligned ranges; all bytes compared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from replication_model import ModelDisk
from replication_support import Built, Layout, build

from replnbd.block import BlockNode, read_bytes
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import Group, Stage

T = TypeVar("T")
SIZE = 256 * 1024 + 512

PRIMARY_OPEN = ("none", "running")
STANDBY_OPEN = ("running", "failover", "failover-failed", "done")


class StandbyMachine(RuleBasedStateMachine):
    """Drives a group and the model alike."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def do(self, awaitable: Awaitable[T]) -> T:
        async def run() -> T:
            return await awaitable

        return self.loop.run_until_complete(run())

    @initialize(seed=st.integers(0, 2**32))
    def build(self, seed: int) -> None:
        rng = random.Random(seed)
        self.bus = EventBus()
        self.jobs = JobRegistry()
        self.built: list[Built] = []
        self.model: list[ModelDisk] = []
        for number in range(rng.choice([1, 1, 2, 3])):
            layout = Layout.draw(rng, SIZE)
            content = rng.randbytes(rng.choice([0, SIZE // 2, SIZE]))
            self.built.append(self.do(build(f"d{number}", layout, self.bus, self.jobs, content)))
            model = ModelDisk(SIZE, self.built[-1].disk.active.granularity)
            model.secondary[: len(content)] = content
            self.model.append(model)
        self.group = Group([built.disk for built in self.built])

    @property
    def stage(self) -> str:
        stages = {model.stage for model in self.model}
        # Commits end one after the other; until the last has, the group is failing over.
        return "failover" if stages == {"failover", "done"} else stages.pop()

    def follow_commits(self) -> None:
        """Let the model see what the background has done."""
        for built, model in zip(self.built, self.model, strict=True):
            if model.stage == "failover" and built.disk.stage is Stage.DONE:
                model.committed()

    # Section: requests

    @rule(seed=st.integers(0, 2**32), count=st.integers(1, 12))
    def requests(self, seed: int, count: int) -> None:
        """Requests of both sides, in flight together, many of them overlapping."""
        rng = random.Random(seed)
        self.do(self.run_requests(rng, count))

    async def run_requests(self, rng: random.Random, count: int) -> None:
        flying: list[asyncio.Task[None]] = []
        checks: list[tuple[bytearray, bytes]] = []
        hot = rng.randrange(SIZE)
        for _ in range(count):
            index = rng.randrange(len(self.built))
            disk, model = self.built[index].disk, self.model[index]
            self.follow_commits()
            standby = rng.random() < 0.5
            node = disk.standby if standby else disk.primary
            if rng.random() < 0.5:
                offset = min(SIZE - 1, max(0, hot + rng.randrange(-5000, 5000)))
            else:
                offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 700, 2048, 4096, 70000]), SIZE - offset)
            operation = rng.choice(["read", "read", "write", "write", "zero", "zero-keep", "trim"])
            if model.stage not in (STANDBY_OPEN if standby else (*PRIMARY_OPEN, "done")) or (
                not standby and model.promoted
            ):
                await self.is_refused(node, operation, offset, length)
                continue
            if operation == "read":
                buffer = bytearray(length)
                shown = model.view() if standby else model.secondary
                checks.append((buffer, bytes(shown[offset : offset + length])))
                flying.append(asyncio.ensure_future(node.pread(offset, memoryview(buffer))))
                continue
            data = rng.randbytes(length) if operation == "write" else bytes(length)
            (model.standby_writes if standby else model.primary_writes)(offset, data)
            if operation == "write":
                flying.append(asyncio.ensure_future(node.pwrite(offset, data)))
            elif operation == "trim":
                flying.append(asyncio.ensure_future(node.discard(offset, length)))
            else:
                unmap = operation == "zero"
                flying.append(asyncio.ensure_future(node.write_zeroes(offset, length, unmap=unmap)))
        await asyncio.gather(*flying)
        for buffer, expected in checks:
            assert buffer == expected

    async def is_refused(self, node: BlockNode, operation: str, offset: int, length: int) -> None:
        refused = pytest.raises(OSError, match=r"not running|fenced")
        if operation == "read":
            with refused:
                await node.pread(offset, memoryview(bytearray(length)))
        elif operation == "write":
            with refused:
                await node.pwrite(offset, bytes(length))
        else:
            with refused:
                await node.write_zeroes(offset, length)

    @rule()
    def flush(self) -> None:
        for built in self.built:
            if built.disk.stage is not Stage.NONE:
                self.do(built.disk.standby.flush())

    # Section: commands

    @rule()
    def start(self) -> None:
        if self.stage in ("running", "failover-failed"):
            with pytest.raises(StateError, match=r"^Block replication is running or done$"):
                self.do(self.group.start())
            return
        self.do(self.group.start())
        if self.stage == "none":
            for model in self.model:
                model.take_checkpoint()
                model.stage = "running"

    @rule()
    def start_as_primary(self) -> None:
        if self.stage == "none":
            text = r"^The parameter mode's value is invalid, needs 1, but got 0$"
            with pytest.raises(StateError, match=text):
                self.do(self.group.start("primary"))

    @rule()
    def checkpoint(self) -> None:
        if self.stage in ("none", "failover-failed"):
            with pytest.raises(StateError, match=r"^Backup job was cancelled unexpectedly$"):
                self.do(self.group.checkpoint())
            return
        self.do(self.group.checkpoint())
        if self.stage == "running":
            for model in self.model:
                model.take_checkpoint()

    @rule()
    def stop(self) -> None:
        if self.stage in ("none", "failover-failed"):
            with pytest.raises(StateError, match=r"^Block replication is not running$"):
                self.do(self.group.stop())
            return
        self.do(self.group.stop())
        if self.stage == "running":
            for model in self.model:
                model.take_checkpoint()
                model.stage = "done"

    @rule(wait=st.booleans())
    def failover(self, wait: bool) -> None:
        if self.stage == "none":
            with pytest.raises(StateError, match=r"^Block replication is not running$"):
                self.do(self.group.failover())
            return
        self.do(self.group.failover())
        if self.stage in ("running", "failover-failed"):
            for model in self.model:
                model.stage = "failover"
                model.promoted = True
        if wait:
            self.commits_end()

    @precondition(lambda self: self.stage == "running")
    @rule()
    def failover_that_fails(self) -> None:
        """The secondary disks die, and come back when the commits have failed."""
        for built in self.built:
            built.secondary_fault.fail("pwrite")
            built.secondary_fault.fail("write_zeroes")
            built.secondary_fault.fail("flush")
        self.do(self.group.failover())
        with pytest.raises(StateError):
            self.do(self.group.wait_committed())
        for built in self.built:
            built.secondary_fault.heal()
        for built, model in zip(self.built, self.model, strict=True):
            assert built.disk.stage is Stage.FAILOVER_FAILED
            model.stage = "failover-failed"
            model.promoted = True

    @precondition(lambda self: self.stage == "failover")
    @rule()
    def commits_end(self) -> None:
        self.do(self.group.wait_committed())
        self.follow_commits()
        for built, model in zip(self.built, self.model, strict=True):
            assert model.stage == "done"
            everything = self.do(read_bytes(built.disk.secondary, 0, SIZE))
            assert everything == model.secondary

    @rule(force=st.booleans())
    def reset(self, force: bool) -> None:
        if self.stage == "failover":
            self.commits_end()
        if self.stage == "running":
            with pytest.raises(StateError, match=r"'reset' is not possible in stage"):
                self.do(self.group.reset(force=force))
            return
        held = any(self.do(built.disk.holds_data()) for built in self.built)
        if held and not force:
            with pytest.raises(StateError, match="which a reset would lose: use force"):
                self.do(self.group.reset())
            return
        self.do(self.group.reset(force=force))
        for built, model in zip(self.built, self.model, strict=True):
            if model.stage == "failover-failed":
                self.take_over_what_was_half_committed(built, model)
            model.active.clear()
            model.stage = "none"
            model.promoted = False

    def take_over_what_was_half_committed(self, built: Built, model: ModelDisk) -> None:
        """A forced reset leaves what the commit had done: each byte of before, or of the view."""
        found = self.do(read_bytes(built.disk.secondary, 0, SIZE))
        view = model.view()
        assert all(
            byte in (before, after)
            for byte, before, after in zip(found, model.secondary, view, strict=True)
        )
        model.secondary = found

    # Section: what holds after every step

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        if not hasattr(self, "group"):
            return
        self.follow_commits()
        for built, model in zip(self.built, self.model, strict=True):
            disk = built.disk
            if model.stage == "failover":
                # The commit may end while this reads: the bytes are the same either way.
                assert disk.stage in (Stage.FAILOVER, Stage.DONE)
            else:
                assert disk.stage.value == model.stage
            expected_error = {
                "none": "Block replication is not running",
                "failover-failed": "I/O error occurred",
            }
            assert disk.replication_error == expected_error.get(model.stage)
            if model.stage in ("none", "running") or not model.promoted:
                secondary = self.do(read_bytes(disk.primary, 0, SIZE))
                assert secondary == model.secondary
            if model.stage != "none":
                assert self.do(read_bytes(disk.standby, 0, SIZE)) == model.view()
        self.follow_commits()

    def teardown(self) -> None:
        if hasattr(self, "group"):
            self.do(self.group.close())
        self.loop.close()


TestStandbyMachine = StandbyMachine.TestCase
TestStandbyMachine.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestStandbyMachine.pytestmark = [pytest.mark.slow]  # type: ignore[attr-defined]
