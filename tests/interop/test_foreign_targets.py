"""replnbd as the primary of any NBD server: QEMU's and nbdkit's, with all that these can lack.

They keep no account and no order; whatever happens to the way there, both disks are equal in the
end, and the primary's client sees nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from foreign_support import GRANULE, HEALTHY, IMPATIENT, SIZE, Foreign, Server, nbdkit, qemu_nbd
from interop_support import KIB

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def file_of(folder: Path) -> Path:
    """An empty file of the disk's size."""
    path = folder / "target.raw"
    path.touch()
    os.truncate(path, SIZE)
    return path


def throttled(folder: Path, *, requests_per_s: int) -> Server:
    """QEMU's, with a limit: it is always behind, also with what connections that have ended sent.
    (nbdkit's delay filter may abort nbdkit, 1.32.5, when a client leaves amid a delay.)"""
    argv = ["qemu-storage-daemon"]
    argv += ["--object", f"throttle-group,id=limit,x-iops-total={requests_per_s}"]
    argv += ["--blockdev", f"file,node-name=file,filename={file_of(folder)},discard=unmap"]
    argv += ["--blockdev", "throttle,node-name=slow,throttle-group=limit,file=file"]
    argv += ["--nbd-server", "addr.type=unix,addr.path=SOCKET,max-connections=8"]
    argv += ["--export", "nbd,id=colo0,node-name=slow,name=colo0,writable=on"]
    return Server(folder, *argv)


def memory(*filters: str) -> Callable[[Path], Server]:
    """nbdkit's memory behind filters; what has a = is a parameter."""
    words = [f"--filter={word}" for word in filters if "=" not in word]
    parameters = [word for word in filters if "=" in word]
    return lambda folder: nbdkit(folder, *words, "memory", str(SIZE), *parameters)


POLICY = "blocksize-error-policy=error"

TARGETS: dict[str, Callable[[Path], Server]] = {
    "qemu-nbd-raw": lambda folder: qemu_nbd(folder, "raw", bytes(SIZE)),
    "qemu-nbd-qcow2": lambda folder: qemu_nbd(folder, "qcow2", bytes(SIZE)),
    "memory": memory(),
    "file": lambda folder: nbdkit(folder, "file", file_of(folder)),
    "throttled": lambda folder: throttled(folder, requests_per_s=1500),
    "blocks-of-512": memory("blocksize-policy", "blocksize-minimum=512", POLICY),
    "blocks-of-4096": memory("blocksize-policy", "blocksize-minimum=4096", POLICY),
    "requests-of-64k": memory("blocksize-policy", "blocksize-maximum=64K", POLICY),
    "requests-of-20k": memory(
        "blocksize-policy", "blocksize-minimum=4096", "blocksize-maximum=20K", POLICY
    ),
    "no-extents": memory("noextents"),
    "no-zeroes": memory("nozero"),
    "zeroes-by-trim-only": memory("nozero", "zeromode=notrim"),
    "no-fua": memory("fua"),
    "fua-ignored": memory("fua", "fuamode=discard"),
    "nothing-but-writes": memory("nozero", "noextents", "nocache", "cachemode=none", "fua"),
}


@pytest.fixture(params=TARGETS)
def any_target(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Foreign]:
    """Each of them."""
    with Foreign(short_dir, TARGETS[request.param], program=IMPATIENT) as world:
        yield world


def test_a_target_is_copied_to_followed_and_found_again(any_target: Foreign) -> None:
    world = any_target
    world.begin()
    for cut in (world.proxy.drop, world.proxy.reset):
        load = world.load()
        load.wait_batches(3)
        cut()
        load.wait_batches(3)
        load.stop()
        world.compare()
    world.compare_for_good()
    world.wait_proven()
    with world.proxy.refusing():
        world.proxy.drop()
        touched = world.write(2)
        world.compare_local()
        before = world.proxy.passed.to_server
    world.compare()
    sent = world.proxy.passed.to_server - before
    assert sent <= 1.1 * len(touched) * GRANULE + 64 * KIB
    assert world.primary.replication() == HEALTHY
    world.primary.quit()
