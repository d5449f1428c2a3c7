"""Targets that keep no order: what was sent first may come last, or after its connection ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from foreign_support import GRANULE, IMPATIENT, SIZE, Foreign, nbdkit, qemu_nbd
from interop_support import KIB, MIB
from peers import wait_until
from peers.nbd_client import CMD_WRITE

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.mark.parametrize("length", [4 * KIB, 2 * MIB])
def test_what_is_about_to_be_written_is_taken_for_no_hole(short_dir: Path, length: int) -> None:
    """nbdkit tells at once what is a hole, and takes its time for a write: when that is asked, the
    write to what is zeroes here again must be over."""
    delays = ["delay-write=700ms", "delay-zero=0"]
    server = nbdkit(short_dir, "--filter=delay", "memory", str(SIZE), *delays, threads=16)
    with Foreign(short_dir, server) as world:
        world.client.write_zeroes(0, SIZE)
        world.content[:] = bytes(SIZE)
        world.begin()
        world.wait_proven()
        world.write_at(MIB, length)
        world.client.write_zeroes(MIB, length)
        world.content[MIB : MIB + length] = bytes(length)
        world.compare()


@pytest.mark.parametrize("sync", [False, True])
def test_a_target_stays_in_step_while_a_few_blocks_are_written_all_the_time(
    short_dir: Path, sync: bool
) -> None:
    """What has to wait for the write before it waits here, and is not copied later on."""
    server = nbdkit(short_dir, "--filter=delay", "memory", str(SIZE), "delay-write=3ms", threads=16)
    with Foreign(short_dir, server, sync=sync) as world:
        world.begin()
        copied = world.primary.link()["copied-bytes"]
        with world.primary.connect() as client:
            for _ in range(20):
                pending = set()
                for _ in range(48):
                    offset, data = MIB + 512 * world.rng.randrange(24), world.rng.randbytes(4 * KIB)
                    pending.add(client.send(CMD_WRITE, offset, len(data), data))
                    world.content[offset : offset + len(data)] = data
                client.finish(pending)
                link = world.primary.link()
                assert (link["state"], link["behind-bytes"]) == ("live", 0)
        world.compare()
        assert world.primary.link()["copied-bytes"] == copied


def test_a_write_of_a_lost_connection_does_not_win(short_dir: Path) -> None:
    """A server may go on with it when the connection has ended, and the next one has begun: that
    cannot be known, and so the place is copied once more later on."""
    disk, slow = short_dir / "target.raw", short_dir / "slow"
    disk.write_bytes(bytes(SIZE))
    move = f"dd of={disk} bs=1M seek=$4 oflag=seek_bytes conv=notrunc status=none"
    server = nbdkit(
        short_dir, "eval", "thread_model=echo parallel", f"get_size=echo {SIZE}",
        f"pread=dd if={disk} bs=1M skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none",
        f"pwrite=if [ -e {slow} ]; then sleep 1; fi; {move}",
        threads=16,
    )  # fmt: skip
    with Foreign(short_dir, server, program=IMPATIENT) as world:
        world.begin()
        world.wait_proven()
        slow.touch()
        before = world.proxy.passed.to_server
        for number in range(8):
            world.write_at(number * GRANULE)
        wait_until(lambda: world.proxy.passed.to_server - before > 8 * 4 * KIB, "it is sent")
        slow.unlink()
        world.proxy.reset()
        world.primary.wait_link("connecting")
        for number in range(8):
            world.write_at(number * GRANULE)
        world.compare_for_good()


def test_what_a_stalled_server_finds_in_its_socket_does_not_win(short_dir: Path) -> None:
    """It reads what an old connection has left there beside what a new one sends. (nbdkit 1.32 is
    no peer for it: it aborts when a connection is reset whose replies it has not sent, "Assertion
    `sock >= 0' failed".)"""
    server = qemu_nbd(short_dir, "raw", bytes(SIZE))
    with Foreign(short_dir, server, program=IMPATIENT) as world:
        world.begin()
        world.wait_proven()
        for _ in range(3):
            os.kill(server.process.pid, signal.SIGSTOP)
            for number in range(3000):
                world.write_at(number * 4096 % SIZE, 512)
            world.primary.wait_link("connecting")
            for number in range(3000):
                world.write_at(number * 4096 % SIZE, 512)
            os.kill(server.process.pid, signal.SIGCONT)
            world.compare_for_good()
