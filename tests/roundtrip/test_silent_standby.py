"""A standby that says nothing any more, until it is given up: nobody is told that all is well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host
from pair import Pair
from peers import Done, run_replnbd, wait_until

pytestmark = pytest.mark.slow
SIZE = 2 << 20
PLACE = 70_000


@pytest.fixture
def pair(short_dir: Path) -> Iterator[Pair]:
    """In step, and started."""
    with Pair(short_dir, 11, size=SIZE) as pair:
        pair.source.begin()
        pair.begin()
        yield pair
        pair.check_logs()


def checkpoint(host: Host) -> Done:
    """As an operator says it."""
    return run_replnbd("checkpoint", "--control", host.control)


def write(pair: Pair, data: bytes) -> None:
    with pair.source.connect("a0") as client:
        client.pwrite(PLACE, data)
    pair.contents[0].apply((PLACE, data))


def test_status_says_how_long_it_has_been_silent_and_what_it_lacks(pair: Pair) -> None:
    pair.network.silence()
    write(pair, b"lost" * 1000)
    link = pair.source.link()
    assert link["state"] == "live"
    assert link["queued-bytes"] >= 4000
    wait_until(lambda: pair.source.link()["reason"] is not None, "a reason")
    assert "the server has not answered for 0" in pair.source.link()["reason"]
    wait_until(lambda: pair.source.link()["state"] == "connecting", "the end of patience")
    assert "the server has not answered for 1.2 s" in pair.source.link()["reason"]
    assert pair.source.link()["behind-bytes"] >= 4000
    pair.heal()
    pair.compare()


@pytest.mark.parametrize("round_", range(4))
def test_a_checkpoint_that_its_end_cuts_short_does_not_say_that_all_has_arrived(
    pair: Pair, round_: int
) -> None:
    write(pair, b"here" * 1000)
    done = checkpoint(pair.source)
    assert (done.status, done.stdout) == (0, "a0: running, all has arrived\n"), done.stderr
    pair.network.silence()
    write(pair, b"lost" * 1000)
    done = checkpoint(pair.source)
    assert done.status == 1, done.stdout
    assert done.stdout == "a0: running, not at the standby (connecting)\n"
    assert "what was written is not at the standby: 'a0': connecting" in done.stderr
    pair.heal()
    pair.compare()
