"""Sessions with real servers: nbdkit, qemu-nbd and replnbd itself; all bytes are compared."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from pathlib import Path
from typing import Any

import pytest
from nbd_support import fresh_seed, nbdkit, on_both_loops, qemu_img, qemu_nbd, served, session, uri

from replnbd.block import FileNode, MemoryNode, NbdConnection, connect_nbd, parse_nbd_uri
from replnbd.block.nbd_connect import _connected_socket
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer

MIB = 1 << 20
SIZE = 8 * MIB
WRITE = 1


async def exercise(connection: NbdConnection, model: bytearray, rng: random.Random) -> None:
    """Random requests of every kind, several at a time, against a model."""
    for _ in range(60):
        writes = []
        for area in range(4):  # apart from each other: the order of their effects does not matter
            first = area * SIZE // 4
            offset = first + rng.randrange(SIZE // 4 - 1)
            length = rng.randint(1, min(first + SIZE // 4 - offset, rng.choice([5000, 400_000])))
            content = rng.choice([rng.randbytes(length), bytes(length)])
            model[offset : offset + length] = content
            if any(content) or not connection.can_zero:
                writes.append(connection.pwrite(offset, content, fua=rng.random() < 0.1))
            else:
                writes.append(connection.write_zeroes(offset, length, unmap=rng.random() < 0.5))
        await asyncio.gather(*writes)
        offset = rng.randrange(SIZE)
        got = bytearray(rng.randint(1, min(SIZE - offset, 600_000)))
        await connection.pread(offset, memoryview(got))
        assert got == model[offset : offset + len(got)]
    await connection.flush()
    everything = bytearray(SIZE)
    await connection.pread(0, memoryview(everything))
    assert everything == model
    assert connection.bytes_outstanding == 0
    if connection.contexts:
        await check_status(connection, model)


async def check_status(connection: NbdConnection, model: bytearray) -> None:
    """What is said to be zero is zero."""
    at = 0
    while at < SIZE:
        for length, flags in (await connection.block_status(at, SIZE - at))["base:allocation"]:
            assert length > 0
            assert not flags & 2 or not any(model[at : at + length])
            at += length
    assert at == SIZE


@on_both_loops
async def test_nbdkit_over_a_unix_socket(short_dir: Path) -> None:
    with nbdkit(short_dir, "memory", str(SIZE)):
        async with session(uri(short_dir)) as connection:
            assert connection.size == SIZE
            assert not connection.extended
            await exercise(connection, bytearray(SIZE), random.Random(fresh_seed()))


@on_both_loops
async def test_qemu_nbd_over_a_unix_socket(short_dir: Path) -> None:
    disk = short_dir / "disk"
    rng = random.Random(fresh_seed())
    model = bytearray(rng.randbytes(SIZE // 2) + bytes(SIZE // 2))
    disk.write_bytes(model)
    with qemu_nbd(short_dir, "-f", "raw", "-x", "ä disk", disk) as server:
        async with session(uri(short_dir, "%C3%A4%20disk")) as connection:
            await exercise(connection, model, rng)
        server.terminate()
    assert disk.read_bytes() == model


@on_both_loops
async def test_replnbd_itself_with_extended_headers(short_dir: Path) -> None:
    disk = short_dir / "disk"
    disk.write_bytes(bytes(SIZE))
    node = FileNode.open(disk)
    model = bytearray(SIZE)
    async with served(short_dir, node) as address, session(address) as connection:
        assert connection.extended
        assert connection.can_fast_zero
        await exercise(connection, model, random.Random(fresh_seed()))
    await node.close()
    assert disk.read_bytes() == model


@on_both_loops
async def test_nbdkit_without_structured_replies(short_dir: Path) -> None:
    with nbdkit(short_dir, "--no-sr", "memory", str(SIZE)):
        async with session(uri(short_dir)) as connection:
            assert not connection.contexts
            await exercise(connection, bytearray(SIZE), random.Random(fresh_seed()))
            with pytest.raises(OSError, match="contexts") as caught:
                await connection.block_status(0, SIZE)
            assert caught.value.errno == errno.ENOTSUP


@on_both_loops
async def test_a_read_of_more_than_a_payload_is_cut(short_dir: Path) -> None:
    content = random.Random(1).randbytes(40 * MIB)
    with nbdkit(short_dir, "memory", "40M"):
        async with session(uri(short_dir)) as connection:
            await connection.pwrite(0, content)
            got = bytearray(40 * MIB)
            await connection.pread(0, memoryview(got))
            assert got == content


@on_both_loops
async def test_dirty_bitmaps_of_qemu_are_told(short_dir: Path) -> None:
    disk = short_dir / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, str(SIZE))
    qemu_img("bitmap", "--add", disk, "b0")
    name = "qemu:dirty-bitmap:b0"
    with qemu_nbd(short_dir, "-f", "qcow2", disk) as server:
        async with session(uri(short_dir)) as connection:
            await connection.pwrite(MIB, b"x" * 100)
        server.terminate()
    with qemu_nbd(short_dir, "-r", "-f", "qcow2", "-B", "b0", disk):
        contexts = ("base:allocation", name, "qemu:nothing")
        async with session(uri(short_dir), contexts=contexts) as connection:
            assert connection.read_only
            status = await connection.block_status(0, SIZE)
            assert status.keys() == {"base:allocation", name}
            assert status[name] == [(MIB, 0), (65536, 1), (SIZE - MIB - 65536, 0)]


@on_both_loops
async def test_requests_go_out_in_the_order_of_submit(short_dir: Path) -> None:
    with nbdkit(short_dir, "-t", "1", "memory", str(SIZE)):
        async with session(uri(short_dir)) as connection:
            ended: list[int] = []
            for number in range(200):
                size = 100_000 if number % 50 == 7 else 512
                payload = bytearray([number]) * size

                def done(failure: OSError | None, number: int = number) -> None:
                    assert failure is None
                    ended.append(number)

                connection.submit(WRITE, 0, 0, size, payload=payload, done=done)
                payload[:] = b"!" * size  # it is ours again
            assert connection.bytes_outstanding > 200 * 512
            await connection.flush()
            assert ended == list(range(200))
            got = bytearray(100_000)
            await connection.pread(0, memoryview(got))
            assert got == b"\xc7" * 512 + b"\x9d" * (100_000 - 512)


@on_both_loops
async def test_tcp_is_tuned(short_dir: Path) -> None:
    server = NbdServer(EventBus())
    server.add_export(Export("disk", MemoryNode(SIZE)))
    await server.listen("nbd://127.0.0.1:0")
    try:
        async with session(f"{server.uris[0]}/disk") as connection:
            await exercise(connection, bytearray(SIZE), random.Random(fresh_seed()))
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    finally:
        await server.close()


class Resolver:
    """The running loop, but for a host with these addresses."""

    def __init__(self, *addresses: tuple[str, int]) -> None:
        self._addresses = addresses

    async def getaddrinfo(self, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", each) for each in self._addresses]

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)


@on_both_loops
async def test_an_address_that_does_not_answer_is_passed_over() -> None:
    target = parse_nbd_uri("nbd://two.addresses.example/")
    with socket.socket() as full, socket.create_server(("127.0.0.1", 0)) as good:
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        crowd = [socket.socket() for _ in range(3)]
        for each in crowd:  # the last ones are not answered any more
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        resolver: Any = Resolver(full.getsockname(), good.getsockname())
        with await _connected_socket(resolver, target, 0.4) as sock:
            assert sock.getpeername() == good.getsockname()
        for each in crowd:
            each.close()


# Section: errors


@on_both_loops
async def test_every_error_reaches_its_request_alone(short_dir: Path) -> None:
    with nbdkit(short_dir, "memory", str(SIZE), "--filter=error", "error-rate=50%"):
        async with session(uri(short_dir)) as connection:
            reads = [connection.pread(0, memoryview(bytearray(512))) for _ in range(200)]
            results = await asyncio.gather(*reads, return_exceptions=True)
            failures = [result for result in results if result is not None]
            assert 0 < len(failures) < 200
            assert {getattr(failure, "errno", None) for failure in failures} == {errno.EIO}
            assert not connection.closed


@on_both_loops
async def test_an_export_that_is_not_there_is_enoent(short_dir: Path) -> None:
    disk = short_dir / "disk"
    disk.write_bytes(bytes(4096))
    with qemu_nbd(short_dir, "-f", "raw", "-x", "disk", disk):
        with pytest.raises(OSError, match="other") as caught:
            await connect_nbd(parse_nbd_uri(uri(short_dir, "other")))
        assert caught.value.errno == errno.ENOENT


@on_both_loops
async def test_nobody_there_is_an_oserror(short_dir: Path) -> None:
    for address in (uri(short_dir), "nbd://127.0.0.1:1/"):
        with pytest.raises(OSError, match="cannot connect to nbd"):
            await connect_nbd(parse_nbd_uri(address))


@on_both_loops
async def test_a_server_that_dies_ends_everything_once(short_dir: Path) -> None:
    delay = ["--filter=delay", "delay-write=60"]
    with nbdkit(short_dir, "memory", str(SIZE), *delay) as server:
        connection = await connect_nbd(parse_nbd_uri(uri(short_dir)))
        closed: list[OSError] = []
        connection.on_closed = closed.append
        ended: list[OSError | None] = []
        for _ in range(10):
            connection.submit(WRITE, 0, 0, 512, payload=bytes(512), done=ended.append)
        await asyncio.sleep(0.05)
        assert not ended
        server.kill()
        while not closed:
            await asyncio.sleep(0.01)
        assert [failure and failure.errno for failure in ended] == [errno.ECONNRESET] * 10
        assert closed[0].errno == errno.ECONNRESET
        assert connection.closed
        connection.submit(WRITE, 0, 0, 512, payload=bytes(512), done=ended.append)
        assert len(ended) == 10
        await asyncio.sleep(0)
        assert len(ended) == 11
        await connection.close()
        assert len(closed) == 1


@on_both_loops
async def test_a_silent_server_is_given_up(short_dir: Path) -> None:
    with nbdkit(short_dir, "memory", str(SIZE), "--filter=delay", "delay-write=60"):
        connection = await connect_nbd(parse_nbd_uri(uri(short_dir)), response_timeout_s=0.2)
        await asyncio.sleep(0.5)
        assert not connection.closed  # nothing is owed
        with pytest.raises(OSError, match="not answered") as caught:
            await connection.pwrite(0, bytes(512))
        assert caught.value.errno == errno.ETIMEDOUT
        await connection.close()


@on_both_loops
async def test_a_cancelled_read_leaves_its_buffer_alone(short_dir: Path) -> None:
    with nbdkit(short_dir, "memory", str(SIZE), "--filter=delay", "delay-read=100ms"):
        async with session(uri(short_dir)) as connection:
            await connection.pwrite(0, b"x" * 4096)
            buffer = bytearray(4096)
            read = asyncio.ensure_future(connection.pread(0, memoryview(buffer)))
            await asyncio.sleep(0.01)
            read.cancel()
            with pytest.raises(asyncio.CancelledError):
                await read
            await asyncio.sleep(0.2)
            assert buffer == bytes(4096)
            assert connection.bytes_outstanding == 0


@on_both_loops
async def test_close_waits_for_what_is_outstanding(short_dir: Path) -> None:
    with nbdkit(short_dir, "memory", str(SIZE), "--filter=delay", "delay-write=100ms"):
        connection = await connect_nbd(parse_nbd_uri(uri(short_dir)))
        ended: list[OSError | None] = []
        connection.submit(WRITE, 0, 0, 512, payload=bytes(512), done=ended.append)
        await connection.close()
        assert ended == [None]
        await connection.close()
