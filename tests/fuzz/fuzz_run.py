"""The loops of the fuzzer: so much CPU time of a target, from a seed. A finding is a PeerError; it
says what to repeat."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from corpus_files import load_all
from fuzz_core import INPUTS, TARGETS
from fuzz_live import Arena, Counts
from peers.process import PeerError

CHECK_CPU_EVERY = 20  # rounds or inputs


@dataclass(frozen=True)
class CoreCounts:
    """What a target on the core has done."""

    inputs: int
    cpu_s: float


def fuzz_core(name: str, seed: int, cpu_s: float) -> CoreCounts:
    """A target on the protocol core, in this process."""
    seeds = list(load_all().values())
    target, make = TARGETS[name], INPUTS[name]
    begin = time.process_time()
    number = 0
    while number % CHECK_CPU_EVERY or time.process_time() - begin < cpu_s:
        data = make(random.Random(f"{seed}/{name}/{number}"), seeds)
        try:
            target(data)
        except Exception as exc:
            what = f"{name}, seed {seed}, input {number}: {type(exc).__name__}: {exc}"
            raise PeerError(f"{what}\n{data.hex()}") from exc
        number += 1
    return CoreCounts(number, time.process_time() - begin)


def fuzz_live(seed: int, cpu_s: float, folder: Path) -> Counts:
    """Rounds of clients against a daemon in `folder`; its CPU time counts, too."""
    with Arena(folder, seed, list(load_all().values())) as arena:
        number = 0
        while number % CHECK_CPU_EVERY or arena.cpu_s < cpu_s:
            arena.round(number)
            number += 1
        arena.finish()
        return arena.counts
