"""What one slow disk does to everybody else: latency of another export and of QMP commands.

A daemon serves two disks. A client reads, writes and flushes 4 KiB of the second disk, and a
manager asks for the status, one at a time, for some seconds: first alone, then while 32 clients
wait for the first disk, each request of which takes 50 ms.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvloop
from bench_cells import tell
from bench_events import Rows, Settings
from nbd_client import NbdClient

from replnbd.control import ControlClient
from replnbd.daemon import Config, Daemon, DiskConfig, ServerConfig, check_config
from replnbd.errors import ConfigError
from replnbd.filters import DelayNode
from replnbd.server import Export

DELAY_S = 0.05
CLIENTS = 32
RUNTIME_S = 3.0
DISK_SIZE = 64 << 20
REQUEST_SIZE = 4096
READY_S = 20.0
LOADS = {
    "none": None,
    "read a DelayNode": ("delay", "read"),
    "flush a DelayNode": ("delay", "flush"),
    "flush, in threads": ("slow", "flush"),
}

_spawn = get_context("spawn")


def serve(folder: Path, sockets: Path) -> None:
    """The daemon's process: disks "slow" and "well", and an export "delay" of the first one through
    a DelayNode. fdatasync of the first one's file takes 50 ms, in a thread as on a real disk."""
    disks = [
        DiskConfig(name=name, mode="secondary", top_id=f"{name}-top", secondary=f"{name}.raw")
        for name in ("slow", "well")
    ]
    slow_file = os.stat(folder / "slow.raw")
    fdatasync = os.fdatasync

    def slow_fdatasync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), slow_file):
            time.sleep(DELAY_S)
        fdatasync(fd)

    async def run(config: Config) -> None:
        async with Daemon(config) as daemon:
            await daemon.standby_group.start()
            slow = daemon.standby_group.disks[0].primary
            daemon.server.add_export(Export("delay", DelayNode("delay", slow, DELAY_S)))
            await asyncio.Event().wait()

    os.fdatasync = slow_fdatasync  # type: ignore[assignment]
    server = ServerConfig(listen=[f"nbd+unix:///?socket={sockets}/nbd"], control=f"{sockets}/qmp")
    uvloop.run(run(check_config(Config(server=server, disk=disks), folder)))


def use(sockets: Path, export: str, command: str) -> None:
    """The slow disk's clients' process: each sends one `command` after the other, for ever."""

    def client() -> None:
        with NbdClient(f"{sockets}/nbd", export) as disk:
            while True:
                disk.read(0, REQUEST_SIZE) if command == "read" else disk.flush()

    for _ in range(CLIENTS):
        threading.Thread(target=client, daemon=True).start()
    threading.Event().wait()


@contextmanager
def process(function: Callable[..., None], *args: object) -> Iterator[BaseProcess]:
    """A process that runs `function` until the block ends."""
    running = _spawn.Process(target=function, args=args, daemon=True)
    running.start()
    try:
        yield running
    finally:
        running.kill()
        running.join()


def connect(path: str) -> ControlClient:
    """The daemon's control socket, once the daemon is ready."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            return ControlClient(path)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def measure(sockets: Path, control: ControlClient) -> dict[str, list[float]]:
    """Seconds that each request and command took, in order of length."""
    took: dict[str, list[float]] = {}
    data = os.urandom(REQUEST_SIZE)
    with NbdClient(f"{sockets}/nbd", "well") as disk:
        calls: dict[str, Callable[[], object]] = {
            "read": lambda: disk.read(0, REQUEST_SIZE),
            "write": lambda: disk.write(0, data),
            "flush": disk.flush,
            "QMP": lambda: control.execute("x-replnbd-status"),
        }
        end = time.monotonic() + RUNTIME_S
        while time.monotonic() < end:
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                took.setdefault(name, []).append(time.perf_counter() - start)
    return {name: sorted(times) for name, times in took.items()}


def slow_disk(settings: Settings) -> Rows:
    """Milliseconds that a request of a disk, or a command, takes while another disk is slow."""
    if "replnbd" not in settings.servers:
        return []
    rows: Rows = []
    for disk in ("slow", "well"):
        with open(settings.directory / f"{disk}.raw", "wb") as file:
            file.truncate(DISK_SIZE)
    # Not in the directory: the path of a unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="replnbd-", dir="/tmp") as name:
        sockets = Path(name)
        with process(serve, settings.directory, sockets), connect(f"{sockets}/qmp") as control:
            for load, arguments in LOADS.items():
                tell(f"slow disk: {load}")
                if arguments is None:
                    took = measure(sockets, control)
                else:
                    with process(use, sockets, *arguments):
                        time.sleep(1)  # until all of them wait
                        took = measure(sockets, control)
                rows += [
                    {
                        "load": load,
                        "request": request,
                        "median ms": times[len(times) // 2] * 1e3,
                        "p99": times[len(times) * 99 // 100] * 1e3,
                        "max": times[-1] * 1e3,
                    }
                    for request, times in took.items()
                ]
    return rows
