"""What the interop tests share: programs run to their end, a standby that any client reaches, and
a model of its two exports."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from peers import (
    REPLNBD,
    Daemon,
    NbdClient,
    PeerError,
    Process,
    QmpClient,
    ReplnbdDisk,
    list_exports,
    wait_until,
)

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
TIMEOUT_S = 60.0
"""How long any one program may take."""

START = ("xen-set-replication", {"enable": True, "primary": False})
CHECKPOINT = ("xen-colo-do-checkpoint",)
FAILOVER = ("xen-set-replication", {"enable": False, "primary": False, "failover": True})


def run(*argv: str | Path, status: int = 0, stdin: str | None = None) -> str:
    """Run a program to its end; what it prints on stdout. PeerError, with all it said, when it
    ends with another status or not in time."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin or "", capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as exc:
        said = f"{exc.stdout!r} {exc.stderr!r}"
        raise PeerError(f"$ {' '.join(words)}\nnot within {TIMEOUT_S:g} s\n{said}") from None
    if done.returncode != status:
        said = f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
        raise PeerError(f"$ {' '.join(words)}\n{said}")
    return done.stdout


def fresh_seed() -> int:
    """A seed that a failure shows, because it is printed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return seed


def mottled(rng: random.Random, size: int, *, block: int = 64 * KIB) -> bytes:
    """A disk's content: blocks of random bytes and blocks of zeroes, about half of each."""
    count = -(-size // block)
    blocks = [rng.choice([bytes(block), rng.randbytes(block)]) for _ in range(count)]
    return b"".join(blocks)[:size]


def assert_same(got: bytes | bytearray, expected: bytes | bytearray, what: str) -> None:
    """All bytes are equal; the message says where the first differs, and does not show the disk."""
    if got == expected:
        return
    if len(got) != len(expected):
        raise AssertionError(f"{what}: {len(got)} bytes, expected {len(expected)}")
    differ = [at for at in range(len(got)) if got[at] != expected[at]]
    raise AssertionError(f"{what}: {len(differ)} bytes differ, {differ[0]:#x} to {differ[-1]:#x}")


class Twin:
    """A model of a disk's two exports: what the primary wrote, and what the standby sees."""

    def __init__(self, content: bytes) -> None:
        self.primary = bytearray(content)
        self.view = bytearray(content)

    def checkpoint(self) -> None:
        """The view moves on."""
        self.view[:] = self.primary


def random_requests(
    rng: random.Random,
    client: NbdClient,
    content: bytearray,
    count: int,
    *,
    length_max: int,
    trim: bool = True,
    alignment: int = 1,
) -> None:
    """Writes, zeroes and trims at any `alignment`, through `client` and to `content` alike.

    replnbd promises zeroes where something was trimmed, as QEMU's filter with `discard=unmap` does.
    """
    for _ in range(count):
        offset = rng.randrange(0, len(content), alignment)
        length = rng.randint(1, rng.choice([SECTOR, length_max]))
        length = min(length + -length % alignment, len(content) - offset)
        match rng.choice(["write", "write", "write", "zeroes", "trim" if trim else "write"]):
            case "write":
                data = rng.randbytes(length)
                client.pwrite(offset, data)
            case "zeroes":
                data = bytes(length)
                client.write_zeroes(offset, length)
            case "trim":
                data = bytes(length)
                client.trim(offset, length)
        content[offset : offset + length] = data


class Standby(Daemon):
    """`replnbd secondary` for one disk, on a unix socket and on a TCP port that it chose."""

    def __init__(self, folder: Path, disk: ReplnbdDisk) -> None:
        self.disk = disk
        self.nbd_socket = folder / "nbd"
        self.control_socket = folder / "qmp"
        self.process = Process(self._command(folder), log=folder / "replnbd.log")
        try:
            self.process.reach(lambda: list_exports(self.nbd_socket))
            self.qmp = self.process.reach(lambda: QmpClient(self.control_socket))
            # The TCP listener comes last.
            wait_until(lambda: len(self._listening()) == 2, "both listeners")
            self.port = int(self._listening()[1].rpartition(":")[2])
        except BaseException as exc:
            self.process.kill()
            if isinstance(exc, OSError):
                raise PeerError(self.process.failure(str(exc))) from exc
            raise

    def _command(self, folder: Path) -> list[str]:
        """Listens on `nbd_socket` first, then on a port of 127.0.0.1; all is in `folder`."""
        disk = self.disk
        argv = [*REPLNBD, "secondary", str(disk.secondary), "--format", disk.format]
        argv += ["--name", disk.name, "--top-id", disk.top_id]
        argv += ["--hidden", str(disk.hidden), "--active", str(disk.active)]
        argv += ["--listen", f"nbd+unix:///?socket={self.nbd_socket}"]
        return [*argv, "--listen", "nbd://127.0.0.1:0", "--control", str(self.control_socket)]

    def _listening(self) -> list[str]:
        return list(self.qmp.execute("x-replnbd-status")["listen"])

    def unix(self, export: str) -> str:
        """The NBD URI of an export on the unix socket."""
        return f"nbd+unix:///{export}?socket={self.nbd_socket}"

    def tcp(self, export: str) -> str:
        """The NBD URI of an export on TCP."""
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def connect(self, export: str) -> NbdClient:
        """A new NBD connection."""
        return NbdClient(self.nbd_socket, export)

    def content(self, export: str) -> bytearray:
        """All bytes of an export."""
        with self.connect(export) as client:
            return client.pread(0, client.size)

    def stage(self) -> str:
        """The disk's."""
        return str(self.qmp.execute("x-replnbd-status")["disks"][0]["stage"])

    def fail_over(self, target: str = "standby") -> None:
        """Until all is committed."""
        command, arguments = FAILOVER
        self.qmp.execute(command, arguments | {"x-replnbd-to": target})
        wait_until(lambda: self.stage() != "failover", "the commit")
        assert self.stage() == "done", self.process.failure("the commit failed")
