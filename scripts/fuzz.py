"""Hostile clients without end: what the tests do for two minutes, for as long as wanted.

live  sessions against a real daemon: valid, nearly valid, mutated and noise; several at a time, in
      any pieces, deaf, and with any end. Every answer and every byte of the disks is compared with
      a model that shares no code with the server.
core  the same on the protocol core alone, and its parsers and packers

Time is CPU time, of the fuzzer and of the daemons. Every finding names the seed that repeats it,
and shows what was sent: minimised, it belongs to tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]

from fuzz_core import TARGETS  # noqa: E402
from fuzz_live import Counts  # noqa: E402
from fuzz_run import CoreCounts, fuzz_core, fuzz_live  # noqa: E402

MIB = 1 << 20
CORE_SHARE = 0.25
"""Of the time: an input of the core takes a tenth of what a client of a daemon does."""
TURN_CPU_S = 60.0
"""What a daemon lives for."""

Result = tuple[str, Counts | CoreCounts | str]


def one(job: tuple[str, int, float]) -> Result:
    """(kind, what was done or what went wrong)."""
    kind, seed, cpu_s = job
    logging.disable(logging.CRITICAL)
    try:
        if kind != "live":
            return kind, fuzz_core(kind, seed, cpu_s)
        with tempfile.TemporaryDirectory(prefix="rnbd-", dir="/tmp") as name:
            return kind, fuzz_live(seed, cpu_s, Path(name))
    except Exception as exc:
        return kind, f"{type(exc).__name__}: {exc}"


def jobs(cpu_s: float, seed: int) -> list[tuple[str, int, float]]:
    """Turns that take so long together."""
    live = cpu_s * (1 - CORE_SHARE)
    turns = max(1, round(live / TURN_CPU_S))
    each = cpu_s * CORE_SHARE / turns / len(TARGETS)
    planned = []
    for turn in range(turns):
        planned.append(("live", seed + turn, live / turns))
        planned += [(name, seed + turn, each) for name in TARGETS]
    return planned


def report(results: list[Result]) -> int:
    """Print what was done; how many findings there were."""
    live = [done for _, done in results if isinstance(done, Counts)]
    if live:
        cpu_s, sessions = sum(each.cpu_s for each in live), sum(each.sessions for each in live)
        requests, refused = sum(each.requests for each in live), sum(each.refused for each in live)
        print(
            f"live: {sessions} sessions in {cpu_s / 60:.1f} CPU-minutes"
            f" ({sessions / sum(each.seconds for each in live):.0f} a second per worker),"
            f" {requests} requests, of which {refused} were refused"
        )
        connection = max(each.connection_bytes for each in live) / MIB
        growth = max(each.growth_bytes for each in live) / MIB
        print(
            f"memory: at most {connection:.1f} MiB for a connection, with what is kept for the"
            f" next; {growth:.1f} MiB more after all of them"
        )
    for name in TARGETS:
        core = [done for kind, done in results if kind == name and isinstance(done, CoreCounts)]
        inputs, cpu_s = sum(each.inputs for each in core), sum(each.cpu_s for each in core)
        print(f"{name}: {inputs} inputs in {cpu_s / 60:.1f} CPU-minutes")
    return sum(isinstance(done, str) for _, done in results)


def main() -> int:
    """Fuzz for as long as asked for; 1 if there was a finding."""
    parser = argparse.ArgumentParser("scripts/fuzz", "scripts/fuzz [options]", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=24, help="of CPU time, in all (24)")
    parser.add_argument("--seed", type=int, help="the first seed (by default, another each time)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    planned = jobs(options.minutes * 60, seed)
    print(f"seeds {seed} to {planned[-1][1]}", flush=True)
    results = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for kind, done in pool.imap_unordered(one, planned):
            results.append((kind, done))
            if isinstance(done, str):
                print(f"{kind}: {done}", flush=True)
    findings = report(results)
    print(f"{findings} findings" if findings else "no finding")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
