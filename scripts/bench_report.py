"""What scripts/bench prints, and the JSON it writes."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

from bench_bars import Verdict, cpu, median, p99, rate, ratio
from bench_cells import Results
from bench_load import Run

CELL_NAME = re.compile(r"(.+) (\d+[km]@.+)")  # state and load


def print_cells(results: Results) -> None:
    """The table: a line per cell and server, replnbd's last, with how it compares."""
    if not results:
        return
    print(
        f"{'requests/s':32}{'server':12}{'median':>9}{'min':>9}{'max':>9}"
        f"{'p99 µs':>9}{'CPU µs':>9}{'replnbd is':>12}"
    )
    for cell, servers in results.items():
        for number, (name, runs) in enumerate(servers.items()):
            rates = [rate(run) for run in runs]
            latency = f"{median(runs, p99):9.0f}" if runs[0].p99_us is not None else f"{'-':>9}"
            compared = ""
            if name != "replnbd" and "replnbd" in servers:
                compared = f"{ratio(servers, name):11.2f}x"
            print(
                f"{cell if number == 0 else '':32}{name:12}{median(runs):9.0f}{min(rates):9.0f}"
                f"{max(rates):9.0f}{latency}{median(runs, cpu):9.1f}{compared}"
            )
    print(flush=True)


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A section's table: a line per row, a column per member."""
    print(title)
    if rows:
        texts = [[str(name) for name in rows[0]]]
        texts += [[as_text(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for line in texts:
            cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
            print("  " + "  ".join(cells))
    print(flush=True)


def as_text(value: object) -> str:
    """A figure as people read it: no more digits than mean something."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def print_bars(verdicts: Sequence[Verdict]) -> None:
    """Which bars are met."""
    if not verdicts:
        return
    width = max(len(verdict.what) for verdict in verdicts) + 2
    print(f"{'bar':{width}}{'at least / at most':34}{'this run':20}")
    for verdict in verdicts:
        met = "met" if verdict.met else "NOT MET"
        print(f"{verdict.what:{width}}{verdict.bar:34}{verdict.figure:20}{met}")
    missed = sum(not verdict.met for verdict in verdicts)
    print(f"{len(verdicts) - missed} of {len(verdicts)} bars met", flush=True)


def cells_json(results: Results) -> dict[str, Any]:
    """Every run of every cell, and the ratios of the medians."""
    return {
        cell: {
            "servers": {name: runs_json(runs) for name, runs in servers.items()},
            "ratio": {name: ratio(servers, name) for name in servers if name != "replnbd"}
            if "replnbd" in servers
            else {},
        }
        for cell, servers in results.items()
    }


def markdown(results: Results) -> str:
    """The README's table: replnbd's medians over QEMU's, a row per state and a column per load."""
    table: dict[str, dict[str, str]] = {}
    for cell, servers in results.items():
        if (parts := CELL_NAME.fullmatch(cell)) and {"qemu", "replnbd"} <= set(servers):
            table.setdefault(parts[1], {})[parts[2]] = f"{ratio(servers, 'qemu'):.1f}"
    loads = list(dict.fromkeys(load for row in table.values() for load in row))
    lines = [f"| times QEMU's requests/s | {' | '.join(loads)} |"]
    lines.append("| --- |" + " ---: |" * len(loads))
    for state, row in table.items():
        lines.append(f"| {state} | {' | '.join(row.get(load, '') for load in loads)} |")
    return "\n".join(lines) + "\n"


def runs_json(runs: list[Run]) -> dict[str, Any]:
    """One server's runs of one cell."""
    latencies = [run.p99_us for run in runs if run.p99_us is not None]
    return {
        "requests-per-s": [run.requests_per_s for run in runs],
        "median": median(runs),
        "p99-us": statistics.median(latencies) if latencies else None,
        "cpu-us": median(runs, cpu),
    }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
    )
    return {
        "processors": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": version.stdout.split("\n")[0],
    }
