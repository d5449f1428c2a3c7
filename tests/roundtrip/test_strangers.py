"""Others than its source at a standby's disk: nobody would know of what they write to it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_model import check_equal
from pair import Pair
from peers import NbdClient, NbdReplyError, wait_until
from peers.nbd_client import CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES

pytestmark = pytest.mark.slow
SIZE = 2 << 20
READ_ONLY = 1 << 1
WRITERS = 1 << 5 | 1 << 6 | 1 << 11
"""SEND_TRIM, SEND_WRITE_ZEROES, SEND_FAST_ZERO."""


@pytest.fixture
def pair(short_dir: Path) -> Iterator[Pair]:
    """Two that have never met."""
    with Pair(short_dir, 5, size=SIZE) as pair:
        yield pair
        pair.check_logs()


def check_reader(pair: Pair) -> None:
    """Who comes now may read, and is told that it may do nothing else."""
    with pair.target.connect("b0") as reader:
        assert reader.flags & READ_ONLY
        assert not reader.flags & WRITERS
        for command in (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES):
            data = b"x" * 512 if command == CMD_WRITE else None
            with pytest.raises(NbdReplyError) as refused:
                reader.finish({reader.send(command, 0, 512, data)})
            assert refused.value.errno == errno.EPERM
        check_equal(reader.pread(0, SIZE), pair.contents[0].data, "the standby's disk")


def check_writer(client: NbdClient) -> None:
    """It may write."""
    assert not client.flags & READ_ONLY
    client.pwrite(0, b"by hand")
    assert client.pread(0, 7) == b"by hand"


def gone(client: NbdClient) -> bool:
    try:
        client.pread(0, 1)
    except OSError:
        return True
    return False


def test_a_copy_is_written_by_its_source_alone(pair: Pair) -> None:
    with pair.target.connect("b0") as stranger, pair.target.connect("b0-top") as view:
        check_writer(stranger)
        pair.source.begin()
        pair.wait_in_step()
        wait_until(lambda: gone(stranger), "the stranger to be sent away")
        pair.begin()
        check_reader(pair)
        view.pwrite(0, b"its own")  # the view is the standby's
        pair.views[0].apply((0, b"its own"))
        pair.compare()
    pair.network.refuse()
    pair.network.reset()
    check_reader(pair)  # with no source there, too
    pair.target.kill()
    pair.target.start()
    check_reader(pair)
    pair.network.admit()
    pair.compare()


def test_a_copy_that_forgets_whose_it_is_can_be_written_by_anybody(pair: Pair) -> None:
    pair.source.begin()
    pair.wait_in_step()
    pair.source.quit()
    pair.target.qmp.execute("x-replnbd-reset", {"force": True})
    with pair.target.connect("b0") as client:
        check_writer(client)
