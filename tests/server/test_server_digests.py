"""x-replnbd:digest and exports that are not listed, as clients see them."""

from __future__ import annotations

import asyncio
import os
import struct
from hashlib import blake2b
from pathlib import Path

import pytest
from peers import LibnbdProcess, RawClient
from peers import nbd_wire as wire
from peers.nbd_answers import Asked
from peers.nbd_wire import Shape
from server_wire import on_both_loops, serving, uri

from replnbd.block import GRANULE, MemoryNode
from replnbd.server import Export

SIZE = 6 * GRANULE + 512
BASE, DIGEST = "base:allocation", "x-replnbd:digest"


def disk() -> MemoryNode:
    """Two granules that are equal, four of which all are different, and a bit."""
    node = MemoryNode(SIZE)
    node.data[2 * GRANULE :] = os.urandom(SIZE - 2 * GRANULE)
    return node


def expected(node: MemoryNode, bits: int) -> list[tuple[int, int]]:
    values = [
        int.from_bytes(blake2b(node.data[at : at + GRANULE], digest_size=8).digest(), "big")
        & ((1 << bits) - 1)
        for at in range(0, SIZE, GRANULE)
    ]
    whole = [(GRANULE, value) for value in values[2:-1]]
    return [(2 * GRANULE, values[0]), *whole, (512, values[-1])]


@pytest.mark.parametrize(("shape", "bits"), [(Shape.STRUCTURED, 32), (Shape.EXTENDED, 64)])
@on_both_loops
async def test_the_status_flags_are_digests_of_granules(
    short_dir: Path, shape: Shape, bits: int
) -> None:
    node = disk()

    def scenario() -> None:
        with RawClient(short_dir / "s").go("d", shape, BASE, DIGEST) as client:
            answer = client.ask(wire.STATUS, 0, SIZE)
            assert answer.statuses[client.contexts[DIGEST]] == expected(node, bits)
            assert answer.statuses[client.contexts[BASE]] == [(SIZE, 0)]
            one = client.ask(wire.STATUS, 2 * GRANULE, SIZE - 2 * GRANULE, flags=wire.REQ_ONE)
            assert one.statuses[client.contexts[DIGEST]] == expected(node, bits)[1:2]
            client.finish()

    async with serving(short_dir, Export("d", node, with_digests=True)):
        await asyncio.to_thread(scenario)


@on_both_loops
async def test_who_compares_a_disk_need_not_ask_for_anything_else(short_dir: Path) -> None:
    node = disk()

    def scenario() -> None:
        with RawClient(short_dir / "s").go("d", Shape.EXTENDED, BASE, DIGEST) as client:
            number = client.contexts[DIGEST]
            payload = struct.pack(">QI", SIZE, number)
            client.expect(7, Asked(wire.STATUS, 0, SIZE, contexts=(number,)))
            header = wire.request(
                wire.STATUS, 0, len(payload), cookie=7, flags=wire.PAYLOAD_LEN, shape=client.shape
            )
            client.send(header + payload)
            answer = client.answer()
            assert answer is not None
            assert answer.statuses == {number: expected(node, 64)}
            client.finish()

    async with serving(short_dir, Export("d", node, with_digests=True)):
        await asyncio.to_thread(scenario)


@on_both_loops
async def test_only_exports_that_have_digests_offer_them(short_dir: Path) -> None:
    def scenario() -> None:
        for name, contexts in (("d", [DIGEST]), ("plain", [])):
            with RawClient(short_dir / "s").go(name, Shape.STRUCTURED, DIGEST) as client:
                assert list(client.contexts) == contexts
                client.finish()

    node = disk()
    async with serving(short_dir, Export("d", node, with_digests=True), Export("plain", node)):
        await asyncio.to_thread(scenario)


@on_both_loops
async def test_an_export_that_is_not_listed_is_there_for_who_knows_its_name(
    short_dir: Path,
) -> None:
    def scenario() -> None:
        with RawClient(short_dir / "s") as client:
            client.send(wire.FIXED)
            names = [reply.payload[4:] for reply in client.option(wire.LIST)[:-1]]
            assert names == [b"shown"]
            told = client.option(wire.INFO, wire.choose(wire.INFO, "hidden")[16:])
            assert told[-1].kind == wire.REP_ACK
        with RawClient(short_dir / "s").go("hidden") as client:
            assert client.ask(wire.READ, 0, 512).data == bytes(512)
            client.finish()

    node = disk()
    exports = Export("hidden", node, listed=False), Export("shown", node)
    async with serving(short_dir, *exports):
        await asyncio.to_thread(scenario)


@pytest.mark.interop
@pytest.mark.slow
async def test_libnbd_gets_the_low_half_of_each_digest_and_does_not_see_what_is_not_listed(
    short_dir: Path,
) -> None:
    node = disk()

    def scenario() -> None:
        base = uri(short_dir).replace("/?", "/{}?")
        with LibnbdProcess(short_dir) as process:
            client = process.connect(base.format("d"), contexts=[BASE, DIGEST])
            assert client.block_status(SIZE, 0)[DIGEST] == expected(node, 32)
            client.close()
            client = process.connect(base.format("d"), options=True)
            assert client.exports() == [("d", "")]
            client.call("opt_abort")
            client = process.connect(base.format("hidden"))
            assert client.size == SIZE
            client.close()

    exports = Export("hidden", node, listed=False), Export("d", node, with_digests=True)
    async with serving(short_dir, *exports):
        await asyncio.to_thread(scenario)
