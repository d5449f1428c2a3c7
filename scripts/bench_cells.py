"""The cells: each a state of the standby and a load on it, the same on every server.

The servers take turns within each repetition, so that a slow minute of the machine hits all. Cells
that leave their state as it was share its preparation; a first touch gets a checkpoint before each
run. Every server brings its disk in itself, through NBD.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bench_floor import Floor
from bench_load import CLUSTER_SIZE, KIB, MIB, Load, Run, Shape
from bench_servers import Nbdkit, Qemu, QemuNbd, Replnbd, Server, Standby, Wire

SMALL = Shape(4 * KIB, 32)
FOUR = Shape(4 * KIB, 32, connections=4)
SHAPES = (Shape(4 * KIB, 1), SMALL, Shape(64 * KIB, 16), Shape(1 * MIB, 4))
TOUCHES_DEPTH_1 = 4096  # enough for a figure; all clusters would take seconds

Results = dict[str, dict[str, list[Run]]]
"""Runs by cell and server."""


@dataclass(frozen=True)
class Cell:
    """A load. `pattern` is fio's --rw, or "touch": each cluster once, in random order."""

    name: str
    export: str
    pattern: str
    shape: Shape

    def run(self, load: Load, server: Server) -> Run:
        """One run on a server that is in the right state."""
        if self.pattern != "touch":
            mix = ["--rwmixread=70"] if self.pattern == "randrw" else []
            return load.timed(server, self.export, self.pattern, self.shape, *mix)
        return load.touch(server, self.export, self.shape, self.touches(load))

    def touches(self, load: Load) -> int:
        """How many requests a first touch consists of."""
        count = load.size // max(self.shape.size, CLUSTER_SIZE)
        return min(count, TOUCHES_DEPTH_1) if self.shape.depth == 1 else count

    def run_floors(self, load: Load, floor: Floor) -> dict[str, Run]:
        """The same without a server, in each kind of space that the cell can meet."""
        if self.pattern != "touch":
            return {"floor": floor.timed(self.pattern, self.shape)}
        count = self.touches(load)
        return {
            "floor": floor.touch(self.export, self.shape, count, fresh=False),
            "floor-fresh": floor.touch(self.export, self.shape, count, fresh=True),
        }


@dataclass(frozen=True)
class Group:
    """Cells that start from one state, and leave it so that the next can start."""

    prepare: Callable[[Load, Standby], None]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Section:
    """Groups on one set of servers."""

    kinds: Sequence[type[Server]]
    groups: Sequence[Group]
    tcp: bool = False


def untouched(load: Load, server: Standby) -> None:
    """A fresh checkpoint."""
    server.checkpoint()


def scattered(load: Load, server: Standby) -> None:
    """The view comes from everywhere: a third from the active overlay, a third from the hidden."""
    server.checkpoint()
    clusters = load.size // CLUSTER_SIZE
    load.touch(server, "disk", SMALL, clusters // 2, seed=2)
    load.touch(server, "view", SMALL, clusters // 3, seed=3)


def view_written(load: Load, server: Standby) -> None:
    """The standby has written everything since the checkpoint."""
    server.checkpoint()
    load.fill(server, "view")


def disk_written(load: Load, server: Standby) -> None:
    """The primary has written everything since the checkpoint: no old data to save."""
    server.checkpoint()
    load.fill(server, "disk")


def nothing(load: Load, server: Standby) -> None:
    """The state is right already."""


def groups(suffix: str = "", shapes: Sequence[Shape] = SHAPES) -> Iterator[Group]:
    """The cells without a first touch; those of the fast path also on several connections."""
    several = [] if suffix else [FOUR]
    kinds = (
        ("standby read", scattered, "view", "randread"),
        ("standby rewrite", view_written, "view", "randwrite"),
        ("primary rewrite", disk_written, "disk", "randwrite"),
    )
    for name, prepare, export, pattern in kinds:
        cells = [
            Cell(f"{name} {shape}{suffix}", export, pattern, shape) for shape in (*shapes, *several)
        ]
        if name == "standby rewrite" and not suffix:
            cells.append(Cell(f"standby mixed 70/30 {SMALL}", "view", "randrw", SMALL))
        yield Group(prepare, cells)


def first_touches() -> Iterator[Group]:
    """One group per cell: each run needs a checkpoint of its own."""
    for name, export in (("standby first touch", "view"), ("primary first touch", "disk")):
        for shape in SHAPES:
            yield Group(untouched, [Cell(f"{name} {shape}", export, "touch", shape)])


STANDBYS = (Qemu, Replnbd)
SECTIONS = {
    "cells": Section(STANDBYS, [*groups(), *first_touches()]),
    "tcp": Section(STANDBYS, [*groups(" tcp", [SMALL])], tcp=True),
    "plain": Section(
        (QemuNbd, Nbdkit, Replnbd),
        [
            Group(
                nothing,
                [
                    Cell(f"plain read {SMALL}", "disk", "randread", SMALL),
                    Cell(f"plain write {SMALL}", "disk", "randwrite", SMALL),
                ],
            )
        ],
    ),
}


def names(patterns: Sequence[str]) -> list[str]:
    """The cells' names that match one of the globs, in order."""
    cells = [c.name for s in SECTIONS.values() for g in s.groups for c in g.cells]
    return [name for name in cells if any(fnmatchcase(name, glob) for glob in patterns)]


@contextmanager
def running(section: Section, load: Load, wanted: Sequence[str]) -> Iterator[list[Server]]:
    """The section's servers, disks filled; those with overlays started, unless all are plain."""
    with ExitStack() as stack:
        servers: list[Server] = []
        for kind in section.kinds:
            if kind.name in wanted:
                place = load.directory / kind.name
                servers.append(stack.enter_context(kind(place, load.size, tcp=section.tcp)))
                load.fill(servers[-1], "disk")
        if section.kinds == STANDBYS:
            for server in servers:
                assert isinstance(server, Standby)
                server.start()
        yield servers


def compare(
    section: Section, load: Load, cells: Sequence[str], wanted: Sequence[str], repeat: int
) -> Results:
    """Run the named cells of a section on the wanted servers, `repeat` times."""
    results: Results = {}
    if not any(cell.name in cells for group in section.groups for cell in group.cells):
        return results
    with running(section, load, wanted) as servers, ExitStack() as stack:
        floor = wire = None
        if "floor" in wanted:
            floor = Floor(load.directory / "floor", load.size)
            stack.callback(floor.close)
        if "wire" in wanted:
            wire = stack.enter_context(Wire(load.directory / "wire", load.size, tcp=section.tcp))
        for turn in range(repeat):
            order = servers if turn % 2 == 0 else servers[::-1]
            for group in section.groups:
                todo = [cell for cell in group.cells if cell.name in cells]
                if not todo:
                    continue
                for server in order:
                    if group.prepare is not nothing:
                        assert isinstance(server, Standby)
                        group.prepare(load, server)
                        server.settle()
                for cell in todo:
                    tell(f"{turn + 1}/{repeat} {cell.name}")
                    runs = {server.name: cell.run(load, server) for server in order}
                    if floor and cell.shape.connections == 1:
                        runs |= cell.run_floors(load, floor)
                    if wire and cell.shape.connections == 1:
                        runs["wire"] = cell.run(load, wire)
                    for name, run in runs.items():
                        results.setdefault(cell.name, {}).setdefault(name, []).append(run)
    return results


def tell(text: str) -> None:
    """What is being done, for who waits at a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
