"""The commands over several primaries, where a process has died amid one of them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from replnbd.block import BlockNode, Buffer, MemoryNode, PassThrough
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import FaultNode
from replnbd.jobs import JobRegistry
from replnbd.replication import History, PrimaryDisk, PrimaryGroup, Role, Stage
from replnbd.replication.session import LinkState
from replnbd.server import Export, NbdServer

SIZE = 1 << 20
NOWHERE = "nbd://127.0.0.1:1/none"


async def primaries(*stages: Stage) -> tuple[PrimaryGroup, list[FaultNode]]:
    """A group whose disks were found in these stages."""
    disks, files = [], []
    for number, stage in enumerate(stages):
        file = FaultNode(f"history{number}", MemoryNode())
        history = await History.open(file, SIZE, "boot", Role.PRIMARY)
        await history.set_stage(stage)
        disk = PrimaryDisk(
            f"d{number}", MemoryNode(SIZE), history, NOWHERE, bus=EventBus(), jobs=JobRegistry()
        )
        disk.resume()
        disks.append(disk)
        files.append(file)
    return PrimaryGroup(disks), files


def stages(group: PrimaryGroup) -> list[str]:
    for disk in group.disks:
        assert disk.history.record.stage is disk.stage
        assert (disk.link.state is not LinkState.OFF) is (disk.stage is Stage.RUNNING)
    return [disk.stage.value for disk in group.disks]


@pytest.mark.parametrize("reverse", [False, True])
async def test_a_start_that_was_cut_short_can_be_ended(reverse: bool) -> None:
    found = [Stage.RUNNING, Stage.NONE, Stage.RUNNING]
    group, _ = await primaries(*(reversed(found[:2]) if reverse else found))
    await group.start()
    assert set(stages(group)) == {"running"}
    with pytest.raises(StateError, match="running or done"):
        await group.start()
    await group.close()


@pytest.mark.parametrize("found", [(Stage.RUNNING, Stage.DONE), (Stage.DONE, Stage.RUNNING)])
async def test_a_stop_that_was_cut_short_can_be_ended(found: tuple[Stage, Stage]) -> None:
    group, _ = await primaries(*found)
    with pytest.raises(StateError, match="not possible in stage 'running'"):
        await group.reset()
    await group.stop()
    assert stages(group) == ["done", "done"]
    await group.reset()
    assert stages(group) == ["none", "none"]
    await group.close()


async def test_a_start_that_was_cut_short_can_be_taken_back() -> None:
    group, _ = await primaries(Stage.NONE, Stage.RUNNING)
    await group.stop()
    assert stages(group) == ["none", "done"]
    with pytest.raises(StateError, match="not running"):
        await group.stop()
    await group.reset()
    assert stages(group) == ["none", "none"]
    await group.close()


async def test_a_group_of_one_mind_gets_qemus_errors() -> None:
    group, _ = await primaries(Stage.RUNNING, Stage.RUNNING)
    with pytest.raises(StateError, match="running or done"):
        await group.start()
    assert stages(group) == ["running", "running"]
    await group.stop()
    await group.start()  # ignored, as QEMU does
    assert stages(group) == ["done", "done"]
    await group.close()


async def test_a_start_that_cannot_be_recorded_starts_none() -> None:
    group, files = await primaries(Stage.NONE, Stage.NONE)
    files[0].fail("pwrite", errno.ENOSPC)  # the second one, in QEMU's order
    with pytest.raises(StateError, match="history of 'd0'"):
        await group.start()
    files[0].heal()
    assert stages(group) == ["none", "none"]
    await group.start()
    assert stages(group) == ["running", "running"]
    await group.close()


async def test_a_demotion_that_cannot_be_recorded_lets_the_link_go_on() -> None:
    group, files = await primaries(Stage.RUNNING)
    files[0].fail("pwrite", errno.EIO)
    with pytest.raises(StateError, match="history of 'd0'"):
        await group.demote()
    files[0].heal()
    assert stages(group) == ["running"]
    assert group.disks[0].history.record.role is Role.PRIMARY
    await group.close()


async def test_a_write_without_a_standby_is_marked_and_is_no_error() -> None:
    group, _ = await primaries(Stage.RUNNING)
    disk = group.disks[0]
    await disk.node.pwrite(70_000, b"x" * 512)
    assert list(disk.history.map.states[:3]) == [0, 3, 0]
    await group.stop()
    assert disk.replication_error is None
    await group.close()


async def test_a_command_whose_caller_gives_up_is_done_whole() -> None:
    for turns in range(1, 30):
        group, _ = await primaries(Stage.NONE, Stage.NONE, Stage.NONE)
        for command, stage in ((group.start, "running"), (group.stop, "done")):
            caller = asyncio.create_task(command())
            for _ in range(turns):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.wait([caller])
            async with group.between_commands():
                assert stages(group) == [stage] * 3, f"cancelled after {turns} turns"
        await group.close()


@asynccontextmanager
async def foreign(folder: Path, node: BlockNode) -> AsyncIterator[str]:
    """The URI of a server that is no standby."""
    server = NbdServer(EventBus())
    server.add_export(Export("copy", node))
    await server.listen(f"nbd+unix:///?socket={folder}/copy")
    try:
        yield f"nbd+unix:///copy?socket={folder}/copy"
    finally:
        await server.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_copy_that_is_ready_waits_for_the_others_and_lets_them_go_on(
    short_dir: Path,
) -> None:
    """Not only the other disks: all the daemon."""
    async with foreign(short_dir, MemoryNode(SIZE)) as to:
        group, _ = await primaries(Stage.NONE, Stage.NONE)
        first, second = group.disks
        first.to = to
        await group.start()
        await until(lambda: first.link.state is LinkState.SYNCING and first.job is None)
        await until(lambda: second.link.reason is not None)
        assert first.link.state is LinkState.SYNCING
        assert second.link.state is LinkState.CONNECTING
        await first.node.pwrite(0, b"more")
        await until(lambda: not first.history.map.behind)
        await group.close()


class Held(PassThrough):
    """Writes when the test says so."""

    driver = "held"

    def __init__(self, file: BlockNode) -> None:
        super().__init__("held", file)
        self.may_write = asyncio.Event()
        self.may_write.set()

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self.may_write.wait()
        await self.file.pwrite(offset, data)


async def test_a_copy_that_waited_for_another_one_is_live_when_it_has_what_was_written(
    short_dir: Path,
) -> None:
    held = Held(copy := MemoryNode(SIZE))
    for name in "xy":
        (short_dir / name).mkdir()
    async with (
        foreign(short_dir / "x", held) as to_x,
        foreign(short_dir / "y", MemoryNode(SIZE)) as to_y,
    ):
        group, _ = await primaries(Stage.NONE, Stage.NONE)
        x, y = group.disks
        x.to, y.to = to_x, to_y
        await group.start()
        await until(lambda: {x.link.state, y.link.state} == {LinkState.LIVE})
        connection = y.link.forwarder.connection
        assert connection is not None
        connection.abort(OSError(errno.ECONNRESET, "lost"))
        await until(lambda: x.link.state is LinkState.SYNCING)
        held.may_write.clear()
        await x.node.pwrite(0, b"written")
        await until(lambda: y.link.state is LinkState.LIVE)
        checkpoint = asyncio.create_task(group.checkpoint())
        for _ in range(200):
            await asyncio.sleep(0)
            assert x.link.state is LinkState.SYNCING
            assert not checkpoint.done()
        held.may_write.set()
        await checkpoint
        assert copy.data == b"written" + bytes(SIZE - 7)
        await until(lambda: x.link.state is LinkState.LIVE)
        await group.close()


async def test_a_way_that_is_lost_is_not_live_from_then_on(short_dir: Path) -> None:
    """What a command reports must not be what was so a moment ago."""
    async with foreign(short_dir, MemoryNode(SIZE)) as to:
        group, _ = await primaries(Stage.NONE)
        link = group.disks[0].link
        group.disks[0].to = to
        await group.start()
        await until(lambda: link.state is LinkState.LIVE)
        connection = link.forwarder.connection
        assert connection is not None
        connection.abort(OSError(errno.ETIMEDOUT, "it says nothing"))
        assert (link.state, link.reason) == (LinkState.CONNECTING, "it says nothing")
        await until(lambda: link.state is LinkState.LIVE)
        link.yank()
        assert (link.state, link.reason) == (LinkState.REFUSED, "the connection was yanked")
        link.yank()
        await until(lambda: link.forwarder.connection is None)
        assert (link.state, link.reason) == (LinkState.REFUSED, "the connection was yanked")
        await group.close()


async def test_a_disk_that_is_stopped_amid_a_copy_goes_on_alone_at_once(short_dir: Path) -> None:
    """What is written then is acknowledged under a generation that is not the copy's, or the copy
    would pass for newer."""
    held = Held(MemoryNode(SIZE))
    async with foreign(short_dir, held) as to:
        group, _ = await primaries(Stage.NONE)
        (disk,) = group.disks
        disk.to, link = to, disk.link
        await group.start()
        await until(lambda: link.state is LinkState.LIVE)
        held.may_write.clear()
        await disk.disk.pwrite(0, b"x")  # or there is nothing to copy
        await disk.history.map.mark_behind(0, SIZE)
        link.nudge()
        await until(lambda: link.job is not None)
        assert disk.history.is_shared
        stopping = asyncio.create_task(group.stop())
        while not stopping.done():
            await asyncio.sleep(0)
            if link.forwarder.connection is None:
                assert link.forwarder.alone or not disk.history.is_shared
        held.may_write.set()
        await stopping
        await group.close()


async def test_held_requests_that_a_stop_cuts_short_are_no_error(short_dir: Path) -> None:
    class Slow(PassThrough):
        driver = "slow"

        def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
            return False

        async def pwrite(self, offset: int, data: Buffer) -> None:
            await asyncio.sleep(0.1)
            await self.file.pwrite(offset, data)

    async with foreign(short_dir, Slow("slow", MemoryNode(SIZE))) as to:
        group, _ = await primaries(Stage.NONE)
        (disk,) = group.disks
        disk.to = to
        await group.start()
        await until(lambda: disk.link.state is LinkState.LIVE)
        writes = [asyncio.create_task(disk.node.pwrite(0, bytes([n]) * 4096)) for n in range(60)]
        await asyncio.wait(writes)
        await group.stop()
        assert stages(group) == ["done"]
        assert group.error() is None
        assert disk.history.map.dirty == 1
        await group.close()


async def test_what_an_earlier_process_has_sent_may_arrive_before_anything_is_copied(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.replication.session.LATE_S", 0.5)
    file = MemoryNode()
    history = await History.open(file, SIZE, "boot", Role.PRIMARY)
    async with foreign(short_dir, copy := MemoryNode(SIZE)) as to:
        await history.begin_pair(to)
        await history.map.clear_everything()
        await history.map.mark(0, 1)  # and then the process is killed
        again = await History.open(file, SIZE, "boot", Role.PRIMARY)
        disk = PrimaryDisk("d", MemoryNode(SIZE), again, to, bus=EventBus(), jobs=JobRegistry())
        disk.disk.pwrite_nowait(0, b"newer")
        group = PrimaryGroup([disk])
        await group.start()
        await until(lambda: disk.link.reason is not None)
        assert "before the last restart" in (disk.link.reason or "")
        copy.pwrite_nowait(0, b"older")  # arrives only now
        await until(lambda: disk.link.state is LinkState.LIVE)
        assert copy.data[:5] == b"newer"
        await group.close()
