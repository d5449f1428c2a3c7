"""What clients must not send: each gets its answer or its end, and the next client is served."""

from __future__ import annotations

import asyncio
import errno
import random
import resource
import struct
from pathlib import Path

import pytest
from server_wire import (
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    NO_HOLE,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    RawClient,
    check_healthy,
    choose,
    on_both_loops,
    request,
    serving,
    settled,
    uri,
)

from replnbd.block import MemoryNode
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer
from replnbd.server.negotiation import Negotiation

SIZE = 1 << 20
GIB4 = 0xFFFFFFFF


def option(number: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    claimed = len(payload) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", number, claimed) + payload


@pytest.mark.parametrize(
    ("claim", "sent"),
    [
        ("client flags we do not know", b"\0\0\xff\xff"),
        ("a wrong option magic", struct.pack(">I", 3) + b"IHAVENOT" + bytes(8)),
        ("an option of 4 GiB", struct.pack(">I", 3) + option(99, length=GIB4)),
        ("an export name of 4 GiB", struct.pack(">I", 3) + option(1, length=GIB4)),
        ("an export name of 2 GiB", struct.pack(">I", 3) + option(1, length=0x7FFFFFFF)),
        ("an export name of 4097 bytes", struct.pack(">I", 3) + option(1, b"n" * 4097)),
        ("an export that is not there", struct.pack(">I", 3) + option(1, b"nosuch")),
        ("33 options", struct.pack(">I", 3) + option(99) * 33),
        ("a request before GO", struct.pack(">I", 3) + request(READ, 0, 512)),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n"),
        ("TLS", bytes.fromhex("1603010200010001fc0303") + bytes(64)),
    ],
)
@on_both_loops
async def test_in_the_handshake_it_ends_the_connection(
    short_dir: Path, claim: str, sent: bytes
) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.connect(short_dir)
        client.send(sent)
        try:
            received = await client.reader.read(-1)
        except ConnectionResetError:
            received = b"NBDMAGIC"
        assert received.startswith(b"NBDMAGIC"), claim
        await client.close()
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize(
    ("claim", "sent", "error"),
    [
        ("READ past the end", request(READ, SIZE - 1, 2), errno.EINVAL),
        ("READ at 2^64 - 512", request(READ, 2**64 - 512, 512), errno.EINVAL),
        ("READ of more than 32 MiB", request(READ, 0, (32 << 20) + 1), errno.EINVAL),
        ("READ of 4 GiB", request(READ, 0, GIB4), errno.EINVAL),
        ("WRITE past the end", request(WRITE, SIZE - 1, 2) + b"ab", errno.ENOSPC),
        ("large WRITE past the end", request(WRITE, 1, SIZE) + bytes(SIZE), errno.ENOSPC),
        ("WRITE with DF", request(WRITE, 0, 2, flags=DF) + b"ab", errno.EINVAL),
        ("WRITE with flag 0x8000", request(WRITE, 0, 1, flags=0x8000) + b"a", errno.EINVAL),
        ("WRITE_ZEROES past the end", request(ZEROES, SIZE, 1), errno.ENOSPC),
        ("TRIM past the end", request(TRIM, SIZE, 1), errno.EINVAL),
        ("TRIM with NO_HOLE", request(TRIM, 0, 1, flags=NO_HOLE), errno.EINVAL),
        ("FLUSH with an offset", request(FLUSH, 1), errno.EINVAL),
        ("FLUSH with a length", request(FLUSH, 0, 1), errno.EINVAL),
        ("CACHE past the end", request(CACHE, SIZE, 1), errno.EINVAL),
        ("CACHE with DF", request(CACHE, 0, 1, flags=DF), errno.EINVAL),
        ("BLOCK_STATUS without a context", request(STATUS, 0, 1, flags=REQ_ONE), errno.EINVAL),
        ("BLOCK_STATUS of 4 GiB", request(STATUS, 0, GIB4), errno.EINVAL),
        ("RESIZE", request(8, 0, 1), errno.EINVAL),
        ("command 99", request(99), errno.EINVAL),
        ("READ with FAST_ZERO", request(READ, 0, 1, flags=FAST_ZERO), errno.EINVAL),
    ],
)
@on_both_loops
async def test_an_invalid_request_gets_its_error_and_the_session_lives(
    short_dir: Path, claim: str, sent: bytes, error: int
) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        client.send(sent + request(READ, 0, 8, cookie=2))
        assert await client.reply() == (error, 0, b""), claim
        assert await client.reply(8) == (0, 2, bytes(8)), claim
        assert node.data == bytes(SIZE)
        await client.close()
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
@on_both_loops
async def test_a_read_only_export_refuses_changes_and_the_session_lives(
    short_dir: Path, command: int
) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("ro", node, writable=False)):
        client = await RawClient.open(short_dir, "ro")
        client.send(request(command, 0, 2, cookie=1) + (b"ab" if command == WRITE else b""))
        client.send(request(READ, 0, 2, cookie=2) + request(FLUSH, cookie=3))
        assert await client.reply() == (errno.EPERM, 1, b"")
        assert await client.reply(2) == (0, 2, bytes(2))
        assert await client.reply() == (0, 3, b"")
        await client.close()


@pytest.mark.parametrize("length", [(32 << 20) + 1, GIB4])
@on_both_loops
async def test_a_write_of_more_than_32_mib_gets_its_error_and_its_end(
    short_dir: Path, length: int
) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        client.send(request(WRITE, 0, length, cookie=1))
        assert await client.reply() == (errno.EINVAL, 1, b"")
        assert await client.at_end()
        await client.close()
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize(
    "sent", [bytes(28), request(READ, 0, 1)[::-1], b"\x25\x60\x95\x14" + bytes(24)]
)
@on_both_loops
async def test_a_wrong_request_magic_ends_the_connection(short_dir: Path, sent: bytes) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node)):
        client = await RawClient.open(short_dir, "e")
        client.send(request(READ, 0, 3, cookie=1) + sent)
        assert await client.reply(3) == (0, 1, bytes(3))
        assert await client.at_end()
        await client.close()
        await check_healthy(short_dir, "e", node)


