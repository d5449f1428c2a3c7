"""BusyPoll: what it finds, when it looks, and that it leaves the end of a connection alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from replnbd.server import polling
from replnbd.server.limits import POLL_BATCH_MAX, POLL_SKIPS_MAX
from replnbd.server.polling import BusyPoll


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def place() -> memoryview:
    return memoryview(bytearray(64))


def test_what_has_come_is_found(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    poll = BusyPoll(ours.fileno())
    poll.begin()
    poll.begin()
    theirs.sendall(b"next")
    buffer = place()
    assert poll.receive(buffer, 1) == 4
    assert bytes(buffer[:4]) == b"next"
    assert poll.receive(buffer, 1) == 0


def test_only_who_has_had_the_loop_twice_in_a_row_polls(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    poll, other = BusyPoll(ours.fileno()), BusyPoll(ours.fileno())
    theirs.sendall(b"next")
    poll.begin()
    assert poll.receive(place(), 1) == 0
    other.begin()
    poll.begin()
    assert poll.receive(place(), 1) == 0
    poll.begin()
    assert poll.receive(place(), POLL_BATCH_MAX + 1) == 0
    assert poll.receive(place(), POLL_BATCH_MAX) == 4


def test_it_looks_the_less_the_more_often_nothing_came(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair

    class Clock:
        """Each reading is 20 µs later: two looks last longer than POLL_S."""

        now = 0.0

        def __call__(self) -> float:
            self.now += 20e-6
            return self.now

    monkeypatch.setattr(polling, "perf_counter", Clock())
    poll = BusyPoll(ours.fileno())
    poll.begin()
    gaps, gap = [], 0
    for _ in range(1000):
        poll.begin()
        before = poll._penalty
        assert poll.receive(place(), 1) == 0
        if poll._penalty != before or poll._skips == POLL_SKIPS_MAX:
            gaps.append(gap)
            gap = 0
        else:
            gap += 1
    assert gaps[:7] == [0, 1, 3, 7, 15, 31, 63]
    assert set(gaps[7:]) == {POLL_SKIPS_MAX}
    # What comes while it does not look is the loop's; the next look finds what there is.
    theirs.sendall(b"next")
    while not poll.receive(place(), 1):
        poll.begin()
    assert poll._penalty == 0


def test_the_end_is_left_for_the_transport(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    poll = BusyPoll(ours.fileno())
    poll.begin()
    poll.begin()
    theirs.close()
    assert poll.receive(place(), 1) == 0
    assert ours.recv(1) == b""


def test_without_a_descriptor_nothing_is_read() -> None:
    poll = BusyPoll(-1)
    poll.begin()
    poll.begin()
    assert poll.receive(place(), 1) == 0


async def test_a_turn_of_the_loop_ends(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setattr(polling, "POLL_TURN_S", 0.0)
    poll = BusyPoll(ours.fileno())
    poll.begin()
    poll.begin()
    theirs.sendall(b"next")
    await asyncio.sleep(0)
    assert poll.receive(place(), 1) == 0
