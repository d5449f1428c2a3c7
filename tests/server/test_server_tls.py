"""The data path over TLS: every byte is compared, and nothing grows with what a client does."""

from __future__ import annotations

import asyncio
import random
import struct
from errno import ESHUTDOWN
from pathlib import Path

import pytest
from server_wire import (
    DISC,
    READ,
    WRITE,
    GatedNode,
    check_healthy,
    choose,
    on_both_loops,
    request,
    settled,
)
from tls_wire import Pki, TlsClient, leaving_nothing, serving_tls
from tls_wire import pki as pki

from replnbd.block import Buffer, MemoryNode
from replnbd.server import Export
from replnbd.server.connection import State
from replnbd.server.limits import IN_FLIGHT_MAX, UNSENT_BYTES_MAX
from replnbd.server.slabs import OUTBOX_BYTES

MIB = 1 << 20
PAYLOAD_MAX = 32 * MIB
RECORD_OVERHEAD = 1.01
"""What TLS adds to records of 16 KiB, and a little more."""

on_both_versions = pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])


@pytest.mark.parametrize("length", [5, 16_000, 300_000])
@on_both_loops
async def test_requests_right_behind_the_tls_handshake_are_served(
    short_dir: Path, pki: Pki, length: int
) -> None:
    node = MemoryNode(MIB)
    data = random.randbytes(length)
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()):
        client = await (await TlsClient.connect(short_dir)).starttls()
        write = request(WRITE, 3, length, cookie=1) + data
        behind = choose("e")[4:] + write + request(READ, 0, length + 9, cookie=2)
        await client.handshake(pki.context(), behind=behind)
        await client.chosen()
        assert await client.reply() == (0, 1, b"")
        assert await client.reply(length + 9) == (0, 2, bytes(3) + data + bytes(6))
        await client.close()


@on_both_versions
@on_both_loops
async def test_the_largest_payloads_arrive_whole(short_dir: Path, pki: Pki, version: str) -> None:
    node = MemoryNode(PAYLOAD_MAX + 7)
    node.data[:] = before = random.randbytes(PAYLOAD_MAX + 7)
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()):
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context(version=version))
        assert await client.pread(5, PAYLOAD_MAX) == before[5 : 5 + PAYLOAD_MAX]
        data = random.randbytes(PAYLOAD_MAX)
        await client.pwrite(3, data)
        assert node.data == before[:3] + data + before[-4:]
        await client.close()


class Sluggish(MemoryNode):
    """Every seventh operation suspends, so that replies overtake each other."""

    calls = 0

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        self.calls += 1
        return bool(self.calls % 7) and super().pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        self.calls += 1
        return bool(self.calls % 7) and super().pwrite_nowait(offset, data)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        await super().pread(offset, buffer)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await asyncio.sleep(0)
        await super().pwrite(offset, data)


@on_both_versions
@on_both_loops
async def test_128_requests_in_flight_get_their_own_bytes(
    short_dir: Path, pki: Pki, version: str
) -> None:
    """Each is at a place of its own, so that their order does not matter."""
    rng = random.Random(7)
    node = Sluggish(16 * MIB)
    node.data[:] = model = bytearray(rng.randbytes(16 * MIB))
    places = [(at, min(rng.randint(1, 100_000), 32768)) for at in range(0, 16 * MIB, 32768)]
    asked: dict[int, tuple[int, int, bytes | None]] = {}
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()):
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context(version=version))

        async def take_one() -> None:
            error, cookie, _ = await client.reply()
            offset, length, data = asked.pop(cookie)
            assert not error
            if data is None:
                assert await client.receive(length) == model[offset : offset + length]

        for cookie, (offset, length) in enumerate(places):
            data = rng.randbytes(length) if cookie % 2 else None
            if data is not None:
                model[offset : offset + length] = data
            asked[cookie] = (offset, length, data)
            command = READ if data is None else WRITE
            client.send(request(command, offset, length, cookie=cookie) + (data or b""))
            if len(asked) == IN_FLIGHT_MAX:
                await take_one()
        while asked:
            await take_one()
        assert node.data == model
        await client.close()


