"""A server under attack, and how to tell that it is as well as before: replnbd as a daemon, and for
the sake of the tables' honesty qemu-nbd and nbdkit, too."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from peers import NbdClient, PeerError, Process, RawClient, ReplnbdDaemon, ReplnbdDisk, wait_until
from peers.nbd_client import Address

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
SIZE = 256 * KIB
BIG = 16 * TIB - 64 * KIB
"""The longest file of ext4, nearly."""

SERVERS = ("replnbd", "qemu-nbd", "nbdkit")
PEAK_BYTES_MAX = 48 * MIB
"""What one hostile client may cost. The largest payload is 32 MiB."""

_WRONG_IN_LOG = re.compile(r"Traceback|^\S+ \S+ (ERROR|CRITICAL) |Assertion", re.M)


def _content() -> bytes:
    rng = random.Random(1)
    return rng.randbytes(64 * KIB) + bytes(64 * KIB) + rng.randbytes(128 * KIB)


CONTENT = _content()
"""Of every "d": random bytes, with a run of zeroes in the middle."""


class Victim:
    """A running server with an export "d" of CONTENT.

    `checked` is what every test ends with. `standby`: the export whose view no hostile client of
    "d" may change, where there is one.
    """

    def __init__(
        self,
        process: Process,
        address: Address,
        ports: Sequence[int] = (),
        *,
        standby: str | None = None,
    ) -> None:
        self.process = process
        self.address = address
        self.ports = ports
        """Of TCP listeners on 127.0.0.1."""
        self.standby = standby
        self.descriptors = process.descriptors + 1
        self.healthy()  # what the first client makes it allocate is no client's harm
        self.settle()
        self.descriptors = process.descriptors

    @contextlib.contextmanager
    def checked(self, *, peak_bytes_max: int = PEAK_BYTES_MAX) -> Iterator[None]:
        """Attack it inside. Afterwards it runs, holds no more descriptors, has not used more
        memory than that, has logged nothing bad, and serves the next client every byte."""
        self.process.reset_peak()
        before = self.process.resident_bytes
        yield
        self.settle()
        self.healthy()
        self.settle()
        peak = self.process.peak_bytes - before
        if peak > peak_bytes_max:
            raise PeerError(self.process.failure(f"used {peak / MIB:.1f} MiB"))
        if found := _WRONG_IN_LOG.search(self.process.log.read_text()):
            raise PeerError(self.process.failure(f"logged {found[0]!r}"))

    def healthy(self) -> None:
        """A new client finds every byte, and can write."""
        with NbdClient(self.address, "d") as client:
            assert client.pread(0, SIZE) == CONTENT
            client.pwrite(SIZE // 2, b"healthy")
            client.flush()
            assert client.pread(SIZE // 2 - 1, 9) == (
                CONTENT[SIZE // 2 - 1 : SIZE // 2]
                + b"healthy"
                + CONTENT[SIZE // 2 + 7 : SIZE // 2 + 8]
            )
            client.pwrite(SIZE // 2, CONTENT[SIZE // 2 : SIZE // 2 + 7])
        if self.standby is not None:
            with NbdClient(self.address, self.standby) as client:
                assert client.pread(0, SIZE) == CONTENT

    def raw(self) -> RawClient:
        """A client that has read the greeting."""
        return RawClient(self.address)

    def settle(self) -> None:
        """Until every client that has left is gone."""
        if not self.process.running:
            raise PeerError(self.process.failure("it has ended"))
        wait_until(lambda: self.process.descriptors <= self.descriptors, "descriptors to be closed")


@contextlib.contextmanager
def replnbd(
    folder: Path, *, big: bool = False, listen: Sequence[str] = (), tables: Sequence[str] = ()
) -> Iterator[Victim]:
    """`replnbd serve` in stage running: "d" for the primary, "d-top" for the standby. `big` adds
    an export of that name, 16 TiB of nothing."""
    disks = [ReplnbdDisk.create(folder, "d", "d-top", CONTENT)]
    if big:
        path = folder / "big.raw"
        with path.open("wb") as file:
            file.truncate(BIG)
        overlays = folder / "big.hidden", folder / "big.active"
        disks.append(ReplnbdDisk("big", "big-top", path, *overlays, "raw"))
    with ReplnbdDaemon(folder, disks, listen=listen, tables=tables) as daemon:
        daemon.qmp.execute("xen-set-replication", {"enable": True, "primary": False})
        yield Victim(daemon.process, daemon.nbd_socket, daemon.ports, standby="d-top")
        daemon.quit()


@contextlib.contextmanager
def serving(server: str, folder: Path) -> Iterator[Victim]:
    """One of SERVERS."""
    if server == "replnbd":
        with replnbd(folder) as victim:
            yield victim
        return
    image, socket = folder / "d.raw", folder / "s"
    image.write_bytes(CONTENT)
    argv = {
        "qemu-nbd": ["qemu-nbd", "-t", "-e", "0", "-x", "d", "-f", "raw", "-A", "-k", socket],
        "nbdkit": ["nbdkit", "-f", "-U", socket, "file"],
    }[server]
    with Process([*map(str, argv), str(image)], log=folder / "log") as process:
        process.reach(lambda: RawClient(socket).close())
        yield Victim(process, socket)
