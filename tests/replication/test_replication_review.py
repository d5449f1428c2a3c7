"""A commit under load, with what users bring: overlays of different shapes, slow files, disks that
end within a cluster, a raw or a qcow2 disk with holes and zero clusters of its own; cancelled,
failing, and tried again. After every step the standby reads what it wrote, and at the end the
secondary disk has it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress

import pytest

from replnbd.block import BlockNode, MemoryNode, OverlayNode, read_bytes
from replnbd.errors import ControlError, StateError
from replnbd.events import EventBus
from replnbd.filters import DelayNode, FaultNode
from replnbd.jobs import JobRegistry, commit
from replnbd.qcow2 import create_qcow2, open_qcow2
from replnbd.replication import Group, Stage, StandbyDisk

CLUSTER_SIZES = [512, 4096, 16384, 65536, 131072]
SIZES = [64 << 10, 300 * 1024 + 512, 700 * 1024 + 1536, 1 << 20]


class Rehearsal:
    """One disk, and what either side must read of it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.size = self.rng.choice(SIZES)
        self.jobs = JobRegistry()

    async def build(self) -> None:
        rng = self.rng
        files = [MemoryNode(name=name) for name in ("secondary", "hidden", "active")]
        raw = rng.random() < 0.5
        if raw:
            await files[0].truncate(self.size)
        for file in files[1 if raw else 0 :]:
            await self.create(file, backed=file is not files[0])
        self.faults = [FaultNode(f"{file.name}-fault", file) for file in files]
        nodes: Sequence[BlockNode] = self.faults
        if rng.random() < 0.7:
            nodes = [DelayNode(f"{fault.name}-slow", fault) for fault in self.faults]
        images: list[OverlayNode] = []
        below: BlockNode | None = nodes[0] if raw else None
        for node in nodes[1 if raw else 0 :]:
            below = await open_qcow2(node, backing=below, name=node.name)
            images.append(below)
        self.secondary = nodes[0] if raw else images[0]
        self.disk = StandbyDisk(
            "d", "top", secondary=self.secondary, hidden=images[-2], active=images[-1],
            bus=EventBus(), jobs=self.jobs,
        )  # fmt: skip
        self.group = Group([self.disk])

    async def create(self, file: BlockNode, *, backed: bool) -> None:
        cluster_size = self.rng.choice(CLUSTER_SIZES)
        await create_qcow2(
            file,
            self.size,
            cluster_size=cluster_size,
            extended_l2=cluster_size >= 16384 and self.rng.random() < 0.5,
            backing_file="below" if backed else None,
            backing_format="raw" if backed else None,
        )

    async def run_until_failover(self) -> None:
        primary = bytearray(self.size)
        if self.rng.random() < 0.5:
            primary[:] = self.rng.randbytes(self.size)
            await self.disk.primary.pwrite(0, bytes(primary))
        await self.disk.primary.discard(self.size // 2, self.size // 4)
        primary[self.size // 2 : self.size // 2 + self.size // 4] = bytes(self.size // 4)
        await self.group.start()
        self.view = bytearray(primary)
        for _ in range(self.rng.randrange(1, 5)):
            await self.requests([(self.disk.primary, primary), (self.disk.standby, self.view)])
            if self.rng.random() < 0.3:
                await self.group.checkpoint()
                self.view[:] = primary
        assert await read_bytes(self.disk.primary, 0, self.size) == primary
        await self.view_is_right()
        await self.group.failover()

    async def requests(self, sides: Sequence[tuple[BlockNode, bytearray]]) -> None:
        """Some requests, in flight together, overlapping; the models follow in the same order."""
        rng = self.rng
        flying: list[asyncio.Task[None]] = []
        reads: list[tuple[bytearray, bytes]] = []
        hot = rng.randrange(self.size)
        for _ in range(rng.randrange(1, 12)):
            node, model = rng.choice(sides)
            offset = rng.randrange(self.size)
            if rng.random() < 0.5:
                offset = min(self.size - 1, max(0, hot + rng.randrange(-9000, 9000)))
            length = rng.choice([1, 512, 700, 2048, 4096, 70000, 150000, self.size])
            length = min(length, self.size - offset)
            end = offset + length
            operation = rng.choice(["read", "read", "write", "write", "zero", "keep", "trim"])
            if operation == "read":
                buffer = bytearray(length)
                reads.append((buffer, bytes(model[offset:end])))
                flying.append(asyncio.ensure_future(node.pread(offset, memoryview(buffer))))
            elif operation == "write":
                data = rng.randbytes(length)
                model[offset:end] = data
                flying.append(asyncio.ensure_future(node.pwrite(offset, data)))
            else:
                model[offset:end] = bytes(length)
                request = (
                    node.discard(offset, length)
                    if operation == "trim"
                    else node.write_zeroes(offset, length, unmap=operation == "zero")
                )
                flying.append(asyncio.ensure_future(request))
            for _ in range(rng.choice([0, 0, 1, 5])):
                await asyncio.sleep(0)
        await asyncio.gather(*flying)
        for buffer, expected in reads:
            assert buffer == expected

    async def view_is_right(self) -> None:
        assert await read_bytes(self.disk.standby, 0, self.size) == self.view

    async def commit_somehow(self, trouble: str) -> None:
        """One commit, with requests of the standby all the while."""
        if trouble == "failing flush":
            self.faults[0].fail("flush", skip=self.rng.randrange(4), times=1)
        for _ in range(self.rng.randrange(6)):
            await self.requests([(self.disk.standby, self.view)])
            if trouble == "cancelled" and self.rng.random() < 0.4:
                with suppress(ControlError):  # it may have ended
                    commit = self.jobs.get("commit-d")
                    commit.cancel()
                    await commit.wait()
        with suppress(StateError):
            await self.group.wait_committed()
        self.faults[0].heal()
        await self.view_is_right()


@pytest.mark.parametrize("seed", range(60))
async def test_a_commit_under_load_loses_no_byte_whatever_the_images_and_the_trouble(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = Rehearsal(seed)
    rng = rehearsal.rng
    # Many chunks and batches on a small disk.
    chunk = rng.choice([4096, 16384, 65536, commit.CHUNK])
    monkeypatch.setattr(commit, "CHUNK", chunk)
    monkeypatch.setattr(commit, "BATCH", chunk * rng.choice([1, 3, 50]))
    await rehearsal.build()
    await rehearsal.run_until_failover()
    for _ in range(4):
        await rehearsal.commit_somehow(rng.choice(["none", "cancelled", "failing flush"]))
        if rehearsal.disk.stage is Stage.DONE:
            break
        await rehearsal.group.failover()
    else:
        await rehearsal.commit_somehow("none")
    assert rehearsal.disk.stage is Stage.DONE
    assert await read_bytes(rehearsal.secondary, 0, rehearsal.size) == rehearsal.view
    await rehearsal.requests([(rehearsal.disk.standby, rehearsal.view)])
    assert await read_bytes(rehearsal.secondary, 0, rehearsal.size) == rehearsal.view
    await rehearsal.group.close()
