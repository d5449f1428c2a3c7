"""A standby that has taken over, as the source of a new one: commands that come while its link
copies. The target is an NBD server of this process that keeps no account."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from replication_support import Built, Layout, build

from replnbd.block import BlockNode, MemoryNode, read_bytes
from replnbd.block.digest import GRANULE
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import FaultNode
from replnbd.jobs import JobRegistry, mirror
from replnbd.replication import Group, History, Role, Stage, StandbyDisk
from replnbd.replication.link import Link
from replnbd.replication.session import LinkState
from replnbd.server import Export, NbdServer

SIZE = 64 * GRANULE


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "CHUNK", GRANULE)


@asynccontextmanager
async def targets(directory: Path) -> AsyncIterator[tuple[NbdServer, list[MemoryNode], list[str]]]:
    """Two of them, and their URIs."""
    server = NbdServer(EventBus())
    nodes = [MemoryNode(SIZE, name=name) for name in ("one", "two")]
    for node in nodes:
        server.add_export(Export(node.name, node))
    path = directory / "nbd.sock"
    await server.listen(f"nbd+unix:///?socket={path}")
    try:
        yield server, nodes, [f"nbd+unix:///{node.name}?socket={path}" for node in nodes]
    finally:
        await server.close(timeout_s=1)


class Source:
    """A group of one disk that has taken over."""

    def __init__(self) -> None:
        self.history_file = FaultNode("history", MemoryNode(name="history"))

    async def start(self) -> Source:
        layout = Layout(size=SIZE, suspends=True)
        built: Built = await build("d", layout, EventBus(), JobRegistry(), b"data" * (SIZE // 8))
        self.disk: StandbyDisk = built.disk
        self.disk.peer._make_history = self._make
        self.group = Group([self.disk])
        await self.group.open()
        await self.group.start()
        await self.group.failover()
        await self.group.wait_committed()
        return self

    async def _make(self) -> History:
        return await History.open(self.history_file, SIZE, "boot", Role.STANDBY)

    @property
    def state(self) -> LinkState:
        link = self.disk.peer.link
        return LinkState.OFF if link is None else link.state

    async def wait_for(self, state: LinkState) -> None:
        async with asyncio.timeout(20):
            while self.state is not state:
                await asyncio.sleep(0.001)

    async def wait_for_copying(self) -> None:
        """Until some of it is on its way."""
        async with asyncio.timeout(20):
            while self.link.job is None or not self.link.history.map.unproven:
                await asyncio.sleep(0)

    @property
    def link(self) -> Link:
        link = self.disk.peer.link
        assert link is not None
        return link

    async def content(self, node: BlockNode) -> bytes:
        return bytes(await read_bytes(node, 0, SIZE))


async def test_replicate_again_while_the_link_copies_goes_to_the_other_target(
    short_dir: Path,
) -> None:
    async with targets(short_dir) as (_, nodes, uris), asyncio.timeout(30):
        source = await Source().start()
        await source.group.replicate({"d": uris[0]})
        await source.wait_for_copying()
        await source.group.replicate({"d": uris[1]})
        await source.wait_for(LinkState.LIVE)
        await source.disk.standby.pwrite(12345, b"and on it goes")
        await source.group.checkpoint()
        assert bytes(nodes[1].data) == await source.content(source.disk.standby)
        await source.group.close()


async def test_a_reset_while_the_link_copies_ends_it(short_dir: Path) -> None:
    async with targets(short_dir) as (_, _, uris), asyncio.timeout(30):
        source = await Source().start()
        await source.group.replicate({"d": uris[0]})
        await source.wait_for_copying()
        link = source.link
        await source.group.reset()
        assert source.disk.stage is Stage.NONE
        assert link.state is LinkState.OFF
        history = source.disk.peer.history
        assert history is not None
        assert history.record.to is None
        assert not history.record.retracting
        await source.group.close()


async def test_a_reset_that_fails_lets_the_link_go_on(short_dir: Path) -> None:
    async with targets(short_dir) as (_, nodes, uris), asyncio.timeout(30):
        source = await Source().start()
        await source.group.replicate({"d": uris[0]})
        await source.wait_for_copying()
        source.history_file.fail("pwrite", errno.EIO, length=1 << 18)  # records, and no marks
        with pytest.raises(StateError, match="history"):
            await source.group.reset()
        source.history_file.heal()
        assert source.disk.promoted
        assert source.disk.peer.sending
        await source.wait_for(LinkState.LIVE)
        await source.group.checkpoint()
        assert bytes(nodes[0].data) == await source.content(source.disk.standby)
        await source.group.close()


async def test_a_target_that_cannot_be_recorded_leaves_the_link_where_it_is(
    short_dir: Path,
) -> None:
    async with targets(short_dir) as (_, nodes, uris), asyncio.timeout(30):
        source = await Source().start()
        await source.group.replicate({"d": uris[0]})
        await source.wait_for(LinkState.LIVE)
        source.history_file.fail("pwrite", errno.ENOSPC, length=1 << 18)
        with pytest.raises(StateError, match="history"):
            await source.group.replicate({"d": uris[1]})
        source.history_file.heal()
        await source.wait_for(LinkState.LIVE)
        assert source.link.to == uris[0]
        await source.disk.standby.pwrite(0, b"still")
        await source.group.checkpoint()
        assert bytes(nodes[0].data) == await source.content(source.disk.standby)
        await source.group.close()


async def test_an_end_of_our_own_is_no_error_of_the_disk(short_dir: Path) -> None:
    async with targets(short_dir) as (_, _, uris), asyncio.timeout(30):
        source = await Source().start()
        errors: list[OSError] = []
        await source.group.replicate({"d": uris[0]})
        source.link._on_error = errors.append
        await source.wait_for(LinkState.LIVE)
        await source.disk.peer.stop_sending()
        assert not errors
        await source.group.close()


async def test_a_command_of_a_disk_whose_way_was_just_lost_is_not_stuck(short_dir: Path) -> None:
    async with targets(short_dir) as (server, _, uris), asyncio.timeout(30):
        source = await Source().start()
        await source.group.replicate({"d": uris[0]})
        await source.wait_for(LinkState.LIVE)
        closing = asyncio.ensure_future(server.close(timeout_s=0.1))
        await source.disk.standby.pwrite(0, b"x")
        await source.group.checkpoint()
        await source.group.reset()
        assert not source.disk.peer.sending
        await closing
        await source.group.close()
