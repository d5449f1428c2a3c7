"""QEMU on both sides of a standby: its drives are our exports, and its quorum is the primary."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop_support import (
    CHECKPOINT,
    FAILOVER,
    KIB,
    MIB,
    SECTOR,
    START,
    Standby,
    Twin,
    assert_same,
    fresh_seed,
    mottled,
    random_requests,
    run,
)
from machine import Machine
from peers import PeerError, ReplnbdDisk, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 6 * MIB + 512


@pytest.fixture
def rng() -> random.Random:
    return random.Random(fresh_seed())


@pytest.fixture
def content(rng: random.Random) -> bytes:
    """What is on the primary's disk at first."""
    return mottled(rng, SIZE)


@pytest.fixture
def standby(short_dir: Path) -> Iterator[Standby]:
    """In stage none, with an empty disk."""
    disk = ReplnbdDisk.create(short_dir, "colo0", "top0", bytes(SIZE))
    with Standby(short_dir, disk) as standby:
        yield standby


def assert_exports(standby: Standby, twin: Twin) -> None:
    """Both exports, all bytes."""
    assert_same(standby.content("colo0"), twin.primary, "colo0")
    assert_same(standby.content("top0"), twin.view, "top0")


def pattern(content: bytearray, value: int, offset: int, length: int) -> tuple[str, str]:
    """qemu-io commands that write a pattern and read it again; `content` is changed alike."""
    content[offset : offset + length] = bytes([value]) * length
    return f"write -P {value} {offset} {length}", f"read -P {value} {offset} {length}"


# Section: our exports as drives


def drive_file(form: str, standby: Standby, export: str) -> str:
    """The ways to name an export that QEMU's users know."""
    if form == "nbd:unix:":
        return f"nbd:unix:{standby.nbd_socket}:exportname={export}"
    return standby.unix(export) if form == "nbd+unix://" else standby.tcp(export)


@pytest.mark.parametrize("form", ["nbd:unix:", "nbd+unix://", "nbd://"])
def test_a_drive_reads_and_writes_each_export(
    standby: Standby, short_dir: Path, rng: random.Random, form: str
) -> None:
    twin = Twin(bytes(SIZE))
    standby.qmp.execute(*START)
    drives = [
        f"if=none,id={export},format=raw,discard=unmap,file={drive_file(form, standby, export)}"
        for export in ("colo0", "top0")
    ]
    with Machine(short_dir, "vm", drives) as vm:
        for drive, content in (("colo0", twin.primary), ("top0", twin.view)):
            for value in range(1, 9):
                offset = rng.randrange(SIZE - 100 * KIB)
                vm.io(drive, *pattern(content, value, offset, rng.randint(1, 100 * KIB)))
            vm.io(drive, "write -z 300001 70001", "write -z -u 1M 64k", "discard 2M 128k", "flush")
            for offset, length in ((300001, 70001), (MIB, 64 * KIB), (2 * MIB, 128 * KIB)):
                content[offset : offset + length] = bytes(length)
            last = pattern(content, 77, SIZE - 700, 700)
            vm.io(drive, *last, "read -P 0 300001 70001", "read -P 0 1M 64k", "read -P 0 2M 128k")
        assert_exports(standby, twin)
        standby.qmp.execute(*CHECKPOINT)
        twin.checkpoint()
        # A drive that was open all the time sees the view as it is now.
        vm.io("top0", f"read -P 77 {SIZE - 700} 700")
        vm.io("top0", *pattern(twin.view, 99, 12345, 54321), "flush")
        assert_exports(standby, twin)
        vm.quit()
    standby.quit()
    assert_same(standby.disk.content(), twin.primary, "the secondary disk")


def test_a_drive_on_the_view_goes_on_through_a_failover(
    standby: Standby, short_dir: Path, rng: random.Random
) -> None:
    twin = Twin(bytes(SIZE))
    standby.qmp.execute(*START)
    drives = [f"if=none,id=view,format=raw,file={standby.tcp('top0')}"]
    with (
        Machine(short_dir, "vm", drives) as vm,
        standby.connect("colo0") as primary,
    ):
        random_requests(rng, primary, twin.primary, 40, length_max=200 * KIB)
        standby.qmp.execute(*CHECKPOINT)
        twin.checkpoint()
        random_requests(rng, primary, twin.primary, 40, length_max=200 * KIB)
        vm.io("view", *pattern(twin.view, 1, 0, MIB))
        standby.qmp.execute(*FAILOVER)
        for value in range(2, 20):
            offset = rng.randrange(SIZE - 100 * KIB)
            vm.io("view", *pattern(twin.view, value, offset, rng.randint(1, 100 * KIB)))
        wait_until(lambda: standby.stage() == "done", "the commit")
        vm.io("view", *pattern(twin.view, 20, 3 * MIB, MIB), "flush")
        assert_same(standby.content("top0"), twin.view, "top0")
        vm.quit()
    standby.quit()
    assert_same(standby.disk.content(), twin.view, "the secondary disk")


