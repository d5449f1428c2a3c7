"""QEMU's tools agree with every byte of the images a daemon works on: in the middle of a run, after
an orderly end, and after a failover; whatever overlays and disks `qemu-img create` can make."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from interop_support import (
    CHECKPOINT,
    FAILOVER,
    KIB,
    MIB,
    SECTOR,
    START,
    Twin,
    assert_same,
    fresh_seed,
    mottled,
    random_requests,
    run,
)
from peers import DiskFormat, NbdClient, ReplnbdDaemon, ReplnbdDisk, qemu_img

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 5 * MIB + 3 * SECTOR
REQUESTS = 40


class Shape(NamedTuple):
    """Options of `qemu-img create` for the hidden and the active overlay, and for the secondary
    disk (None: a raw one)."""

    hidden: str
    active: str
    secondary: str | None = None


def both(overlays: str, secondary: str | None = None) -> Shape:
    """The same options for both overlays."""
    return Shape(overlays, overlays, secondary)


def same(options: str) -> Shape:
    """The same options for all three, the secondary disk being a qcow2."""
    return Shape(options, options, options)


SHAPES = {
    "qemu's own": same(""),
    "clusters of 512": same("cluster_size=512"),
    "clusters of 512, 64-bit": both("cluster_size=512,refcount_bits=64"),
    "clusters of 1k, 1-bit": both("cluster_size=1k,refcount_bits=1"),
    "clusters of 4k, 2-bit": both("cluster_size=4k,refcount_bits=2", "refcount_bits=2"),
    "clusters of 16k, 4-bit": both("cluster_size=16k,refcount_bits=4"),
    "8-bit": same("refcount_bits=8"),
    "32-bit": both("refcount_bits=32"),
    "64-bit, lazy refcounts": same("refcount_bits=64,lazy_refcounts=on"),
    "clusters of 256k, 1-bit": same("cluster_size=256k,refcount_bits=1"),
    "clusters of 2M": same("cluster_size=2M"),
    "version 2": same("compat=0.10"),
    "version 2, clusters of 512": both("compat=0.10,cluster_size=512"),
    "version 2, clusters of 2M": same("compat=0.10,cluster_size=2M"),
    "extended": same("extended_l2=on"),
    "extended 16k, 1-bit": same("extended_l2=on,cluster_size=16k,refcount_bits=1"),
    "extended 2M, lazy refcounts": both("extended_l2=on,cluster_size=2M,lazy_refcounts=on"),
    "small below large": Shape("cluster_size=512,compat=0.10", "cluster_size=2M,extended_l2=on"),
    "large below small": Shape("cluster_size=2M", "cluster_size=512,refcount_bits=64", ""),
}


def make_disk(folder: Path, shape: Shape, content: bytes) -> ReplnbdDisk:
    """A secondary disk with `content`, and overlays over it, all by qemu-img."""
    format_: DiskFormat = "raw" if shape.secondary is None else "qcow2"
    disk = ReplnbdDisk.create(folder, "colo0", "top0", content, "raw")
    if shape.secondary is not None:
        raw = disk.secondary
        disk = ReplnbdDisk("colo0", "top0", folder / "colo0.qcow2", *overlays_of(folder), "qcow2")
        options = ["-o", shape.secondary] if shape.secondary else []
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, disk.secondary)
        raw.unlink()
    below = (disk.secondary, format_), (disk.hidden, "qcow2")
    for overlay, options_text, (backing, backing_format) in zip(
        (disk.hidden, disk.active), (shape.hidden, shape.active), below, strict=True
    ):
        options = ["-o", options_text] if options_text else []
        backed = ["-b", backing.name, "-F", backing_format]
        qemu_img("create", "-q", "-f", "qcow2", *options, *backed, overlay)
    return disk


def overlays_of(folder: Path) -> tuple[Path, Path]:
    return folder / "colo0.hidden.qcow2", folder / "colo0.active.qcow2"


def moved(disk: ReplnbdDisk, folder: Path) -> ReplnbdDisk:
    """Copies of a disk's files in another folder: their backing files are the copies, too."""
    secondary, hidden, active = (
        Path(shutil.copy(path, folder)) for path in (disk.secondary, disk.hidden, disk.active)
    )
    return ReplnbdDisk(disk.name, disk.top_id, secondary, hidden, active, disk.format)


def check_images(disk: ReplnbdDisk, *, in_use: bool) -> None:
    """qemu-img finds neither errors (exit status 2) nor leaks (3) in any image of the disk."""
    share = ["-U"] if in_use else []
    for path in (disk.hidden, disk.active, disk.secondary):
        if path is not disk.secondary or disk.format == "qcow2":
            qemu_img("check", "-f", "qcow2", *share, path)


def compare_images(disk: ReplnbdDisk, twin: Twin, *, in_use: bool) -> None:
    """`qemu-img compare` finds the view in the active overlay over its backing files, and what the
    primary wrote in the secondary disk."""
    share = ["-U"] if in_use else []
    for path, format_, expected in images_of(disk, twin):
        model = path.with_suffix(".model")
        model.write_bytes(expected)
        qemu_img("compare", *share, "-f", format_, "-F", "raw", path, model)


