"""QEMU as the primary and replnbd as its standby, from the first synchronisation to the time after
the failover: with QEMU's filter in mode primary, and with a plain NBD node in the quorum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import (
    CHECKPOINT,
    KIB,
    MIB,
    SECTOR,
    START,
    assert_same,
    run,
)
from peers import (
    DiskFormat,
    End,
    FilterPrimary,
    PeerError,
    PlainPrimary,
    QemuPrimary,
    Way,
    wait_until,
)
from primary_support import HEALTHY, World

pytestmark = [pytest.mark.interop, pytest.mark.slow]

FORMS: tuple[type[QemuPrimary], ...] = (FilterPrimary, PlainPrimary)
FAILED = {"error": True, "desc": "I/O error occurred"}
FENCED = "Denied by server for option 7 \\(go\\)"
HEADER = 28
"""Bytes of a request without its payload."""


@pytest.fixture(params=["raw", "qcow2"])
def format_(request: pytest.FixtureRequest) -> DiskFormat:
    """The secondary disk's."""
    chosen: DiskFormat = request.param
    return chosen


@pytest.fixture(params=FORMS, ids=["filter", "plain"])
def form(request: pytest.FixtureRequest) -> type[QemuPrimary]:
    chosen: type[QemuPrimary] = request.param
    return chosen


@pytest.fixture
def world(short_dir: Path, form: type[QemuPrimary]) -> Iterator[World]:
    """With a raw disk."""
    world = World(short_dir, form)
    yield world
    world.close()


@pytest.fixture
def any_world(short_dir: Path, form: type[QemuPrimary], format_: DiskFormat) -> Iterator[World]:
    """With any disk."""
    world = World(short_dir, form, format_)
    yield world
    world.close()


@pytest.fixture
def plain(short_dir: Path) -> Iterator[World]:
    """With a plain NBD node and a raw disk."""
    world = World(short_dir, PlainPrimary)
    yield world
    world.close()


@pytest.fixture
def filtered(short_dir: Path) -> Iterator[World]:
    """With QEMU's filter and a raw disk."""
    world = World(short_dir, FilterPrimary)
    yield world
    world.close()


# Section: the whole life


def test_a_primary_is_synchronised_replicates_and_outlives_the_failover(any_world: World) -> None:
    world = any_world
    world.begin()
    for _ in range(2):
        world.write()
        world.trim()
        world.guest.flush()
        world.compare()
        for side in (world.primary, world.standby):
            side.qmp.execute(*CHECKPOINT)
        world.twin.checkpoint()
        world.compare()
        world.write_view()
        world.write()
        world.compare()
    world.compare_guest()
    assert world.primary.bad_children() == set()
    assert world.primary.status() == HEALTHY

    world.standby.fail_over()
    assert_same(world.standby.content("top0"), world.twin.view, "top0 after the failover")
    # The old primary lives on, on its own disk alone.
    world.write()
    world.guest.flush()
    world.compare_guest()
    world.write_view()
    assert_same(world.standby.content("top0"), world.twin.view, "top0 after the failover")
    world.primary.detach()
    world.write()
    world.compare_guest()
    world.primary.quit()
    world.standby.quit()
    assert_same(world.primary.local.read_bytes(), world.twin.primary, "the old primary's file")
    assert_same(world.standby.disk.content(), world.twin.view, "the promoted disk")


def test_zeroes_of_a_guest_travel_as_zeroes_where_qemu_detects_them(world: World) -> None:
    """A plain node detects zeroes that are written as data; the filter makes data of all zeroes."""
    world.begin()
    before = world.proxy.passed.to_server
    world.guest.write_zeroes(0, 2 * MIB)
    world.guest.pwrite(2 * MIB, bytes(MIB))
    world.twin.primary[: 3 * MIB] = bytes(3 * MIB)
    sent = world.proxy.passed.to_server - before
    if isinstance(world.primary, FilterPrimary):
        assert sent > 3 * MIB
    else:
        assert sent < 4 * KIB
    world.compare()


