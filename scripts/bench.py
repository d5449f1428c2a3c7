"""Requests per second of replnbd and of QEMU's replication filter, side by side.

fio's nbd engine sends 4 KiB requests at depth 32 over a unix socket. Each cell is prepared the same
way on both servers, and the servers take turns, so that a slow minute of the machine hits both.
Both write to files in one directory (--directory; by default the system's temporary one): its file
system is part of what is measured. The last line of each cell is replnbd's median over QEMU's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_servers import Qemu, Replnbd, Server

REQUEST_SIZE = 4096  # bytes
DEPTH = 32
CLUSTER_SIZE = 65536  # bytes: QEMU's overlays copy this much on a first touch
SEED = 1
MEMORY_DISK_SIZE = 1 << 40


@dataclass
class Run:
    """One run of a cell on one server."""

    requests_per_s: float
    cpu_us: float
    """Processor time of the server per request."""


class Load:
    """fio, and the disk it works on."""

    def __init__(self, directory: Path, size: int, runtime_s: float) -> None:
        self.directory = directory
        self.size = size
        self.runtime_s = runtime_s
        self._logs = 0

    def timed(self, server: Server, export: str, pattern: str) -> Run:
        """Random requests all over the disk for the set time."""
        return self._measure(
            server, export, f"--rw={pattern}", "--time_based", f"--runtime={self.runtime_s}"
        )

    def fill(self, server: Server, export: str) -> None:
        """Write the whole disk once, in order, in requests as large as nbdcopy's."""
        self._fio(server, export, "--rw=write", "--bs=256k", f"--size={self.size}")

    def scatter(self, server: Server, export: str, count: int, size: int, seed: int) -> Run:
        """One request to each of `count` clusters of a disk of `size` bytes, in random order."""
        clusters = random.Random(seed).sample(range(size // CLUSTER_SIZE), count)
        self._logs += 1
        path = self.directory / f"scatter{self._logs}.log"
        with open(path, "w") as log:
            log.write("fio version 2 iolog\nnbd add\nnbd open\n")
            for cluster in clusters:
                log.write(f"nbd write {cluster * CLUSTER_SIZE} {REQUEST_SIZE}\n")
            log.write("nbd close\n")
        return self._measure(
            server, export, "--rw=randwrite", f"--read_iolog={path}", "--replay_no_stall=1"
        )

    def _measure(self, server: Server, export: str, *options: str) -> Run:
        before = server.cpu_s()
        job = self._fio(server, export, f"--bs={REQUEST_SIZE}", *options)
        used = server.cpu_s() - before
        done = job["read"]["total_ios"] + job["write"]["total_ios"]
        rate = job["read"]["iops"] + job["write"]["iops"]
        if job["error"] or not done:
            raise SystemExit(f"fio failed on {server.name}, export {export}: error {job['error']}")
        return Run(rate, used / done * 1e6)

    def _fio(self, server: Server, export: str, *options: str) -> dict[str, dict[str, float]]:
        command = ["fio", "--name=bench", "--output-format=json", "--ioengine=nbd", "--thread"]
        command += [f"--uri={server.uri(export)}", f"--iodepth={DEPTH}", f"--randseed={SEED}"]
        command += ["--refill_buffers", "--norandommap", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"fio failed on {server.name}: {done.stdout[-500:]}{done.stderr}")
        job: dict[str, dict[str, float]] = json.loads(done.stdout[done.stdout.index("{") :])[
            "jobs"
        ][0]
        return job


# The cells. Each starts from a fresh checkpoint, prepares, and measures one run.


def standby_randread(load: Load, server: Server) -> Run:
    """Reads of the view: a third each from the active overlay, the hidden one and the disk."""
    clusters = load.size // CLUSTER_SIZE
    load.scatter(server, "disk", clusters // 2, load.size, seed=1)
    load.scatter(server, "view", clusters // 3, load.size, seed=2)
    return load.timed(server, "view", "randread")


def standby_randwrite(load: Load, server: Server) -> Run:
    """Writes to the view where the standby has written before."""
    load.fill(server, "view")
    return load.timed(server, "view", "randwrite")


def standby_first_touch(load: Load, server: Server) -> Run:
    """Writes to the view, each to a cluster not written since the checkpoint."""
    return load.scatter(server, "view", load.size // CLUSTER_SIZE, load.size, seed=3)


def primary_randwrite(load: Load, server: Server) -> Run:
    """Writes of the primary where it has written since the checkpoint: no old data to save."""
    load.fill(server, "disk")
    return load.timed(server, "disk", "randwrite")


def primary_first_touch(load: Load, server: Server) -> Run:
    """Writes of the primary, each to a cluster not written since the checkpoint."""
    return load.scatter(server, "disk", load.size // CLUSTER_SIZE, load.size, seed=4)


CELLS: dict[str, Callable[[Load, Server], Run]] = {
    "standby randread": standby_randread,
    "standby randwrite": standby_randwrite,
    "standby first touch": standby_first_touch,
    "primary randwrite": primary_randwrite,
    "primary first touch": primary_first_touch,
}


def compare(load: Load, servers: list[Server], cells: list[str], repeat: int) -> dict[str, object]:
    """Run the cells, print as they come, return the figures."""
    figures: dict[str, object] = {}
    print(
        f"{'requests/s':22}{'server':9}{'median':>9}{'min':>9}{'max':>9}{'CPU µs':>8}{'ratio':>7}"
    )
    for cell in cells:
        runs: dict[str, list[Run]] = {server.name: [] for server in servers}
        for turn in range(repeat):
            for server in servers if turn % 2 == 0 else reversed(servers):
                server.checkpoint()
                runs[server.name].append(CELLS[cell](load, server))
        medians = {
            name: statistics.median(r.requests_per_s for r in rs) for name, rs in runs.items()
        }
        ratio = medians["replnbd"] / medians["qemu"] if len(medians) == 2 else None
        for name, results in runs.items():
            rates = [run.requests_per_s for run in results]
            cpu = statistics.median(run.cpu_us for run in results)
            shown = f"{ratio:7.2f}" if ratio is not None and name == "replnbd" else ""
            print(
                f"{cell:22}{name:9}{medians[name]:9.0f}{min(rates):9.0f}{max(rates):9.0f}"
                f"{cpu:8.1f}{shown}",
                flush=True,
            )
        figures[cell] = {
            "ratio": ratio,
            **{
                name: {
                    "median": medians[name],
                    "runs": [run.requests_per_s for run in results],
                    "cpu-us": [run.cpu_us for run in results],
                }
                for name, results in runs.items()
            },
        }
    return figures


def memory(directory: Path, kind: type[Server], clusters: int) -> dict[str, object]:
    """Resident memory with a sparse 1 TiB disk and scattered clusters in both overlays."""
    place = directory / f"memory-{kind.name}"
    place.mkdir()
    secondary = place / "disk.raw"
    with open(secondary, "wb") as disk:
        disk.truncate(MEMORY_DISK_SIZE)
    load = Load(place, MEMORY_DISK_SIZE, 0)
    server = kind(place, secondary)
    try:
        server.export()
        server.start()
        load.scatter(server, "disk", clusters // 2, MEMORY_DISK_SIZE, seed=5)
        load.scatter(server, "view", clusters - clusters // 2, MEMORY_DISK_SIZE, seed=6)
        now, peak = server.resident_mib()
    finally:
        server.close()
    print(
        f"{kind.name}: {now:.0f} MiB resident (highest {peak:.0f}) with a sparse 1 TiB disk and"
        f" {clusters} scattered clusters in the overlays",
        flush=True,
    )
    return {"resident-mib": now, "peak-mib": peak, "clusters": clusters}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    add = parser.add_argument
    add("--cell", action="append", choices=list(CELLS), help="only this cell; may be repeated")
    add("--server", choices=["qemu", "replnbd"], help="only this server; no ratio")
    add("--repeat", type=int, default=5, help="runs of each cell on each server (default 5)")
    add("--runtime", type=float, default=3.0, help="seconds of a timed run (default 3)")
    add("--size", type=int, default=512, help="MiB of the disk (default 512)")
    add("--clusters", type=int, default=100_000, help="for the memory figure (default 100000)")
    add("--no-memory", action="store_true", help="leave the memory figure out")
    add("--directory", type=Path, help="where the disks go; needs 8 times the disk's size")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE; - for stdout")
    return parser.parse_args()


def main() -> None:
    """Compare, measure memory, write the JSON."""
    options = arguments()
    if options.json == Path("-"):
        sys.stdout, stdout = sys.stderr, sys.stdout
    else:
        stdout = sys.stdout
    kinds = [kind for kind in (Qemu, Replnbd) if options.server in (None, kind.name)]
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="replnbd-bench-", dir=options.directory) as name:
        directory = Path(name)
        load = Load(directory, options.size << 20, options.runtime)
        servers: list[Server] = []
        try:
            for kind in kinds:
                place = directory / kind.name
                place.mkdir()
                secondary = place / "disk.raw"
                secondary.touch()
                os.truncate(secondary, load.size)
                servers.append(kind(place, secondary))
                servers[-1].export()
                load.fill(servers[-1], "disk")  # the initial sync
                servers[-1].start()
            cells = options.cell or list(CELLS)
            figures["requests-per-s"] = compare(load, servers, cells, options.repeat)
        finally:
            for server in servers:
                server.close()
        if not options.no_memory:
            figures["memory"] = {
                kind.name: memory(directory, kind, options.clusters) for kind in kinds
            }
    if options.json:
        text = json.dumps(figures, indent=2) + "\n"
        stdout.write(text) if options.json == Path("-") else options.json.write_text(text)


if __name__ == "__main__":
    main()
