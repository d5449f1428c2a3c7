"""What each operation of a session says on the wire, and what it does where a server cannot."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from nbd_scripts import SIZE, chunk, entered
from nbd_support import on_both_loops, settled

from replnbd.block import NbdConnection, connect_nbd, parse_nbd_uri

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EVERYTHING = 0xD6D
GIB = 1 << 30
MIB = 1 << 20


class Asked(NamedTuple):
    """A request, as a server saw it."""

    command: int
    flags: int
    offset: int
    length: int


class Recorder:
    """A server that acknowledges everything, reads with zeroes."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readexactly(32)
            magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQQ", head)
            assert magic == 0x21E41C71
            if flags & PAYLOAD_LEN:
                await reader.readexactly(length)
            self.asked.append(Asked(command, flags, offset, length))
            if command == DISC:
                return
            if command == READ:
                writer.write(chunk(1, cookie, offset, struct.pack(">Q", offset) + bytes(length)))
            elif command == STATUS:
                writer.write(chunk(6, cookie, offset, struct.pack(">IIQQ", 5, 1, length, 3)))
            else:
                writer.write(chunk(0, cookie, offset))


Operation = Callable[[NbdConnection], Awaitable[object]]


async def said(
    folder: Path, operation: Operation, flags: int, sizes: tuple[int, int, int] | None = None
) -> list[Asked]:
    """What a server with these flags hears of an operation."""
    recorder = Recorder()
    async with entered(folder, recorder, flags=flags, sizes=sizes) as address:
        connection = await connect_nbd(parse_nbd_uri(address))
        try:
            await operation(connection)
        finally:
            await connection.close()
            await settled()
    assert recorder.asked.pop() == Asked(DISC, 0, 0, 0)
    return recorder.asked


