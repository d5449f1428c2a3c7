"""What durability "power" costs beside "process": first touches, and checkpoints.

Everything else is the same with both: a request that saves nothing syncs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from bench_cells import SMALL, Cell, tell
from bench_events import Rows, Settings
from bench_load import KIB, MIB, Load, Shape
from bench_servers import Replnbd, ReplnbdPower

KINDS = (Replnbd, ReplnbdPower)
CELLS = [
    Cell(f"{name} {shape}", export, "touch", shape)
    for name, export in (("primary first touch", "disk"), ("standby first touch", "view"))
    for shape in (Shape(4 * KIB, 1), SMALL, Shape(64 * KIB, 16), Shape(1 * MIB, 4))
] + [Cell(f"primary rewrite {SMALL}", "disk", "randwrite", SMALL)]
DIRTY = 64 * MIB
"""Written by each side before a checkpoint, and not flushed by anybody."""


def durability(settings: Settings) -> Rows:
    """Requests/s of each cell, and the milliseconds of a checkpoint, with each durability."""
    if "replnbd" not in settings.servers:
        return []
    load = Load(settings.directory, settings.size, settings.runtime_s)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}

    def note(what: str, unit: str, kind: type[Replnbd], figure: float) -> None:
        found.setdefault((what, unit), {}).setdefault(kind.name, []).append(figure)

    servers = {kind: kind(settings.directory / kind.name, settings.size) for kind in KINDS}
    try:
        for server in servers.values():
            load.fill(server, "disk")
            server.start()
        for turn in range(settings.repeat):
            for cell in CELLS:
                for kind in KINDS[:: 1 if turn % 2 == 0 else -1]:
                    tell(f"{turn + 1}/{settings.repeat} {cell.name} {kind.name}")
                    server = servers[kind]
                    server.checkpoint()
                    if cell.pattern != "touch":
                        load.fill(server, "disk")
                    server.settle()
                    run = cell.run(load, server)
                    note(cell.name, "requests/s", kind, run.requests_per_s)
                    if cell.shape.depth == 1 and run.p99_us is not None:
                        note(f"{cell.name}: p99", "µs", kind, run.p99_us)
            for kind, server in servers.items():
                for export in ("disk", "view"):
                    load.fill(server, export, min(DIRTY, load.size))
                took = _milliseconds(server.checkpoint)
                note(f"checkpoint after {DIRTY // MIB} MiB on each side", "ms", kind, took)
                note("checkpoint after nothing", "ms", kind, _milliseconds(server.checkpoint))
    finally:
        for server in servers.values():
            server.close()
    return [
        {"what": what, "unit": unit, "process": a, "power": b, "power/process": b / a}
        for (what, unit), each in found.items()
        for a, b in [(median(each[Replnbd.name]), median(each[ReplnbdPower.name]))]
    ]


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
