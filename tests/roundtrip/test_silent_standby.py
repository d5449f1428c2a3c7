"""A standby that says nothing any more, until it is given up: nobody is told that all is well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def silent_until_given_up(pair: Pair) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What status says of the link while the standby is silent, and then."""
    live: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []

    def given_up() -> bool:
        link = pair.source.link()
        (last if link["state"] == "connecting" else live).append(link)
        return bool(last)

    pair.network.silence()
    write(pair, b"lost" * 1000)
    wait_until(given_up, "the end of patience")
    pair.heal()
    pair.compare()
    return live, last[0]


def test_status_says_how_long_it_has_been_silent_and_what_it_lacks(pair: Pair) -> None:
    for _ in range(5):  # a machine that stands still for a second may miss what comes between
        live, last = silent_until_given_up(pair)
        assert "the server has not answered for 1.2 s" in last["reason"]
        assert last["behind-bytes"] >= 4000
        assert {link["state"] for link in live} <= {"live"}
        reasons = [link["reason"] for link in live]
        if live and live[0]["queued-bytes"] >= 4000 and reasons[0] is None and any(reasons):
            assert all("the server has not answered for 0" in each for each in reasons if each)
            return
    pytest.fail("nothing was said of the silence")


@pytest.mark.parametrize("round_", range(4))
def test_a_checkpoint_that_its_end_cuts_short_does_not_say_that_all_has_arrived(
    pair: Pair, round_: int
) -> None:
    write(pair, b"here" * 1000)
    there = Done(0, "a0: running, all has arrived\n", "")
    wait_until(lambda: checkpoint(pair.source) == there, "a checkpoint")
    pair.network.silence()
    write(pair, b"lost" * 1000)
    done = checkpoint(pair.source)
    assert done.status == 1, done.stdout
    assert done.stdout == "a0: running, not at the standby (connecting)\n"
    assert "what was written is not at the standby: 'a0': connecting" in done.stderr
    pair.heal()
    pair.compare()
