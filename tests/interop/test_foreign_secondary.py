"""replnbd as the primary of QEMU's own secondary: from the first copy, while the filter is in stage
none, through checkpoints to a failover on QEMU's side. Nothing there tells replnbd anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign_support import FAILED, HEALTHY, IMPATIENT, SIZE, Foreign, Server
from interop_support import CHECKPOINT, FAILOVER, START, assert_same
from peers import DiskFormat, QemuDisk, QemuSecondary, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HOT = 3 << 20


class Secondary(Server):
    """A QEMU whose disk is empty."""

    def __init__(self, folder: Path, format_: DiskFormat) -> None:
        self.disk = QemuDisk.create(folder, "colo0", "top0", bytes(SIZE), format_)
        self.qemu = QemuSecondary(folder, [self.disk])
        self.export = "colo0"
        self.socket = self.qemu.nbd_socket
        self.process = self.qemu.process

    def view(self) -> bytearray:
        """All bytes of the standby's."""
        with self.qemu.connect("top0") as client:
            return client.pread(0, SIZE)

    def close(self) -> None:
        """Kill it."""
        self.qemu.__exit__(None, None, None)


@pytest.fixture(params=["raw", "qcow2"])
def secondary(request: pytest.FixtureRequest, short_dir: Path) -> Secondary:
    """With a disk of that format."""
    return Secondary(short_dir, request.param)


@pytest.fixture
def world(short_dir: Path, secondary: Secondary) -> Iterator[Foreign]:
    """A primary for it."""
    with Foreign(short_dir, secondary, program=IMPATIENT) as world:
        yield world


def checkpoint(world: Foreign, secondary: Secondary) -> bytes:
    """On the primary, then on QEMU, while the guest is paused, as COLO does; what the view is."""
    world.primary.checkpoint()
    secondary.qemu.qmp.execute(*CHECKPOINT)
    view = bytes(world.content)
    assert_same(secondary.view(), view, "the view after a checkpoint")
    return view


def test_a_secondary_of_qemu_is_copied_to_followed_and_promoted(
    world: Foreign, secondary: Secondary
) -> None:
    world.begin()
    load = world.load()
    load.wait_batches(2)
    load.stop()
    world.compare()
    secondary.qemu.qmp.execute(*START)
    view = bytes(world.content)
    for _ in range(4):
        load = world.load()
        load.wait_batches(3)
        assert_same(secondary.view(), view, "the view while the primary writes")
        load.stop()
        view = checkpoint(world, secondary)
    world.write()
    with secondary.qemu.connect("top0") as standby:
        standby.pwrite(HOT, b"the standby's own")
    view = view[:HOT] + b"the standby's own" + view[HOT + 17 :]
    world.compare()
    secondary.qemu.qmp.execute(*FAILOVER)
    secondary.qemu.wait_for_commit()
    assert_same(secondary.view(), view, "the view after the failover")
    world.primary.quit()
    secondary.qemu.quit()
    assert_same(secondary.disk.content(), view, "the promoted disk")


def test_a_hot_block_is_what_it_was_at_each_checkpoint(
    world: Foreign, secondary: Secondary
) -> None:
    """The last of many writes to one block that are on their way at once: QEMU may do any of them
    last, so that not all of them can be sent."""
    world.begin()
    secondary.qemu.qmp.execute(*START)
    for number in range(60):
        writes = [(HOT + 512 * (each % 3), world.rng.randbytes(4096)) for each in range(32)]
        world.client.finish(world.client.send_writes(writes))
        for offset, data in writes:
            world.content[offset : offset + 4096] = data
        world.primary.checkpoint()
        secondary.qemu.qmp.execute(*CHECKPOINT)
        with secondary.qemu.connect("top0") as standby:
            got = standby.pread(HOT, 8192)
        assert got == world.content[HOT : HOT + 8192], f"checkpoint {number}"


def test_a_secondary_of_qemu_that_was_cut_off_is_brought_up_to_date(
    world: Foreign, secondary: Secondary
) -> None:
    """The view stands still meanwhile."""
    world.begin()
    secondary.qemu.qmp.execute(*START)
    view = bytes(world.content)
    load = world.load()
    for cut in (world.proxy.drop, world.proxy.reset, world.proxy.silence):
        load.wait_batches(2)
        cut()
        wait_until(lambda: world.primary.replication() == FAILED, "the error")
        load.wait_batches(2)
        world.proxy.resume()
        assert_same(secondary.view(), view, "the view while the primary is away")
        world.primary.wait_link("live", "syncing")
    load.stop()
    world.compare_for_good()
    assert world.primary.replication() == HEALTHY
    checkpoint(world, secondary)