# Section: QEMU as the primary


def quorum_drive(local: Path) -> str:
    """The drive of README's step 2: a quorum with one child."""
    options = ["if=none", "id=colo-disk0", "driver=quorum", "read-pattern=fifo"]
    options += ["vote-threshold=1", "children.0.driver=raw", "children.0.file.driver=file"]
    return ",".join([*options, f"children.0.file.filename={local}"])


def nbd_node(standby: Standby) -> dict[str, Any]:
    """The `blockdev-add` of README's step 2."""
    return {
        "driver": "nbd",
        "export": "colo0",
        "server": {"type": "inet", "host": "127.0.0.1", "port": str(standby.port)},
    }


def synchronise(primary: Machine) -> None:
    """README's first synchronisation, and then the second child of the quorum."""
    mirror = {"job-id": "resync", "device": "colo-disk0", "target": "nbd0", "sync": "full"}
    primary.qmp.execute("blockdev-mirror", {**mirror, "auto-dismiss": False})
    primary.wait_for_job("resync", "ready")
    primary.qmp.execute("stop")
    primary.qmp.execute("block-job-cancel", {"device": "resync"})
    primary.wait_for_job("resync", "concluded")
    primary.qmp.execute("block-job-dismiss", {"id": "resync"})
    primary.qmp.execute("x-blockdev-change", {"parent": "colo-disk0", "node": "nbd0"})


def bad_children(primary: Machine) -> set[tuple[str, str]]:
    """(node, what it failed to do) of every report of the quorum."""
    return {(data["node-name"], data["type"]) for data in primary.events("QUORUM_REPORT_BAD")}


def test_a_quorum_is_synchronised_replicates_and_outlives_the_failover(
    standby: Standby, short_dir: Path, rng: random.Random, content: bytes
) -> None:
    local = short_dir / "vm0.raw"
    local.write_bytes(content)
    twin = Twin(content)
    with Machine(short_dir, "primary", [quorum_drive(local)]) as primary:
        primary.export("colo-disk0")
        node = {**nbd_node(standby), "node-name": "nbd0", "detect-zeroes": "on"}
        primary.qmp.execute("blockdev-add", node)
        with primary.connect("colo-disk0") as guest:
            synchronise(primary)
            assert_same(standby.content("colo0"), content, "the disk after the mirror job")
            standby.qmp.execute(*START)
            primary.qmp.execute("cont")

            # A quorum has no discard: QEMU drops a guest's TRIM above it.
            random_requests(rng, guest, twin.primary, 60, length_max=200 * KIB, trim=False)
            assert_exports(standby, twin)
            # detect-zeroes: a guest's zeroes travel as WRITE_ZEROES, and the view keeps the old.
            guest.pwrite(MIB + 1, bytes(500 * KIB))
            twin.primary[MIB + 1 : MIB + 1 + 500 * KIB] = bytes(500 * KIB)
            guest.flush()
            assert_exports(standby, twin)
            standby.qmp.execute(*CHECKPOINT)
            twin.checkpoint()
            assert_exports(standby, twin)
            with standby.connect("top0") as view:
                random_requests(rng, view, twin.view, 40, length_max=200 * KIB)
            random_requests(rng, guest, twin.primary, 60, length_max=200 * KIB, trim=False)
            assert_exports(standby, twin)
            assert bad_children(primary) == set()

            standby.fail_over()
            assert_same(standby.content("top0"), twin.view, "top0 after the failover")
            # The old primary lives on, on its own disk alone.
            random_requests(rng, guest, twin.primary, 40, length_max=200 * KIB, trim=False)
            guest.flush()
            assert ("nbd0", "write") in bad_children(primary)
            assert {node for node, _ in bad_children(primary)} == {"nbd0"}
            assert_same(guest.pread(0, SIZE), twin.primary, "the old primary's disk")
            child = {"parent": "colo-disk0", "child": "children.1"}
            primary.qmp.execute("x-blockdev-change", child)
            primary.qmp.execute("blockdev-del", {"node-name": "nbd0"})
            random_requests(rng, guest, twin.primary, 20, length_max=200 * KIB, trim=False)
            assert_same(guest.pread(0, SIZE), twin.primary, "the old primary's disk")
        primary.quit()
    standby.quit()
    assert_same(local.read_bytes(), twin.primary, "the old primary's file")
    assert_same(standby.disk.content(), twin.view, "the secondary disk")


