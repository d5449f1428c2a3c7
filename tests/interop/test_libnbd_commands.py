"""libnbd's commands and flags, with simple and with structured replies, on both exports: every byte
is what a model says, every chunk what the protocol says."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest
from interop_support import KIB, assert_same
from libnbd_support import BLOCK, EXPORTS, REPLIES, SIZE, Served
from peers import Libnbd, ReadChunk
from peers.libnbd import Command
from peers.nbd_wire import DF, FAST_ZERO, FUA, NO_HOLE

pytestmark = [pytest.mark.interop, pytest.mark.slow]

on_both = pytest.mark.parametrize("export", EXPORTS)
in_both = pytest.mark.parametrize("replies", REPLIES)


def some_range(served: Served, *, length_max: int = 200 * KIB) -> tuple[int, int]:
    """(offset, length), not aligned to anything."""
    offset = served.rng.randrange(SIZE)
    return offset, min(served.rng.randint(1, length_max), SIZE - offset)


# Section: READ


def assert_covered_once(chunks: list[ReadChunk], offset: int, length: int) -> None:
    """The chunks tell of every byte of the range exactly once."""
    position = offset
    for chunk in sorted(chunks):
        assert chunk.offset == position
        position += chunk.length
    assert position == offset + length


@on_both
@in_both
def test_read_returns_every_byte_at_any_offset_and_length(
    served: Served, export: str, replies: str
) -> None:
    model = served.model(export)
    with served.connect(export, replies) as client:
        assert_same(client.pread(SIZE, 0), model, "all of it")
        assert client.pread(1, SIZE - 1) == model[-1:]
        for _ in range(100):
            offset, length = some_range(served)
            assert_same(client.pread(length, offset), model[offset : offset + length], "a range")


@on_both
def test_structured_read_sends_zeroes_as_holes_and_the_rest_as_data(
    served: Served, export: str
) -> None:
    model = served.model(export)
    with served.connect(export) as client:
        for _ in range(100):
            offset, length = some_range(served)
            data, chunks = client.read_chunks(length, offset)
            assert_same(data, model[offset : offset + length], "a range")
            assert_covered_once(chunks, offset, length)
            for chunk in chunks:
                end = chunk.offset + chunk.length
                if chunk.kind == "hole":
                    assert not any(model[chunk.offset : end]), chunk
                    continue
                assert chunk.kind == "data"
                # No whole block of zeroes is sent.
                for start in range(chunk.offset + -chunk.offset % BLOCK, end - BLOCK + 1, BLOCK):
                    assert any(model[start : start + BLOCK]), (chunk, start)
            # "A server SHOULD try to minimize the number of chunks": kinds take turns.
            kinds = [chunk.kind for chunk in chunks]
            assert all(one != other for one, other in itertools.pairwise(kinds)), chunks


@on_both
def test_df_gets_one_chunk_and_the_same_bytes(served: Served, export: str) -> None:
    model = served.model(export)
    model[: 2 * BLOCK] = bytes(BLOCK) + b"d" * BLOCK
    with served.connect(export) as client:
        client.pwrite(bytes(model[: 2 * BLOCK]), 0)
        ranges = [(0, BLOCK, "hole"), (512, 1024, "hole"), (0, BLOCK + 1, "data")]
        for offset, length, kind in [*ranges, *((*some_range(served), "") for _ in range(50))]:
            data, chunks = client.read_chunks(length, offset, DF)
            assert_same(data, model[offset : offset + length], "a range")
            assert [chunk[:2] for chunk in chunks] == [(offset, length)]
            assert chunks[0].kind == kind or not kind
            assert chunks[0].kind == "data" or not any(data)


@on_both
def test_simple_replies_bring_the_same_bytes_in_one_piece(served: Served, export: str) -> None:
    with served.connect(export, "simple") as client:
        for _ in range(20):
            offset, length = some_range(served)
            data, chunks = client.read_chunks(length, offset)
            assert_same(data, served.model(export)[offset : offset + length], "a range")
            assert chunks == [ReadChunk(offset, length, "data")]


# Section: what changes bytes

Change = Callable[[Libnbd, bytes, int, int], None]


def _write(client: Libnbd, data: bytes, offset: int, flags: int) -> None:
    client.pwrite(data, offset, flags)


def _zero(client: Libnbd, data: bytes, offset: int, flags: int) -> None:
    client.zero(len(data), offset, flags)


def _trim(client: Libnbd, data: bytes, offset: int, flags: int) -> None:
    client.trim(len(data), offset, flags)


CHANGES = [
    pytest.param(_write, 0, id="write"),
    pytest.param(_write, FUA, id="write-fua"),
    pytest.param(_zero, 0, id="zero"),
    pytest.param(_zero, FUA, id="zero-fua"),
    pytest.param(_zero, NO_HOLE, id="zero-no-hole"),
    pytest.param(_zero, NO_HOLE | FUA, id="zero-no-hole-fua"),
    pytest.param(_trim, 0, id="trim"),
    pytest.param(_trim, FUA, id="trim-fua"),
]


@on_both
@in_both
@pytest.mark.parametrize(("change", "flags"), CHANGES)
def test_changes_are_read_by_others_at_once(
    served: Served, export: str, replies: str, change: Change, flags: int
) -> None:
    model, other = served.model(export), served.connect(export)
    with served.connect(export, replies) as client:
        ranges = [some_range(served) for _ in range(10)]
        for offset, length in [
            *ranges,
            (0, 1),
            (SIZE - 1, 1),
            (BLOCK, BLOCK),
            (SIZE - BLOCK, BLOCK),
        ]:
            # replnbd promises zeroes where something was trimmed.
            data = served.rng.randbytes(length) if change is _write else bytes(length)
            change(client, data, offset, flags)
            model[offset : offset + length] = data
            around = max(0, offset - 1000), min(SIZE, offset + length + 1000)
            found = other.pread(around[1] - around[0], around[0])
            assert_same(found, model[around[0] : around[1]], "the range and what is around it")
    other.close()


@on_both
@in_both
def test_a_fast_zero_zeroes_or_says_enotsup_and_changes_nothing(
    served: Served, export: str, replies: str
) -> None:
    model = served.model(export)
    with served.connect(export, replies) as client:
        outcomes = []
        aligned = [(served.rng.randrange(SIZE // BLOCK) * BLOCK, BLOCK) for _ in range(5)]
        for flags in (FAST_ZERO, FAST_ZERO | NO_HOLE, FAST_ZERO | FUA):
            for offset, length in aligned + [some_range(served) for _ in range(10)]:
                (outcome,) = client.pipeline([("zero", length, offset, flags)])
                assert outcome is None or outcome[0] == errno.ENOTSUP
                outcomes.append(outcome is None)
                if outcome is None:
                    model[offset : offset + length] = bytes(length)
                found = client.pread(length, offset)
                assert_same(found, model[offset : offset + length], "the range")
        assert any(outcomes)  # most are fast


@on_both
@in_both
def test_flush_and_cache_change_nothing(served: Served, export: str, replies: str) -> None:
    with served.connect(export, replies) as client:
        client.flush()
        for offset, length in [(0, SIZE), (SIZE - 1, 1), *(some_range(served) for _ in range(20))]:
            client.cache(length, offset)
        assert_same(client.pread(SIZE, 0), served.model(export), export)


@on_both
@in_both
def test_requests_of_no_bytes_succeed_and_leave_the_stream_in_step(
    served: Served, export: str, replies: str
) -> None:
    model = served.model(export)
    with served.connect(export, replies, strict=False) as client:
        for offset in (0, 1, SIZE - 1, SIZE):
            assert client.pread(0, offset) == b""
            client.pwrite(b"", offset)
            client.zero(0, offset)
            client.trim(0, offset)
            client.cache(0, offset)
            assert client.pread(100, 50) == model[50:150]


# Section: pipelines


def random_command(served: Served, start: int, end: int) -> Command:
    """One command within a range."""
    offset = served.rng.randrange(start, end)
    length = served.rng.randint(1, end - offset)
    verb = served.rng.choice(["pread", "pread", "pwrite", "pwrite", "zero", "trim", "cache"])
    what = served.rng.randbytes(length) if verb == "pwrite" else length
    flags = served.rng.choice([0, FUA]) if verb in ("pwrite", "zero", "trim") else 0
    return verb, what, offset, flags


def expected_result(model: bytearray, command: Command) -> bytes | None:
    """What a command results in; `model` is changed as the export is."""
    verb, what, offset, _ = command
    end = offset + (len(what) if isinstance(what, bytes) else what)
    if verb == "pread":
        return bytes(model[offset:end])
    if isinstance(what, bytes):
        model[offset:end] = what
    elif verb in ("zero", "trim"):
        model[offset:end] = bytes(what)
    return None


@on_both
@in_both
def test_64_commands_in_flight_each_get_their_own_answer(
    served: Served, export: str, replies: str
) -> None:
    model = served.model(export)
    span = SIZE // 64
    with served.connect(export, replies, strict=False) as client:
        for _ in range(8):
            # Each has a span of its own: among overlapping ones the protocol leaves the order open.
            commands = [random_command(served, at * span, at * span + span) for at in range(63)]
            commands.append(("flush", 0, 0, 0))
            refused = ("pread", 10, SIZE - 5, 0)
            served.rng.shuffle(commands)
            results = client.pipeline([*commands, refused])
            for command, result in zip(commands, results, strict=False):
                expected = None if command[0] == "flush" else expected_result(model, command)
                assert result == expected, command[0::2]
            assert results[-1][0] == errno.EINVAL
        assert_same(client.pread(SIZE, 0), model, export)


@in_both
def test_both_exports_and_both_shapes_of_replies_side_by_side(served: Served, replies: str) -> None:
    other = REPLIES[replies == REPLIES[0]]
    clients = [served.connect(EXPORTS[0], replies), served.connect(EXPORTS[1], other)]
    span = SIZE // 16
    for _ in range(8):
        for export, client in zip(EXPORTS, clients, strict=True):
            commands = [random_command(served, at * span, at * span + span) for at in range(16)]
            results = client.pipeline(commands)
            model = served.model(export)
            assert results == [expected_result(model, command) for command in commands]
        served.checkpoint()
    for client in clients:
        client.close()
