"""A standby that is cut off is what its primary was at some moment, unless it knows better."""

from __future__ import annotations

from pathlib import Path

import pytest
from guest_model import SECTOR
from pair import Pair
from peers import wait_until

pytestmark = pytest.mark.slow

WRITES = 120


@pytest.mark.parametrize("seed", range(4))
def test_a_standby_that_is_cut_off_has_each_write_with_all_before_it(
    short_dir: Path, seed: int
) -> None:
    with Pair(short_dir, seed, size=8 << 20, queue_bytes=200_000) as pair:
        rng = pair.rng
        pair.source.begin()
        pair.begin()
        for _ in range(4):
            pair.compare()
            before = bytes(pair.contents[0].data)
            pair.network.limit(rng.choice([4 << 20, 20 << 20]))
            writes = some_writes(pair)
            pair.refuse(pair.target)
            wait_until(lambda: not pair.target.status()["primary-connections"], "the cut")
            if not pair.target.status()["syncing"]:
                assert_prefix(before, writes, bytes(pair.target.read("b0")))
            pair.heal()
        pair.check_logs()


def some_writes(pair: Pair) -> list[tuple[int, bytes]]:
    """One after the other: now and then more than the queue takes."""
    rng, content = pair.rng, pair.contents[0]
    writes = []
    with pair.source.connect("a0") as client:
        for number in range(rng.randint(1, WRITES)):
            length = rng.choice([SECTOR, 4096, 65536, 150_000])
            offset = rng.randrange((content.size - length) // SECTOR) * SECTOR
            write = (offset, number.to_bytes(2, "big") * (length // 2))
            client.pwrite(*write)
            content.apply(write)
            writes.append(write)
    return writes


def assert_prefix(before: bytes, writes: list[tuple[int, bytes]], found: bytes) -> None:
    """That `found` is `before` and the first so many of `writes`."""
    state = bytearray(before)
    states = 1 if state == found else 0
    for offset, data in writes:
        state[offset : offset + len(data)] = data
        states += state == found
    assert states, f"a state that never was, after {len(writes)} writes"


@pytest.mark.parametrize("seed", range(3))
def test_with_sync_a_source_that_dies_has_acknowledged_nothing_that_the_standby_lacks(
    short_dir: Path, seed: int
) -> None:
    with Pair(short_dir, seed, size=8 << 20, sync=True) as pair:
        pair.source.begin()
        pair.begin()
        pair.network.delay(0.002)
        pair.run_for(pair.rng.randint(20, 60))
        pair.source.kill()
        pair.guests_ended()
        wait_until(lambda: not pair.target.status()["primary-connections"], "the end of its writes")
        assert not pair.target.status()["syncing"]
        pair.contents[0].settle(pair.target.read("b0"), "the standby's disk")