# Section: a standby that goes away


def assert_left_alone(world: World) -> None:
    """The guest goes on without an error, and the primary knows that it is alone: a quorum reports
    a plain node that fails; the filter keeps errors of writes from it, and its status tells."""
    world.write()
    if isinstance(world.primary, FilterPrimary):
        assert world.primary.status() == FAILED
        assert (world.primary.node, "write") not in world.primary.bad_children()
    else:
        world.primary.wait_bad("write")
        assert world.primary.status() == HEALTHY  # there is no replication node
    world.guest.flush()
    world.primary.wait_bad("flush")
    assert {node for node, _ in world.primary.bad_children()} <= {world.primary.node}
    world.compare_guest()


@pytest.mark.parametrize("how", ["failover", "kill", "unplug"])
def test_the_guest_sees_no_error_when_the_standby_has_gone(world: World, how: str) -> None:
    world.begin()
    world.write()
    world.compare()
    match how:
        case "failover":
            world.standby.fail_over()
        case "kill":
            world.standby.process.kill()
        case "unplug":
            world.proxy.refuse()
            world.proxy.reset()
    assert_left_alone(world)
    world.primary.detach()
    world.write()
    world.compare_guest()
    world.primary.quit()


@pytest.mark.parametrize("end", End)
def test_a_cut_connection_costs_some_writes_and_qemu_goes_on_without_them(
    world: World, end: End
) -> None:
    """And with a standby that lacks them. The report of the quorum, or the status of the filter, is
    all there is to know it by: who manages the two has to synchronise them again."""
    world.begin()
    world.write()
    disk = bytearray(world.twin.primary)
    world.proxy.cut_after(HEADER + 100, Way.TO_SERVER, end)
    # QEMU connects again by itself, a few writes later.
    missed = 0
    while not world.write_sector(missed):
        missed += SECTOR
        assert missed < MIB
    assert missed
    world.write_sector(2 * MIB)
    world.guest.flush()
    disk[missed:] = world.twin.primary[missed:]
    assert_same(world.standby.content("colo0"), disk, "the standby's disk")
    world.compare_guest()
    if isinstance(world.primary, FilterPrimary):
        assert world.primary.status() == FAILED
        world.primary.qmp.execute(*CHECKPOINT)
        assert world.primary.status() == FAILED
    else:
        world.primary.wait_bad("write")


def test_a_guest_waits_for_a_silent_standby_until_it_is_yanked(world: World) -> None:
    world.begin()
    world.proxy.silence(Way.TO_CLIENT)
    before = world.proxy.received
    data = world.rng.randbytes(SECTOR)
    pending = world.guest.send_writes([(0, data)])
    world.twin.primary[:SECTOR] = data
    wait_until(lambda: world.proxy.received.to_client > before.to_client, "the standby's reply")
    assert world.standby.content("colo0")[:SECTOR] == data
    assert world.proxy.passed.to_client == before.to_client
    world.primary.yank()
    world.guest.finish(pending)
    assert_left_alone(world)


# Section: a primary that comes back


def test_a_stale_primary_is_refused_until_reset(world: World) -> None:
    world.begin()
    world.write()
    world.write_view()
    world.standby.fail_over()
    world.primary.detach()
    with pytest.raises(PeerError, match=FENCED):
        world.primary.synchronise(world.address, "colo0")
    stale = type(world.primary)(world.folder, other_disk(world), name="stale")
    with stale, pytest.raises(PeerError, match=FENCED):
        stale.synchronise(world.address, "colo0")
    assert_same(world.standby.content("top0"), world.twin.view, "top0")

    world.standby.qmp.execute("x-replnbd-reset")
    world.begin()
    world.write()
    world.write_view()
    world.compare()
    world.standby.fail_over()
    world.primary.quit()
    world.standby.quit()
    assert_same(world.standby.disk.content(), world.twin.view, "the promoted disk")
    for overlay in (world.standby.disk.hidden, world.standby.disk.active):
        run("qemu-img", "check", "-q", "-f", "qcow2", overlay)


