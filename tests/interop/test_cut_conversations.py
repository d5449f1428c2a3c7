"""A session that ends after any of its bytes: what was complete has happened and is answered, what
was not has left no trace, and the next client finds all of that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hostile_support import CONTENT, SIZE, Victim, replnbd
from peers import NbdClient, RawClient
from peers.conversation import SHAPES, TOUCHED, Conversation
from peers.nbd_answers import Answer
from peers.nbd_wire import Shape

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with replnbd(tmp_path_factory.mktemp("v"), listen=["nbd://127.0.0.1:0"]) as running:
        yield running


@pytest.fixture
def keeper(victim: Victim) -> Iterator[NbdClient]:
    """A healthy client that is there all the time."""
    with victim.checked(), NbdClient(victim.address, "d") as client:
        victim.descriptors += 1
        yield client
        client.pwrite(0, CONTENT[:TOUCHED])
        victim.descriptors -= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_session_that_sends_no_more_after_any_byte(
    victim: Victim, keeper: NbdClient, shape: Shape
) -> None:
    conversation = Conversation.of(shape, "d", CONTENT)
    for length in range(len(conversation.sent) + 1):
        messages = conversation.complete(length)
        with victim.raw() as client:
            client.send(conversation.sent[:length])
            client.hang_up()
            conversation.answers(client.receive_rest(), messages)
        assert keeper.pread(0, SIZE) == (conversation.disks[messages - 1] if messages else CONTENT)
        keeper.pwrite(0, CONTENT[:TOUCHED])


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_session_that_breaks_off_after_any_byte(
    victim: Victim, keeper: NbdClient, shape: Shape, tcp: bool
) -> None:
    """What the server has not read when a RST arrives is lost: then the disk is as after one of
    the messages before, and never anything between two."""
    conversation = Conversation.of(shape, "d", CONTENT)
    for length in range(len(conversation.sent) + 1):
        messages = conversation.complete(length)
        with RawClient(("127.0.0.1", victim.ports[0]) if tcp else victim.address) as client:
            client.send(conversation.sent[:length])
            client.reset()
        victim.settle()
        disk = keeper.pread(0, SIZE)
        assert disk == CONTENT or disk in conversation.disks[:messages]
        keeper.pwrite(0, CONTENT[:TOUCHED])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_session_in_two_pieces_is_answered_as_in_one(
    victim: Victim, keeper: NbdClient, shape: Shape
) -> None:
    """The second piece is sent when the server has read the first."""
    conversation = Conversation.of(shape, "d", CONTENT)

    def answered(offset: int) -> list[Answer]:
        with victim.raw() as client:
            client.send(conversation.sent[:offset])
            client.wait_taken()
            client.send(conversation.sent[offset:])
            received = client.receive_rest()
        found = conversation.answers(received, len(conversation.ends))
        assert keeper.pread(0, SIZE) == conversation.disks[-1]
        keeper.pwrite(0, CONTENT[:TOUCHED])
        return sorted(found, key=lambda answer: answer.cookie)

    whole = answered(0)
    for offset in range(1, len(conversation.sent)):
        assert answered(offset) == whole, offset
