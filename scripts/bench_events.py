"""What happens at once: checkpoints and failovers, and how long clients wait meanwhile."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench_cells import STANDBYS, tell
from bench_load import KIB, MIB, Load, Shape
from bench_probe import Probe
from bench_servers import Standby
from nbd_client import NbdClient

from replnbd.errors import ReplnbdError

CALM_S = 0.7  # of the probe before a checkpoint, to see what it waits without one
CALM_END_S = 0.05  # before the checkpoint: what was sent later may wait for it
AFTER_S = 0.7  # and after: work in the background may be felt, too
SPARE_SIZE = 16 * MIB  # of the disk, that no fill writes; the probe does
STANDBY_WRITES_PER_S = 1000  # a load that the commit can keep up with; else it might never end
COMMIT_S = 120.0
ABORT_S = 20.0

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    directory: Path
    servers: tuple[str, ...]
    repeat: int
    runtime_s: float
    size: int
    quick: bool

    def standbys(self) -> list[type[Standby]]:
        """The servers with overlays that are wanted."""
        return [kind for kind in STANDBYS if kind.name in self.servers]

    def turns(self, turn: int) -> list[type[Standby]]:
        """The same, in the order of a repetition: each begins every second one."""
        return self.standbys()[:: 1 if turn % 2 == 0 else -1]


def checkpoint(settings: Settings) -> Rows:
    """Checkpoints with so much dirty in each overlay: the command, the longest wait of a client."""
    dirty = (0, 64, 256) if settings.quick else (0, 64, 512, 2048)
    size = dirty[-1] * MIB + SPARE_SIZE
    load = Load(settings.directory, size, 0)
    found: dict[tuple[int, str], Rows] = {}
    aborts: Counter[tuple[int, str]] = Counter()
    servers: dict[type[Standby], Standby] = {}
    try:
        for turn in range(settings.repeat):
            for mib in dirty:
                for kind in settings.turns(turn):
                    tell(f"{turn + 1}/{settings.repeat} checkpoint {mib} MiB {kind.name}")
                    figures = None
                    while figures is None:
                        if kind not in servers:
                            servers[kind] = synchronised(kind, settings.directory, load)
                        figures = one_checkpoint(servers[kind], load, mib * MIB)
                        if figures is None:
                            # With requests in flight QEMU 7.2 may find that "First cluster in
                            # emptied image is in use", and aborts.
                            aborts[mib, kind.name] += 1
                            servers.pop(kind).close()
                            shutil.rmtree(settings.directory / kind.name)
                    found.setdefault((mib, kind.name), []).append(figures)
    finally:
        for server in servers.values():
            server.close()
    return [
        {
            "MiB dirty": mib,
            "server": name,
            "command ms": median(row["command"] for row in rows),
            "max": max(row["command"] for row in rows),
            "stall ms": median(row["stall"] for row in rows),
            "max stall": max(row["stall"] for row in rows),
            "max calm": max(row["calm"] for row in rows),
            "aborts": aborts[mib, name],
        }
        for (mib, name), rows in sorted(found.items())
    ]


def synchronised(kind: type[Standby], directory: Path, load: Load) -> Standby:
    """A server whose disk is filled and which replicates."""
    server = kind(directory / kind.name, load.size)
    load.fill(server, "disk")
    server.start()
    return server


def one_checkpoint(server: Standby, load: Load, dirty: int) -> dict[str, float] | None:
    """All in milliseconds; None: the server aborts."""
    if dirty:
        load.fill(server, "disk", dirty)
        load.fill(server, "view", dirty)
    server.settle()
    try:
        with Probe(server) as probe:
            begin = time.monotonic()
            time.sleep(CALM_S)
            sent = time.monotonic()
            server.checkpoint()
            done = time.monotonic()
            time.sleep(AFTER_S)
            end = time.monotonic()
    except ReplnbdError:
        if server.process.wait(ABORT_S):
            return None
        raise
    return {
        "command": (done - sent) * 1000,
        "stall": probe.longest_s(sent, end) * 1000,
        "calm": probe.longest_s(begin, sent - CALM_END_S) * 1000,
    }


def failover(settings: Settings) -> Rows:
    """Failovers while the standby writes: the command, the first read, until all is committed."""
    mib = 64 if settings.quick else 512
    found: dict[str, Rows] = {kind.name: [] for kind in settings.standbys()}
    for turn in range(settings.repeat):
        for kind in settings.turns(turn):
            tell(f"{turn + 1}/{settings.repeat} failover {kind.name}")
            place = settings.directory / "failover"
            with kind(place, mib * MIB) as server:
                found[kind.name].append(one_failover(server, Load(place, mib * MIB, 0)))
            shutil.rmtree(place)
    return [
        {
            "server": name,
            "MiB dirty": mib,
            "command ms": median(row["command"] for row in rows),
            "max": max(row["command"] for row in rows),
            "first read ms": median(row["read"] for row in rows),
            "max read": max(row["read"] for row in rows),
            "committed s": median(row["committed"] for row in rows),
            "max committed": max(row["committed"] for row in rows),
        }
        for name, rows in found.items()
    ]


def one_failover(server: Standby, load: Load) -> dict[str, float]:
    """With every byte of both overlays dirty."""
    load.fill(server, "disk")
    server.start()
    load.fill(server, "disk")
    load.fill(server, "view")
    server.settle()
    options = ["--rw=randwrite", "--time_based", f"--runtime={COMMIT_S}"]
    options += [f"--rate_iops={STANDBY_WRITES_PER_S}"]
    fio = load.begin(server, "view", Shape(4 * KIB, 1), *options)
    try:
        with NbdClient(str(server.socket), "view") as client:
            client.read(0, 4 * KIB)
            time.sleep(1)  # until fio is at it
            place = random.randrange(client.size // (4 * KIB)) * 4 * KIB
            sent = time.monotonic()
            server.failover()
            done = time.monotonic()
            client.read(place, 4 * KIB)
            read = time.monotonic()
            server.wait(server.committed, COMMIT_S, pause_s=0.01)
            committed = time.monotonic()
    finally:
        fio.kill()
        fio.communicate()
    return {
        "command": (done - sent) * 1000,
        "read": (read - done) * 1000,
        "committed": committed - sent,
    }
