"""The load: fio's nbd engine (libnbd), and what one run of it gave."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_servers import Server

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER_SIZE = 64 * KIB  # both servers' overlays; QEMU copies this much on a first touch
FILL_SIZE = 256 * KIB  # bytes per request of a fill: nbdcopy's
SEED = 1


@dataclass(frozen=True)
class Shape:
    """How the requests come: bytes of each, how many are in flight, on how many connections."""

    size: int
    depth: int
    connections: int = 1

    def __str__(self) -> str:
        size = f"{self.size // MIB}m" if self.size >= MIB else f"{self.size // KIB}k"
        return f"{size}@{self.depth}" + (f"x{self.connections}" if self.connections > 1 else "")


@dataclass(frozen=True)
class Run:
    """One run of a cell on one server."""

    requests_per_s: float
    p99_us: float | None
    """Completion latency that 99 % of the requests stayed below; None where nobody measured it."""
    cpu_us: float
    """Processor time of the server per request."""


class Load:
    """fio, and the disk it works on."""

    def __init__(self, directory: Path, size: int, runtime_s: float) -> None:
        self.directory = directory
        self.size = size
        self.runtime_s = runtime_s

    def timed(self, server: Server, export: str, pattern: str, shape: Shape, *options: str) -> Run:
        """Random requests all over the disk for the set time. `pattern` is fio's --rw."""
        runtime = f"--runtime={round(self.runtime_s * 1000)}ms"
        return self._measure(
            server, export, shape, f"--rw={pattern}", "--time_based", runtime, *options
        )

    def fill(self, server: Server, export: str, size: int | None = None, offset: int = 0) -> None:
        """Write the first `size` bytes (by default all) from `offset` on, once and in order."""
        options = ["--rw=write", f"--size={size or self.size}", f"--offset={offset}"]
        self._finish(server, self.begin(server, export, Shape(FILL_SIZE, 4), *options))

    def touch(self, server: Server, export: str, shape: Shape, count: int, seed: int = SEED) -> Run:
        """`count` writes in random order, none to a cluster that another has touched."""
        unit = max(shape.size, CLUSTER_SIZE)
        places = random.Random(seed).sample(range(self.size // unit), count)
        path = self.directory / f"touch-{export}.log"
        with open(path, "w") as log:
            log.write("fio version 2 iolog\nnbd add\nnbd open\n")
            log.writelines(f"nbd write {place * unit} {shape.size}\n" for place in places)
            log.write("nbd close\n")
        return self._measure(
            server, export, shape, "--rw=randwrite", f"--read_iolog={path}", "--replay_no_stall=1"
        )

    def begin(
        self, server: Server, export: str, shape: Shape, *options: str
    ) -> subprocess.Popen[str]:
        """Start fio and leave it running; the caller ends it."""
        command = ["fio", "--name=bench", "--output-format=json", "--ioengine=nbd", "--thread"]
        command += [f"--uri={server.uri(export)}", f"--bs={shape.size}"]
        command += [f"--iodepth={shape.depth}", f"--numjobs={shape.connections}"]
        command += ["--group_reporting", f"--randseed={SEED}", "--norandommap", *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _measure(self, server: Server, export: str, shape: Shape, *options: str) -> Run:
        before = server.cpu_s()
        job = self._finish(server, self.begin(server, export, shape, *options))
        used = server.cpu_s() - before
        kinds = [job[kind] for kind in ("read", "write") if job[kind]["total_ios"]]
        if not kinds:
            raise SystemExit(f"fio did nothing on {server.name}, export {export}")
        return Run(
            sum(kind["iops"] for kind in kinds),
            max(kind["clat_ns"]["percentile"]["99.000000"] for kind in kinds) / 1000,
            used / sum(kind["total_ios"] for kind in kinds) * 1e6,
        )

    def _finish(self, server: Server, fio: subprocess.Popen[str]) -> dict[str, Any]:
        output, errors = fio.communicate()
        if fio.returncode != 0:
            raise SystemExit(f"fio failed on {server.name}: {output[-500:]}{errors}")
        job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
        if job["error"]:
            raise SystemExit(f"fio failed on {server.name}: error {job['error']}")
        return job
