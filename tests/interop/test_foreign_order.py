"""Targets that keep no order: what was sent first may come last, or after its connection ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_support import GRANULE, SIZE, Foreign, nbdkit
from interop_support import KIB, MIB
from peers import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.mark.parametrize("length", [4 * KIB, 2 * MIB])
def test_what_is_about_to_be_written_is_taken_for_no_hole(short_dir: Path, length: int) -> None:
    """nbdkit tells at once what is a hole, and takes its time for a write: when that is asked, the
    write to what is zeroes here again must be over."""
    server = nbdkit(
        short_dir, "--filter=delay", "memory", str(SIZE), "delay-write=700ms", "delay-zero=0"
    )
    with Foreign(short_dir, server) as world:
        world.client.write_zeroes(0, SIZE)
        world.content[:] = bytes(SIZE)
        world.begin()
        world.wait_proven()
        world.write_at(MIB, length)
        world.client.write_zeroes(MIB, length)
        world.content[MIB : MIB + length] = bytes(length)
        world.compare()


def test_a_write_of_a_lost_connection_does_not_win(short_dir: Path) -> None:
    """The server goes on with it after the connection has ended, and after the next has begun."""
    server = nbdkit(short_dir, "--filter=delay", "memory", str(SIZE), "delay-write=1500ms")
    with Foreign(short_dir, server) as world:
        world.begin()
        world.wait_proven()
        before = world.proxy.passed.to_server
        for number in range(8):
            world.write_at(number * GRANULE)
        wait_until(lambda: world.proxy.passed.to_server - before > 8 * 4 * KIB, "it is sent")
        world.proxy.reset()
        for number in range(8):
            world.write_at(number * GRANULE)
        world.compare()
