"""A live QEMU reads the exports by its jobs, and QEMU's tools pull what has changed by the dirty
bitmap: QEMU 7.2's own client, with structured replies, BLOCK_STATUS and x-dirty-bitmap."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop_support import (
    CHECKPOINT,
    KIB,
    START,
    Standby,
    Twin,
    assert_same,
    fresh_seed,
    random_requests,
    run,
)
from libnbd_support import BLOCK, DIRTY, EXPORTS, NAME, SIZE, TOP, data_blocks, patchy, sparse_disk
from peers import CountingProxy, Machine, qemu_img, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

OVERHEAD = 64 * KIB


class World:
    """A running standby with a sparse disk, behind a proxy, and the model of its exports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = random.Random(fresh_seed())
        content = patchy(self.rng, SIZE)
        self.twin = Twin(content)
        self.standby = Standby(folder, sparse_disk(folder, content))
        self.proxy = CountingProxy(folder / "proxy", self.standby.nbd_socket)
        self.standby.qmp.execute(*START)

    def model(self, export: str) -> bytearray:
        return self.twin.primary if export == NAME else self.twin.view

    def change(self, export: str, count: int = 20) -> None:
        """Random requests of a client."""
        with self.standby.connect(export) as client:
            random_requests(self.rng, client, self.model(export), count, length_max=50 * KIB)


@pytest.fixture
def world(short_dir: Path) -> Iterator[World]:
    world = World(short_dir)
    with world.standby, world.proxy:
        yield world
        for export in EXPORTS:
            assert_same(world.standby.content(export), world.model(export), export)
        world.standby.quit()


# Section: jobs of a live QEMU


def nbd_node(world: World, export: str) -> dict[str, Any]:
    """The `blockdev-add` of an export, through the proxy."""
    server = {"type": "unix", "path": str(world.proxy.path)}
    return {"driver": "nbd", "node-name": "source", "server": server, "export": export}


def target_node(path: Path) -> dict[str, Any]:
    """The `blockdev-add` of an empty image of the size of the disk."""
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "target", "file": file}


JOBS = {"blockdev-backup": "concluded", "blockdev-mirror": "ready"}
"""And the status in which all has been copied."""


@pytest.mark.parametrize("job", JOBS)
def test_a_job_takes_a_still_and_sparse_image_of_the_view_while_the_primary_writes(
    world: World, job: str
) -> None:
    world.change(NAME)
    world.change(TOP)
    still = bytes(world.twin.view)
    target = world.folder / "target.qcow2"
    with Machine(world.folder, "vm", []) as vm:
        vm.qmp.execute("blockdev-add", nbd_node(world, TOP))
        vm.qmp.execute("blockdev-add", target_node(target))
        options = {"job-id": "job", "device": "source", "target": "target", "sync": "full"}
        # Slow enough for many writes of the primary to come in between.
        vm.qmp.execute(job, {**options, "auto-dismiss": False, "speed": 2 * SIZE})
        with world.standby.connect(NAME) as primary:

            def done() -> bool:
                random_requests(world.rng, primary, world.twin.primary, 10, length_max=20 * KIB)
                return status(vm) == JOBS[job]

            wait_until(done, f"{job} to copy")
        if job == "blockdev-mirror":
            vm.qmp.execute("block-job-cancel", {"device": "job"})
            vm.wait_for_job("job", "concluded")
        vm.qmp.execute("job-dismiss", {"id": "job"})
        vm.quit()
    data = sum(len(block) for _, block in data_blocks(still))
    # QEMU copies in its own units: a cluster that has some data is read as a whole.
    assert world.proxy.count().to_client < 2 * data + OVERHEAD
    copy = world.folder / "copy"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", target, copy)
    assert_same(copy.read_bytes(), still, "the copy")


def status(vm: Machine) -> str:
    """Of the only job."""
    (job,) = vm.qmp.execute("query-jobs")
    assert "error" not in job, job
    return str(job["status"])


# Section: what has changed since the checkpoint


def bitmap_options(world: World, export: str) -> str:
    """An export for QEMU's tools; what they take for its holes is what has changed."""
    options = ["driver=nbd", "server.type=unix", f"server.path={world.proxy.path}"]
    return ",".join([*options, f"export={export}", f"x-dirty-bitmap={DIRTY}"])


def changed_ranges(world: World, export: str) -> list[tuple[int, int]]:
    """(offset, length) of what the dirty bitmap says has changed: QEMU calls it no data."""
    argv = ["--output=json", "--image-opts", bitmap_options(world, export)]
    extents = json.loads(run("qemu-img", "map", *argv))
    assert sum(each["length"] for each in extents) == SIZE
    return [(each["start"], each["length"]) for each in extents if not each["data"]]


@pytest.mark.parametrize("export", EXPORTS)
def test_qemu_img_pulls_an_incremental_backup_by_the_dirty_bitmap(
    world: World, export: str
) -> None:
    world.change(NAME)
    world.standby.qmp.execute(*CHECKPOINT)
    world.twin.checkpoint()
    full = world.folder / "full"
    run("nbdcopy", world.standby.unix(TOP), full)
    assert_same(full.read_bytes(), world.model(export), "the full backup")
    assert changed_ranges(world, export) == []

    for each in EXPORTS:
        world.change(each, count=8)
    world.proxy.count()
    ranges = changed_ranges(world, export)
    assert ranges
    # An empty image over the export; to read through it with -C keeps what was read.
    increment = world.folder / "increment"
    uri = world.proxy.uri(export)
    create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-F", "raw"]
    qemu_img(*create, "-b", uri, increment)
    steps = [word for offset, length in ranges for word in ("-c", f"read {offset} {length}")]
    run("qemu-io", "-C", "-f", "qcow2", *steps, increment)
    # It read the changes, by whole clusters, and little else.
    changed = sum(length + 2 * BLOCK for _, length in ranges)
    assert world.proxy.count().to_client < changed + OVERHEAD
    assert changed < SIZE
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", full, increment)
    restored = world.folder / "restored"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", increment, restored)
    assert_same(restored.read_bytes(), world.model(export), "full and increment")
