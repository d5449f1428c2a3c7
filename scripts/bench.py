"""replnbd next to QEMU's replication filter, and, as a plain export, to nbdkit and qemu-nbd.

fio's nbd engine sends the requests. All servers work on files in one directory (--directory; by
default the system's temporary one): its file system is part of what is measured. They take turns,
so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import bench_bars
import bench_cells
import bench_durability
import bench_events
import bench_primary
import bench_replies
import bench_report
import bench_scale
import bench_slow_disk
import bench_tls
from bench_bars import Verdict
from bench_cells import SECTIONS, Results
from bench_events import Rows, Settings
from bench_load import MIB, Load

SERVERS = ("qemu", "replnbd", "nbdkit", "qemu-nbd", "floor", "wire")
WARM_DISKS = 12  # the files of a section, and room for the kernel to choose pages


class Event(NamedTuple):
    """A section that is no matrix of cells."""

    title: str
    measure: Callable[[Settings], Rows]
    bars: Callable[[Rows], Iterable[Verdict]]


EVENTS = {
    "checkpoint": Event(
        "checkpoints; stall: the longest wait of a client that never pauses; calm: before it",
        bench_events.checkpoint,
        bench_bars.of_checkpoint,
    ),
    "failover": Event(
        f"failovers while the standby writes {bench_events.STANDBY_WRITES_PER_S} times a second",
        bench_events.failover,
        bench_bars.of_failover,
    ),
    "slow-disk": Event(
        f"another disk, while each request of a slow one takes {bench_slow_disk.DELAY_S * 1000:.0f}"
        " ms and 32 clients wait for it",
        bench_slow_disk.slow_disk,
        bench_bars.of_slow_disk,
    ),
    "start": Event(
        "from exec until a client is greeted, overlays there",
        bench_scale.start,
        bench_bars.of_start,
    ),
    "memory": Event(
        "memory with a sparse 1 TiB disk and scattered clusters, half in each overlay",
        bench_scale.memory,
        bench_bars.of_memory,
    ),
    "recovery": Event(
        "from exec until a client is greeted, after kill -9 with scattered clusters in 1 TiB",
        bench_scale.recovery,
        bench_bars.of_recovery,
    ),
    "durability": Event(
        'durability "power" beside "process"',
        bench_durability.durability,
        lambda _: (),
    ),
    "replies": Event(
        "requests/s by the shape of replies",
        bench_replies.replies,
        bench_bars.of_replies,
    ),
    "tls": Event(
        "MiB/s of a plain export over TCP, in clear text and encrypted",
        bench_tls.tls,
        lambda _: (),
    ),
    "primary": Event(
        "random writes of a disk with a standby, next to a plain export",
        bench_primary.primary,
        bench_bars.of_primary,
    ),
    "sync": Event(
        "a standby brought up to date, next to nbdcopy; and one that hangs",
        bench_primary.sync,
        bench_bars.of_sync,
    ),
    "scale": Event(
        f"replnbd's cost of a request, {bench_cells.SMALL} on each connection",
        bench_scale.scale,
        bench_bars.of_scale,
    ),
}


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser("scripts/bench", "scripts/bench [options]", __doc__)
    add = parser.add_argument
    add(
        "--section",
        action="append",
        choices=[*SECTIONS, *EVENTS],
        help="only this; may be repeated",
    )
    add("--cell", action="append", metavar="GLOB", help="only cells named so, e.g. '*4k@32'")
    add("--server", action="append", choices=SERVERS, help="only this server; may be repeated")
    add("--list", action="store_true", help="name the cells, and measure nothing")
    add("--quick", action="store_true", help="a short run: few repetitions, small disks")
    add("--repeat", type=positive, help="runs of everything on each server (5; --quick: 2)")
    add("--runtime", type=float, help="seconds of a timed run (2; --quick: 0.5)")
    add("--size", type=positive, help="MiB of the disk (1024; --quick: 256)")
    add("--directory", type=Path, help="where the disks go: needs 12 times their size")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE; - for stdout")
    add("--markdown", type=Path, metavar="FILE", help="write the README's table to FILE")
    add("--chart", type=chart, metavar="FILE", help="draw the ratios into FILE.svg or FILE.png")
    options = parser.parse_args()
    defaults = {"repeat": 2, "runtime": 0.5, "size": 256} if options.quick else {}
    for name, value in {"repeat": 5, "runtime": 2.0, "size": 1024, **defaults}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.section is None:
        options.section = list(SECTIONS) if options.cell else [*SECTIONS, *EVENTS]
    if options.cell and not bench_cells.names(options.cell):
        parser.error(f"no cell matches {' or '.join(options.cell)}: see --list")
    if options.directory and not options.directory.is_dir():
        parser.error(f"--directory: {options.directory} is not a directory")
    if options.runtime <= 0:
        parser.error("--runtime must be positive")
    return options


def positive(text: str) -> int:
    """A count."""
    value = int(text)
    if value <= 0:
        raise ValueError(text)
    return value


def chart(text: str) -> Path:
    """A file that a chart can be written to."""
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"{text} ends neither in .svg nor in .png")
    return Path(text)


def warm_memory(size: int) -> None:
    """Use `size` bytes of memory once, or half of what there is.

    A virtual machine gets its memory from the host when it first touches it: a page cache that
    grows into such memory was measured to write 64 KiB in 57 µs instead of 13.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, min(size, available // 2), flags=flags).close()


def measure(options: argparse.Namespace, sections: Sequence[str]) -> dict[str, Any]:
    """Run the sections, print as they come, return the figures."""
    wanted = tuple(options.server or SERVERS)
    cells = bench_cells.names(options.cell or ["*"])
    results: Results = {}
    events: dict[str, Rows] = {}
    verdicts: list[Verdict] = []
    bench_cells.tell("warming memory")
    warm_memory(WARM_DISKS * options.size * MIB)
    for name in sections:
        with tempfile.TemporaryDirectory(prefix="replnbd-bench-", dir=options.directory) as place:
            settings = Settings(
                directory=Path(place),
                servers=wanted,
                repeat=options.repeat,
                runtime_s=options.runtime,
                size=options.size * MIB,
                quick=options.quick,
            )
            if name in SECTIONS:
                load = Load(Path(place), options.size * MIB, options.runtime)
                found = bench_cells.compare(SECTIONS[name], load, cells, wanted, options.repeat)
                results |= found
                bench_report.print_cells(found)
                verdicts += bench_bars.of_cells(found)
            else:
                event = EVENTS[name]
                events[name] = event.measure(settings)
                bench_report.print_rows(event.title, events[name])
                verdicts += event.bars(events[name])
    bench_report.print_bars(verdicts)
    profile = bench_bars.profile(results)
    if profile:
        bench_report.print_rows(
            "rates below a bar, and what a loop did that makes the same calls, or only answers",
            profile,
        )
    if options.markdown:
        options.markdown.write_text(bench_report.markdown(results))
    if options.chart:
        # Here, for nobody who draws no chart needs the library.
        import bench_chart

        bench_chart.draw(results, options.chart)
    return {
        "machine": bench_report.machine(),
        "cells": bench_report.cells_json(results),
        **events,
        "bars": [asdict(verdict) for verdict in verdicts],
        "profile": profile,
    }


def main() -> None:
    """Measure, report, write the JSON."""
    options = arguments()
    if options.list:
        print("\n".join(bench_cells.names(options.cell or ["*"])))
        return
    stdout = sys.stdout
    if options.json == Path("-"):
        sys.stdout = sys.stderr
    figures = measure(options, options.section)
    if options.json:
        text = json.dumps(figures, indent=2) + "\n"
        stdout.write(text) if options.json == Path("-") else options.json.write_text(text)


if __name__ == "__main__":
    main()
