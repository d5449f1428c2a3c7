"""What the tests with targets that are no replnbd share: such servers, a primary that sends to one
through a proxy, and a load for it."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from interop_support import KIB, MIB, assert_same, fresh_seed, mottled
from peers import (
    REPLNBD,
    CuttingProxy,
    DiskFormat,
    NbdClient,
    PeerError,
    Process,
    ReplnbdPrimary,
    list_exports,
    wait_until,
)
from peers.disk import make_image
from peers.nbd_client import CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES

SIZE = 8 * MIB
GRANULE = 64 * KIB
LENGTH_MAX = 150 * KIB
IN_FLIGHT = 48
HEALTHY = {"error": False}
FAILED = {"error": True, "desc": "I/O error occurred"}

IMPATIENT = (
    sys.executable,
    "-c",
    "from replnbd.cli import main; from replnbd.replication import session, target;"
    "target.CONNECT_TIMEOUT_S = target.RESPONSE_TIMEOUT_S = 2.0;"
    "session.LATE_S = 3.0; session.PROVE_S = 0.5; main()",
)
"""A replnbd that gives a silent target up after 2 s, and not after 20."""

REFUSED_SOON = (
    sys.executable,
    "-c",
    "from replnbd.cli import main; from replnbd.replication import link; link.REFUSED_S = 0.2;"
    "main()",
)
"""One that asks a target that has refused again after 0.2 s, and not after 10."""

BUGS = ("our bug", "Traceback", "never retrieved", "AssertionError")
"""What a log must not have."""


class Server:
    """Any NBD server on the unix socket `folder`/target. `argv` has the word SOCKET for its path.
    After `kill`, `run` starts it again."""

    def __init__(self, folder: Path, *argv: str | Path, export: str = "colo0") -> None:
        self.export = export
        self.socket = folder / "target"
        self._argv = [str(word).replace("SOCKET", str(self.socket)) for word in argv]
        self._log = folder / "target.log"
        self.run()

    def run(self) -> None:
        """Start it."""
        self.socket.unlink(missing_ok=True)
        self.process = Process(self._argv, log=self._log)
        self._reach()

    def _reach(self) -> None:
        self.process.reach(lambda: list_exports(self.socket))

    def content(self) -> bytes | bytearray:
        """All bytes."""
        with NbdClient(self.socket, self.export) as client:
            step = min(client.size, client.block_sizes[2] if client.block_sizes else MIB)
            parts = (
                client.pread(at, min(step, client.size - at)) for at in range(0, client.size, step)
            )
            return b"".join(parts)

    def close(self) -> None:
        """Kill it."""
        self.process.kill()


def nbdkit(folder: Path, *words: str | Path, threads: int = 1) -> Server:
    """nbdkit with filters, a plugin and their parameters. With several threads a connection it
    does things at the same time, in any order, but nbdkit 1.32.5 may abort when a client leaves
    (raw_send_socket: `sock >= 0')."""
    return Server(folder, "nbdkit", "-f", "-t", str(threads), "-U", "SOCKET", *words)


def qemu_nbd(folder: Path, format_: DiskFormat, content: bytes, *words: str) -> Server:
    """qemu-nbd, of an image that it makes."""
    image = folder / f"target.{format_}"
    make_image(image, format_, content)
    argv = ["qemu-nbd", "--persistent", "--shared=8", "--socket=SOCKET", "--export-name=colo0"]
    argv.append("--discard=unmap")
    return Server(folder, *argv, f"--format={format_}", *words, image)


class Load(threading.Thread):
    """A client that always has dozens of requests in flight: writes, zeroes and trims of any size
    anywhere, and every other one to one block of 4 KiB. `content` is what the disk has then, for
    replnbd keeps the order of what overlaps."""

    def __init__(self, client: NbdClient, content: bytearray, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.batches = 0
        self.failure: BaseException | None = None
        self.touched: set[int] = set()
        """Granules."""
        self._client = client
        self._content = content
        self._rng = rng
        self._stopping = False

    def run(self) -> None:
        """See the class."""
        try:
            while not self._stopping:
                self.batch()
        except BaseException as exc:
            self.failure = exc
        finally:
            self._client.close()

    def batch(self) -> None:
        """Some requests, until all are answered."""
        pending = {self._one(number % 2 == 0) for number in range(IN_FLIGHT)}
        self._client.finish(pending)
        self.batches += 1

    def _one(self, hot: bool) -> int:
        rng, content = self._rng, self._content
        length = rng.randint(1, rng.choice([512, 4 * KIB, LENGTH_MAX]))
        offset = rng.randrange(len(content) - length)
        if hot:
            offset, length = 3 * MIB + rng.choice([0, 0, 512]), rng.choice([4096, 512, 100])
        command = rng.choice([CMD_WRITE] * 4 + [CMD_WRITE_ZEROES, CMD_TRIM])
        data = rng.randbytes(length) if command == CMD_WRITE else None
        content[offset : offset + length] = data or bytes(length)
        self.touched.update(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))
        return self._client.send(command, offset, length, data)

    def wait_batches(self, count: int) -> None:
        """Until so many more have been answered."""
        wanted = self.batches + count
        wait_until(lambda: self.batches >= wanted or not self.is_alive(), "the load's requests")
        assert self.failure is None, f"a client was told {self.failure!r}"

    def stop(self) -> None:
        """End, and see how."""
        self._stopping = True
        self.join(30)
        assert not self.is_alive(), "the load hangs"
        assert self.failure is None, f"a client was told {self.failure!r}"


class Foreign:
    """A server as the target, a proxy before it, and a primary whose disk has `content`."""

    def __init__(
        self,
        folder: Path,
        server: Server | Callable[[Path], Server],
        *,
        sync: bool = False,
        format_: DiskFormat = "raw",
        program: Sequence[str] = REPLNBD,
        uri: Callable[[CuttingProxy], str] | None = None,
    ) -> None:
        self.rng = random.Random(fresh_seed())
        self.content = bytearray(mottled(self.rng, SIZE))
        self.server = server if isinstance(server, Server) else server(folder)
        self.proxy = CuttingProxy(("127.0.0.1", 0), self.server.socket)
        to = self.proxy.uri(self.server.export) if uri is None else uri(self.proxy)
        local = folder / f"vm0.{format_}"
        make_image(local, format_, self.content)
        try:
            self.primary = ReplnbdPrimary(
                folder, local, to, sync=sync, format_=format_, program=program
            )
        except BaseException:
            self.proxy.close()
            self.server.close()
            raise
        self.client = self.primary.connect()

    def begin(self) -> None:
        """The first synchronisation."""
        self.primary.start()
        self.compare()

    def load(self) -> Load:
        """One that runs."""
        load = Load(self.primary.connect(), self.content, self.rng)
        load.start()
        return load

    def write(self, batches: int = 3) -> set[int]:
        """Some requests; the granules that they have changed."""
        with self.primary.connect() as client:
            load = Load(client, self.content, self.rng)
            for _ in range(batches):
                load.batch()
        return load.touched

    def write_at(self, offset: int, length: int = 4096) -> None:
        """One request."""
        data = self.rng.randbytes(length)
        self.client.pwrite(offset, data)
        self.content[offset : offset + length] = data

    def compare_local(self) -> None:
        """What the primary's guest reads, all bytes."""
        assert_same(self.client.pread(0, len(self.content)), self.content, "the primary's disk")

    def compare(self) -> None:
        """All bytes of both disks, once the target has them."""
        self._wait_in_step()
        self.compare_local()
        assert_same(self.server.content(), self.content, "the target")

    def compare_for_good(self) -> None:
        """The same once nothing can come any more that was sent on connections that have ended."""
        self._wait_in_step()
        self.wait_proven()
        self.compare()

    def _wait_in_step(self) -> None:
        try:
            self.primary.wait_in_step()
        except PeerError as exc:  # a peer that has died explains it
            raise PeerError(self.server.process.failure(str(exc))) from exc

    def wait_proven(self) -> None:
        """Until nothing is marked."""

        def proven() -> bool:
            link = self.primary.link()
            return not link["unproven-bytes"] and not link["behind-bytes"]

        wait_until(proven, "nothing marked")

    def check_log(self) -> None:
        """AssertionError if the primary has met a bug of its own."""
        log = self.primary.log.read_text(errors="replace")
        for bug in BUGS:
            assert bug not in log, f"{bug}\n{log[-6000:]}"

    def close(self) -> None:
        """Whatever still runs is killed."""
        self.client.close()
        self.primary.__exit__(None, None, None)
        self.proxy.close()
        self.server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if exc is None:
            self.check_log()
