"""Inbox, Outbox and Pool: no byte is overwritten that somebody still uses."""

from __future__ import annotations

import asyncio
import random
from typing import cast

from replnbd.server.slabs import (
    EXPECTED_BYTES,
    INBOX_BYTES,
    OUTBOX_BYTES,
    POOL_BYTES_MAX,
    START_BYTES,
    TAIL_BYTES,
    Inbox,
    Outbox,
    Pool,
    Slab,
)


class MemoryTransport:
    """Keeps what is written as slices, as a busy transport does, until `drain`."""

    def __init__(self) -> None:
        self.pending: list[memoryview] = []
        self.sent = bytearray()

    def write(self, data: memoryview) -> None:
        self.pending.append(data)

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.pending))

    def drain(self) -> None:
        for data in self.pending:
            self.sent += data
        self.pending.clear()


def fill(inbox: Inbox, data: bytes) -> int:
    """Receive as much of `data` as there is room for."""
    room = inbox.get_buffer()
    assert len(room) > 0
    count = min(len(room), len(data))
    room[:count] = data[:count]
    inbox.received(count)
    return count


def unparsed(inbox: Inbox) -> bytes:
    return bytes(inbox.slab.view[inbox.start : inbox.end])


def test_an_inbox_keeps_every_byte_that_is_not_parsed_whatever_is_lent() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    inbox = Inbox(Pool())
    stream = rng.randbytes(3_000_000)
    fed = parsed = 0
    lent: list[tuple[Slab, memoryview, bytes]] = []
    while parsed < len(stream):
        if inbox.end - inbox.start < INBOX_BYTES:  # if not, reading stops until something is parsed
            inbox.settle()
            fed += fill(inbox, stream[fed : fed + rng.choice([1, 28, 4096, 300_000])])
        while inbox.end > inbox.start and rng.random() < 0.9:
            count = min(rng.choice([1, 28, 5000, 100_000]), inbox.end - inbox.start)
            piece = inbox.slab.view[inbox.start : inbox.start + count]
            expected = stream[parsed : parsed + count]
            assert piece == expected
            if rng.random() < 0.2:  # an operation suspends, and uses it on
                inbox.slab.users += 1
                lent.append((inbox.slab, piece, expected))
            inbox.start += count
            parsed += count
        while lent and rng.random() < 0.3:
            slab, piece, expected = lent.pop(rng.randrange(len(lent)))
            assert piece == expected
            slab.users -= 1
    for _, piece, expected in lent:
        assert piece == expected


def test_an_inbox_starts_small_and_grows_when_it_was_filled() -> None:
    inbox = Inbox(Pool())
    assert len(inbox.get_buffer()) == START_BYTES
    fill(inbox, bytes(START_BYTES - 1))
    inbox.settle()
    assert len(inbox.get_buffer()) == 1
    fill(inbox, b"x")
    inbox.settle()
    assert len(inbox.get_buffer()) == INBOX_BYTES - START_BYTES
    assert unparsed(inbox) == bytes(START_BYTES - 1) + b"x"


def test_an_expected_payload_lands_in_place_and_the_next_bytes_behind_it() -> None:
    pool = Pool()
    inbox = Inbox(pool)
    fill(inbox, b"header" + b"pay")
    inbox.start = 6
    inbox.expect(100_000)
    assert inbox.take_payload() is None
    rest = bytes(range(256)) * 400
    while (complete := inbox.take_payload()) is None:
        rest = rest[fill(inbox, rest[:99_997]) :]
    payload, slab = complete
    assert payload == (b"pay" + bytes(range(256)) * 400)[:100_000]
    assert slab.pooled
    inbox.settle()
    fill(inbox, b"next")
    assert unparsed(inbox) == b"next"


def test_a_payload_s_buffer_grows_with_the_bytes_that_have_come() -> None:
    inbox = Inbox(Pool())
    content = random.Random(1).randbytes(32 << 20)
    fill(inbox, content[:10])
    inbox.expect(len(content))
    filled = 10
    while (complete := inbox.take_payload()) is None:
        room = len(inbox.get_buffer())
        assert filled + room <= max(EXPECTED_BYTES, 8 * filled)
        filled += fill(inbox, content[filled : filled + 300_000])
    assert complete[0] == content


def test_skipped_bytes_are_dropped_however_they_arrive() -> None:
    inbox = Inbox(Pool())
    fill(inbox, b"abcdef")
    inbox.skip(10)
    inbox.settle()
    for piece in (b"gh", b"i", b"jKL"):
        fill(inbox, piece)
    assert unparsed(inbox) == b"KL"


