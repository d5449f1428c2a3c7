"""Standby: the library's door, inside another program, under both event loops."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from daemon_support import SIZE, Setup, check_overlays, pattern
from loops import on_both_loops
from peers import NbdClient, NbdReplyError, QmpClient, fingerprints, qemu_img

from replnbd.block import FileNode, MemoryNode, read_bytes
from replnbd.daemon import Config, Daemon, DiskConfig, ServerConfig, Standby, check_config
from replnbd.errors import ConfigError, ImageError, StateError
from replnbd.events import EventBus
from replnbd.filters import FaultNode
from replnbd.jobs import JobRegistry
from replnbd.qcow2 import create_qcow2, open_qcow2
from replnbd.replication import Group, StandbyDisk


def disk_of(setup: Setup, number: int = 0) -> DiskConfig:
    """The configuration of a disk, with absolute paths."""
    table = {key.replace("-", "_"): value for key, value in setup.tables[number].items()}
    for key in ("secondary", "hidden", "active"):
        table[key] = str(setup.path(key, number))
    return DiskConfig(**table)


def stages(standby: Standby) -> list[str]:
    return [disk["stage"] for disk in standby.status()["disks"]]


@on_both_loops
async def test_a_program_replicates_checkpoints_and_fails_over(setup: Setup) -> None:
    async with Standby([disk_of(setup)]) as standby:
        told: list[tuple[str, dict[str, Any]]] = []
        unsubscribe = standby.events.subscribe(lambda name, data: told.append((name, data)))
        assert standby.uris == []
        primary, view = standby.node("d", "primary"), standby.node("d")
        await primary.pwrite(0, b"initial sync")
        with pytest.raises(OSError, match="Block replication is not running") as caught:
            await read_bytes(view, 0, 512)
        assert caught.value.errno == errno.EIO
        await standby.start()
        first = bytearray(pattern(1))
        first[:12] = b"initial sync"
        await primary.pwrite(0, b"after the 1st")
        assert await read_bytes(view, 0, SIZE) == first
        await standby.checkpoint()
        first[:13] = b"after the 1st"
        await primary.write_zeroes(0, SIZE)
        await view.pwrite(SIZE - 4, b"mine")
        await standby.failover()
        assert stages(standby) == ["done"]
        expected = first[:-4] + b"mine"
        assert await read_bytes(view, 0, SIZE) == expected
        with pytest.raises(OSError, match="'d' is fenced") as caught:
            await primary.pwrite(0, b"stale")
        assert caught.value.errno == errno.ESHUTDOWN
        await standby.reset()
        assert await read_bytes(primary, 0, SIZE) == expected
        unsubscribe()
        await standby.start()
    stage_changes = [data for name, data in told if name == "x-replnbd-stage"]
    assert [(data["previous"], data["stage"]) for data in stage_changes] == [
        ("none", "running"),
        ("running", "failover"),
        ("failover", "done"),
        ("done", "none"),
    ]
    counts = [data["count"] for name, data in told if name == "x-replnbd-checkpoint"]
    assert counts == [1, 2]
    assert setup.path("secondary").read_bytes() == expected
    check_overlays(setup)


@on_both_loops
async def test_a_stop_leaves_the_primarys_latest(setup: Setup) -> None:
    async with Standby([disk_of(setup)]) as standby:
        await standby.start()
        await standby.node("d", "primary").pwrite(0, b"latest")
        await standby.node("d").pwrite(100, b"dropped")
        await standby.stop()
        assert stages(standby) == ["done"]
        assert await read_bytes(standby.node("d"), 0, SIZE) == b"latest" + pattern(1)[6:]
    assert setup.path("secondary").read_bytes() == b"latest" + pattern(1)[6:]
    check_overlays(setup)


@on_both_loops
async def test_two_disks_are_one_group(short_dir: Path) -> None:
    setup = Setup(short_dir, "a", "b")
    async with Standby([disk_of(setup, 0), disk_of(setup, 1)]) as standby:
        await standby.start()
        assert stages(standby) == ["running", "running"]
        for name in ("a", "b"):
            await standby.node(name, "primary").pwrite(0, name.encode() * 100)
            assert await read_bytes(standby.node(name), 0, SIZE) == pattern(1)
        await standby.checkpoint()
        for name in ("a", "b"):
            assert await read_bytes(standby.node(name), 0, 100) == name.encode() * 100
        await standby.failover(wait=False)
        assert set(stages(standby)) <= {"failover", "done"}
        await standby.failover()
        assert stages(standby) == ["done", "done"]
    for number in range(2):
        check_overlays(setup, number)


@on_both_loops
async def test_commands_that_do_not_fit_are_refused_and_change_nothing(setup: Setup) -> None:
    async with Standby([disk_of(setup)]) as standby:
        for command in (standby.stop, standby.failover):
            with pytest.raises(StateError, match=r"^Block replication is not running$"):
                await command()
        with pytest.raises(StateError, match=r"^Backup job was cancelled unexpectedly$"):
            await standby.checkpoint()
        assert stages(standby) == ["none"]
        await standby.start()
        with pytest.raises(StateError, match=r"^Block replication is running or done$"):
            await standby.start()
        with pytest.raises(StateError, match=r"^'reset' is not possible in stage 'running'$"):
            await standby.reset(force=True)
        with pytest.raises(StateError, match=r"^no disk 'x'$"):
            standby.node("x")
        assert stages(standby) == ["running"]


@on_both_loops
async def test_nbd_clients_and_a_manager_use_the_same_standby(setup: Setup) -> None:
    """The peers are synchronous, so each conversation with them is a thread of its own."""
    socket, control = setup.folder / "nbd", setup.folder / "qmp"
    disk = disk_of(setup)
    uri = f"nbd+unix:///?socket={socket}"
    async with Standby([disk], listen=[uri, "nbd://127.0.0.1:0"], control=control) as standby:
        assert standby.uris[0] == uri
        await standby.start()

        def talk() -> None:
            with NbdClient(socket, "d") as primary, NbdClient(socket, "d-top") as view:
                primary.pwrite(0, b"by NBD")
                assert view.pread(0, SIZE) == pattern(1)
            with QmpClient(control) as qmp:
                qmp.execute("xen-colo-do-checkpoint")

        await asyncio.to_thread(talk)
        assert standby.status()["disks"][0]["checkpoints"] == 2
        assert await read_bytes(standby.node("d"), 0, 6) == b"by NBD"
        await standby.failover()

        def stale() -> None:
            with pytest.raises(NbdReplyError, match="fenced"):
                NbdClient(socket, "d")

        await asyncio.to_thread(stale)
    assert not socket.exists()
    assert not control.exists()


def test_what_is_wrong_with_the_configuration_is_told_before_anything_is_opened(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(setup.folder)
    before = fingerprints(setup.folder)
    with pytest.raises(ConfigError, match=r"^no \[\[disk\]\] table: nothing to serve$"):
        Standby([])
    with pytest.raises(ConfigError, match="Missing the option top-id"):
        Standby([DiskConfig(name="d", mode="secondary", secondary="d.raw")])
    disk = DiskConfig(name="d", mode="secondary", top_id="t", secondary="d.raw")
    Standby([disk])
    assert disk.secondary == f"{setup.folder}/d.raw"
    assert fingerprints(setup.folder) == before


@on_both_loops
async def test_an_error_in_the_program_closes_everything_in_order(setup: Setup) -> None:
    async def fail() -> None:
        async with Standby([disk_of(setup)], control=setup.control) as standby:
            await standby.start()
            await standby.node("d").pwrite(0, b"acknowledged")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not Path(setup.control).exists()
    check_overlays(setup)
    async with Standby([disk_of(setup)]) as standby:  # the locks are gone
        assert stages(standby) == ["running"]
        assert await read_bytes(standby.node("d"), 0, 12) == b"acknowledged"


@on_both_loops
async def test_two_standbys_of_a_program_cannot_have_the_same_files(setup: Setup) -> None:
    async with Standby([disk_of(setup)]) as standby:
        with pytest.raises(ConfigError, match="is in use by another process"):
            async with Standby([disk_of(setup)]):
                pass
        await standby.start()
        assert await read_bytes(standby.node("d"), 0, SIZE) == pattern(1)


@on_both_loops
async def test_a_listener_that_cannot_be_undoes_everything(setup: Setup) -> None:
    before = fingerprints(setup.folder)
    uris = [f"nbd+unix:///?socket={setup.folder}/nbd", "nbd+unix:///?socket=/no/such/place"]
    with pytest.raises(ConfigError, match=r"^cannot listen on"):
        async with Standby([disk_of(setup)], listen=uris, control=setup.control):
            pass
    assert fingerprints(setup.folder) == before


@on_both_loops
async def test_a_good_qcow2_disk_under_a_bad_overlay_is_as_it_was(setup: Setup) -> None:
    """It is marked dirty while it is open: that must be gone with the refusal."""
    raw = setup.path("secondary").rename(setup.folder / "raw")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, setup.path("secondary"))
    setup.table["format"] = "qcow2"
    setup.path("active").write_bytes(b"garbage")
    before = fingerprints(setup.folder)
    with pytest.raises(ImageError, match=r"d\.active: "):
        async with Standby([disk_of(setup)]):
            pass
    assert fingerprints(setup.folder) == before


# Section: disks that fail


class FaultyDisk:
    """A disk of real files whose secondary disk and overlays fail when they are told to."""

    def __init__(self, disk: StandbyDisk, faults: list[FaultNode], bus: EventBus) -> None:
        self.disk = disk
        self.secondary, self.hidden, self.active = faults
        self.group = Group([disk])

    @classmethod
    async def open(cls, setup: Setup, bus: EventBus) -> FaultyDisk:
        """Over images that qemu-img has made."""
        setup.make_overlays()
        faults = [
            FaultNode(key, FileNode.open(setup.path(key)))
            for key in ("secondary", "hidden", "active")
        ]
        hidden = await open_qcow2(faults[1], backing=faults[0], name="d-hidden")
        active = await open_qcow2(faults[2], backing=hidden, name="d-active")
        disk = StandbyDisk(
            "d", "d-top", secondary=faults[0], hidden=hidden, active=active,
            bus=bus, jobs=JobRegistry(),
        )  # fmt: skip
        return cls(disk, faults, bus)


@on_both_loops
async def test_a_commit_that_meets_an_error_can_be_tried_again_when_it_is_gone(
    setup: Setup,
) -> None:
    bus = EventBus()
    told: list[tuple[str, dict[str, Any]]] = []
    bus.subscribe(lambda name, data: told.append((name, data)))
    faulty = await FaultyDisk.open(setup, bus)
    disk, group = faulty.disk, faulty.group
    await group.start()
    for offset in range(0, SIZE, 65536):
        await disk.primary.pwrite(offset, b"\xaa" * 65536)
    await disk.standby.pwrite(SIZE - 512, b"mine")
    faulty.secondary.fail("pwrite", errno.EIO, offset=SIZE // 2, length=512)
    await group.failover()
    with pytest.raises(StateError, match=r"^'d': commit-d: .*injected into pwrite"):
        await group.wait_committed()
    assert disk.stage.value == "failover-failed"
    expected = bytearray(pattern(1))
    expected[SIZE - 512 : SIZE - 508] = b"mine"
    assert await read_bytes(disk.standby, 0, SIZE) == expected
    # The split write: what an overlay has allocated goes to it, and the secondary disk is spared.
    await disk.standby.pwrite(SIZE // 2, b"split")
    expected[SIZE // 2 : SIZE // 2 + 5] = b"split"
    assert await read_bytes(disk.standby, 0, SIZE) == expected
    faulty.secondary.heal()
    await group.failover()
    await group.wait_committed()
    assert disk.stage.value == "done"
    assert disk.error is None
    assert await read_bytes(disk.standby, 0, SIZE) == expected
    await group.close()
    assert setup.path("secondary").read_bytes() == expected
    check_overlays(setup)
    assert [data for name, data in told if name == "BLOCK_JOB_ERROR"] == [
        {"device": "commit-d", "operation": "write", "action": "report"}
    ]


@on_both_loops
async def test_the_end_makes_the_secondary_disk_durable_and_says_when_it_cannot(
    setup: Setup,
) -> None:
    faulty = await FaultyDisk.open(setup, EventBus())
    faulty.secondary.fail("flush", errno.EIO)
    with pytest.raises(OSError, match=r"^\[Errno 5\] disk 'd' could not be flushed at its end: "):
        await faulty.group.close()
    check_overlays(setup)
    for key in ("secondary", "hidden", "active"):  # closed all the same: the locks are gone
        await FileNode.open(setup.path(key)).close()


@on_both_loops
async def test_one_disk_that_cannot_be_flushed_does_not_keep_another_from_it(
    short_dir: Path,
) -> None:
    bus = EventBus()
    pair = []
    for name in ("1", "2"):
        (short_dir / name).mkdir()
        setup = Setup(short_dir / name)
        pair.append((setup, await FaultyDisk.open(setup, bus)))
    (_, good), (_, bad) = pair
    bad.secondary.fail("flush", errno.EIO)
    group = Group([bad.disk, good.disk])
    await good.disk.primary.pwrite(0, b"durable")
    calls = good.secondary.calls
    with pytest.raises(OSError, match="could not be flushed"):
        await group.close()
    assert good.secondary.calls == calls + 1  # its flush
    for setup, _ in pair:
        check_overlays(setup)
        await FileNode.open(setup.path("secondary")).close()


@on_both_loops
async def test_a_failed_checkpoint_is_remembered_until_the_next_good_one(setup: Setup) -> None:
    faulty = await FaultyDisk.open(setup, EventBus())
    disk, group = faulty.disk, faulty.group
    await group.start()
    await disk.primary.pwrite(0, b"after the checkpoint")
    faulty.hidden.fail("pwrite", errno.EIO, times=1)
    with pytest.raises(StateError, match=r"^Failed to empty d-hidden: "):
        await group.checkpoint()
    assert disk.replication_error == "I/O error occurred"
    assert await read_bytes(disk.standby, 0, SIZE) == pattern(1)
    await group.checkpoint()
    assert disk.replication_error is None
    assert await read_bytes(disk.standby, 0, 20) == b"after the checkpoint"
    await group.close()
    check_overlays(setup)


async def test_an_overlay_that_is_no_file_serves_as_well(setup: Setup) -> None:
    """StandbyDisk takes any nodes: here everything is in memory, and nothing is left of it."""
    secondary, files = MemoryNode(SIZE), (MemoryNode(), MemoryNode())
    for file in files:
        await create_qcow2(file, SIZE, backing_file="below", backing_format="raw")
    hidden = await open_qcow2(files[0], backing=secondary)
    active = await open_qcow2(files[1], backing=hidden)
    bus = EventBus()
    disk = StandbyDisk(
        "m", "m-top", secondary=secondary, hidden=hidden, active=active, bus=bus, jobs=JobRegistry()
    )
    group = Group([disk])
    await group.start()
    await disk.primary.pwrite(0, b"x")
    assert await read_bytes(disk.standby, 0, 1) == b"\0"
    await group.close()
    assert os.listdir(setup.folder) == ["d.raw"]


async def test_a_daemon_in_a_program_answers_as_its_control_socket_would(setup: Setup) -> None:
    server = ServerConfig(listen=[], control=None)
    config = check_config(Config(server=server, disk=[disk_of(setup)]), setup.folder)
    async with Daemon(config) as daemon:
        await daemon.set_replication(enable=True, primary=False, failover=False)
        nodes = [node["node-name"] for node in daemon.block_nodes()]
        assert nodes == ["d", "d-top", "d-secondary", "d-hidden", "d-active"]
        exports = [(export["id"], export["shutting-down"]) for export in daemon.block_exports()]
        assert exports == [("d", False), ("d-top", False)]
        with pytest.raises(StateError, match=r"^NBD server not running$"):
            await daemon.nbd_server_stop()
