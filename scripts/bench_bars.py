"""The bars: what replnbd promises to reach, and whether a run's figures show it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench_cells import Results
from bench_load import Run

FLOOR_SHARE = 0.8  # of the floor: where the page cache bounds the ratio, this is enough
CPU_SHARE = 1 / 3  # of QEMU's


@dataclass(frozen=True)
class Verdict:
    """A bar, the figure of this run, and whether it is met."""

    what: str
    bar: str
    figure: str
    met: bool


def rate(run: Run) -> float:
    """Requests per second."""
    return run.requests_per_s


def cpu(run: Run) -> float:
    """Processor time per request."""
    return run.cpu_us


def p99(run: Run) -> float:
    """Latency; 0 where it was not measured."""
    return run.p99_us or 0.0


def median(runs: list[Run], figure: Callable[[Run], float] = rate) -> float:
    """The median of a figure."""
    return statistics.median(map(figure, runs))


def ratio(
    servers: dict[str, list[Run]], other: str, figure: Callable[[Run], float] = rate
) -> float:
    """replnbd's median to another server's."""
    below = median(servers[other], figure)
    return median(servers["replnbd"], figure) / below if below else 0.0


def ratio_bar(cell: str) -> dict[str, float]:
    """How many times another server's rate a cell must reach, by server."""
    if cell.startswith("plain"):
        return {"nbdkit": 1.0, "qemu-nbd": 3.0}
    if " 4k@32" not in cell:
        return {"qemu": 1.5}
    if "first touch" in cell:
        return {"qemu": 6.0 if cell.startswith("primary") else 4.5}
    return {} if "mixed" in cell else {"qemu": 3.0}


def of_cells(results: Results) -> Iterator[Verdict]:
    """Throughput, latency and processor time, cell by cell."""
    for cell, servers in results.items():
        if "replnbd" not in servers:
            continue
        for other, bar in ratio_bar(cell).items():
            if other in servers:
                yield throughput(cell, servers, other, bar)
        if "qemu" in servers:
            figure = ratio(servers, "qemu", p99)
            yield Verdict(f"{cell}: p99", "1.0x qemu's", f"{figure:.2f}x", figure <= 1)
            if " 4k@32" in cell:
                figure = ratio(servers, "qemu", cpu)
                met = figure <= CPU_SHARE
                yield Verdict(f"{cell}: CPU", "a third of qemu's", f"{figure:.2f}x", met)


def throughput(cell: str, servers: dict[str, list[Run]], other: str, bar: float) -> Verdict:
    """Requests per second; a large first touch may reach most of the floor instead."""
    figure = ratio(servers, other)
    met, text, wanted = figure >= bar, f"{figure:.2f}x", f"{bar:g}x {other}"
    if "first touch" in cell and " 4k@" not in cell and "floor" in servers:
        share = ratio(servers, "floor")
        wanted += f", or {FLOOR_SHARE:.0%} of the floor"
        text += f", {share:.0%}"
        met = met or share >= FLOOR_SHARE
    return Verdict(cell, wanted, text, met)
