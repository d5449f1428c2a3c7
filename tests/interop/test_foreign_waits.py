"""How long a client of the primary waits for a target that is no replnbd: with sync = true until it
has a write, or is given up; else never, whatever that costs in memory."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from foreign_support import FAILED, IMPATIENT, SIZE, Foreign, nbdkit, qemu_nbd
from interop_support import KIB, MIB
from peers import CuttingProxy, NbdClient, ReplnbdPrimary, Way
from peers.nbd_client import CMD_WRITE, CMD_WRITE_ZEROES

pytestmark = [pytest.mark.interop, pytest.mark.slow]


class Pending:
    """A write that was sent, and may not have been answered."""

    def __init__(self, world: Foreign, offset: int, length: int = 512) -> None:
        self.offset = offset
        self.data = world.rng.randbytes(length)
        world.content[offset : offset + length] = self.data
        self.client = world.primary.connect()
        self.cookies = self.client.send_writes([(offset, self.data)])

    def answered(self, within_s: float) -> bool:
        """Whether the answer comes in time."""
        self.client.set_timeout(within_s)
        try:
            self.client.finish(self.cookies)
        except TimeoutError:
            return False
        self.client.close()
        return True


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
def test_with_sync_a_write_is_acknowledged_when_the_target_has_it(
    short_dir: Path, kind: str
) -> None:
    server = (
        qemu_nbd(short_dir, "raw", bytes(SIZE))
        if kind == "qemu-nbd"
        else nbdkit(short_dir, "--filter=delay", "memory", str(SIZE), "delay-write=5ms")
    )
    with Foreign(short_dir, server, sync=True) as world:
        world.begin()
        with NbdClient(server.socket, server.export) as target:
            for number in range(100):
                # Next to each other, in one block of 4 KiB, and unaligned.
                pending = [Pending(world, 512 * (7 * number + i) + 3, 100) for i in range(4)]
                for each in pending:
                    assert each.answered(10)
                    got = target.pread(each.offset, len(each.data))
                    assert got == each.data, f"write {number} is not there"
        world.compare()


def test_with_sync_a_write_waits_for_a_silent_target_until_that_is_given_up(
    short_dir: Path,
) -> None:
    server = nbdkit(short_dir, "memory", str(SIZE))
    with Foreign(short_dir, server, sync=True, program=IMPATIENT) as world:
        world.begin()
        world.proxy.silence(Way.TO_CLIENT)
        pending = [Pending(world, MIB), Pending(world, MIB + 512), Pending(world, 3 * MIB)]
        began = time.monotonic()
        assert not pending[0].answered(1)
        assert all(each.answered(10) for each in pending)
        assert 1.5 < time.monotonic() - began < 6
        assert world.primary.replication() == FAILED
        world.write(1)
        assert time.monotonic() - began < 8
        world.proxy.resume()
        world.compare_for_good()


def test_with_sync_a_write_is_acknowledged_at_once_when_the_connection_ends(
    short_dir: Path,
) -> None:
    with Foreign(short_dir, nbdkit(short_dir, "memory", str(SIZE)), sync=True) as world:
        world.begin()
        world.proxy.silence(Way.TO_SERVER)
        pending = [Pending(world, MIB), Pending(world, MIB + 512)]
        assert not pending[0].answered(0.5)
        world.proxy.reset()
        assert all(each.answered(2) for each in pending)
        world.proxy.resume()
        world.compare()


# Section: a target that hangs, and a client in a hurry

DISK = 1 << 30


class Hurry(NamedTuple):
    """Requests of one kind, side by side in the first `area` bytes; `grown_max`: what the primary
    may grow by meanwhile."""

    command: int
    length: int
    area: int
    requests: int
    grown_max: int

    def run(self, client: NbdClient, count: int) -> float:
        """How many a second are answered, 32 at a time."""
        stride = max(4 * KIB, self.length)
        payload = b"\x5a" * self.length if self.command == CMD_WRITE else None
        began = time.monotonic()
        for first in range(0, count, 32):
            places = (number * stride % self.area for number in range(first, first + 32))
            client.finish({client.send(self.command, at, self.length, payload) for at in places})
        return count / (time.monotonic() - began)


HURRIES = {
    "4k": Hurry(CMD_WRITE, 4 * KIB, 64 * MIB, 30_000, 40 * MIB),
    "1m": Hurry(CMD_WRITE, MIB, 64 * MIB, 192, 40 * MIB),
    "1-byte": Hurry(CMD_WRITE, 1, DISK, 60_000, 20 * MIB),
    "zeroes": Hurry(CMD_WRITE_ZEROES, 512, DISK, 60_000, 20 * MIB),
}


@pytest.mark.parametrize("kind", HURRIES)
def test_a_target_that_hangs_costs_a_client_in_a_hurry_no_time_and_little_memory(
    short_dir: Path, kind: str
) -> None:
    hurry = HURRIES[kind]
    local = short_dir / "vm0.raw"
    local.touch()
    os.truncate(local, DISK)
    server = nbdkit(short_dir, "memory", str(DISK))
    with (
        CuttingProxy(("127.0.0.1", 0), server.socket) as proxy,
        ReplnbdPrimary(short_dir, local, proxy.uri("colo0")) as primary,
        primary.connect() as client,
    ):
        primary.start()
        primary.wait_in_step()
        well = hurry.run(client, hurry.requests // 4)
        primary.wait_in_step()
        before = primary.process.resident_bytes
        primary.process.reset_peak()
        proxy.silence()
        hung = hurry.run(client, hurry.requests)
        grown = primary.process.peak_bytes - before
        print(f"{kind}: {well:.0f}/s, with a hanging target {hung:.0f}/s, {grown >> 10} KiB")
        assert primary.link()["queued-bytes"]
        assert hung > 0.4 * well
        assert grown < hurry.grown_max
    server.close()
