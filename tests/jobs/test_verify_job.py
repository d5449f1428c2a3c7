"""What a comparison says of what it cannot compare: not that it is equal."""

from __future__ import annotations

import asyncio

import pytest

from replnbd.block import DirtyMap, MemoryNode, digests
from replnbd.block.digest import GRANULE
from replnbd.events import EventBus
from replnbd.jobs import VerifyJob, verify

COUNT = 4
KEY = b"key"


class Target:
    """A copy in memory; `busy` is done before it looks at its digests, and before it tells them."""

    def __init__(self) -> None:
        self.node = MemoryNode(COUNT * GRANULE)
        self.nudged = 0

    def digest_key(self) -> bytes:
        return KEY

    async def busy(self) -> None:
        return

    async def digests(self, offset: int, length: int) -> list[tuple[int, int | None]] | None:
        await self.busy()
        found = await digests(self.node, offset, length, KEY)
        await self.busy()
        return list(found)

    def nudge(self) -> None:
        self.nudged += 1


class Disk:
    """A disk, its copy, and the account of what differs: nothing is marked."""

    def __init__(self) -> None:
        self.source = MemoryNode(COUNT * GRANULE)
        self.dirty = DirtyMap(COUNT * GRANULE, MemoryNode(COUNT), 0)
        self.target = Target()

    async def verify(self) -> VerifyJob:
        job = VerifyJob("verify-d", EventBus(), self.source, self.dirty, self.target)  # type: ignore[arg-type]
        job.start()
        await job.wait()
        return job


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "AGAIN_S", 0.01)


async def test_what_is_equal_and_what_differs() -> None:
    disk = Disk()
    assert (await disk.verify()).result == "equal"
    await disk.source.pwrite(GRANULE + 5, b"x")
    job = await disk.verify()
    assert (job.result, job.mismatches) == (f"{GRANULE} bytes differed", GRANULE)
    assert disk.dirty.is_behind(GRANULE, 1)
    assert disk.target.nudged == 1


async def test_what_has_yet_to_be_copied_is_not_called_equal() -> None:
    disk = Disk()
    await disk.source.pwrite(0, b"x" * 2 * GRANULE)
    await disk.dirty.mark_behind(0, 2 * GRANULE)
    job = await disk.verify()
    assert (job.result, job.mismatches) == (f"{2 * GRANULE} bytes could not be compared", 0)
    assert job.describe()["x-replnbd-skipped"] == 2 * GRANULE


async def test_what_is_written_all_the_time_does_not_keep_it_for_ever() -> None:
    disk = Disk()
    numbers = iter(range(1, 1 << 30))

    async def busy() -> None:
        data = next(numbers).to_bytes(8, "big")
        await disk.dirty.mark(0, 8)
        await disk.source.pwrite(0, data)
        await disk.target.node.pwrite(0, data)

    disk.target.busy = busy  # type: ignore[method-assign]
    async with asyncio.timeout(20):
        job = await disk.verify()
    assert job.result == f"{GRANULE} bytes could not be compared"
    assert disk.source.data == disk.target.node.data