OPERATIONS: dict[str, tuple[Operation, list[Asked]]] = {
    "read": (lambda s: s.pread(5, memoryview(bytearray(7))), [Asked(READ, 0, 5, 7)]),
    "write": (lambda s: s.pwrite(5, b"1234567"), [Asked(WRITE, PAYLOAD_LEN, 5, 7)]),
    "durable write": (
        lambda s: s.pwrite(5, b"x", fua=True), [Asked(WRITE, PAYLOAD_LEN | FUA, 5, 1)],
    ),
    "long read": (
        lambda s: s.pread(0, memoryview(bytearray(33 * MIB))),
        [Asked(READ, 0, 0, 32 * MIB), Asked(READ, 0, 32 * MIB, MIB)],
    ),
    "long write": (
        lambda s: s.pwrite(1, bytes(33 * MIB)),
        [Asked(WRITE, PAYLOAD_LEN, 1, 32 * MIB), Asked(WRITE, PAYLOAD_LEN, 1 + 32 * MIB, MIB)],
    ),
    "zeroes": (lambda s: s.write_zeroes(5, 7), [Asked(ZEROES, 0, 5, 7)]),
    "allocated zeroes": (
        lambda s: s.write_zeroes(5, 7, unmap=False), [Asked(ZEROES, NO_HOLE, 5, 7)],
    ),
    "fast durable zeroes": (
        lambda s: s.write_zeroes(5, 7, fast=True, fua=True), [Asked(ZEROES, FAST_ZERO | FUA, 5, 7)],
    ),
    "all zeroes": (lambda s: s.write_zeroes(0, SIZE), [Asked(ZEROES, 0, 0, GIB)]),
    "trim": (lambda s: s.trim(5, 7), [Asked(TRIM, 0, 5, 7)]),
    "durable trim": (lambda s: s.trim(5, 7, fua=True), [Asked(TRIM, FUA, 5, 7)]),
    "flush": (lambda s: s.flush(), [Asked(FLUSH, 0, 0, 0)]),
    "cache": (
        lambda s: s.cache(0, 33 * MIB),
        [Asked(CACHE, 0, 0, 32 * MIB), Asked(CACHE, 0, 32 * MIB, MIB)],
    ),
    "block status": (lambda s: s.block_status(0, SIZE), [Asked(STATUS, 0, 0, SIZE)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@on_both_loops
async def test_an_operation_is_a_request(short_dir: Path, name: str) -> None:
    operation, expected = OPERATIONS[name]
    assert await said(short_dir, operation, EVERYTHING) == expected


CANNOT = {
    "zeroes": OPERATIONS["zeroes"][0],
    "trim": OPERATIONS["trim"][0],
    "cache": OPERATIONS["cache"][0],
}


@pytest.mark.parametrize("name", CANNOT)
@on_both_loops
async def test_what_a_server_cannot_is_not_asked_for(short_dir: Path, name: str) -> None:
    with pytest.raises(OSError, match="the server has no") as caught:
        await said(short_dir, CANNOT[name], 1)
    assert caught.value.errno == errno.ENOTSUP


@on_both_loops
async def test_fast_zeroes_are_asked_for_only_where_they_are_offered(short_dir: Path) -> None:
    with pytest.raises(OSError, match="fast") as caught:
        await said(short_dir, lambda s: s.write_zeroes(0, 1, fast=True), EVERYTHING & ~0x800)
    assert caught.value.errno == errno.ENOTSUP


@on_both_loops
async def test_without_fua_there_is_a_flush_behind(short_dir: Path) -> None:
    without = EVERYTHING & ~8
    flush = Asked(FLUSH, 0, 0, 0)

    async def durably(session: NbdConnection) -> None:
        await session.pwrite(0, b"x", fua=True)
        await session.write_zeroes(1, 1, fua=True)
        await session.trim(2, 1, fua=True)

    assert await said(short_dir, durably, without) == [
        Asked(WRITE, PAYLOAD_LEN, 0, 1), flush, Asked(ZEROES, 0, 1, 1), flush, Asked(TRIM, 0, 2, 1),
        flush,
    ]  # fmt: skip


@on_both_loops
async def test_without_flush_there_is_none(short_dir: Path) -> None:
    assert await said(short_dir, lambda s: s.flush(), EVERYTHING & ~4) == []


@on_both_loops
async def test_the_servers_sizes_are_kept_to(short_dir: Path) -> None:
    sizes = (4096, 4096, 3 * 4096 + 100)
    heard = await said(short_dir, lambda s: s.pwrite(4096, bytes(16384)), EVERYTHING, sizes)
    assert heard == [
        Asked(WRITE, PAYLOAD_LEN, 4096, 3 * 4096), Asked(WRITE, PAYLOAD_LEN, 4 * 4096, 4096),
    ]  # fmt: skip
    for offset, length in ((1, 4096), (0, 100)):
        with pytest.raises(OSError, match="blocks of 4096") as caught:
            await said(short_dir, lambda s, o=offset, n=length: s.trim(o, n), EVERYTHING, sizes)  # type: ignore[misc]
        assert caught.value.errno == errno.EINVAL


@on_both_loops
async def test_an_aborted_session_says_no_more(short_dir: Path) -> None:
    recorder = Recorder()
    async with entered(short_dir, recorder) as address:
        connection = await connect_nbd(parse_nbd_uri(address))
        reason = OSError(errno.ECANCELED, "enough of it")
        told: list[OSError] = []
        ended: list[OSError | None] = []
        connection.submit(WRITE, 0, 0, 3, payload=b"abc", done=ended.append)
        connection.abort(reason)
        connection.abort(OSError(errno.EIO, "again"))
        assert ended == [reason]
        connection.on_closed = told.append  # late, and told all the same
        assert connection.on_closed is not None
        with pytest.raises(OSError, match="enough of it"):
            await connection.flush()
        await connection.close()
        assert told == [reason]
        assert connection.on_closed is None
    assert recorder.asked == []


@on_both_loops
async def test_a_done_may_submit_and_may_end_the_session(short_dir: Path) -> None:
    async with entered(short_dir, Recorder()) as address:
        connection = await connect_nbd(parse_nbd_uri(address))
        count = 0
        over = asyncio.Event()

        def done(failure: OSError | None) -> None:
            nonlocal count
            count += 1
            if failure is not None:
                if count == 120:
                    over.set()
            elif count < 100:
                connection.submit(WRITE, 0, count, 1, payload=b"x", done=done)
            elif count == 100:
                connection.abort(OSError(errno.ECANCELED, "enough of it"))

        for at in range(21):
            connection.submit(WRITE, 0, at, 1, payload=b"x", done=done)
        await over.wait()
        await settled()
        assert count == 120
        await connection.close()
