"""What an export has not offered is refused, whatever the node behind it could do (nbdkit 1.32 ends
with a failed assertion when FAST_ZERO is used where it is not advertised)."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path

import pytest
from peers import RawClient
from peers import nbd_wire as wire
from peers.nbd_wire import Shape
from server_wire import on_both_loops, serving

from replnbd.block import MemoryNode
from replnbd.nbd.constants import TransmissionFlag
from replnbd.server import Export

SIZE = 1 << 16


class Plain(Export):
    """Offers nothing but READ, WRITE and what no export can leave out."""

    @property
    def transmission_flags(self) -> int:
        return int(TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_WRITE_ZEROES)


def ask(folder: Path, shape: Shape, command: int, flags: int, data: bytes) -> int:
    """The error of a request, and the session that goes on."""
    contexts = () if shape is Shape.SIMPLE else ("base:allocation",)
    with RawClient(folder / "s").go("plain", shape, *contexts) as client:
        answer = client.ask(command, 0, 0 if command == wire.FLUSH else 512, flags=flags, data=data)
        assert client.ask(wire.READ, 0, SIZE).data == b"\7" * SIZE
        client.finish()
        return answer.error


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (wire.ZEROES, wire.FAST_ZERO),
        (wire.ZEROES, wire.FAST_ZERO | wire.NO_HOLE),
        (wire.ZEROES, wire.FUA),
        (wire.WRITE, wire.FUA),
        (wire.READ, wire.FUA),
        (wire.FLUSH, wire.FUA),
        (wire.CACHE, 0),
        (wire.READ, wire.REQ_ONE),
    ],
)
@on_both_loops
async def test_it_is_refused_and_the_session_lives(
    short_dir: Path, shape: Shape, command: int, flags: int
) -> None:
    node = MemoryNode(SIZE)
    node.data[:] = b"\7" * SIZE
    data = bytes(512) if command == wire.WRITE else b""
    async with serving(short_dir, Plain("plain", node)):
        error = await asyncio.to_thread(ask, short_dir, shape, command, flags, data)
    assert error == errno.EINVAL
    assert node.data == b"\7" * SIZE


@on_both_loops
async def test_a_status_payload_is_for_extended_headers_with_a_context(short_dir: Path) -> None:
    def scenario() -> None:
        for shape, contexts in (
            (Shape.STRUCTURED, ("base:allocation",)),
            (Shape.EXTENDED, ()),
        ):
            with RawClient(short_dir / "s").go("plain", shape, *contexts) as client:
                payload = struct.pack(">QI", SIZE, 1) if shape is Shape.EXTENDED else b""
                answer = client.ask(wire.STATUS, 0, 12, flags=wire.PAYLOAD_LEN, data=payload)
                assert answer.error == errno.EINVAL
                client.finish()

    async with serving(short_dir, Plain("plain", MemoryNode(SIZE))):
        await asyncio.to_thread(scenario)
