"""QEMU's drives are our exports, as a guest has them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import (
    CHECKPOINT,
    FAILOVER,
    KIB,
    MIB,
    START,
    Standby,
    Twin,
    assert_same,
    fresh_seed,
    mottled,
    random_requests,
)
from peers import Machine, ReplnbdDisk, wait_until

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
