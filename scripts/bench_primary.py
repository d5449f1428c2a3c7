"""The primary's side: what a standby costs its writes, and how fast one is brought up to date.

Peers in the same run: a plain export of replnbd for the writes, nbdcopy for the synchronisation.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_cells import tell
from bench_events import Rows, Settings
from bench_load import KIB, MIB, Load, Shape
from bench_servers import Replnbd, Server, Standby
from nbd_client import NbdClient

SHAPES = (Shape(4 * KIB, 1), Shape(4 * KIB, 32), Shape(64 * KIB, 16), Shape(MIB, 4))
GRANULE = 64 * KIB
SYNC_S = 120.0
POLL_S = 0.01


class ReplnbdPrimary(Standby):
    """`replnbd serve` of a disk in mode primary, whose standby is `to`."""

    name = "replnbd-primary"

    def __init__(self, directory: Path, size: int, to: Server) -> None:
        self.to = to
        super().__init__(directory, size)

    def command(self) -> list[str]:
        config = self.directory / "replnbd.toml"
        config.write_text(f"""
            [server]
            listen = ["nbd+unix:///?socket={self.socket}"]
            control = "{self.control}"
            [[disk]]
            name = "disk"
            mode = "primary"
            disk = "disk.raw"
            to = "{self.to.uri("disk")}"
            """)
        return [str(Path(sys.executable).with_name("replnbd")), "serve", str(config)]

    def start(self) -> None:
        self.client.execute("xen-set-replication", enable=True, primary=True)

    @property
    def link(self) -> dict[str, Any]:
        """What the status says of the link."""
        link: dict[str, Any] = self.client.execute("x-replnbd-status")["disks"][0]["link"]
        return link

    def wait_in_step(self) -> float:
        """Until the standby is; how long that took, to POLL_S."""
        begin = time.perf_counter()
        self.wait(self._in_step, SYNC_S, POLL_S)
        return time.perf_counter() - begin

    def _in_step(self) -> bool:
        link = self.link
        return link["state"] == "live" and not link["behind-bytes"]


def primary(settings: Settings) -> Rows:
    """Random writes of a disk with a standby, next to a plain export; the standby is at rest."""
    load = Load(settings.directory, settings.size, settings.runtime_s)
    rates: dict[str, list[tuple[float, float]]] = {}
    cpus: dict[str, list[tuple[float, float, float]]] = {}
    plain = Replnbd(settings.directory / "plain", settings.size)
    standby = Replnbd(settings.directory / "standby", settings.size)
    it = ReplnbdPrimary(settings.directory / "primary", settings.size, standby)
    with plain, standby, it:
        for server in (plain, it):
            load.fill(server, "disk")
        it.start()
        it.wait_in_step()
        for turn in range(settings.repeat):
            for shape in SHAPES:
                tell(f"{turn + 1}/{settings.repeat} {shape} writes, plain and with a standby")
                alone = load.timed(plain, "disk", "randwrite", shape)
                used = standby.cpu_s()
                both = load.timed(it, "disk", "randwrite", shape)
                requests = both.requests_per_s * settings.runtime_s
                away = (standby.cpu_s() - used) * 1e6 / requests
                it.wait_in_step()
                rates.setdefault(str(shape), []).append((alone.requests_per_s, both.requests_per_s))
                cpus.setdefault(str(shape), []).append((alone.cpu_us, both.cpu_us, away))
    rows = []
    for what, runs in rates.items():
        before, now = (median(run[each] for run in runs) for each in (0, 1))
        row: dict[str, object] = {"writes": what, "plain /s": before, "with a standby /s": now}
        row["cost"] = before / now
        for at, name in enumerate(("plain", "primary", "standby")):
            row[f"{name}: CPU µs"] = median(run[at] for run in cpus[what])
        rows.append(row)
    return rows


def sync(settings: Settings) -> Rows:
    """A half-full disk to an empty standby, by nbdcopy and by replnbd; a resync after a break, in
    which a tenth of the granules is written; and a standby that hangs."""
    size = settings.size
    rng = random.Random(1)
    rates: dict[str, list[float]] = {"nbdcopy": [], "full sync": []}
    moved: list[float] = []
    hangs: list[tuple[float, float, float]] = []
    for turn in range(settings.repeat):
        tell(f"{turn + 1}/{settings.repeat} synchronisations of {size // MIB} MiB, half full")
        folder = settings.directory / f"sync{turn}"
        folder.mkdir()
        standby = Replnbd(folder / "standby", size, tcp=True)
        with standby, ReplnbdPrimary(folder / "primary", size, standby) as it:
            _fill_half(it.disk, size, rng)
            begin = time.perf_counter()
            subprocess.run(["nbdcopy", str(it.disk), standby.uri("disk")], check=True)
            rates["nbdcopy"].append(size / 2 / MIB / (time.perf_counter() - begin))
            with open(standby.disk, "r+b") as disk:  # nobody has it in use
                disk.truncate(0)
                disk.truncate(size)
            it.start()
            rates["full sync"].append(size / 2 / MIB / it.wait_in_step())
            moved.append(_resync(it, standby, rng))
            load = Load(folder, size, settings.runtime_s)
            hangs.append(_hang(it, standby, load))
    rows: Rows = [
        {"what": f"{name}, MiB/s of data", "figure": median(each)} for name, each in rates.items()
    ]
    rows.append({"what": "full sync / nbdcopy", "figure": _ratio(rates)})
    rows.append({"what": "resync: bytes moved / differing", "figure": median(moved)})
    for at, what in enumerate(("writes/s before", "writes/s then", "peak memory, MiB")):
        figure = median(each[at] for each in hangs)
        rows.append({"what": f"standby hangs, 4k@32: {what}", "figure": figure})
    return rows


def _ratio(rates: dict[str, list[float]]) -> float:
    return median(rates["full sync"]) / median(rates["nbdcopy"])


def _fill_half(path: Path, size: int, rng: random.Random) -> None:
    with open(path, "r+b") as disk:
        for at in range(0, size, 2 * MIB):
            disk.seek(at)
            disk.write(rng.randbytes(MIB))


def _resync(it: ReplnbdPrimary, standby: Server, rng: random.Random) -> float:
    """Bytes moved by the resync after a break, to bytes that differed (in granules): 4 KiB were
    written to a tenth of the granules, and 4 KiB that change nothing to another tenth."""
    it.client.execute("xen-set-replication", enable=False, primary=True)
    places = rng.sample(range(it.size // GRANULE), it.size // GRANULE // 5)
    with NbdClient(str(it.socket), "disk") as disk:
        for number, place in enumerate(places):
            at = place * GRANULE
            disk.write(at, disk.read(at, 4 * KIB) if number % 2 else rng.randbytes(4 * KIB))
    differing = _differing(it.disk, standby.disk)
    before = int(it.link["copied-bytes"])
    it.client.execute("x-replnbd-reset")
    it.start()
    it.wait_in_step()
    assert not _differing(it.disk, standby.disk)
    return (int(it.link["copied-bytes"]) - before) / differing


def _differing(one: Path, other: Path) -> int:
    """Bytes, in granules."""
    count = 0
    with open(one, "rb") as here, open(other, "rb") as there:
        while (mine := here.read(GRANULE)) or there.read(0):
            count += GRANULE if mine != there.read(GRANULE) else 0
    return count


def _hang(it: ReplnbdPrimary, standby: Server, load: Load) -> tuple[float, float, float]:
    """Writes a second with a standby, and with one that hangs; and the primary's peak memory."""
    before = load.timed(it, "disk", "randwrite", Shape(4 * KIB, 32))
    it.wait_in_step()
    os.kill(standby.process.pid, signal.SIGSTOP)
    try:
        then = load.timed(it, "disk", "randwrite", Shape(4 * KIB, 32))
    finally:
        os.kill(standby.process.pid, signal.SIGCONT)
    it.wait_in_step()
    return before.requests_per_s, then.requests_per_s, it.resident_mib()[1]
