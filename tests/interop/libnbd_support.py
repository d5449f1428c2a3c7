"""What the tests with libnbd share: a sparse disk that is replicated, a model of both exports, and
other servers with the same bytes on them, to compare answers with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from interop_support import (
    CHECKPOINT,
    KIB,
    MIB,
    START,
    Standby,
    Twin,
    assert_same,
    fresh_seed,
    run,
)
from peers import Libnbd, LibnbdProcess, Process, ReplnbdDisk, list_exports

NAME, TOP = "colo0", "top0"
EXPORTS = [NAME, TOP]
REPLIES = ["simple", "structured"]
"""The shapes of replies that libnbd 1.14 knows."""

BLOCK = 4 * KIB
"""In which a file system stores data and holes."""

SIZE = 4 * MIB + 1536
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
DIRTY, RESYNC = "qemu:dirty-bitmap:checkpoint", "qemu:dirty-bitmap:resync"
DIGEST = "x-replnbd:digest"
CONTEXTS = {NAME: [BASE, DEPTH, DIRTY, RESYNC, DIGEST], TOP: [BASE, DEPTH, DIRTY, RESYNC]}
"""Those of each export, in the order in which they are listed."""


def patchy(rng: random.Random, size: int, *, run_max: int = 16) -> bytes:
    """A disk's content: runs of up to `run_max` blocks of random bytes and of zeroes, by turns.

    What is behind the last whole block is random: a file system makes no hole of it once it was
    data, so a new file with zeroes there would have another map than a disk that got them."""
    content = bytearray()
    zeroes = False
    while len(content) < size:
        length = BLOCK * rng.randint(1, run_max)
        content += bytes(length) if zeroes else rng.randbytes(length)
        zeroes = not zeroes
    tail = size % BLOCK
    return bytes(content[: size - tail]) + rng.randbytes(tail)


def data_blocks(content: bytes | bytearray) -> Iterator[tuple[int, bytes]]:
    """The blocks that are not all zeroes, and where they are."""
    for start in range(0, len(content), BLOCK):
        block = bytes(content[start : start + BLOCK])
        if any(block):
            yield start, block


def write_sparse(path: Path, content: bytes | bytearray) -> None:
    """A file in which every block of zeroes is a hole."""
    with path.open("wb") as file:
        for start, block in data_blocks(content):
            file.seek(start)
            file.write(block)
        file.truncate(len(content))


def sparse_disk(folder: Path, content: bytes) -> ReplnbdDisk:
    """A replicated disk, raw and sparse."""
    disk = ReplnbdDisk.create(folder, NAME, TOP, b"")
    write_sparse(disk.secondary, content)
    return disk


class Served:
    """A standby in stage running with a sparse disk, libnbd beside it, and what its exports hold.

    One for all tests of a file: each gets it with `twin` as the exports are, and all bytes of both
    are compared when it ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = random.Random(fresh_seed())
        self.initial = patchy(self.rng, SIZE)
        self.twin = Twin(self.initial)
        self.standby = Standby(folder, sparse_disk(folder, self.initial))
        self.standby.qmp.execute(*START)
        self.libnbd = LibnbdProcess(folder)

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        return self.standby.unix(export)

    def model(self, export: str) -> bytearray:
        """The bytes of an export, to be changed as the export is."""
        return self.twin.primary if export == NAME else self.twin.view

    def connect(
        self,
        export: str,
        replies: str = "structured",
        *,
        contexts: Sequence[str] = (),
        strict: bool = True,
    ) -> Libnbd:
        """A connection of libnbd to an export."""
        uri = self.uri(export)
        structured = replies == "structured"
        return self.libnbd.connect(uri, structured=structured, contexts=contexts, strict=strict)

    def haggle(self, export: str = "", *, contexts: Sequence[str] = ()) -> Libnbd:
        """A connection of libnbd in option haggling."""
        return self.libnbd.connect(self.uri(export), contexts=contexts, options=True)

    def checkpoint(self) -> None:
        """The view moves on."""
        self.standby.qmp.execute(*CHECKPOINT)
        self.twin.checkpoint()

    def restore(self, export: str) -> None:
        """Make an export what the disk was at first, its holes included."""
        with self.standby.connect(export) as client:
            client.trim(0, SIZE)
            for start, block in data_blocks(self.initial):
                client.pwrite(start, block)
        self.model(export)[:] = self.initial

    def look(self) -> None:
        """Begin with what is there now, whatever a failed test has left."""
        for export in EXPORTS:
            self.model(export)[:] = self.standby.content(export)

    def compare(self) -> None:
        """All bytes of both exports."""
        for export in EXPORTS:
            assert_same(self.standby.content(export), self.model(export), export)

    def close(self) -> None:
        """An orderly end, and the files are as they should be."""
        self.libnbd.close()
        self.standby.quit()
        disk = self.standby.disk
        assert_same(disk.content(), self.twin.primary, "the secondary disk")
        for overlay in (disk.hidden, disk.active):
            run("qemu-img", "check", "-q", "-f", "qcow2", overlay)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.libnbd.close()
        self.standby.__exit__(kind, exc, traceback)


class OtherServer:
    """Another NBD server with one export: what it would have answered."""

    def __init__(self, argv: Sequence[str], socket: Path, export: str) -> None:
        self.uri = f"nbd+unix:///{export}?socket={socket}"
        self.process = Process(argv, log=socket.with_suffix(".log"))
        try:
            self.process.reach(lambda: list_exports(socket))
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()


class QemuNbd(OtherServer):
    """qemu-nbd, with all the contexts it has."""

    def __init__(self, folder: Path, image: Path, export: str, *options: str) -> None:
        socket = folder / "qemu-nbd"
        argv = ["qemu-nbd", "--persistent", "--shared=0", "--allocation-depth", "--discard=unmap"]
        argv += [f"--socket={socket}", f"--export-name={export}", *options, str(image)]
        super().__init__(argv, socket, export)


class NbdkitFile(OtherServer):
    """nbdkit with its file plugin."""

    def __init__(self, folder: Path, image: Path) -> None:
        socket = folder / "nbdkit"
        argv = ["nbdkit", "--foreground", "--unix", str(socket), "file", str(image)]
        super().__init__(argv, socket, "")
