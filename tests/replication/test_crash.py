"""The process dies at any operation on any file, or one operation fails: nothing that was
acknowledged is lost, no command has half happened, and the next process goes on.

The counts here are for every run of the tests; `scripts/soak` has the large ones.
"""

from __future__ import annotations

import pytest
from crash_world import Life

from replnbd.replication import keeper

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "RETRY_S", 0.001)


@pytest.mark.parametrize("seed", range(16))
async def test_a_process_that_dies_loses_nothing(seed: int) -> None:
    """One life after the other, on disks of all layouts."""
    print("seed", seed)
    life = await Life.begin(seed, disks=1 + seed % 3)
    for _ in range(15):
        life.machine.die_at = life.machine.operations + life.machine.rng.randrange(1, 150)
        await life.run(60)
        await life.recover()


@pytest.mark.parametrize("seed", [101, 102, 103])
async def test_a_life_can_end_at_each_of_its_operations(seed: int) -> None:
    """The n-th operation is the last, for every n."""
    print("seed", seed)
    nth, died = 0, True
    while died:
        nth += 1
        life = await Life.begin(seed, disks=2)
        life.machine.die_at = life.machine.operations + nth
        died = await life.run(24)
        if died:
            await life.recover()
    assert nth > 20


@pytest.mark.parametrize("seed", [201, 202, 203, 204, 205])
async def test_each_operation_of_a_life_can_fail(seed: int) -> None:
    """The n-th operation fails, for every n: the step is told as failed or has happened, on each
    disk; and a process that dies then finds what was there."""
    print("seed", seed)
    nth, failed = 0, True
    while failed:
        nth += 1
        life = await Life.begin(seed, disks=2)
        life.machine.fail_at = life.machine.operations + nth
        failed = await life.run(24)
        if failed:
            await life.compare_after_failure()
            await life.recover()
    assert nth > 20
