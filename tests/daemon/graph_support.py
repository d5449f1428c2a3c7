"""A daemon with a disk in mode primary, and servers of what becomes its copy, all in one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from daemon_support import pattern

from replnbd.block import MemoryNode, read_bytes
from replnbd.control import MirrorOptions, NbdNodeOptions, UnixServer
from replnbd.daemon import Config, Daemon, DiskConfig, ServerConfig, check_config
from replnbd.events import EventBus
from replnbd.filters import FaultNode
from replnbd.jobs import Job
from replnbd.replication import PrimaryDisk, PrimaryGroup
from replnbd.server import Export, NbdServer

SIZE = 1 << 20
PATIENCE_S = 20.0
"""A bound for a hang, far above what a loaded machine needs."""


class Target:
    """An NBD server that keeps no account of what it is a copy of. `node` fails at will."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.memory = MemoryNode(SIZE)
        self.node = FaultNode("target", self.memory)
        self.server = NbdServer(EventBus())

    async def open(self) -> None:
        """Listen (again)."""
        self.server = NbdServer(EventBus())
        self.server.add_export(Export("colo0", self.node))
        await self.server.listen(f"nbd+unix:///?socket={self.path}")

    async def close(self) -> None:
        """Gone, with all its connections."""
        await self.server.close(timeout_s=0)


class World:
    """`daemon`, with the disk vm0, and `target`, which is not added yet."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.folder = folder
        (folder / "vm0.raw").write_bytes(pattern(1, SIZE))
        table = DiskConfig(name="vm0", mode="primary", disk="vm0.raw", **keys)
        config = Config(server=ServerConfig(listen=[], control=None), disk=[table])
        self.daemon = Daemon(check_config(config, folder))
        self.target = Target(folder / "target")
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.daemon.events.subscribe(lambda name, data: self.told.append((name, data)))

    @property
    def disk(self) -> PrimaryDisk:
        """vm0."""
        assert isinstance(self.daemon.group, PrimaryGroup)
        return self.daemon.group.disks[0]

    def job(self, job_id: str = "resync") -> Job:
        """One that is not forgotten."""
        return self.daemon.jobs_registry.get(job_id)

    async def add_node(
        self, name: str = "nbd0", *, path: Path | None = None, **options: Any
    ) -> None:
        """blockdev-add, of the target or of what is at `path`."""
        server = UnixServer(str(path or self.target.path))
        await self.daemon.blockdev_add(NbdNodeOptions(name, server, "colo0", **options))

    async def mirror(self, target: str = "nbd0", **options: Any) -> Job:
        """blockdev-mirror, to be dismissed by hand."""
        job_id = options.pop("job_id", "resync")
        sync = options.pop("sync", "full")
        await self.daemon.blockdev_mirror(
            MirrorOptions(job_id, "vm0", target, sync, auto_dismiss=False, **options)
        )
        return self.job(job_id)

    async def write(self, offset: int, data: bytes) -> None:
        """As the guest."""
        await self.disk.node.pwrite(offset, data)

    async def compare(self) -> None:
        """All bytes."""
        assert await read_bytes(self.disk.node, 0, SIZE) == bytes(self.target.memory.data)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The data of all of that name so far."""
        return [data for event, data in self.told if event == name]

    async def wait_event(self, name: str) -> dict[str, Any]:
        """The first of that name."""
        await until(lambda: bool(self.events(name)))
        return self.events(name)[0]

    async def wait_status(self, status: str) -> None:
        """Until the mirror is that."""
        await until(lambda: self.job().status == status)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, in turns of the loop."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def opened(folder: Path, **keys: Any) -> AsyncIterator[World]:
    """A world whose daemon and target run."""
    world = World(folder, **keys)
    await world.target.open()
    try:
        await world.daemon.open()
        try:
            yield world
        finally:
            await world.daemon.close()
    finally:
        await world.target.close()


@asynccontextmanager
async def silent(path: Path) -> AsyncIterator[asyncio.Event]:
    """A server that takes clients and says nothing; the event: one has come."""
    come = asyncio.Event()
    gone = asyncio.Event()

    async def keep(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        come.set()
        await gone.wait()
        writer.close()

    server = await asyncio.start_unix_server(keep, str(path))
    try:
        yield come
    finally:
        gone.set()
        server.close()
        await server.wait_closed()
