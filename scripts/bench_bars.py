"""The bars: what replnbd promises to reach, and whether a run's figures show it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench_cells import Results
from bench_events import Rows
from bench_load import Run

CHECKPOINT_MS, STALL_MS = 5, 10
FAILOVER_MS, FIRST_READ_MS = 20, 5
SLOW_DISK_P99_MS = 5
START_S = 0.5
RECOVERY_CLUSTERS, RECOVERY_S = 1_000_000, 2.0
MEMORY_CLUSTERS, MEMORY_MIB = 1_000_000, 150
GROWTH = 1.1
FLOOR_SHARE = 0.8  # of the floor: where the page cache bounds the ratio, this is enough
REPLIES_SHARE = 0.9
STANDBY_COST = 1.5
SYNC_SHARE = 0.8
RESYNC_MOVED = 1.1
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


def profile(results: Results) -> Rows:
    """Where a request's processor time goes, for the cells that miss a rate.

    The wire (client, sockets, a loop that answers) and the calls (the reads and writes below any
    server) were measured without replnbd in the same run; the rest is replnbd's own. The floor is
    the wire's rate, or that of a processor that does both, if that is less.
    """
    rows: Rows = []
    for cell, servers in results.items():
        # Several connections have one loop, too: its floor is that of one connection.
        alone = results.get(cell.removesuffix("x4"), {})
        floors = [runs for name, runs in alone.items() if name.startswith("floor")]
        if not floors or "wire" not in alone or "replnbd" not in servers:
            continue
        wanted = max(
            (bar * median(servers[other]) for other, bar in ratio_bar(cell).items()
             if other in servers),
            default=0.0,
        )  # fmt: skip
        reached = median(servers["replnbd"])
        if reached >= wanted:
            continue
        spent, wire = median(servers["replnbd"], cpu), median(alone["wire"], cpu)
        calls = min(median(runs, cpu) for runs in floors)
        floor = min(median(alone["wire"]), 1e6 / (wire + calls))
        rows.append(
            {
                "cell": cell,
                "bar /s": wanted,
                "floor /s": floor,
                "replnbd /s": reached,
                "of floor": f"{reached / floor:.0%}",
                "CPU µs": spent,
                "wire": wire,
                "calls": calls,
                "rest": spent - wire - calls,
            }
        )
    return rows


def of_checkpoint(rows: Rows) -> Iterator[Verdict]:
    """The longest command and the longest wait of all repetitions."""
    for row in rows:
        if row["server"] == "replnbd":
            what = f"checkpoint, {row['MiB dirty']} MiB dirty in each overlay"
            yield at_most(f"{what}: command", row["max"], CHECKPOINT_MS, "ms")
            yield at_most(f"{what}: worst stall", row["max stall"], STALL_MS, "ms")


def of_failover(rows: Rows) -> Iterator[Verdict]:
    """The command and the first read as long as they ever took; the commit next to QEMU's."""
    found = {row["server"]: row for row in rows}
    if row := found.get("replnbd"):
        yield at_most("failover: command", row["max"], FAILOVER_MS, "ms")
        yield at_most("failover: first read", row["max read"], FIRST_READ_MS, "ms")
        if "qemu" in found:
            qemu = found["qemu"]["committed s"]
            yield at_most("failover: committed", row["committed s"], qemu, "s (qemu's)")


def of_slow_disk(rows: Rows) -> Iterator[Verdict]:
    """Every request next to a slow disk."""
    for row in rows:
        if row["load"] != "none":
            what = f"slow disk ({row['load']}), {row['request']}: p99"
            yield at_most(what, row["p99"], SLOW_DISK_P99_MS, "ms")


def of_start(rows: Rows) -> Iterator[Verdict]:
    """The median start."""
    for row in rows:
        if row["server"] == "replnbd":
            yield at_most("start of the daemon", row["start s"], START_S, "s")


def of_memory(rows: Rows) -> Iterator[Verdict]:
    """At the size the bar names; a quick run does not reach it."""
    for row in rows:
        if (row["server"], row["clusters"]) == ("replnbd", MEMORY_CLUSTERS):
            what = "resident memory, 1,000,000 clusters"
            yield at_most(what, row["MiB resident"], MEMORY_MIB, "MiB")


def of_recovery(rows: Rows) -> Iterator[Verdict]:
    """The median, at the size the bar names; a quick run does not reach it."""
    for row in rows:
        if row["clusters"] == RECOVERY_CLUSTERS:
            yield at_most("recovery, 1,000,000 clusters", row["recovery s"], RECOVERY_S, "s")


def of_replies(rows: Rows) -> Iterator[Verdict]:
    """Structured replies next to simple ones."""
    for row in rows:
        ratio = row["structured/simple"]
        yield Verdict(
            f"{row['what']}: structured/simple", f"{REPLIES_SHARE} x", f"{ratio:.3g}",
            ratio >= REPLIES_SHARE,
        )  # fmt: skip


def of_primary(rows: Rows) -> Iterator[Verdict]:
    """What a standby costs."""
    for row in rows:
        yield at_most(f"{row['writes']} writes with a standby", row["cost"], STANDBY_COST, "x")


def of_sync(rows: Rows) -> Iterator[Verdict]:
    """A standby brought up to date."""
    figures = {row["what"]: row["figure"] for row in rows}
    share = figures["full sync / nbdcopy"]
    yield Verdict("full sync / nbdcopy", f"{SYNC_SHARE} x", f"{share:.3g}", share >= SYNC_SHARE)
    moved = figures["resync: bytes moved / differing"]
    yield at_most("resync: bytes moved / differing", moved, RESYNC_MOVED, "x")


def of_scale(rows: Rows) -> Iterator[Verdict]:
    """Every larger set-up next to the smallest."""
    for row in rows:
        if row["ratio"] != 1:
            yield at_most(f"{row['set-up']}: {row['load']}, CPU", row["ratio"], GROWTH, "x")


def at_most(what: str, figure: float, bar: float, unit: str) -> Verdict:
    """A bar that must not be exceeded."""
    return Verdict(what, f"{bar:.3g} {unit}", f"{figure:.3g}", figure <= bar)
