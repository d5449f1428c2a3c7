"""A standby with a history dies at any operation on any file, amid what its source says and what
its group is told: it has taken over if and only if it is of a generation of its own, and what it
has otherwise than its source is marked."""

from __future__ import annotations

import pytest
from peer_world import PeerLife

from replnbd.replication import keeper

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "RETRY_S", 0.001)


@pytest.mark.parametrize("seed", range(12))
async def test_whoever_dies_whenever_both_sides_know_what_differs(seed: int) -> None:
    print("seed", seed)
    life = PeerLife(seed, disks=1 + seed % 2)
    await life.begin()
    for _ in range(12):
        life.machine.die_at = life.machine.operations + life.rng.randrange(1, 150)
        if await life.run(60):
            await life.recover()


@pytest.mark.parametrize("seed", [301, 303])
async def test_a_life_with_a_source_can_end_at_each_of_its_operations(seed: int) -> None:
    """The n-th operation is the last, for every n."""
    print("seed", seed)
    nth, died = 0, True
    while died:
        nth += 1
        life = PeerLife(seed, disks=2)
        await life.begin()
        life.machine.die_at = life.machine.operations + nth
        died = await life.run(40)
        if died:
            await life.recover()
    assert nth > 20
    assert life.failovers > 0