def convert_images(disk: ReplnbdDisk, twin: Twin, *, in_use: bool) -> None:
    """`qemu-img convert` reads the same, all bytes."""
    share = ["-U"] if in_use else []
    for path, format_, expected in images_of(disk, twin):
        converted = path.with_suffix(".converted")
        qemu_img("convert", *share, "-f", format_, "-O", "raw", path, converted)
        assert_same(converted.read_bytes(), expected, path.name)


def images_of(disk: ReplnbdDisk, twin: Twin) -> list[tuple[Path, DiskFormat, bytearray]]:
    """(image, format, the model's bytes) of the two that are a disk."""
    return [
        (disk.active, "qcow2", twin.view),
        (disk.secondary, disk.format, twin.primary),
    ]


def read_all(client: NbdClient) -> bytearray:
    """All bytes of an export."""
    return client.pread(0, client.size)


@contextmanager
def both_exports(daemon: ReplnbdDaemon) -> Iterator[tuple[NbdClient, NbdClient]]:
    with daemon.connect("colo0") as primary, daemon.connect("top0") as standby:
        yield primary, standby


def work(daemon: ReplnbdDaemon, twin: Twin, rng: random.Random, *, length_max: int) -> None:
    """Requests of both sides, interleaved, and a flush of each; both exports are read whole."""
    with both_exports(daemon) as (primary, standby):
        for _ in range(4):
            share = REQUESTS // 4
            random_requests(rng, primary, twin.primary, share, length_max=length_max)
            random_requests(rng, standby, twin.view, share, length_max=length_max)
        primary.flush()
        standby.flush()
        assert_same(read_all(primary), twin.primary, "the primary's export")
        assert_same(read_all(standby), twin.view, "the view")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_qemu_agrees_with_every_byte_in_mid_run_at_the_end_and_after_failover(
    shape: Shape, short_dir: Path
) -> None:
    rng = random.Random(fresh_seed())
    twin = Twin(mottled(rng, SIZE))
    disk = make_disk(short_dir, shape, bytes(twin.primary))
    with ReplnbdDaemon(short_dir, [disk]) as daemon:
        daemon.qmp.execute(*START)
        work(daemon, twin, rng, length_max=200 * KIB)
        check_images(disk, in_use=True)
        convert_images(disk, twin, in_use=True)
        daemon.qmp.execute(*CHECKPOINT)
        twin.checkpoint()
        check_images(disk, in_use=True)
        compare_images(disk, twin, in_use=True)
        work(daemon, twin, rng, length_max=64 * KIB)
        check_images(disk, in_use=True)
        compare_images(disk, twin, in_use=True)
        daemon.qmp.execute(*FAILOVER)
        daemon.wait_for_commit()
        assert daemon.stages() == {"done"}
        check_images(disk, in_use=True)
        with daemon.connect("top0") as standby:
            random_requests(rng, standby, twin.view, 10, length_max=64 * KIB)
            standby.flush()
            assert_same(read_all(standby), twin.view, "the view after the failover")
        daemon.quit()
    twin.primary[:] = twin.view
    check_images(disk, in_use=False)
    convert_images(disk, twin, in_use=False)


@pytest.mark.parametrize("name", ["qemu's own", "clusters of 512", "version 2", "extended",
    "small below large", "large below small"])  # fmt: skip
def test_what_an_orderly_end_leaves_is_the_view_and_qemu_img_commits_it(
    name: str, short_dir: Path
) -> None:
    rng = random.Random(fresh_seed())
    twin = Twin(mottled(rng, SIZE))
    disk = make_disk(short_dir, SHAPES[name], bytes(twin.primary))
    with ReplnbdDaemon(short_dir, [disk]) as daemon:
        daemon.qmp.execute(*START)
        work(daemon, twin, rng, length_max=200 * KIB)
        daemon.qmp.execute(*CHECKPOINT)
        twin.checkpoint()
        work(daemon, twin, rng, length_max=200 * KIB)
        daemon.quit()
    check_images(disk, in_use=False)
    compare_images(disk, twin, in_use=False)
    convert_images(disk, twin, in_use=False)
    # One overlay after the other, and, on copies, both at once.
    (short_dir / "copy").mkdir()
    copy = moved(disk, short_dir / "copy")
    for overlay in (disk.active, disk.hidden):
        run("qemu-img", "commit", "-q", "-f", "qcow2", overlay)
    run("qemu-img", "commit", "-q", "-f", "qcow2", "-b", copy.secondary.name, copy.active)
    for committed in (disk, copy):
        assert_same(committed.content(), twin.view, "the disk after qemu-img commit")


def test_a_flush_of_the_primary_leaves_no_leak_in_the_hidden_overlay(short_dir: Path) -> None:
    """Its refcount table outgrows its place, which has to be given back at the flush."""
    rng = random.Random(fresh_seed())
    twin = Twin(rng.randbytes(SIZE))
    shape = both("cluster_size=512,refcount_bits=64")
    disk = make_disk(short_dir, shape, bytes(twin.primary))
    with ReplnbdDaemon(short_dir, [disk]) as daemon:
        daemon.qmp.execute(*START)
        with daemon.connect("colo0") as primary:
            twin.primary[: 4 * MIB] = rng.randbytes(4 * MIB)
            primary.pwrite(0, twin.primary[: 4 * MIB])
            primary.flush()
            check_images(disk, in_use=True)
            compare_images(disk, twin, in_use=True)