def test_an_outbox_never_changes_what_the_transport_has_not_sent() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    transport = MemoryTransport()
    outbox = Outbox(cast(asyncio.Transport, transport), Pool())
    expected = bytearray()
    lent: list[tuple[Slab, memoryview, bytes]] = []
    for _ in range(300):
        outbox.begin()
        for _ in range(rng.randrange(40)):
            reply = rng.randbytes(rng.choice([16, 4112, 16 + 65536]))
            if outbox.at + len(reply) > outbox.limit:
                outbox.turn()
            assert outbox.at + len(reply) <= outbox.limit
            slab, at = outbox.slab, outbox.at
            slab.view[at : at + len(reply)] = reply
            if rng.random() < 0.1:
                lent.append((slab, slab.view[at : at + len(reply)], reply))
                outbox.lend(at + len(reply))
                slab.users += 1
            else:
                outbox.at += len(reply)
                expected += reply
        outbox.flush()
        if rng.random() < 0.3:
            transport.drain()
        if lent and rng.random() < 0.5:
            slab, place, reply = lent.pop()
            slab.users -= 1
            outbox.send(place, slab)
            expected += reply
    transport.drain()
    assert transport.sent == expected
    for _, place, reply in lent:
        assert place == reply
    assert outbox.limit == OUTBOX_BYTES


def test_a_reply_s_slab_is_not_used_again_before_the_reply_was_sent() -> None:
    transport, pool = MemoryTransport(), Pool()
    outbox = Outbox(cast(asyncio.Transport, transport), pool)
    slab = pool.take(1 << 20)
    outbox.send(slab.view[: 1 << 20], slab)
    outbox.begin()
    assert pool.take(1 << 20) is not slab
    transport.drain()
    outbox.begin()
    assert pool.take(1 << 20) is slab


def test_slabs_go_back_as_their_replies_are_sent_while_others_wait() -> None:
    transport, pool = MemoryTransport(), Pool()
    outbox = Outbox(cast(asyncio.Transport, transport), pool)
    slabs = [pool.take(1 << 20) for _ in range(3)]
    for slab in slabs:
        outbox.send(slab.view[: 1 << 20], slab)
        outbox.put(b"a short one")
    outbox.flush()
    transport.sent += transport.pending.pop(0)
    transport.pending[0] = transport.pending[0][5:]
    outbox.begin()
    assert pool.take(1 << 20) is slabs[0]
    assert pool.take(1 << 20) not in slabs


def test_a_reply_of_holes_does_not_keep_what_it_was_read_into() -> None:
    transport, pool = MemoryTransport(), Pool()
    outbox = Outbox(cast(asyncio.Transport, transport), pool)
    slab = pool.take(1 << 20)
    slab.view[:5] = b"holes"
    outbox.send(slab.view[:5], slab)
    assert pool.take(1 << 20) is slab
    slab.view[:5] = b"other"
    transport.drain()
    assert transport.sent == b"holes"


def test_a_pool_gives_slabs_that_are_large_enough_and_wastes_little() -> None:
    pool = Pool()
    assert len(pool.take((32 << 20) + 44).buffer) == len(pool.take(32 << 20).buffer)
    for size in [1, 16, 4112, 32_769, 65_553, (1 << 20) + 16, (32 << 20) + 16]:
        assert size <= len(pool.take(size).buffer) <= size + max(size // 4, 16384) + 4096


def test_a_pool_keeps_what_fits_beside_what_is_in_use() -> None:
    pool = Pool()
    old = [pool.take(8 << 20) for _ in range(5)]
    assert 40 << 20 < pool.bytes < POOL_BYTES_MAX
    while old:
        pool.give(old.pop())
    large = pool.take(32 << 20)
    assert pool.bytes == len(large.buffer)
    pool.give(large)
    assert pool.take(32 << 20) is large


def test_a_pool_keeps_nothing_while_more_than_its_limit_is_in_use() -> None:
    pool = Pool()
    used = [pool.take(32 << 20), pool.take(32 << 20)]
    size = len(used[0].buffer)
    pool.give(pool.take(1 << 20))
    assert pool.bytes == 2 * size
    pool.give(used.pop())
    assert pool.bytes == size
    pool.give(used.pop())
    assert pool.bytes == size


def test_a_slab_that_never_comes_back_is_not_in_a_pool_s_way() -> None:
    """Of a client that is gone, for one."""
    pool = Pool()
    for _ in range(3):
        pool.take(40 << 20)
    assert pool.bytes == 0


def test_a_payload_of_32_mib_finds_the_buffers_of_the_last_one() -> None:
    pool = Pool()
    inbox = Inbox(pool)
    seen = []
    for _ in range(2):
        inbox.expect(32 << 20)
        while (complete := inbox.take_payload()) is None:
            inbox.received(len(inbox.get_buffer()))
        seen.append(complete[1])
        pool.give(complete[1])
    assert seen[0] is seen[1]


def test_who_has_taken_a_large_reply_but_for_its_end_holds_its_slab_no_longer() -> None:
    transport, pool = MemoryTransport(), Pool()
    outbox = Outbox(cast(asyncio.Transport, transport), pool)
    slab = pool.take(8 << 20)
    reply = random.randbytes(8 << 20)
    slab.view[: len(reply)] = reply
    outbox.send(slab.view[: len(reply)], slab)
    assert transport.get_write_buffer_size() == len(reply)
    transport.sent += transport.pending.pop(0)
    assert transport.get_write_buffer_size() == TAIL_BYTES
    outbox.begin()
    assert pool.take(8 << 20) is slab
    slab.view[:] = bytes(len(slab.buffer))
    transport.drain()
    assert transport.sent == reply
