"""A primary and its standby, both behind the Linux kernel's own NBD client: file systems live on
NAME and on TOP-ID at the same time, through checkpoints and failovers."""

from __future__ import annotations

from pathlib import Path

import pytest
from interop_support import CHECKPOINT, MIB, START, assert_same
from kernel_client_support import (
    HOST,
    Files,
    Work,
    attach,
    check_device,
    detach,
    expect_bytes,
    mount,
    start_writing,
    stop_writing,
    umount,
)
from peers import Guest

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def take_over(work: Work, files: Files) -> None:
    """After a failover TOP-ID and the secondary disk are the same, with these files."""
    exported = work.standby.content("top0")
    work.standby.quit()
    assert_same(work.disk.content(), exported, "the secondary disk")
    files.check_image(work.disk.secondary, work.folder / "files")


def test_the_view_is_the_checkpoint_until_the_next_one(work: Work) -> None:
    guest, files = work.guest, work.files
    work.make_file_system("-C 4")
    files.write(guest, "nbd0", "a", "b", "c")
    seen, content = files.copy(), work.start()
    attach(guest, work.standby, "top0", "nbd1", "-C 4")
    for old, new in (("b", "d"), ("c", "e")):
        files.remove(guest, "nbd0", old)
        files.write(guest, "nbd0", "a", new)
        guest.run("fstrim /mnt/nbd0; sync")
        expect_bytes(guest, "nbd1", content, "the view before the next checkpoint")
        mount(guest, "nbd1", "ro")
        seen.check_mounted(guest, "nbd1")
        umount(guest, "nbd1")
        seen, content = files.copy(), work.checkpoint()
        expect_bytes(guest, "nbd1", content, "the view after the checkpoint")
    umount(guest, "nbd0")
    work.check_view(seen)
    detach(guest, "nbd0")
    detach(guest, "nbd1")
    work.check_disk()


def test_the_standby_writes_on_its_view_while_the_primary_writes_on_the_disk(work: Work) -> None:
    guest, files = work.guest, work.files
    work.make_file_system()
    files.write(guest, "nbd0", "a", "b")
    work.start()
    seen = files.copy()
    attach(guest, work.standby, "top0", "nbd1")
    mount(guest, "nbd1")
    for name in ("c", "d"):
        files.write(guest, "nbd0", "a", name)
        seen.write(guest, "nbd1", "b", name)
    seen.remove(guest, "nbd1", "a")
    guest.run("fstrim /mnt/nbd1; fstrim /mnt/nbd0")
    files.check_mounted(guest, "nbd0")
    seen.check_mounted(guest, "nbd1")
    umount(guest, "nbd1")
    check_device(guest, "nbd1")
    expect_bytes(guest, "nbd1", work.standby.content("top0"), "the view in the guest")
    work.check_view(seen)
    # A checkpoint drops all that the standby wrote.
    expect_bytes(guest, "nbd1", work.checkpoint(), "the view after the checkpoint")
    umount(guest, "nbd0")
    detach(guest, "nbd1")
    detach(guest, "nbd0")
    work.check_disk()


def test_a_checkpoint_while_the_primary_writes_is_what_a_journal_repairs(work: Work) -> None:
    guest, files = work.guest, work.files
    work.make_file_system("-C 4")
    files.write(guest, "nbd0", "a", "b", "c")
    work.standby.qmp.execute(*START)
    start_writing(guest)
    for _ in range(3):
        work.wait_for_writes(4 * MIB)
        work.standby.qmp.execute(*CHECKPOINT)
        attach(guest, work.standby, "top0", "nbd1")
        mount(guest, "nbd1")
        guest.run("rm -f /mnt/nbd1/noise.*")
        files.check_mounted(guest, "nbd1")
        umount(guest, "nbd1")
        check_device(guest, "nbd1")
        detach(guest, "nbd1")
    stop_writing(guest)
    guest.run("rm -f /mnt/nbd0/noise.*")
    files.check_mounted(guest, "nbd0")
    umount(guest, "nbd0")
    detach(guest, "nbd0")
    work.check_disk()


def test_after_a_failover_the_primary_is_cut_off_and_the_standby_goes_on(work: Work) -> None:
    guest, files = work.guest, work.files
    work.make_file_system()
    files.write(guest, "nbd0", "a", "b")
    work.start()
    seen = files.copy()
    files.write(guest, "nbd0", "a", "lost")
    attach(guest, work.standby, "top0", "nbd1")
    mount(guest, "nbd1")
    seen.write(guest, "nbd1", "b", "c")
    work.standby.fail_over()
    guest.run("dd if=/dev/vda of=/mnt/nbd0/x bs=64k count=1 conv=fsync", status=1)
    said = guest.run(f"nbd-client {HOST} {work.standby.port} -N colo0 /dev/nbd2", status=1)
    assert "'colo0' is fenced" in said
    seen.check_mounted(guest, "nbd1")
    seen.write(guest, "nbd1", "b", "d")
    seen.remove(guest, "nbd1", "c")
    guest.run("fstrim /mnt/nbd1")
    umount(guest, "nbd1")
    check_device(guest, "nbd1")
    detach(guest, "nbd1")
    take_over(work, seen)


@pytest.mark.parametrize("target", ["standby", "latest"])
def test_a_standby_takes_over_from_a_primary_that_died_while_it_wrote(
    work: Work, short_dir: Path, source_file: Path, target: str
) -> None:
    survivor, files = work.guest, work.files
    with Guest(short_dir, source_file) as work.guest:
        work.make_file_system("-C 4")
        files.write(work.guest, "nbd0", "a", "b")
        work.standby.qmp.execute(*START)
        (files if target == "latest" else files.copy()).write(work.guest, "nbd0", "b", "c")
        start_writing(work.guest)
        work.wait_for_writes(8 * MIB)
    work.guest = survivor
    work.standby.fail_over(target)
    attach(survivor, work.standby, "top0", "nbd1")
    mount(survivor, "nbd1")
    survivor.run("rm -f /mnt/nbd1/noise.*")
    files.check_mounted(survivor, "nbd1")
    files.write(survivor, "nbd1", "d")
    umount(survivor, "nbd1")
    check_device(survivor, "nbd1")
    detach(survivor, "nbd1")
    take_over(work, files)
