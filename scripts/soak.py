"""Process deaths without end: what the tests do a few hundred times, as often as wanted.

deaths    lives of standbys in memory, whose process dies at any operation on any file
failures  the same, where the operation fails and the process lives on
power     power failures: daemons whose storage loses what was not synced, in any order, and torn
kills     kill -9 of a real daemon with two disks, under load and amid checkpoints
roundtrips  walks of two real daemons: synchronisations, failovers and the way back, cut and killed

After each, all bytes are compared with the model. Every line names the seed that repeats it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / room) for room in ("", "replication", "daemon", "roundtrip")]

from crash_world import Life  # noqa: E402
from kills import Kills  # noqa: E402
from power_world import PowerLife  # noqa: E402
from walk import Walk  # noqa: E402

PER_LIFE = 20
OPERATIONS = 150  # at most, until the next fault
STEPS = 80
WALK_STEPS = 8


async def deaths(seed: int) -> int:
    """A life with so many deaths; returns how many those were."""
    life = await Life.begin(seed, disks=1 + seed % 3)
    for _ in range(PER_LIFE):
        life.machine.die_at = life.machine.operations + life.machine.rng.randrange(1, OPERATIONS)
        await life.run(STEPS)
        await life.recover()
    return PER_LIFE


async def failures(seed: int) -> int:
    """A life with so many operations that fail; each is followed by a death."""
    life = await Life.begin(seed, disks=1 + seed % 3)
    done = 0
    for _ in range(PER_LIFE):
        life.machine.fail_at = life.machine.operations + life.machine.rng.randrange(1, OPERATIONS)
        if await life.run(STEPS):
            await life.compare_after_failure()
            done += 1
        await life.recover()
    return done


def power(seed: int) -> int:
    """A life with so many power failures."""
    with tempfile.TemporaryDirectory(prefix="rnbd-", dir="/dev/shm") as name:
        PowerLife(Path(name), seed).run(PER_LIFE)
    return PER_LIFE


def kills(seed: int) -> int:
    """Ten rounds of kill -9."""
    with tempfile.TemporaryDirectory(prefix="rnbd-", dir="/tmp") as name:
        rounds = Kills(Path(name), seed)
        for _ in range(5):
            rounds.kill_under_load()
            rounds.kill_in_a_checkpoint()
    return 10


def roundtrips(seed: int) -> int:
    """One walk."""
    with tempfile.TemporaryDirectory(prefix="rnbd-", dir="/tmp") as name:
        Walk(Path(name), seed).run(WALK_STEPS)
    return 1


KINDS: dict[str, Callable[[int], int]] = {
    "deaths": lambda seed: asyncio.run(deaths(seed)),
    "failures": lambda seed: asyncio.run(failures(seed)),
    "power": power,
    "kills": kills,
    "roundtrips": roundtrips,
}
SIZES = dict.fromkeys(KINDS, PER_LIFE) | {"kills": 10, "roundtrips": 1}
"""How many one seed does."""


def one(job: tuple[str, int]) -> tuple[str, int, int, str]:
    """(kind, seed, faults, what went wrong)."""
    kind, seed = job
    logging.disable(logging.CRITICAL)
    try:
        return kind, seed, KINDS[kind](seed), ""
    except Exception as exc:
        return kind, seed, 0, f"{type(exc).__name__}: {exc}"


def main() -> int:
    """Run as many of each kind as asked for; 1 if one went wrong."""
    parser = argparse.ArgumentParser("scripts/soak", "scripts/soak [options]", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    counts_wanted = {
        "deaths": 10_000, "failures": 2_000, "power": 10_000, "kills": 200, "roundtrips": 200,
    }  # fmt: skip
    for kind, count in counts_wanted.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"so many ({count})")
    parser.add_argument("--seed", type=int, help="the first seed (by default, another each time)")
    options = parser.parse_args()
    first = options.seed if options.seed is not None else random.randrange(1 << 30)
    begin = time.monotonic()
    counts: dict[str, int] = {}
    wrong = 0
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for kind in KINDS:
            wanted, size = getattr(options, kind), SIZES[kind]
            jobs = [(kind, first + number) for number in range(-(-wanted // size))]
            for _, seed, done, failure in pool.imap_unordered(one, jobs):
                counts[kind] = counts.get(kind, 0) + done
                if failure:
                    wrong += 1
                    print(f"{kind}, seed {seed}: {failure[:2000]}", flush=True)
            if jobs:
                took = time.monotonic() - begin
                print(f"{kind}: {counts[kind]}, seeds {first} on, {took:.0f} s so far", flush=True)
    print(f"{wrong} went wrong" if wrong else "nothing was lost, and nothing invented")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
