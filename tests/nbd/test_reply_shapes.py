"""Replies in their three shapes, taken apart by a reader that shares no code with them."""

from __future__ import annotations

import errno

import pytest
from peers import nbd_wire as wire
from peers.nbd_answers import Answer, Answers, Asked
from peers.nbd_wire import Shape, Transcript

from replnbd.nbd import EXTENDED_REPLIES, SIMPLE_REPLIES, STRUCTURED_REPLIES, Replies, Request

SHAPES = [
    (SIMPLE_REPLIES, Shape.SIMPLE),
    (STRUCTURED_REPLIES, Shape.STRUCTURED),
    (EXTENDED_REPLIES, Shape.EXTENDED),
]
COOKIE = 2**64 - 3
NAMES = [shape.value for _, shape in SHAPES]
every_shape = pytest.mark.parametrize(("replies", "shape"), SHAPES, ids=NAMES)
structured_shapes = pytest.mark.parametrize(("replies", "shape"), SHAPES[1:], ids=NAMES[1:])


def decoded(shape: Shape, reply: bytes, asked: Asked) -> Answer:
    """The one answer in `reply`."""
    answers = Answers(Transcript(reply), shape)
    answers.expect(COOKIE, asked)
    answer = answers.next()
    assert answer is not None
    assert answer.cookie == COOKIE
    assert not answers.pending
    assert answers.next() is None
    return answer


@every_shape
@pytest.mark.parametrize("command", [wire.READ, wire.WRITE, wire.FLUSH, wire.TRIM, wire.CACHE])
def test_success_without_payload_even_of_a_read_of_nothing(
    replies: Replies, shape: Shape, command: int
) -> None:
    reply = replies.ack(Request(0, command, COOKIE, 77, 0))
    assert decoded(shape, reply, Asked(command, 77)).error == 0


@structured_shapes
@pytest.mark.parametrize("command", [wire.READ, wire.WRITE, wire.TRIM, wire.STATUS])
def test_a_failure_says_where_it_was(replies: Replies, shape: Shape, command: int) -> None:
    reply = replies.error(Request(0, command, COOKIE, 77, 5), errno.EIO, "disk ✗", 78)
    answer = decoded(shape, reply, Asked(command, 77, 5))
    assert (answer.error, answer.text, answer.at) == (errno.EIO, "disk ✗", 78)


@structured_shapes
def test_a_flush_that_fails_is_nowhere(replies: Replies, shape: Shape) -> None:
    reply = replies.error(Request(0, wire.FLUSH, COOKIE, 0, 0), errno.EIO, "no", 0)
    assert decoded(shape, reply, Asked(wire.FLUSH)).at is None


@structured_shapes
@pytest.mark.parametrize("text", ["x" + "é" * 4096, "\udcff" * 5000, "é" * 2048])
def test_a_long_text_ends_behind_a_whole_character(
    replies: Replies, shape: Shape, text: str
) -> None:
    request = Request(0, wire.WRITE, COOKIE, 512, 4096)
    reply = replies.error(request, errno.EIO, text)
    answer = decoded(shape, reply, Asked(wire.WRITE, 512, 4096))
    assert 4095 <= len(answer.text.encode()) <= 4096
    assert text.replace("\udcff", "?").startswith(answer.text)