def test_a_standby_is_taken_into_a_quorum_again_after_reset(
    standby: Standby, short_dir: Path, rng: random.Random, content: bytes
) -> None:
    local = short_dir / "vm0.raw"
    local.write_bytes(content)
    twin = Twin(content)
    with Machine(short_dir, "primary", [quorum_drive(local)]) as primary:
        primary.export("colo-disk0")
        node = {**nbd_node(standby), "node-name": "nbd0", "detect-zeroes": "on"}
        with primary.connect("colo-disk0") as guest:
            for _ in range(2):
                primary.qmp.execute("blockdev-add", node)
                synchronise(primary)
                twin.checkpoint()
                standby.qmp.execute(*START)
                primary.qmp.execute("cont")
                random_requests(rng, guest, twin.primary, 30, length_max=200 * KIB, trim=False)
                with standby.connect("top0") as view:
                    random_requests(rng, view, twin.view, 30, length_max=200 * KIB)
                assert_exports(standby, twin)
                standby.fail_over()
                assert_same(standby.content("top0"), twin.view, "top0 after the failover")
                child = {"parent": "colo-disk0", "child": "children.1"}
                primary.qmp.execute("x-blockdev-change", child)
                primary.qmp.execute("blockdev-del", {"node-name": "nbd0"})
                with pytest.raises(PeerError, match="Denied by server"):
                    primary.qmp.execute("blockdev-add", node)
                standby.qmp.execute("x-replnbd-reset")
        primary.quit()
    standby.quit()
    assert_same(standby.disk.content(), twin.view, "the secondary disk")
    for overlay in (standby.disk.hidden, standby.disk.active):
        run("qemu-img", "check", "-q", "-f", "qcow2", overlay)


def test_qemus_own_primary_filter_replicates_to_us(
    standby: Standby, short_dir: Path, rng: random.Random, content: bytes
) -> None:
    local = short_dir / "vm0.raw"
    local.write_bytes(content)
    run("nbdcopy", "--flush", local, standby.unix("colo0"))
    twin = Twin(content)
    with Machine(short_dir, "primary", [quorum_drive(local)]) as primary:
        primary.export("colo-disk0")
        node = {"driver": "replication", "mode": "primary", "node-name": "replication0"}
        primary.qmp.execute("blockdev-add", {**node, "file": nbd_node(standby)})
        child = {"parent": "colo-disk0", "node": "replication0"}
        primary.qmp.execute("x-blockdev-change", child)
        standby.qmp.execute(*START)
        primary.qmp.execute("xen-set-replication", {"enable": True, "primary": True})
        with primary.connect("colo-disk0") as guest:

            def whole_sectors(count: int) -> None:
                # The filter takes no less, and cannot read what stands around.
                random_requests(
                    rng, guest, twin.primary, count,
                    length_max=200 * KIB, trim=False, alignment=SECTOR,
                )  # fmt: skip

            whole_sectors(60)
            assert_exports(standby, twin)
            for side in (primary, standby):
                side.qmp.execute(*CHECKPOINT)
            twin.checkpoint()
            whole_sectors(60)
            with standby.connect("top0") as view:
                random_requests(rng, view, twin.view, 40, length_max=200 * KIB)
            assert_exports(standby, twin)
            status = "query-xen-replication-status"
            assert primary.qmp.execute(status) == standby.qmp.execute(status) == {"error": False}

            standby.fail_over()
            # The filter keeps errors from the quorum: its status tells.
            whole_sectors(40)
            assert bad_children(primary) == set()
            assert primary.qmp.execute(status) == {"error": True, "desc": "I/O error occurred"}
            assert_same(guest.pread(0, SIZE), twin.primary, "the old primary's disk")
            assert_same(standby.content("top0"), twin.view, "top0 after the failover")
        primary.quit()
    standby.quit()
    assert_same(local.read_bytes(), twin.primary, "the old primary's file")
    assert_same(standby.disk.content(), twin.view, "the secondary disk")
