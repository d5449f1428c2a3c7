"""A disk that hangs keeps nobody waiting but its own clients: other exports and QMP go on."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from daemon_support import SIZE, Setup, pattern
from loops import on_both_loops
from peers import NbdClient, QmpClient

from replnbd.block import PassThrough
from replnbd.block.file import CALLS_MAX
from replnbd.daemon import Config, Daemon, DiskConfig, ServerConfig, check_config
from replnbd.server import Export


class Hanging:
    """Stands for a disk that does not answer: system calls on the file `path` wait until
    `go_on`, and reads of it miss the page cache. `waiting` counts the threads it holds."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = 0
        self.go_on = threading.Event()
        self._file = os.stat(path)
        self._preadv, self._fdatasync = os.preadv, os.fdatasync
        monkeypatch.setattr(os, "preadv", self._slow_preadv)
        monkeypatch.setattr(os, "fdatasync", self._slow_fdatasync)

    def _wait(self, fd: int) -> None:
        if os.path.samestat(os.fstat(fd), self._file):
            self.waiting += 1
            assert self.go_on.wait(30)

    def _slow_preadv(self, fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and os.path.samestat(os.fstat(fd), self._file):
            raise BlockingIOError
        self._wait(fd)
        return self._preadv(fd, buffers, at, flags)

    def _slow_fdatasync(self, fd: int) -> None:
        self._wait(fd)
        self._fdatasync(fd)


@pytest.fixture
def setup_of_two(short_dir: Path) -> Setup:
    return Setup(short_dir, "hanging", "well")


def config_of(setup: Setup) -> Config:
    tables = ({key.replace("-", "_"): table[key] for key in table} for table in setup.tables)
    disks = [DiskConfig(**table) for table in tables]
    server = ServerConfig(listen=setup.listen, control=setup.control)
    return check_config(Config(server=server, disk=disks), setup.folder)


def use_others(setup: Setup) -> None:
    """What must go on. TimeoutError if it does not."""
    for export in ("well", "well-top"):
        with NbdClient(setup.folder / "nbd", export, timeout_s=10) as client:
            assert client.pread(0, SIZE) == pattern(1)
            client.flush()
    with QmpClient(setup.folder / "qmp", timeout_s=10) as qmp:
        for command in ("x-replnbd-status", "query-jobs", "query-named-block-nodes"):
            qmp.execute(command)


@on_both_loops
async def test_other_exports_and_qmp_go_on_while_a_disk_holds_every_thread_it_may(
    setup_of_two: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of_two
    async with Daemon(config_of(setup)) as daemon:
        await daemon.standby_group.start()
        slow = daemon.standby_group.disks[0].primary
        hanging = Hanging(setup.path("secondary"), monkeypatch)
        buffers = [bytearray(512) for _ in range(CALLS_MAX)]
        requests = [slow.pread(0, memoryview(buffer)) for buffer in buffers]
        requests += [slow.flush() for _ in range(CALLS_MAX)]
        tasks = [asyncio.create_task(request) for request in requests]
        while hanging.waiting < CALLS_MAX:
            await asyncio.sleep(0.01)
        try:
            await asyncio.to_thread(use_others, setup)
            assert not any(task.done() for task in tasks)
            assert hanging.waiting == CALLS_MAX
        finally:
            hanging.go_on.set()
            await asyncio.gather(*tasks)
        assert all(buffer == pattern(1)[:512] for buffer in buffers)


class HeldNode(PassThrough):
    """Every read and flush waits until `go_on`, as those of a DelayNode do for a while."""

    driver = "held"
    go_on: asyncio.Event
    waiting = 0

    async def pread(self, offset: int, buffer: memoryview) -> None:
        self.waiting += 1
        await self.go_on.wait()
        await self.file.pread(offset, buffer)

    async def flush(self) -> None:
        self.waiting += 1
        await self.go_on.wait()
        await self.file.flush()


@on_both_loops
async def test_other_exports_and_qmp_go_on_while_the_requests_of_one_wait(
    setup_of_two: Setup,
) -> None:
    setup = setup_of_two
    async with Daemon(config_of(setup)) as daemon:
        await daemon.standby_group.start()
        held = HeldNode("held", daemon.standby_group.disks[0].primary)
        held.go_on = asyncio.Event()
        daemon.server.add_export(Export("held", held))

        def read_and_flush() -> None:
            with NbdClient(setup.folder / "nbd", "held") as client:
                assert client.pread(0, SIZE) == pattern(1)
                client.flush()

        clients = [asyncio.create_task(asyncio.to_thread(read_and_flush)) for _ in range(3)]
        while held.waiting < len(clients):
            await asyncio.sleep(0.01)
        try:
            await asyncio.to_thread(use_others, setup)
            assert held.waiting == len(clients)
        finally:
            held.go_on.set()
            await asyncio.gather(*clients)
