"""The same requests in each shape of replies, side by side on both exports: simple, structured and
extended differ in their headers and in what is sent of zeroes, and in nothing else."""

from __future__ import annotations

import random

import pytest
from interop_support import KIB, assert_same
from libnbd_support import BASE, DEPTH, DIRTY, EXPORTS, SIZE, Served
from peers import RawClient
from peers import nbd_wire as wire
from peers.nbd_answers import Answer, Asked
from peers.nbd_wire import Shape

pytestmark = [pytest.mark.interop, pytest.mark.slow]

CONTEXTS = (BASE, DEPTH, DIRTY)


def connect(served: Served, export: str, shape: Shape) -> RawClient:
    """A client with all the contexts that its shape can have."""
    contexts = () if shape is Shape.SIMPLE else CONTEXTS
    return RawClient(served.standby.nbd_socket).go(export, shape, *contexts)


def some_range(rng: random.Random, start: int = 0, end: int = SIZE) -> tuple[int, int]:
    """(offset, length) within a range, not aligned to anything."""
    offset = rng.randrange(start, end)
    return offset, min(rng.randint(1, rng.choice([100, 100 * KIB])), end - offset)


@pytest.mark.parametrize("export", EXPORTS)
def test_every_shape_reads_the_same_bytes_and_extents(served: Served, export: str) -> None:
    model = served.model(export)
    simple, structured, extended = (connect(served, export, shape) for shape in Shape)
    for _ in range(60):
        offset, length = some_range(served.rng)
        answers = [each.ask(wire.READ, offset, length) for each in (simple, structured, extended)]
        for answer in answers:
            assert_same(answer.data, model[offset : offset + length], f"{length} at {offset}")
        # The same chunks, of which the extended ones have headers that are 12 bytes longer.
        assert answers[1].holes == answers[2].holes
        assert answers[1].chunks == answers[2].chunks
        assert answers[2].wire_bytes - answers[1].wire_bytes == 12 * answers[1].chunks
        assert answers[0].wire_bytes == 16 + length
        first, second = (
            each.ask(wire.STATUS, offset, length).statuses for each in (structured, extended)
        )
        assert first == second
    for client in (simple, structured, extended):
        client.finish()


def expect(model: bytearray, asked: Asked, payload: bytes) -> bytes:
    """The bytes that answer a request; `model` is changed as the export is."""
    end = asked.offset + asked.length
    if asked.command == wire.READ:
        return bytes(model[asked.offset : end])
    if asked.command == wire.WRITE:
        model[asked.offset : end] = payload
    elif asked.command in (wire.TRIM, wire.ZEROES):
        model[asked.offset : end] = bytes(asked.length)
    return b""


FLAGS = {
    wire.READ: [0], wire.WRITE: [0, wire.FUA], wire.FLUSH: [0], wire.TRIM: [0, wire.FUA],
    wire.CACHE: [0], wire.ZEROES: [0, wire.FUA, wire.NO_HOLE],
}  # fmt: skip


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("shape", Shape)
def test_32_requests_in_flight_in_each_shape_leave_what_the_model_says(
    served: Served, export: str, shape: Shape
) -> None:
    rng, model, span = served.rng, served.model(export), SIZE // 32
    with connect(served, export, shape) as client:
        for _ in range(10):
            expected: dict[int, bytes] = {}
            for at in range(32):  # each in a span of its own: the order is open
                command = rng.choice(list(FLAGS))
                offset, length = some_range(rng, at * span, at * span + span)
                if command == wire.FLUSH:
                    offset = length = 0
                payload = rng.randbytes(length) if command == wire.WRITE else b""
                flags = rng.choice(FLAGS[command])
                cookie = client.begin(command, offset, length, flags=flags, data=payload)
                expected[cookie] = expect(model, Asked(command, offset, length), payload)
            while expected:
                answer: Answer | None = client.answer()
                assert answer is not None
                assert (answer.error, answer.text) == (0, "")
                assert_same(answer.data, expected.pop(answer.cookie), "what was read")
        client.finish()
