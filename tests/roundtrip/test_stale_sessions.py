"""What a network has held back of a session that is over reaches nobody any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import Pair
from peers import Way, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(short_dir: Path) -> Pair:
    """In step, without guests."""
    return Pair(short_dir, 1)


def write(pair: Pair, offset: int, data: bytes) -> None:
    """By a client that comes and goes."""
    with pair.source.connect(pair.source.user_export(0)) as client:
        client.pwrite(offset, data)
    pair.contents[0].apply((offset, data))


def test_a_write_that_was_held_back_does_not_undo_a_later_one(pair: Pair) -> None:
    with pair:
        pair.source.begin()
        pair.wait_in_step()
        pair.network.cut_after(0, Way.TO_SERVER, None)  # silent: these connections, no others
        write(pair, 0, b"old" * 1000)
        pair.wait_links(lambda link: link["state"] == "connecting", "the link to give up")
        write(pair, 0, b"new" * 1000)
        pair.wait_in_step()
        pair.compare()
        pair.network.resume()
        wait_until(lambda: pair.network.connections == 2, "the old connections to end")
        pair.compare()