@pytest.mark.parametrize(("length", "bound"), [(4096, 0), (PAYLOAD_MAX, PAYLOAD_MAX)])
@on_both_loops
async def test_a_client_that_does_not_read_is_not_read_from(
    short_dir: Path, pki: Pki, length: int, bound: int
) -> None:
    node, count = MemoryNode(PAYLOAD_MAX), 100 * MIB // length
    node.data[:] = random.randbytes(MIB) * 32
    exports = Export("e", node), Export("other", MemoryNode(MIB))
    async with serving_tls(short_dir, *exports, tls=pki.tls()) as server:
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context())
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(request(READ, 0, length) * count)
        (connection,) = server.connections
        await settled(lambda: connection._reading_paused)
        assert (
            connection.unsent_bytes <= (UNSENT_BYTES_MAX + OUTBOX_BYTES + bound) * RECORD_OVERHEAD
        )
        await check_healthy(short_dir, "other", exports[1].node)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(count):  # and when it does read, nothing is missing
            assert await client.reply(length) == (0, 0, bytes(node.data[:length]))
        await client.close()


@on_both_loops
async def test_disc_is_answered_by_an_end_of_tls_behind_all_replies(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    node = GatedNode(MIB)
    async with (
        serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server,
        leaving_nothing(server, caplog),
    ):
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context())
        node.gate.clear()
        client.send(request(WRITE, 0, 3, cookie=1) + b"abc" + request(READ, 0, 3, cookie=2))
        await node.wait_waiting(2)
        client.send(request(DISC))
        await settled(lambda: {each.state for each in server.connections} == {State.DRAINING})
        node.gate.set()
        assert await client.reply() == (0, 1, b"")
        assert await client.reply(3) == (0, 2, b"abc")
        assert await client.at_end()
        client.notify()
        client.hang_up()


@on_both_loops
async def test_disc_is_no_end_of_a_long_reply_that_is_not_read_yet(
    short_dir: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    node, length = GatedNode(8 * MIB), 8 * MIB  # more would keep DISC waiting
    node.data[:] = random.randbytes(length)
    async with (
        serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server,
        leaving_nothing(server, caplog),
    ):
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context())
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        node.gate.clear()
        client.send(request(READ, 0, length) + request(DISC))
        await node.wait_waiting(1)
        await settled(lambda: {each.state for each in server.connections} == {State.DRAINING})
        node.gate.set()
        await settled(lambda: {each.state for each in server.connections} == {State.LINGERING})
        assert sum(each.unsent_bytes for each in server.connections) > length - 2 * MIB
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await client.reply(length) == (0, 0, bytes(node.data))
        assert await client.at_end()
        client.notify()
        client.hang_up()


@pytest.mark.parametrize("how", ["fence", "remove"])
@on_both_loops
async def test_who_loses_its_export_is_told_eshutdown_and_then_the_end(
    short_dir: Path, pki: Pki, how: str
) -> None:
    node = GatedNode(MIB)
    async with serving_tls(short_dir, Export("e", node), tls=pki.tls()) as server:
        client = await TlsClient.connect(short_dir)
        await client.go("e", pki.context())
        node.gate.clear()
        client.send(request(WRITE, 0, 3, cookie=1) + b"abc")
        await node.wait_waiting(1)
        losing = asyncio.ensure_future(
            server.fence("e", "why") if how == "fence" else server.remove_export("e", "hard")
        )
        await asyncio.sleep(0)
        client.send(request(WRITE, 0, 3, cookie=2) + b"xyz" + request(READ, 0, 3, cookie=3))
        assert await client.reply() == (ESHUTDOWN, 2, b"")
        assert await client.reply() == (ESHUTDOWN, 3, b"")
        assert not losing.done()
        node.gate.set()
        await losing
        assert await client.reply() == (0, 1, b"")
        assert await client.at_end()
        assert node.data[:3] == b"abc"
        await client.close()


@on_both_loops
async def test_structured_replies_with_contexts_work_over_tls(short_dir: Path, pki: Pki) -> None:
    async with serving_tls(short_dir, Export("e", MemoryNode(MIB)), tls=pki.tls()):
        client = await (await TlsClient.connect(short_dir)).starttls()
        await client.handshake(pki.context(), behind=b"IHAVEOPT" + struct.pack(">II", 8, 0))
        assert await client.option_reply() == (8, 1, b"")
        client.send(choose("e")[4:])
        await client.chosen()
        client.send(request(READ, 0, 5, cookie=9))
        header = struct.pack(">IHHQI", 0x668E33EF, 1, 1, 9, 8 + 5)
        assert await client.receive(20 + 13) == header + bytes(8 + 5)
        await client.close()
