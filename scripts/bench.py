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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_bars
import bench_cells
import bench_report
from bench_cells import SECTIONS, Results
from bench_load import MIB, Load

SERVERS = ("qemu", "replnbd", "nbdkit", "qemu-nbd", "floor")
WARM_DISKS = 12  # the files of a section, and room for the kernel to choose pages


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser("scripts/bench", "scripts/bench [options]", __doc__)
    add = parser.add_argument
    add("--section", action="append", choices=[*SECTIONS], help="only this; may be repeated")
    add("--cell", action="append", metavar="GLOB", help="only cells named so, e.g. '*4k@32'")
    add("--server", action="append", choices=SERVERS, help="only this server; may be repeated")
    add("--list", action="store_true", help="name the cells, and measure nothing")
    add("--quick", action="store_true", help="a short run: few repetitions, small disks")
    add("--repeat", type=positive, help="runs of everything on each server (5; --quick: 2)")
    add("--runtime", type=float, help="seconds of a timed run (2; --quick: 0.5)")
    add("--size", type=positive, help="MiB of the disk (1024; --quick: 256)")
    add("--directory", type=Path, help="where the disks go: needs 12 times their size")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE; - for stdout")
    options = parser.parse_args()
    defaults = {"repeat": 2, "runtime": 0.5, "size": 256} if options.quick else {}
    for name, value in {"repeat": 5, "runtime": 2.0, "size": 1024, **defaults}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
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
    wanted = options.server or SERVERS
    cells = bench_cells.names(options.cell or ["*"])
    results: Results = {}
    figures: dict[str, Any] = {"machine": bench_report.machine()}
    bench_cells.tell("warming memory")
    warm_memory(WARM_DISKS * options.size * MIB)
    for name in sections:
        with tempfile.TemporaryDirectory(prefix="replnbd-bench-", dir=options.directory) as place:
            load = Load(Path(place), options.size * MIB, options.runtime)
            section = SECTIONS[name]
            if not any(cell.name in cells for group in section.groups for cell in group.cells):
                continue
            found = bench_cells.compare(section, load, cells, wanted, options.repeat)
            bench_cells.tell("")
            bench_report.print_cells(found)
            results |= found
    verdicts = list(bench_bars.of_cells(results))
    if verdicts:
        bench_report.print_bars(verdicts)
    figures["cells"] = bench_report.cells_json(results)
    figures["bars"] = [asdict(verdict) for verdict in verdicts]
    return figures


def main() -> None:
    """Measure, report, write the JSON."""
    options = arguments()
    if options.list:
        print("\n".join(bench_cells.names(options.cell or ["*"])))
        return
    stdout = sys.stdout
    if options.json == Path("-"):
        sys.stdout = sys.stderr
    figures = measure(options, options.section or list(SECTIONS))
    if options.json:
        text = json.dumps(figures, indent=2) + "\n"
        stdout.write(text) if options.json == Path("-") else options.json.write_text(text)


if __name__ == "__main__":
    main()
