"""What grows: start-up time, memory, recovery, and the cost of a request with many exports or
clients."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from bench_cells import SMALL, tell
from bench_events import Rows, Settings
from bench_load import GIB, MIB, TIB, Load, Shape
from bench_servers import Qemu, Replnbd, Standby

# Each of the many connections is as busy as the one it is compared with.
MANY = Shape(SMALL.size, SMALL.depth, connections=64)
LARGEST = 16 * TIB - MIB  # bytes: an ext4 file with 4 KiB blocks must stay below 16 TiB
TMPFS = Path("/dev/shm")
TMPFS_SIZE_MIN = 10 * GIB
QEMU_CLUSTERS_MAX = 100_000  # each takes it 64 KiB of disk space


def start(settings: Settings) -> Rows:
    """From exec until a client is accepted and greeted, overlays being there."""
    found: dict[str, list[float]] = {kind.name: [] for kind in settings.standbys()}
    for turn in range(settings.repeat + 1):
        for kind in settings.standbys():
            with kind(settings.directory / kind.name, settings.size) as server:
                if turn:  # the first one makes the overlays
                    found[kind.name].append(server.start_s)
    return [
        {"server": name, "start s": median(times), "min": min(times), "max": max(times)}
        for name, times in found.items()
    ]


def memory(settings: Settings) -> Rows:
    """Resident memory with a sparse 1 TiB disk, half the clusters in each overlay."""
    rows: Rows = []
    with large_directory(settings) as directory:
        for clusters in (5_000,) if settings.quick else (100_000, 1_000_000):
            for kind in settings.standbys():
                if kind is Qemu and clusters > QEMU_CLUSTERS_MAX:
                    continue
                tell(f"memory {clusters} clusters {kind.name}")
                now, peak = resident(kind, directory, clusters)
                rows.append(
                    {
                        "server": kind.name,
                        "clusters": clusters,
                        "MiB resident": now,
                        "highest": peak,
                    }
                )
    return rows


@contextmanager
def large_directory(settings: Settings) -> Iterator[Path]:
    """Where overlays of a million clusters go: to a tmpfs, if there is room. ext4 takes minutes to
    make and to delete a million extents, and memory was measured to be the same on both."""
    room = TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > TMPFS_SIZE_MIN
    with tempfile.TemporaryDirectory(
        prefix="replnbd-bench-", dir=TMPFS if room else settings.directory
    ) as name:
        yield Path(name)


def resident(kind: type[Standby], directory: Path, clusters: int) -> tuple[float, float]:
    """A server's memory with so many clusters touched, in MiB: now, and at its highest."""
    with touched(kind, directory, clusters) as server:
        found = server.resident_mib()
    shutil.rmtree(server.directory)
    return found


@contextmanager
def touched(kind: type[Standby], directory: Path, clusters: int) -> Iterator[Standby]:
    """A standby of 1 TiB with so many clusters touched, half of them in each overlay."""
    load = Load(directory, TIB, 0)
    with kind(directory / kind.name, TIB) as server:
        server.start()
        load.touch(server, "disk", SMALL, clusters // 2, seed=5)
        load.touch(server, "view", SMALL, clusters - clusters // 2, seed=6)
        server.settle()
        yield server


def recovery(settings: Settings) -> Rows:
    """After kill -9 with a sparse 1 TiB disk: from exec until a client is greeted."""
    if "replnbd" not in settings.servers:
        return []
    rows: Rows = []
    with large_directory(settings) as directory:
        for clusters in (5_000,) if settings.quick else (100_000, 1_000_000):
            tell(f"recovery {clusters} clusters")
            with touched(Replnbd, directory, clusters) as server:
                server.process.kill()
            times = []
            for _ in range(settings.repeat):
                with Replnbd(server.directory, TIB) as again:
                    times.append(again.start_s)
                    again.process.kill()
            rows.append(
                {
                    "server": "replnbd",
                    "clusters": clusters,
                    "recovery s": median(times),
                    "min": min(times),
                    "max": max(times),
                }
            )
            shutil.rmtree(server.directory)
    return rows


def scale(settings: Settings) -> Rows:
    """replnbd's processor time per 4 KiB request in larger set-ups, next to the smallest."""
    if "replnbd" not in settings.servers:
        return []
    cases = {
        f"1 disk, 1 connection, {settings.size // MIB} MiB": (1, settings.size, SMALL),
        "50 disks, 100 exports": (50, settings.size, SMALL),
        "64 connections": (1, settings.size, MANY),
        "16 TiB disk": (1, LARGEST, SMALL),
    }
    load = Load(settings.directory, settings.size, settings.runtime_s)
    costs: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        servers = {}
        for number, (case, (disks, size, _)) in enumerate(cases.items()):
            tell(f"preparing {case}")
            place = settings.directory / str(number)
            server = stack.enter_context(Replnbd(place, size, disks=disks))
            servers[case] = server
            # All work on as much data, in the middle of the disk; so the page cache is the same.
            load.fill(server, "disk", offset=(size - load.size) // 2)
            server.start()
            load.fill(server, "disk", offset=(size - load.size) // 2)
        for turn in range(settings.repeat):
            for case, (_, size, shape) in cases.items():
                tell(f"{turn + 1}/{settings.repeat} {case}")
                area = [f"--offset={(size - load.size) // 2}", f"--size={load.size}"]
                for export, pattern in (("view", "randread"), ("disk", "randwrite")):
                    run = load.timed(servers[case], export, pattern, shape, *area)
                    costs.setdefault((case, pattern), []).append(run.cpu_us)
    base = next(iter(cases))
    return [
        {
            "set-up": case,
            "load": f"{'standby' if pattern == 'randread' else 'primary'} {pattern}",
            "CPU µs": median(values),
            "min": min(values),
            "max": max(values),
            "ratio": median(values) / median(costs[base, pattern]),
        }
        for (case, pattern), values in costs.items()
    ]
