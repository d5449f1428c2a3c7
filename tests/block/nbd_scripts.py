"""Servers that say what a test tells them to, whatever they hear."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

GREETING = b"NBDMAGICIHAVEOPT\0\3"
SIZE = 1 << 30


def reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload


def chunk(kind: int, cookie: int, offset: int, payload: bytes = b"", *, flags: int = 1) -> bytes:
    head = struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload))
    return head + payload


CONTEXT = struct.pack(">I", 5) + b"base:allocation"
EXPORT = struct.pack(">HQH", 0, SIZE, 0x96D)
DATA = random.Random(1).randbytes(40_000)
OPTIONS = [
    GREETING,
    reply(11, 1),
    reply(10, 4, CONTEXT) + reply(10, 1),
    reply(7, 3, EXPORT) + reply(7, 1),
]
"""A server's side of a handshake, turn by turn."""

REPLIES = [
    chunk(1, 1, 512, struct.pack(">Q", 512) + DATA[:30_000], flags=0)
    + chunk(1, 1, 512, struct.pack(">Q", 30_512) + DATA[30_000:]),
    chunk(0, 2, 0),
    chunk(6, 3, 0, struct.pack(">IIQQ", 5, 1, 1 << 20, 3)),
    chunk(0, 4, 0),
]
"""And of the four requests of `talk`."""

ASKED = [4 + 16, 16 + 4 + 0 + 4 + 4 + 15, 16 + 4 + 2 + 6, 32, 32 + 100, 32, 32]
"""How many bytes the client has said when it is the server's turn again, after the greeting."""


@dataclass
class Script:
    """What a server says, turn by turn, and what it does at the end of that."""

    turns: list[bytes]
    ending: str = "close"
    piece: int = 1 << 30


@asynccontextmanager
async def scripted(folder: Path, script: Script) -> AsyncIterator[str]:
    """A server that says so, whatever it hears."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for turn, asked in zip(script.turns, [*ASKED, 0], strict=False):
                for at in range(0, len(turn), script.piece):
                    writer.write(turn[at : at + script.piece])
                    await writer.drain()
                    if script.piece < len(turn):
                        await asyncio.sleep(0)
                if turn is not script.turns[-1]:
                    await reader.readexactly(asked)
            match script.ending:
                case "reset":
                    writer.transport.abort()
                case "silence":
                    await reader.read(-1)
                case "noise":
                    while True:
                        writer.write(os.urandom(1 << 16))
                        await writer.drain()
                case "zeroes":
                    while True:
                        writer.write(bytes(1 << 16))
                        await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, folder / "s")
    async with server:
        yield f"nbd+unix:///?socket={folder}/s"


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def entered(
    folder: Path, then: Handler, *, flags: int = 0x96D, sizes: tuple[int, int, int] | None = None
) -> AsyncIterator[str]:
    """A server whose handshake is good; `then` has the rest."""
    last = reply(7, 3, struct.pack(">HQH", 0, SIZE, flags))
    if sizes is not None:
        last += reply(7, 3, struct.pack(">HIII", 3, *sizes))
    options = [*OPTIONS[:-1], last + reply(7, 1)]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for turn, asked in zip(options, ASKED, strict=False):
                writer.write(turn)
                if turn is not options[-1]:
                    await reader.readexactly(asked)
            await then(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(serve, folder / "s"):
        yield f"nbd+unix:///?socket={folder}/s"