def other_disk(world: World) -> Path:
    """A copy of the primary's disk, of which its QEMU has the lock."""
    copy = world.folder / "stale.raw"
    copy.write_bytes(world.primary.local.read_bytes())
    return copy


def test_a_primary_that_reconnects_by_itself_is_refused(plain: World) -> None:
    """QEMU keeps a guest's writes for `reconnect-delay` seconds, and tries again and again."""
    world = plain
    assert isinstance(world.primary, PlainPrimary)
    world.primary.options["reconnect-delay"] = 3
    world.begin()
    world.write()
    world.write_view()
    # As long as there is no failover it goes on where it was.
    world.proxy.reset()
    world.write()
    world.compare()
    assert world.primary.bad_children() == set()
    world.standby.fail_over()
    assert_left_alone(world)
    assert_same(world.standby.content("top0"), world.twin.view, "top0 after the failover")
    world.primary.quit()
    world.standby.quit()
    assert_same(world.standby.disk.content(), world.twin.view, "the promoted disk")


# Section: what the filter says


def test_the_filter_tells_its_state(filtered: World) -> None:
    """replnbd as the standby changes nothing of what QEMU 7.2 says on the primary's side."""
    primary, start = filtered.primary, {"enable": True, "primary": True}
    assert primary.status() == HEALTHY  # there is no node yet
    primary.synchronise(filtered.address, "colo0")
    not_running = {"error": True, "desc": "Block replication is not running"}
    assert primary.status() == not_running
    refused = primary.qmp.answer("xen-set-replication", {"enable": True, "primary": False})
    assert refused.desc == "The parameter mode's value is invalid, needs 0, but got 1"
    filtered.standby.qmp.execute(*START)
    primary.start()
    assert primary.status() == HEALTHY
    again = primary.qmp.answer("xen-set-replication", start)
    assert again.desc == "Block replication is running or done"
    filtered.write()
    stop = {"enable": False, "primary": True, "failover": True}
    primary.qmp.execute("xen-set-replication", stop)
    assert primary.status() == HEALTHY
    # Done: nothing more is sent, and a start does nothing.
    standby = bytes(filtered.twin.primary)
    filtered.write()
    assert primary.qmp.execute("xen-set-replication", start) == {}
    filtered.write()
    assert_same(filtered.standby.content("colo0"), standby, "the disk after the filter's end")
    assert primary.status() == HEALTHY


def test_what_the_filter_sends_before_its_start_is_nothing(filtered: World) -> None:
    filtered.primary.synchronise(filtered.address, "colo0")
    standby = bytes(filtered.twin.primary)
    filtered.write()
    filtered.primary.wait_bad("write")
    filtered.compare_guest()
    assert_same(filtered.standby.content("colo0"), standby, "the disk before the start")


def test_the_filter_spoils_what_stands_around_less_than_a_sector(filtered: World) -> None:
    """QEMU 7.2 does not notice that it could not read the rest of the sector; nobody is told. This
    is why `World.write` keeps to sectors here, as all real guests do."""
    filtered.begin()
    offsets = range(0, 64 * SECTOR, SECTOR)
    for offset in offsets:
        assert filtered.write_sector(offset)
    # Not one right after its sector was written: QEMU's buffer may be what that was written from.
    for offset in reversed(offsets):
        filtered.guest.pwrite(offset + 100, b"small")
        filtered.twin.primary[offset + 100 : offset + 105] = b"small"
    filtered.compare_guest()
    standby, guest = filtered.standby.content("colo0"), filtered.twin.primary
    sectors = [slice(at, at + SECTOR) for at in offsets]
    assert all(standby[each][100:105] == b"small" for each in sectors)
    assert any(standby[each] != guest[each] for each in sectors)
    assert filtered.primary.bad_children() == set()
    assert filtered.primary.status() == HEALTHY
