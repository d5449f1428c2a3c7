"""Forwarder and MirrorJob between a disk and a copy that does its worst (copy_world): what is not
marked is the same on both sides at every moment, and in the end everything is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from copy_world import World, shrink

from replnbd.block.digest import GRANULE
from replnbd.errors import StateError


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


class Walk(World):
    """Random requests, faults, sessions, proofs and jobs."""

    def draw(self) -> tuple[int, int]:
        unit = self.rng.choice([512, 512, 4096, GRANULE])
        offset = self.rng.randrange(self.size) // unit * unit
        length = min(self.rng.randrange(1, 9) * unit, 3 * GRANULE, self.size - offset)
        if self.ours and self.rng.random() < 0.2:
            offset = min(offset + 1, self.size - 1)
            length = max(1, length - 1)
        return offset, length

    def write(self) -> None:
        offset, length = self.draw()
        # Few contents, so that what was overwritten comes back.
        data = bytes([self.rng.randrange(3)]) * length
        if not self.gate.pwrite_nowait(offset, data):
            self.spawn(self.gate.pwrite(offset, data))

    def zero(self) -> None:
        offset, length = self.draw()
        operation = self.rng.choice([self.gate.write_zeroes, self.gate.discard])
        self.spawn(operation(offset, length))

    def flush(self) -> None:
        self.spawn(self.forwarder.flush())

    def prove(self) -> None:
        self.spawn(self.forwarder.prove())

    def cancel_something(self) -> None:
        provers = [t for t in self.tasks if "prove" in repr(t.get_coro())]
        if provers:
            self.rng.choice(provers).cancel()

    def come_and_go(self) -> None:
        if self.connection is None:
            if self.job is None or self.job.status.value == "null":
                connection = self.connect(
                    payload_max=1 << 20 if self.ours else self.rng.choice([GRANULE, 1 << 20])
                )
                connection.refusals = self.rng.choice([0.0, 0.0, 0.1])
        elif self.rng.random() < 0.2:
            self.lose(power=self.rng.random() < 0.4)

    def work(self) -> None:
        job = self.job
        if job is None or job.status.value == "null":
            if self.connection is not None:
                self.mirror()
            return
        actions: list[Callable[[], None]] = [job.pause, job.resume, job.resume, job.cancel]
        try:
            self.rng.choice(actions)()
        except StateError:
            pass

    def hurt(self) -> None:
        if self.rng.random() < 0.3:
            self.fault.fail(self.rng.choice(["pwrite", "write_zeroes", "pread"]), times=1)
        else:
            self.fault.heal()

    def late(self) -> None:
        self.land_late(all_of_it=self.rng.random() < 0.3)

    def steps(self) -> None:
        for _ in range(self.rng.randrange(8)):
            if self.connection is not None:
                self.connection.step()

    async def run(self, count: int) -> None:
        actions: list[Callable[[], None]] = [
            self.write, self.write, self.write, self.zero, self.flush, self.prove, self.steps,
            self.steps, self.steps, self.late, self.come_and_go, self.work, self.hurt,
            self.cancel_something,
        ]  # fmt: skip
        for _ in range(count):
            self.rng.choice(actions)()
            self.check()
            if self.rng.random() < 0.6:
                await asyncio.sleep(0)
                self.check()
            self.reap()
            if self.connection is not None and not self.sync:
                most = 3 * GRANULE + 3 * GRANULE + 3 * 2 * GRANULE + 32 * 1000
                assert self.connection.bytes_outstanding_max <= most

    async def end_well(self) -> None:
        """The faults are over: everything becomes the same, and is known to be."""
        self.fault.heal()
        if self.job is not None and self.job.status.value == "paused":
            self.job.resume()
        if self.connection is not None:
            self.connection.refusals = 0.0
        await self.settle()
        if self.connection is None:
            self.connect()
        self.forwarder.go_on()
        self.land_late(all_of_it=True)
        while self.dirty.behind:
            self.mirror()
            await self.settle()
        self.slow_file.slowness = 0.0
        self.prove()
        await self.settle()
        self.slow_file.slowness = self.slowness
        assert self.dirty.dirty == 0
        assert not any(self.file.data)
        assert self.local.data == self.remote.data == self.remote.durable


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("seed", range(10))
async def test_what_is_not_marked_is_the_same_on_both_sides(
    seed: int, ours: bool, sync: bool
) -> None:
    seed = 4 * seed + 2 * ours + sync
    print("seed", seed)
    walk = Walk(seed, ours=ours, sync=sync, tail=random.Random(seed).choice([512, 1024, GRANULE]))
    for _ in range(3):
        await walk.run(150)
        await walk.end_well()
