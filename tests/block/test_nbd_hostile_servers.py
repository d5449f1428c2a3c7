"""A client meets servers that end, garble, lie or say nothing, at every byte of the conversation:
whatever they do, everything it was asked for ends, soon, and it is not harmed."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from nbd_scripts import ASKED, DATA, OPTIONS, REPLIES, SIZE, Script, chunk, entered, scripted
from nbd_support import fresh_seed, on_both_loops

from replnbd.block import connect_nbd, parse_nbd_uri
from replnbd.errors import ProtocolError

LATE_S = 3.0
"""How long a client waits for an answer."""

HANGS_S = 10 * LATE_S
"""A client that has not ended by then hangs."""

Talk = tuple[bytes, dict[str, list[tuple[int, int]]]]
"""What a session read, and the extents that it was told of."""

RIGHT: Talk = (DATA, {"base:allocation": [(1 << 20, 3)]})


async def talk(address: str, timeout_s: float = LATE_S) -> Talk:
    """One session with four requests, each after the one before."""
    connection = await connect_nbd(
        parse_nbd_uri(address), timeout_s=timeout_s, response_timeout_s=timeout_s
    )
    closed: list[OSError] = []
    connection.on_closed = closed.append
    try:
        buffer = bytearray(40_000)
        await connection.pread(512, memoryview(buffer))
        await connection.pwrite(0, bytes(100))
        found = await connection.block_status(0, 1 << 20)
        await connection.flush()
    finally:
        await connection.close()
        assert len(closed) == 1
        assert connection.bytes_outstanding == 0
    return bytes(buffer), found


async def outcome(address: str, timeout_s: float = LATE_S) -> Talk | BaseException:
    """How `talk` ended, which it has to, soon: with what it heard, or one of two kinds of error."""
    async with asyncio.timeout(HANGS_S):
        try:
            return await talk(address, timeout_s)
        except (OSError, ProtocolError) as exc:
            return exc


async def ends_in_time(address: str, timeout_s: float = LATE_S) -> BaseException | None:
    """How `talk` ended; with data that is right, or with an error."""
    ended = await outcome(address, timeout_s)
    if isinstance(ended, BaseException):
        return ended
    assert ended == RIGHT
    return None


@on_both_loops
async def test_a_server_that_keeps_to_the_script_is_understood(short_dir: Path) -> None:
    for piece in (1 << 30, 1000):
        async with scripted(short_dir, Script(OPTIONS + REPLIES, piece=piece)) as address:
            assert await ends_in_time(address) is None


def cut(turns: list[bytes], length: int) -> list[bytes]:
    """The first `length` bytes of a conversation."""
    kept = []
    for turn in turns:
        kept.append(turn[:length])
        length -= len(turn)
        if length <= 0:
            break
    return kept


def cuts(turns: list[bytes]) -> list[int]:
    """Every byte, but not in the middle of data."""
    total = sum(map(len, turns))
    start = sum(map(len, OPTIONS))
    return [at for at in range(total) if not start + 50 < at < start + 29_990 or at % 5000 == 0][
        :-1
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["close", "reset"])
@on_both_loops
async def test_a_server_may_end_at_every_byte(short_dir: Path, ending: str) -> None:
    turns = OPTIONS + REPLIES
    points = [
        at for at in cuts(turns) if at < 400 or at % 97 == 0 or at > sum(map(len, turns)) - 200
    ]
    for at in points:
        async with scripted(short_dir, Script(cut(turns, at), ending)) as address:
            failure = await ends_in_time(address)
            assert isinstance(failure, OSError), f"cut at {at}: {failure!r}"
            assert failure.errno in (errno.ECONNRESET, errno.EPIPE), f"cut at {at}: {failure!r}"


@pytest.mark.slow
@on_both_loops
async def test_a_server_may_garble_every_byte(short_dir: Path) -> None:
    turns = OPTIONS + REPLIES
    seed = fresh_seed()
    rng = random.Random(seed)
    whole = b"".join(turns)
    header_bytes = [at for at in cuts(turns) if at < 330 or at > len(whole) - 10_300]
    for at in rng.sample(header_bytes, 150):
        garbled, position = [], 0
        for turn in turns:
            changed = bytearray(turn)
            if position <= at < position + len(turn):
                changed[at - position] ^= rng.randint(1, 255)
            garbled.append(bytes(changed))
            position += len(turn)
        async with scripted(short_dir, Script(garbled)) as address:
            # Data and flags may be anything; that there is an end is what counts.
            await outcome(address)


@pytest.mark.parametrize("turns", range(1, 9))
@on_both_loops
async def test_a_server_may_be_silent_at_every_turn(short_dir: Path, turns: int) -> None:
    said = (OPTIONS + REPLIES)[:turns]
    said[-1] = said[-1][:-1]  # all but a byte
    async with scripted(short_dir, Script(said, "silence")) as address:
        failure = await ends_in_time(address, 0.15)
        assert isinstance(failure, OSError)
        assert failure.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("ending", ["noise", "zeroes"])
@pytest.mark.parametrize("turns", [1, 2, 4, 5, 6, 7])
@on_both_loops
async def test_a_server_may_talk_without_end(short_dir: Path, turns: int, ending: str) -> None:
    async with scripted(short_dir, Script((OPTIONS + REPLIES)[:turns], ending)) as address:
        failure = await ends_in_time(address)
        assert isinstance(failure, (OSError, ProtocolError))


@on_both_loops
async def test_an_endless_reply_is_not_kept(short_dir: Path) -> None:
    """64 MiB of extents, again and again; what we hold does not grow."""
    count = 1 << 20
    status = struct.pack(">II", 5, count) + struct.pack(">QQ", 512, 0) * count
    said = [*OPTIONS, chunk(6, 1, 0, status)]
    async with scripted(short_dir, Script(said, "silence")) as address:
        connection = await connect_nbd(parse_nbd_uri(address))
        try:
            found = await connection.block_status(0, SIZE)
        finally:
            connection.abort(OSError(errno.ECONNRESET, "enough"))
            await connection.close()
    assert found["base:allocation"] == [(512, 0)] * 8192


@on_both_loops
async def test_a_reply_that_nobody_asked_for_ends_the_session(short_dir: Path) -> None:
    said = [*OPTIONS[:-1], OPTIONS[-1] + chunk(0, 1, 0)]
    async with scripted(short_dir, Script(said, "silence")) as address:
        failure = await ends_in_time(address)
        assert isinstance(failure, OSError)
        assert failure.errno == errno.EPROTO
        assert "cookie 1" in str(failure)


@on_both_loops
async def test_a_server_that_shuts_down_is_left_softly(short_dir: Path) -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for turn, asked in zip(OPTIONS, ASKED, strict=False):
            writer.write(turn)
            await reader.readexactly(asked)
        writer.write(chunk(0x8001, 1, 512, struct.pack(">IH", 108, 3) + b"bye"))
        heard.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_unix_server(serve, short_dir / "s")
    async with server:
        failure = await ends_in_time(f"nbd+unix:///?socket={short_dir}/s")
    assert isinstance(failure, OSError)
    assert failure.errno == errno.ESHUTDOWN
    assert "bye" in str(failure)
    assert (await heard)[:8] == struct.pack(">IHH", 0x21E41C71, 0, 2)


@on_both_loops
async def test_a_server_that_does_not_read_is_given_up(short_dir: Path) -> None:
    over = asyncio.Event()

    async def sleep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()

    async with entered(short_dir, sleep) as address:
        connection = await connect_nbd(parse_nbd_uri(address), response_timeout_s=0.2)
        with pytest.raises(OSError, match="not answered") as caught:
            await connection.pwrite(0, bytes(16 << 20))
        assert caught.value.errno == errno.ETIMEDOUT
        await connection.close()
        over.set()


@on_both_loops
async def test_a_server_that_never_answers_one_request_is_given_up(short_dir: Path) -> None:
    """Though it answers all others."""

    async def answer_all_but_one(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while header := await reader.readexactly(32):
            cookie = int.from_bytes(header[8:16])
            if cookie != 3:
                writer.write(chunk(0, cookie, 0))

    async with entered(short_dir, answer_all_but_one) as address:
        connection = await connect_nbd(parse_nbd_uri(address), response_timeout_s=0.1)
        for _ in range(2):
            await connection.flush()
        left = asyncio.ensure_future(connection.flush())
        await asyncio.sleep(0)
        begin = asyncio.get_running_loop().time()
        while not left.done() and asyncio.get_running_loop().time() < begin + HANGS_S:
            with suppress(OSError):
                await connection.flush()
        with pytest.raises(OSError, match=r"left a request unanswered for 1\.5") as caught:
            await left
        assert caught.value.errno == errno.ETIMEDOUT
        await connection.close()


@pytest.mark.slow
@on_both_loops
async def test_a_slow_line_is_no_silence(short_dir: Path) -> None:
    length = 4 << 20

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = 32 + length
        while left:
            left -= len(await reader.read(min(left, 150_000)))
            await asyncio.sleep(0.02)
        writer.write(chunk(0, 1, 0))
        await reader.read(1000)

    async with entered(short_dir, read) as address:
        connection = await connect_nbd(parse_nbd_uri(address), response_timeout_s=0.25)
        await connection.pwrite(0, bytes(length))  # takes a second
        await connection.close()


@on_both_loops
async def test_a_trickle_is_silence(short_dir: Path) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(32)
        writer.write(chunk(1, 1, 0, struct.pack(">Q", 0) + b"x" * 100_000)[:40])
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.005)
            await writer.drain()

    async with entered(short_dir, trickle) as address:
        connection = await connect_nbd(parse_nbd_uri(address), response_timeout_s=0.2)
        with pytest.raises(OSError, match="not answered"):
            await connection.pread(0, memoryview(bytearray(100_000)))
        await connection.close()


@on_both_loops
async def test_nothing_is_left_of_attempts_that_failed(short_dir: Path) -> None:
    for turns in range(len(OPTIONS)):
        said = [*OPTIONS[:turns], OPTIONS[turns][:-1]]
        for ending in ("close", "silence", "noise"):
            async with scripted(short_dir, Script(said, ending)) as address:
                before = set(os.listdir("/proc/self/fd"))
                target = parse_nbd_uri(address)
                with pytest.raises((OSError, ProtocolError)):
                    await connect_nbd(target, timeout_s=0.05)
                attempt = asyncio.ensure_future(connect_nbd(target))
                await asyncio.sleep(0.01)
                attempt.cancel()
                await asyncio.wait([attempt])
                for _ in range(100):  # the server's ends close in their own time
                    if set(os.listdir("/proc/self/fd")) == before:
                        break
                    await asyncio.sleep(0.01)
                else:
                    raise AssertionError(f"after {turns} turns and {ending} there are more files")