@on_both_loops
async def test_a_conversation_cut_at_every_byte_leaves_the_server_well(short_dir: Path) -> None:
    node = MemoryNode(SIZE)
    conversation = choose("e") + request(WRITE, 0, 5) + b"hello" + request(READ, 0, 5)
    conversation += request(FLUSH) + request(DISC)
    async with serving(short_dir, Export("e", node)) as server:
        for length in range(len(conversation) + 1):
            client = await RawClient.connect(short_dir)
            client.send(conversation[:length])
            await client.writer.drain()
            if length % 2:
                client.writer.transport.abort()
            else:
                client.writer.write_eof()
                assert (await client.reader.read(-1)).startswith(b"NBDMAGIC")
            await client.close()
        await settled(lambda: not server.connections and not server._negotiations)
        node.data[:5] = bytes(5)
        await check_healthy(short_dir, "e", node)


@pytest.mark.parametrize("prefix", ["", "client flags", "go"])
def test_random_bytes_at_any_phase_harm_nobody(short_dir: Path, prefix: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    start = {"": b"", "client flags": struct.pack(">I", 3), "go": choose("ro")}[prefix]

    async def scenario() -> None:
        node = MemoryNode(SIZE)
        exports = Export("e", node), Export("ro", node, writable=False)
        async with serving(short_dir, *exports):
            for _ in range(50):
                client = await RawClient.connect(short_dir)
                client.send(start + rng.randbytes(rng.choice([28, 100, 5000])))
                client.writer.write_eof()
                try:
                    await client.reader.read(-1)
                except ConnectionResetError:
                    pass
                await client.close()
            assert node.data == bytes(SIZE)
            await check_healthy(short_dir, "e", node)

    asyncio.run(scenario())


@on_both_loops
async def test_who_does_not_finish_the_handshake_in_time_is_dropped(short_dir: Path) -> None:
    node = MemoryNode(SIZE)
    sent = [b"", b"\0\0", struct.pack(">I", 3), struct.pack(">I", 3) + option(3)[:7]]
    async with serving(short_dir, Export("e", node), handshake_timeout_s=0.05) as server:
        steady = await RawClient.open(short_dir, "e")
        clients = [await RawClient.connect(short_dir) for _ in sent]
        for client, data in zip(clients, sent, strict=True):
            client.send(data)
        for client in clients:
            assert await client.receive(18)
            assert await client.at_end()
            await client.close()
        assert not server._negotiations
        assert await steady.pread(0, 4) == bytes(4)  # the deadline is the handshake's alone
        await steady.close()


@on_both_loops
async def test_a_client_too_many_is_refused_until_another_leaves(short_dir: Path) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node), connections_max=3) as server:
        serving_clients = [await RawClient.open(short_dir, "e") for _ in range(2)]
        haggling = await RawClient.connect(short_dir)
        await haggling.receive(18)
        refused = await RawClient.connect(short_dir)
        assert await refused.at_end()
        await refused.close()
        await serving_clients[0].close()
        await settled(lambda: len(server.connections) == 1)
        await check_healthy(short_dir, "e", node)
        await serving_clients[1].close()
        await haggling.close()


@on_both_loops
async def test_clients_leave_a_quarter_of_the_descriptors_to_the_disks(short_dir: Path) -> None:
    node = MemoryNode(SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard))
    try:
        server = NbdServer(EventBus())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.add_export(Export("e", node))
    await server.listen(uri(short_dir))
    clients = [await RawClient.open(short_dir, "e") for _ in range(6)]
    refused = await RawClient.connect(short_dir)
    assert await refused.at_end()
    for client in (refused, *clients):
        await client.close()
    await server.close()


@on_both_loops
async def test_a_haggler_that_does_not_read_is_not_read_from(short_dir: Path) -> None:
    exports = [Export(f"export {n}", MemoryNode(0), "d" * 4096) for n in range(200)]
    async with serving(short_dir, *exports) as server:
        client = await RawClient.connect(short_dir)
        client.send(struct.pack(">I", 3) + option(3) * 30)
        await settled(lambda: any(each.write_paused for each in server._negotiations))
        (negotiation,) = server._negotiations
        assert isinstance(negotiation, Negotiation)
        assert negotiation.transport is not None
        one_list = sum(24 + len(each.name) + 4096 for each in exports) + 20
        assert negotiation.transport.get_write_buffer_size() <= one_list + 65536
        await client.receive(18 + 30 * one_list)  # all the same, it gets what it asked for
        client.send(option(2))
        assert (await client.receive(20))[8:16] == struct.pack(">II", 2, 1)
        await client.close()


@on_both_loops
async def test_200_clients_at_a_time_are_all_served(short_dir: Path) -> None:
    node = MemoryNode(SIZE)
    async with serving(short_dir, Export("e", node)):
        clients = [await RawClient.open(short_dir, "e") for _ in range(200)]
        for index, client in enumerate(clients):
            await client.pwrite(index * 100, bytes([index]) * 100)
        for index, client in enumerate(reversed(clients)):
            assert await client.pread((199 - index) * 100, 100) == bytes([199 - index]) * 100
        for index, client in enumerate(clients):
            assert await client.pread((199 - index) * 100, 100) == bytes([199 - index]) * 100
            await client.close()
