"""The Linux kernel's own NBD client, in a small guest: what most people will put a disk on. File
systems are made and used through it, and every byte is compared on the host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from interop_support import KIB, MIB, assert_same
from kernel_client_support import (
    SIZE,
    Work,
    attach,
    check_device,
    detach,
    expect_bytes,
    mount,
    umount,
)
from peers import Guest, PeerError
from peers.guest_image import find_kernel

pytestmark = [pytest.mark.interop, pytest.mark.slow]

FILE_BLOCK = 512  # what st_blocks counts


def test_a_command_that_fails_shows_what_it_said_and_the_guests_console(guest: Guest) -> None:
    assert guest.run("echo one; echo two >&2") == "one\ntwo\n"
    assert guest.run("echo three; exit 7", status=7) == "three\n"
    with pytest.raises(PeerError) as failure:
        guest.run("echo before >&2; false; echo after")
    said = str(failure.value)
    assert "guest$ echo before" in said
    assert "\nexit status 1, expected 0\nbefore\n" in said
    assert "\nafter\n" not in said
    assert re.search(r"^\[ *\d+\.\d+\] ", said, re.MULTILINE), "no console"


def test_a_guest_without_a_kernel_says_what_brings_one(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"no kernel for the guest in .*: scripts/test brings one"):
        find_kernel([tmp_path])


@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_file_system_made_through_the_kernel_is_whole_on_the_disk(
    work: Work, block_size: int
) -> None:
    guest, files = work.guest, work.files
    work.make_file_system(f"-b {block_size}")
    assert int(guest.run("cat /sys/block/nbd0/queue/logical_block_size")) == block_size
    files.write(guest, "nbd0", "a", "b", "c", "d")
    files.remove(guest, "nbd0", "b")
    files.write(guest, "nbd0", "c", "e")
    guest.run("fstrim /mnt/nbd0")
    umount(guest, "nbd0")
    check_device(guest, "nbd0")
    mount(guest, "nbd0")
    files.check_mounted(guest, "nbd0")
    umount(guest, "nbd0")
    expect_bytes(guest, "nbd0", work.standby.content("colo0"), "the device in the guest")
    detach(guest, "nbd0")
    work.check_disk()


def test_fstrim_gives_a_deleted_files_space_back_to_the_host(work: Work) -> None:
    guest, files = work.guest, work.files
    work.make_file_system()
    files.write(guest, "nbd0", "kept")
    guest.run("dd if=/dev/vda of=/mnt/nbd0/gone bs=64k count=128 conv=fsync status=none")
    full = work.disk.secondary.stat().st_blocks * FILE_BLOCK
    guest.run("rm /mnt/nbd0/gone; sync; fstrim /mnt/nbd0; sync")
    left = work.disk.secondary.stat().st_blocks * FILE_BLOCK
    assert left <= full - 7 * MIB  # the rest is for what the file system writes itself
    files.check_mounted(guest, "nbd0")
    umount(guest, "nbd0")
    detach(guest, "nbd0")
    work.check_disk()


def test_parallel_writers_over_four_connections_lose_nothing(work: Work) -> None:
    guest, expected = work.guest, bytearray(SIZE)
    attach(guest, work.standby, "colo0", "nbd0", "-C 4")
    assert work.status("primary-connections") == 4
    piece = 128 * KIB
    places = work.rng.sample(range(SIZE // piece), 150)
    writers = []
    for index, how in enumerate(["oflag=direct", "conv=fsync", "oflag=direct", "conv=fsync"]):
        mine = places[index::4]
        copy = f"dd if=/dev/vda of=/dev/nbd0 bs=128k count=1 skip=$at seek=$at status=none {how}"
        writers.append(f"(for at in {' '.join(map(str, mine))}; do {copy} || exit; done) &")
        for place in mine:
            span = slice(place * piece, (place + 1) * piece)
            expected[span] = work.source[span]
    together = ' pids="$pids $!"; '.join([*writers, ""])
    guest.run(f"{together} for pid in $pids; do wait $pid; done; sync")
    expect_bytes(guest, "nbd0", expected, "the device in the guest")
    detach(guest, "nbd0")
    work.wait_for_connections(0)
    assert_same(work.standby.content("colo0"), expected, "the export")
    work.standby.quit()
    assert_same(work.disk.content(), expected, "the secondary disk")


def test_a_device_comes_back_after_every_disconnect_with_what_was_on_it(work: Work) -> None:
    guest, files = work.guest, work.files
    work.make_file_system()
    with work.standby.connect("colo0") as bystander:
        for name in ("a", "b", "c"):
            files.write(guest, "nbd0", name)
            umount(guest, "nbd0")
            detach(guest, "nbd0")
            guest.run("nbd-client -c /dev/nbd0", status=1)
            work.wait_for_connections(1)
            bystander.flush()
            attach(guest, work.standby, "colo0", "nbd0", "-C 2")
            mount(guest, "nbd0")
            files.check_mounted(guest, "nbd0")
    umount(guest, "nbd0")
    detach(guest, "nbd0")
    work.check_disk()


@pytest.mark.parametrize("by", ["client", "export"])
def test_a_device_that_is_read_only_cannot_be_written(work: Work, by: str) -> None:
    guest, files = work.guest, work.files
    work.make_file_system()
    files.write(guest, "nbd0", "a")
    umount(guest, "nbd0")
    detach(guest, "nbd0")
    before = work.standby.content("colo0")
    if by == "client":
        attach(guest, work.standby, "colo0", "nbd0", "-readonly")
    else:
        arguments = {"device": "colo0", "name": "still", "writable": False}
        work.standby.qmp.execute("nbd-server-add", arguments)
        attach(guest, work.standby, "still", "nbd0")
    assert int(guest.run("cat /sys/block/nbd0/ro")) == 1
    said = guest.run("dd if=/dev/vda of=/dev/nbd0 bs=4k count=1 oflag=direct", status=1)
    assert "Operation not permitted" in said
    guest.run("blkdiscard /dev/nbd0", status=1)
    mount(guest, "nbd0", "ro")
    files.check_mounted(guest, "nbd0")
    guest.run("touch /mnt/nbd0/b", status=1)
    umount(guest, "nbd0")
    detach(guest, "nbd0")
    assert_same(work.standby.content("colo0"), before, "the export")
    work.check_disk()
