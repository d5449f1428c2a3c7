"""What the tests of the NBD client share: servers of all kinds, and sessions with them."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from loops import on_both_loops as on_both_loops  # for all tests of the client
from peers import Process

from replnbd.block import BlockNode, NbdConnection, connect_nbd, parse_nbd_uri
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer


def fresh_seed() -> int:
    """A seed that a failure shows, because it is printed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return seed


@asynccontextmanager
async def session(uri: str, **options: Any) -> AsyncIterator[NbdConnection]:
    """A session, closed at the end."""
    connection = await connect_nbd(parse_nbd_uri(uri), **options)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def served(folder: Path, node: BlockNode, name: str = "disk") -> AsyncIterator[str]:
    """The URI of `node`, which replnbd itself serves: with extended headers."""
    server = NbdServer(EventBus())
    server.add_export(Export(name, node))
    await server.listen(f"nbd+unix:///?socket={folder}/s")
    try:
        yield f"nbd+unix:///{name}?socket={folder}/s"
    finally:
        await server.close()


def reachable(path: Path) -> None:
    """Raises while nobody listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


def reachable_port(port: int) -> None:
    """Raises while nobody listens there."""
    socket.create_connection(("127.0.0.1", port)).close()


def listening(process: Process, path: Path) -> Process:
    """The process, once it listens."""
    try:
        process.reach(lambda: reachable(path))
    except BaseException:
        process.kill()
        raise
    return process


def nbdkit(folder: Path, *arguments: str | Path, name: str = "s") -> Process:
    """nbdkit on a unix socket in `folder`."""
    path = folder / name
    path.unlink(missing_ok=True)
    argv = ["nbdkit", "-f", "--exit-with-parent", "-U", str(path), *map(str, arguments)]
    return listening(Process(argv, log=folder / "nbdkit.log"), path)


def qemu_nbd(folder: Path, *arguments: str | Path, name: str = "s") -> Process:
    """qemu-nbd on a unix socket in `folder`."""
    path = folder / name
    path.unlink(missing_ok=True)
    argv = ["qemu-nbd", "-t", "-k", str(path), *map(str, arguments)]
    return listening(Process(argv, log=folder / "qemu-nbd.log"), path)


def uri(folder: Path, export: str = "", *, name: str = "s") -> str:
    """Of an export of a server in `folder`."""
    return f"nbd+unix:///{export}?socket={folder / name}"


def qemu_img(*arguments: str | Path) -> None:
    """Run qemu-img; what it prints is in the error if it fails."""
    argv: Sequence[str] = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def settled(seconds: float = 0.0) -> None:
    """Let the loop run."""
    await asyncio.sleep(seconds)
