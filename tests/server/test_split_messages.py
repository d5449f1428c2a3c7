"""Messages in any pieces are answered as if they had come whole: byte for byte, wherever the bytes
of a session are split."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peers import nbd_wire as wire
from peers.conversation import SHAPES, TOUCHED, Conversation
from peers.nbd_wire import Shape

from replnbd.block import MemoryNode, RangeLock
from replnbd.events import EventBus
from replnbd.replication.nodes import GateNode
from replnbd.server import Export, NbdServer
from replnbd.server.listener import BoundSocket

SIZE = 1 << 16
LONG = 255 * 160
"""Bytes of a payload that gets a buffer of its own."""
CONTENT = bytes(range(1, 256)) * (SIZE // 255) + bytes(SIZE % 255)


class NoSocket:
    """What a transport shows that has none."""

    family = socket.AF_UNIX

    def fileno(self) -> int:
        return -1

    def setsockopt(self, *_: object) -> None:
        pass


class MemoryTransport(asyncio.Transport):
    """A connection whose other end is the test: `feed` arrives, `sent` was answered."""

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__({"socket": NoSocket()})
        self.sent = bytearray()
        self.ended = False
        self._protocol: Any = protocol
        self._paused = False
        protocol.connection_made(self)

    async def feed(self, data: bytes) -> None:
        """`data` arrives, in one piece as far as there is room for it."""
        view = memoryview(data)
        while view and not self.ended:
            await self._settle(lambda: not self._paused or self.ended)
            buffer = self._protocol.get_buffer(-1)
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            self._protocol.buffer_updated(count)
            view = view[count:]

    async def end(self) -> None:
        """The client hangs up, and the server, too."""
        if not self.ended and not self._protocol.eof_received():
            self.close()
        await self._settle(lambda: self.ended)

    async def _settle(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False

    def is_closing(self) -> bool:
        return self.ended

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.close()

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close


class YieldingNode(MemoryNode):
    """Every operation waits for a turn of the loop."""

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        return False

    def pwrite_nowait(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        return False

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        await super().pread(offset, buffer)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await asyncio.sleep(0)
        await super().pwrite(offset, data)


async def talk(pieces: list[bytes], node: MemoryNode) -> bytes:
    """What the server answers to a client whose bytes come in these pieces. Requests that overlap
    wait for each other, as they do in a disk that is replicated."""
    node.data[:] = CONTENT
    server = NbdServer(EventBus())
    server.add_export(Export("d", GateNode("gate", SIZE, node, RangeLock())))
    with socket.socket() as nowhere:
        protocol = server._new_client(BoundSocket(nowhere, "nbd://nowhere"))
    assert isinstance(protocol, asyncio.BufferedProtocol)
    transport = MemoryTransport(protocol)
    for piece in pieces:
        await transport.feed(piece)
        await asyncio.sleep(0)
    await transport.end()
    while server.connections:
        await asyncio.sleep(0)
    await server.close()
    assert transport.sent.startswith(wire.GREETING)
    return bytes(transport.sent)


def split(sent: bytes, *offsets: int) -> list[bytes]:
    return [sent[a:b] for a, b in pairwise([0, *offsets, len(sent)])]


@pytest.mark.parametrize("shape", SHAPES)
async def test_split_in_two_at_every_offset(shape: Shape) -> None:
    conversation = Conversation.of(shape, "d", CONTENT)
    sent, node = conversation.sent, MemoryNode(SIZE)
    whole = await talk([sent], node)
    assert conversation.answers(whole[18:], len(conversation.ends))
    for offset in range(len(sent)):
        assert await talk(split(sent, offset), node) == whole, offset
        assert node.data == conversation.disks[-1]


@pytest.mark.parametrize("shape", SHAPES)
async def test_byte_by_byte(shape: Shape) -> None:
    conversation = Conversation.of(shape, "d", CONTENT)
    sent, node = conversation.sent, MemoryNode(SIZE)
    pieces = [sent[at : at + 1] for at in range(len(sent))]
    assert await talk(pieces, node) == await talk([sent], node)
    assert node.data == conversation.disks[-1]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_long_payload_split_around_every_edge(shape: Shape) -> None:
    """Edges of messages, of pages, and of the buffers that a payload is received into."""
    conversation = Conversation.of(shape, "d", CONTENT, long=LONG)
    sent, node = conversation.sent, MemoryNode(SIZE)
    assert node.size >= TOUCHED + LONG
    whole = await talk([sent], node)
    assert conversation.answers(whole[18:], len(conversation.ends))
    offsets = {end + n for end in conversation.ends for n in range(-34, 35)}
    offsets |= {edge + n for edge in range(0, len(sent), 4096) for n in range(-3, 4)}
    for offset in sorted(offsets & set(range(len(sent)))):
        assert await talk(split(sent, offset), node) == whole, offset
        assert node.data == conversation.disks[-1]


@pytest.mark.parametrize("node", [MemoryNode(SIZE), YieldingNode(SIZE)], ids=["quick", "slow"])
@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
def test_in_any_pieces(shape: Shape, node: MemoryNode, data: st.DataObject) -> None:
    """Of a node that makes requests wait the answers may come in another order."""
    conversation = Conversation.of(shape, "d", CONTENT, long=LONG)
    cuts = data.draw(st.lists(st.integers(0, len(conversation.sent)), max_size=12))
    answered = asyncio.run(talk(split(conversation.sent, *sorted(cuts)), node))
    whole = asyncio.run(talk([conversation.sent], MemoryNode(SIZE)))
    messages = len(conversation.ends)
    found = conversation.answers(answered[18:], messages)
    assert sorted(found, key=lambda each: each.cookie) == conversation.answers(whole[18:], messages)
    assert node.data == conversation.disks[-1]
