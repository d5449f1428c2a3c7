"""Extended headers against the real daemon, on a disk of nearly 16 TiB: requests of 64 bits, their
replies, payloads where none belong, and BLOCK_STATUS with a filter.

No client of Debian 12 speaks them (libnbd does since 1.18, QEMU since 8.2): RawClient does, and
holds the server to every rule for replies, the echoed offset and the type of status chunks among
them.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from interop_support import KIB, MIB, START, Standby
from libnbd_support import BASE, BLOCK, DEPTH, DIRTY, EXPORTS, NAME, TOP
from map_support import HIDDEN, HOLE, SECONDARY, SUBCLUSTER, Map
from peers import RawClient, ReplnbdDisk
from peers import nbd_wire as wire
from peers.nbd_answers import Answer, Asked
from peers.nbd_wire import Shape

pytestmark = [pytest.mark.interop, pytest.mark.slow]

GIB, TIB = 1 << 30, 1 << 40
SIZE = 16 * TIB - BLOCK
"""The longest file of ext4."""

CONTEXTS = (BASE, DEPTH, DIRTY)


@pytest.fixture(scope="module")
def standby() -> Iterator[Standby]:
    """Running, with nothing on its disk."""
    with tempfile.TemporaryDirectory(prefix="rnbd-") as name:
        disk = ReplnbdDisk.create(Path(name), NAME, TOP, b"")
        os.truncate(disk.secondary, SIZE)
        with Standby(Path(name), disk) as standby:
            standby.qmp.execute(*START)
            yield standby
            standby.quit()


@pytest.fixture
def client(standby: Standby, request: pytest.FixtureRequest) -> Iterator[RawClient]:
    """A client of the export that the test is about, after a checkpoint."""
    standby.qmp.execute("xen-colo-do-checkpoint")
    export = request.getfixturevalue("export")
    with RawClient(standby.nbd_socket).go(export, Shape.EXTENDED, *CONTEXTS) as client:
        yield client
        assert client.ask(wire.READ, SIZE - 10, 10).error == 0  # still in step
        client.finish()


def succeed(answer: Answer) -> Answer:
    """One that is no error."""
    assert (answer.error, answer.text) == (0, "")
    return answer


def status(
    client: RawClient, offset: int, length: int, flags: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """BLOCK_STATUS, by the names of contexts."""
    statuses = succeed(client.ask(wire.STATUS, offset, length, flags=flags)).statuses
    return {name: statuses[number] for name, number in client.contexts.items()}


def send(
    client: RawClient, command: int, offset: int, payload: bytes, *,
    flags: int = wire.PAYLOAD_LEN, length: int | None = None, effect: int = 0,
    contexts: Sequence[int] = (),
) -> Answer:  # fmt: skip
    """A request with a payload, wrong in any way. The answer is to be about `effect` bytes, in
    `contexts`."""
    header_length = len(payload) if length is None else length
    cookie = 0xC00C1E
    client.expect(cookie, Asked(command, offset, effect, flags, tuple(contexts)))
    header = wire.request(
        command, offset, header_length, cookie=cookie, flags=flags, shape=Shape.EXTENDED
    )
    client.send(header + payload)
    answer = client.answer()
    assert answer is not None
    return answer


def filter_of(length: int, *ids: int) -> bytes:
    """The payload: effect length and ids."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def map_of(client: RawClient, context: str, offset: int, length: int) -> Map:
    """One context of a range, asked for until all of it is there: an answer may fall short."""
    found: Map = []
    end, number = offset + length, client.contexts[context]
    while offset < end:
        wanted = filter_of(end - offset, number)
        answer = send(client, wire.STATUS, offset, wanted, effect=end - offset, contexts=[number])
        for count, state in succeed(answer).statuses[number]:
            if found and found[-1][1] == state:
                found[-1] = (found[-1][0] + count, state)
            else:
                found.append((count, state))
            offset += count
    return found


# Section: 64 bits

on_both = pytest.mark.parametrize("export", EXPORTS)


@on_both
def test_the_export_is_offered_with_a_filter_for_block_status(
    client: RawClient, export: str
) -> None:
    assert client.size == SIZE
    assert set(client.contexts) == set(CONTEXTS)
    offered = [bit for bit in range(16) if client.flags >> bit & 1]
    assert offered == [0, 2, 3, 5, 6, 7, 8, 10, 11, 12]  # 12: BLOCK_STATUS_PAYLOAD


@on_both
def test_one_block_status_describes_16_tib(client: RawClient, export: str) -> None:
    depth = 1 if export == NAME else SECONDARY
    clean = {BASE: [(SIZE, HOLE)], DEPTH: [(SIZE, depth)], DIRTY: [(SIZE, 0)]}
    assert status(client, 0, SIZE) == clean
    assert status(client, 0, SIZE, wire.REQ_ONE) == clean
    assert status(client, 9 * TIB + 1, 5 * TIB + 7)[DIRTY] == [(5 * TIB + 7, 0)]
    assert status(client, SIZE - 1, 1)[DEPTH] == [(1, depth)]


