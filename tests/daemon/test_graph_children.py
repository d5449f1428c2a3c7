"""A real disk's children: those that cannot be, those that are lost, and what replication's
commands do while there is one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from graph_support import SIZE, World, opened, silent, until

from replnbd.errors import StateError
from replnbd.replication import LinkState, Stage

TAKEN = "Node 'vm0' has one copy at a time, and that is '{}' now"


@pytest.fixture
async def world(short_dir: Path) -> AsyncIterator[World]:
    """Of a disk without a key `to`, and with nbd0 added."""
    async with opened(short_dir) as world:
        await world.add_node()
        yield world


async def test_a_child_that_was_yanked_is_not_looked_for_again(world: World) -> None:
    await world.daemon.add_child("vm0", "nbd0")
    world.daemon.yank("nbd0")
    bad = await world.wait_event("QUORUM_REPORT_BAD")
    assert bad == {
        "type": "flush",
        "error": "the connection was yanked",
        "node-name": "nbd0",
        "sector-num": 0,
        "sectors-count": 0,
    }
    link = world.disk.link
    await until(lambda: link.forwarder.connection is None)
    assert link.state is LinkState.REFUSED
    await world.write(0, b"alone")
    assert world.disk.history.map.behind == 1
    assert world.daemon.replication_error() == "I/O error occurred"
    await world.daemon.remove_child("vm0", "children.1")
    await world.daemon.add_child("vm0", "nbd0")
    assert world.daemon.replication_error() is None
    await world.compare()


async def test_who_waits_for_a_silent_child_does_not_keep_the_daemon_from_its_end(
    short_dir: Path,
) -> None:
    async with silent(short_dir / "silent") as come:
        async with opened(short_dir) as world:
            await world.add_node(path=short_dir / "silent")
            adding = asyncio.create_task(world.daemon.add_child("vm0", "nbd0"))
            await come.wait()
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 5
        with pytest.raises(StateError, match=r"cannot become a child: the connection was yanked$"):
            await adding


async def test_a_silent_child_is_given_up(world: World) -> None:
    async with silent(world.folder / "silent"):
        await world.add_node("nbd1", path=world.folder / "silent")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("replnbd.daemon.quorum.REACH_S", 0.05)
            with pytest.raises(StateError, match=r"become a child: the server does not answer$"):
                await world.daemon.add_child("vm0", "nbd1")
    await world.daemon.add_child("vm0", "nbd0")


async def test_without_a_child_there_is_still_no_standby(world: World) -> None:
    with pytest.raises(StateError, match=r"^'vm0' has no standby: there is no key 'to'$"):
        await world.daemon.set_replication(True, True, False)
    assert world.daemon.replication_error() == "Block replication is not running"


async def test_a_disk_with_a_child_ignores_replication_and_keeps_its_history(world: World) -> None:
    await world.daemon.add_child("vm0", "nbd0")
    await world.daemon.set_replication(True, True, False)
    await world.daemon.checkpoint()
    await world.daemon.set_replication(False, True, True)
    await world.daemon.reset(False)
    with pytest.raises(StateError, match=f"^{TAKEN.format('nbd0')}$"):
        await world.daemon.reset(True)
    assert world.disk.link.state is LinkState.LIVE
    assert world.disk.stage is Stage.NONE


async def test_a_checkpoint_waits_for_what_has_fallen_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.replication.forwarder.QUEUE_BYTES_MAX", 0)
    await world.daemon.add_child("vm0", "nbd0")
    for data in (b"in flight", b"and more than may be"):
        await world.write(0, data)
    assert world.disk.history.map.behind == 1
    await world.daemon.checkpoint()
    await world.compare()


async def test_a_checkpoint_of_what_the_copy_was_never_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.replication.link.CATCH_UP_S", 0.05)
    await world.daemon.add_child("vm0", "nbd0")
    world.target.node.fail("pwrite")
    await world.write(0, b"refused there")
    await world.wait_event("QUORUM_REPORT_BAD")
    with pytest.raises(StateError, match=r"^'vm0' is being synchronised: a checkpoint has to wait"):
        await world.daemon.checkpoint()


async def test_a_disk_that_replicates_has_its_child_already(short_dir: Path) -> None:
    to = f"nbd+unix:///colo0?socket={short_dir}/target"
    async with opened(short_dir, to=to) as world:
        await world.add_node()
        await world.daemon.set_replication(True, True, False)
        await until(lambda: world.disk.link.state is LinkState.LIVE)
        nodes = {each["node-name"]: each for each in world.daemon.block_nodes()}
        assert nodes["vm0-remote"]["file"] == to
        assert nodes["vm0-remote"]["image"]["virtual-size"] == SIZE
        taken = f"^{TAKEN.format('vm0-remote')}$"
        with pytest.raises(StateError, match=taken):
            await world.mirror()
        with pytest.raises(StateError, match=taken):
            await world.daemon.add_child("vm0", "nbd0")
        with pytest.raises(StateError, match=r"^Child 'children.1' of node 'vm0' is its standby"):
            await world.daemon.remove_child("vm0", "children.1")
        with pytest.raises(StateError, match=r"^Node 'vm0-remote' was not added by blockdev-add$"):
            await world.mirror("vm0-remote")
        assert world.daemon.yankable() == ["vm0-remote", "nbd0"]
        assert world.disk.link.state is LinkState.LIVE


async def test_a_disk_that_does_not_replicate_can_be_lent_and_not_started_meanwhile(
    short_dir: Path,
) -> None:
    to = f"nbd+unix:///colo0?socket={short_dir}/elsewhere"
    async with opened(short_dir, to=to) as world:
        await world.add_node()
        await world.daemon.add_child("vm0", "nbd0")
        with pytest.raises(StateError, match=f"^{TAKEN.format('nbd0')}$"):
            await world.daemon.set_replication(True, True, False)
        await world.compare()
        await world.daemon.remove_child("vm0", "children.1")
        await world.daemon.set_replication(True, True, False)
        assert world.disk.link.node_name == "vm0-remote"


async def test_a_demoted_disk_leaves_nothing_in_the_graph_but_the_nodes(world: World) -> None:
    job = await world.mirror()
    await world.wait_status("ready")
    await world.daemon.demote()
    assert job.status == "concluded"
    names = [each["node-name"] for each in world.daemon.block_nodes()]
    assert {"nbd0", "vm0", "vm0-top"} <= set(names)
    with pytest.raises(StateError, match=r"^Need a root block node$"):
        await world.mirror(job_id="another")
    with pytest.raises(StateError, match=r"^The node vm0 does not support adding a child$"):
        await world.daemon.add_child("vm0", "nbd0")
    await world.daemon.blockdev_del("nbd0")
