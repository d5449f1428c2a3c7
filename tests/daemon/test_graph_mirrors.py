"""Mirrors by hand of a real disk: where to, which errors end them, and how they end."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from graph_support import SIZE, World, opened, silent, until

from replnbd.control import InetServer, NbdNodeOptions, UnixServer
from replnbd.daemon.quorum import uri_of
from replnbd.errors import ConfigError, StateError
from replnbd.filters import FaultNode
from replnbd.replication import LinkState


@pytest.fixture
async def world(short_dir: Path) -> AsyncIterator[World]:
    """Of a disk without a key `to`, and with nbd0 added."""
    async with opened(short_dir) as world:
        await world.add_node()
        yield world


@pytest.mark.parametrize(
    ("server", "export", "uri"),
    [
        (InetServer("h", "10809"), "colo0", "nbd://h:10809/colo0"),
        (InetServer("::1", "1"), "", "nbd://[::1]:1/"),
        (InetServer("h", "http"), "a/b c%", "nbd://h:80/a%2Fb%20c%25"),
        (UnixServer("/run/a b?&#"), "é", "nbd+unix:///%C3%A9?socket=/run/a%20b%3F%26%23"),
    ],
)
def test_a_node_is_where_its_options_say(
    server: InetServer | UnixServer, export: str, uri: str
) -> None:
    assert uri_of(NbdNodeOptions("nbd0", server, export)) == uri


@pytest.mark.parametrize(
    ("server", "text"),
    [
        (
            InetServer("h", "no such service"),
            "^address resolution failed for h:no such service: Servname not supported for"
            " ai_socktype$",
        ),
        (InetServer("h", "65536"), "^not an NBD URI that can be used: nbd://h:65536/: "),
        (InetServer("a b", "1"), "percent-encoded$"),
        (UnixServer("/" + "x" * 200), "^not an NBD URI .* longer than 107 bytes$"),
    ],
)
async def test_a_node_that_can_be_nowhere_is_refused_when_it_is_used(
    world: World, server: InetServer | UnixServer, text: str
) -> None:
    await world.daemon.blockdev_add(NbdNodeOptions("nbd1", server))
    with pytest.raises(ConfigError, match=text):
        await world.mirror("nbd1")
    with pytest.raises(ConfigError, match=text):
        await world.daemon.add_child("vm0", "nbd1")
    assert not world.disk.lent
    assert list(world.daemon.jobs_registry) == []


async def test_a_mirror_is_one_job_and_a_child_lacks_nothing_of_what_came_after(
    world: World,
) -> None:
    job = await world.mirror()
    await world.wait_status("ready")
    assert [each["id"] for each in world.daemon.jobs()] == ["resync"]
    assert world.daemon.status()["disks"][0]["job"]["id"] == "resync"
    await world.write(0, b"while it is ready")
    job.cancel(force=False)
    await job.wait()
    await world.compare()
    await world.write(SIZE - 4, b"gap!")
    before = world.disk.link.bytes_copied
    await world.daemon.add_child("vm0", "nbd0")
    assert world.disk.link.state is LinkState.LIVE
    assert world.disk.link.bytes_copied - before == 1 << 16
    await world.write(4096, b"to both")
    await world.daemon.checkpoint()
    await world.compare()
    job.dismiss()
    await world.daemon.remove_child("vm0", "children.1")
    await world.daemon.blockdev_del("nbd0")


async def test_a_full_mirror_is_one_even_to_where_there_was_a_copy_before(world: World) -> None:
    job = await world.mirror()
    await world.wait_status("ready")
    job.cancel(force=False)
    await job.wait()
    job.dismiss()
    world.target.memory.data[:] = bytes(SIZE)  # another disk, at the same place
    await world.mirror()
    await world.wait_status("ready")
    await world.compare()


async def test_a_target_that_cannot_be_reached_fails_the_job(world: World) -> None:
    await world.target.close()
    job = await world.mirror()
    await job.wait()
    assert job.error is not None
    assert "No such file" in str(job.error)
    assert world.events("BLOCK_JOB_ERROR") == [
        {"device": "resync", "operation": "write", "action": "report"}
    ]
    assert world.disk.link.state is LinkState.OFF
    assert not world.disk.lent


async def test_a_target_may_come_within_the_time_that_the_node_is_given(world: World) -> None:
    await world.target.close()
    await world.add_node("nbd1", open_timeout_s=60)
    await world.mirror("nbd1")
    await until(lambda: world.disk.link.reason is not None)
    assert world.job().status == "running"
    await world.target.open()
    await world.wait_status("ready")
    await world.compare()


async def test_a_target_may_be_away_as_long_as_the_node_says(world: World) -> None:
    await world.add_node("nbd1", reconnect_delay_s=60)
    job = await world.mirror("nbd1")
    await world.wait_status("ready")
    await world.target.close()
    await world.write(0, b"nobody there")
    await until(lambda: world.disk.link.reason is not None)
    await world.target.open()
    await until(lambda: world.disk.link.state is LinkState.LIVE)
    assert job.status == "ready"
    job.cancel(force=False)
    await job.wait()
    assert job.error is None
    await world.compare()


async def test_a_ready_mirror_whose_way_is_lost_fails(world: World) -> None:
    job = await world.mirror()
    await world.wait_status("ready")
    await world.target.close()
    await job.wait()
    assert job.error is not None
    done = await world.wait_event("BLOCK_JOB_COMPLETED")
    assert done["error"] == job.error.strerror
    assert world.events("QUORUM_REPORT_BAD") == [], "it is no child"


async def test_a_target_of_another_size_is_refused_whatever_is_said_of_errors(
    world: World,
) -> None:
    world.target.node.size = world.target.memory.size = SIZE // 2
    job = await world.mirror()
    await job.wait()
    text = f"it has {SIZE // 2} bytes, and this disk {SIZE}"
    assert job.error is not None
    assert job.error.strerror == text
    with pytest.raises(StateError, match=f"^Node 'nbd0' cannot become a child: {text}$"):
        await world.daemon.add_child("vm0", "nbd0")


@pytest.mark.slow
async def test_errors_of_the_target_are_ignored_if_the_user_says_so(world: World) -> None:
    world.target.node.fail("pwrite", errno.EIO, times=1)
    await world.mirror(on_target_error="ignore")
    await world.wait_status("ready")
    assert world.events("BLOCK_JOB_ERROR") == [
        {"device": "resync", "operation": "write", "action": "ignore"}
    ]
    await world.compare()


@pytest.mark.slow
async def test_a_target_without_space_stops_the_job_if_the_user_says_so(world: World) -> None:
    world.target.node.fail("pwrite", errno.ENOSPC)
    job = await world.mirror(on_target_error="enospc")
    await world.wait_status("paused")
    assert world.events("BLOCK_JOB_ERROR") == [
        {"device": "resync", "operation": "write", "action": "stop"}
    ]
    world.target.node.heal()
    job.resume()
    await world.wait_status("ready")
    await world.compare()


@pytest.mark.slow
async def test_errors_of_the_source_are_another_matter(world: World) -> None:
    source = world.disk.link.source = FaultNode("faulty", world.disk.link.source)
    source.fail("pread", errno.EIO, times=1)
    await world.mirror(on_source_error="ignore")
    await world.wait_status("ready")
    assert world.events("BLOCK_JOB_ERROR") == [
        {"device": "resync", "operation": "read", "action": "ignore"}
    ]
    await world.compare()
    world.job().cancel()
    await world.job().wait()
    source.fail("pread", errno.EIO)
    failed = await world.mirror(job_id="another", on_target_error="ignore")
    await failed.wait()
    assert world.events("BLOCK_JOB_ERROR")[1:] == [
        {"device": "another", "operation": "read", "action": "report"}
    ]


async def test_a_write_that_a_ready_target_refuses_fails_the_job(world: World) -> None:
    job = await world.mirror()
    await world.wait_status("ready")
    world.target.node.fail("pwrite", errno.EIO)
    await world.write(0, b"refused there")
    await job.wait()
    assert job.error is not None
    assert job.error.errno == errno.EIO


async def test_in_mode_write_blocking_a_write_waits_for_the_target(world: World) -> None:
    job = await world.mirror(copy_mode="write-blocking")
    await world.wait_status("ready")
    await world.write(0, b"there already")
    assert world.target.memory.data[:13] == b"there already"
    job.cancel()
    await job.wait()
    assert not world.disk.link.forwarder.sync


async def test_a_paused_job_that_ends_can_be_cancelled(world: World) -> None:
    job = await world.mirror(speed=1)
    await until(lambda: world.disk.link.state is LinkState.SYNCING)
    job.pause()
    job.cancel()
    await job.wait()
    assert job.cancelled
    assert not world.disk.lent


async def test_yank_frees_a_mirror_from_a_server_that_says_nothing(world: World) -> None:
    async with silent(world.folder / "silent") as come:
        await world.add_node("nbd1", path=world.folder / "silent", open_timeout_s=60)
        job = await world.mirror("nbd1")
        await come.wait()
        world.daemon.yank("nbd0")
        assert world.disk.link.state is LinkState.CONNECTING
        world.daemon.yank("nbd1")
        await job.wait()
    assert job.error is not None
    assert job.error.strerror == "the connection was yanked"


async def test_a_daemon_that_ends_with_a_mirror_and_comes_back_knows_what_the_target_lacks(
    short_dir: Path,
) -> None:
    async with opened(short_dir) as world:
        await world.add_node()
        job = await world.mirror()
        await world.wait_status("ready")
        await world.write(0, b"sent")
    assert job.status == "concluded"
    async with opened(short_dir) as again:
        again.target.memory.data[:] = world.target.memory.data
        await again.disk.node.pwrite(1 << 17, b"since")
        await again.add_node()
        await again.daemon.add_child("vm0", "nbd0")
        assert again.disk.link.bytes_copied == 1 << 16