@on_both
def test_an_island_11_tib_out_is_found_from_0(client: RawClient, export: str) -> None:
    island = 11 * TIB
    succeed(client.ask(wire.WRITE, island, data=b"i" * BLOCK))
    if export == TOP:
        expected = {
            BASE: [(island, HOLE), (BLOCK, 0), (SIZE - island - BLOCK, HOLE)],
            DEPTH: [(island, SECONDARY), (BLOCK, 1), (SIZE - island - BLOCK, SECONDARY)],
        }
    else:
        expected = {
            BASE: [(island, HOLE), (BLOCK, 0), (SIZE - island - BLOCK, HOLE)],
            DEPTH: [(SIZE, 1)],
        }
    expected[DIRTY] = [(island, 0), (BLOCK, 1), (SIZE - island - BLOCK, 0)]
    assert status(client, 0, SIZE) == expected
    assert status(client, 0, SIZE, wire.REQ_ONE) == {
        name: extents[:1] for name, extents in expected.items()
    }
    succeed(client.ask(wire.TRIM, island, BLOCK))


@on_both
@pytest.mark.parametrize("command", [wire.TRIM, wire.ZEROES])
def test_one_request_makes_more_than_4_gib_zeroes(
    client: RawClient, standby: Standby, export: str, command: int
) -> None:
    start, length = 5 * TIB + 100, 5 * GIB + 5
    inside = [start, start + 3 * GIB + 3, start + 4 * GIB, start + length - 1000]
    outside = [start - 1000, start + length]
    for offset in [*inside, *outside]:
        succeed(client.ask(wire.WRITE, offset, data=b"d" * 1000))
    standby.qmp.execute("xen-colo-do-checkpoint")
    if export == TOP:
        # A checkpoint drops what the standby wrote.
        for offset in [*inside, *outside]:
            succeed(client.ask(wire.WRITE, offset, data=b"d" * 1000))
    succeed(client.ask(command, start, length, flags=wire.FUA))
    for offset in inside:
        assert client.ask(wire.READ, offset, 1000).data == bytes(1000)
    for offset in outside:
        assert client.ask(wire.READ, offset, 1000).data == b"d" * 1000
    around = -(-start // BLOCK) * BLOCK, (start + length) // BLOCK * BLOCK
    length = around[1] - around[0]
    assert map_of(client, BASE, around[0], length) == [(length, HOLE)]
    dirty = map_of(client, DIRTY, around[0], length)
    if export == TOP:
        assert dirty == [(length, 1)]
    else:
        # Old data was saved where there was some, and nowhere else.
        assert 0 < sum(count for count, state in dirty if state) <= len(inside) * 2 * BLOCK
        with RawClient(standby.nbd_socket).go(TOP, Shape.EXTENDED, DEPTH) as view:
            for offset in inside:
                assert view.ask(wire.READ, offset, 1000).data == b"d" * 1000
                (extent, *_) = status(view, offset, 1)[DEPTH]
                assert extent == (1, HIDDEN)
            view.finish()
    succeed(client.ask(wire.TRIM, around[0] - BLOCK, BLOCK))
    succeed(client.ask(wire.TRIM, around[1], BLOCK))


@on_both
def test_what_ends_past_64_bits_or_the_disk_is_refused(client: RawClient, export: str) -> None:
    for offset, length in [(0, SIZE + 1), (1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (SIZE, 1)]:
        for command, error in [
            (wire.TRIM, errno.EINVAL), (wire.ZEROES, errno.ENOSPC), (wire.CACHE, errno.EINVAL),
            (wire.STATUS, errno.EINVAL),
        ]:  # fmt: skip
            answer = client.ask(command, offset, length)
            assert answer.error == error, (command, offset, length)
            assert answer.text.endswith(f"at {offset} of {length} bytes ends past {SIZE}")
    for length in (32 * MIB + 1, 2**32, 2**63):
        answer = client.ask(wire.READ, 0, length)
        assert answer.error == errno.EINVAL
        assert answer.text == f"READ of {length} bytes, more than {32 * MIB}"


# Section: payloads


@on_both
def test_the_longest_write_and_read_of_one_request(client: RawClient, export: str) -> None:
    at = 13 * TIB + 4093
    data = os.urandom(MIB) + bytes(30 * MIB) + os.urandom(MIB)
    succeed(client.ask(wire.WRITE, at, data=data))
    answer = succeed(client.ask(wire.READ, at, 32 * MIB))
    assert answer.data == data
    assert answer.wire_bytes < 2 * MIB + 64 * KIB  # the zeroes between were holes
    whole = succeed(client.ask(wire.READ, at, 32 * MIB, flags=wire.DF))
    assert (whole.data, whole.chunks, whole.holes) == (data, 1, ())
    succeed(client.ask(wire.TRIM, 13 * TIB, 64 * MIB))


@on_both
def test_a_write_needs_payload_len_and_no_other_command_takes_it(
    client: RawClient, export: str
) -> None:
    before = client.ask(wire.READ, 0, 100).data
    # Without the flag there is no payload: the length would be an effect length.
    answer = send(client, wire.WRITE, 0, b"", flags=0, length=10)
    assert (answer.error, answer.text) == (errno.EINVAL, "WRITE without PAYLOAD_LEN")
    # "a server SHOULD gracefully consume length bytes of payload"
    for command, name in [
        (wire.READ, "READ"), (wire.TRIM, "TRIM"), (wire.CACHE, "CACHE"), (wire.FLUSH, "FLUSH"),
        (wire.ZEROES, "WRITE_ZEROES"),
    ]:  # fmt: skip
        for payload in (b"p", b"p" * 100, b"p" * 100_000, b"p" * MIB):
            answer = send(client, command, 0, payload)
            assert (answer.error, answer.text) == (errno.EINVAL, f"{name} with flags 0x20")
    answer = send(client, 99, 0, b"p" * 1000)
    assert (answer.error, answer.text) == (errno.EINVAL, "command 99 is not known here")
    assert client.ask(wire.READ, 0, 100).data == before


# Section: BLOCK_STATUS with a filter


@on_both
def test_a_filter_chooses_among_the_selected_contexts(client: RawClient, export: str) -> None:
    whole = succeed(client.ask(wire.STATUS, TIB, 10 * TIB)).statuses
    base, depth, dirty = (client.contexts[name] for name in CONTEXTS)
    for ids in [(base,), (depth,), (dirty,), (dirty, base), (dirty, depth, base)]:
        wanted = filter_of(10 * TIB, *ids)
        answer = send(client, wire.STATUS, TIB, wanted, effect=10 * TIB, contexts=ids)
        assert succeed(answer).statuses == {number: whole[number] for number in ids}
        one = send(
            client, wire.STATUS, TIB, wanted, effect=10 * TIB, contexts=ids,
            flags=wire.PAYLOAD_LEN | wire.REQ_ONE,
        )  # fmt: skip
        assert one.statuses == {number: whole[number][:1] for number in ids}


@on_both
def test_a_wrong_filter_is_einval_and_the_stream_stays_in_step(
    client: RawClient, export: str
) -> None:
    base, depth, dirty = (client.contexts[name] for name in CONTEXTS)
    unknown = max(client.contexts.values()) + 1
    for what, payload in {
        "no ids": filter_of(TIB),
        "not even a length": b"1234567",
        "an empty payload": b"",
        "half an id": filter_of(TIB, base) + b"xx",
        "the same id twice": filter_of(TIB, base, base),
        "an unknown id": filter_of(TIB, unknown),
        "an unknown id among known ones": filter_of(TIB, base, unknown),
        "id 0": filter_of(TIB, 0),
        "more ids than there are contexts": filter_of(TIB, base, depth, dirty, base),
        "a great many ids": filter_of(TIB, *range(10_000)),
        "a length of 0": filter_of(0, base),
        "a length past the end": filter_of(SIZE + 1, base),
        "a length of 64 bits": filter_of(2**64 - 1, base),
    }.items():
        answer = send(client, wire.STATUS, 0, payload, contexts=(base,))
        assert answer.error == errno.EINVAL, what
        assert answer.text.startswith("BLOCK_STATUS"), what
        assert succeed(client.ask(wire.STATUS, 0, SUBCLUSTER)).statuses


@on_both
def test_without_contexts_the_filter_is_not_offered_and_not_taken(
    standby: Standby, export: str
) -> None:
    with RawClient(standby.nbd_socket).go(export, Shape.EXTENDED) as client:
        assert not client.flags >> 12 & 1
        answer = send(client, wire.STATUS, 0, filter_of(TIB, 1))
        assert answer.error == errno.EINVAL
        assert client.ask(wire.STATUS, 0, TIB).error == errno.EINVAL
        assert succeed(client.ask(wire.READ, 0, 512)).data == bytes(512)
        client.finish()


# Section: what was negotiated


def test_structured_reply_after_extended_headers_is_refused_and_they_stay(
    standby: Standby,
) -> None:
    with RawClient(standby.nbd_socket) as client:
        client.send(wire.FIXED_NO_ZEROES)
        client.option(wire.STRUCTURED_REPLY)
        client.option(wire.EXTENDED_HEADERS)  # takes precedence over it
        client.send(wire.option(wire.STRUCTURED_REPLY))
        (refused,) = wire.read_option_replies(client, wire.STRUCTURED_REPLY)
        assert refused.kind == wire.ERR_EXT_HEADER_REQD
        client.option(wire.GO, wire.choose(0, TOP)[16:])
        client.transmit(Shape.EXTENDED)
        assert succeed(client.ask(wire.READ, 15 * TIB, 100)).data == bytes(100)
        client.finish()
