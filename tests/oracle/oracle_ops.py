"""What the oracle's sequences are made of: operations, their outcomes, and the generator.

An operation is a value, so that one sequence can run in two worlds and in a model, and a failure
can print what led to it. A sequence follows from its seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import NamedTuple

from peers import DiskFormat

KIB = 1024
CLUSTER = 64 * KIB
"""QEMU's default qcow2 cluster, and so the unit in which its backup job copies."""


class Stage(StrEnum):
    """Where the group stands, as a sequence sees it: `done` told apart by what came before."""

    NONE = "none"
    RUNNING = "running"
    FAILOVER = "failover"
    FAILED = "failover-failed"
    STOPPED = "done after stop"
    COMMITTED = "done after failover"


class Side(StrEnum):
    """Which export: NAME, which the primary writes, or TOP-ID, the standby's view."""

    PRIMARY = "primary"
    STANDBY = "standby"


class Verb(Enum):
    """What an operation does. The first group goes over NBD, the second over QMP."""

    READ = "read"
    WRITE = "write"
    ZEROES = "write zeroes"
    TRIM = "trim"
    FLUSH = "flush"
    BURST = "writes in flight on both exports at once"
    COMPARE = "read all of both exports"
    FENCED = "the primary tries to go on"

    START = "start"
    START_AS_PRIMARY = "start as primary"
    START_WITH_FAILOVER = "start with failover"
    CHECKPOINT = "checkpoint"
    STOP = "stop"
    STOP_AS_PRIMARY = "stop as primary"
    FAILOVER = "failover"
    STATUS = "status"
    JOBS = "jobs"
    SETTLE = "wait until the commit is over"


NBD_VERBS = frozenset({Verb.READ, Verb.WRITE, Verb.ZEROES, Verb.TRIM, Verb.FLUSH})


@dataclass(frozen=True)
class Op:
    """One operation. `salt` decides the bytes that are written; `flags` are NBD command flags."""

    verb: Verb
    disk: int = 0
    side: Side | None = None
    offset: int = 0
    length: int = 0
    salt: int = 0
    flags: int = 0

    @property
    def data(self) -> bytes:
        """The bytes of a WRITE."""
        return random.Random(self.salt).randbytes(self.length)

    def burst(self) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        """The writes of a BURST, primary's and standby's (of a FAILOVER: standby's only). Writes of
        one side do not overlap, so that their order does not matter; across sides they do."""
        chooser = random.Random(self.salt)
        sides = []
        for _ in range(2):
            writes, end = [], self.offset + self.length
            position = self.offset
            while position < end:
                length = min(chooser.randrange(1, 24 * KIB), end - position)
                if chooser.random() < 0.5:
                    writes.append((position, chooser.randbytes(length)))
                position += length
            chooser.shuffle(writes)
            sides.append(writes)
        return sides[0], sides[1]

    def __str__(self) -> str:
        where = f" disk {self.disk} {self.offset}+{self.length}" if self.length else ""
        side = f"{self.side} " if self.side else ""
        flags = f" flags {self.flags:#x}" if self.flags else ""
        return f"{side}{self.verb.value}{where}{flags}"


class Outcome(NamedTuple):
    """What came back: ("bytes", ...), ("errno", name), ("return", value), ("error", (class, desc)),
    or ("ok", None)."""

    kind: str
    value: object = None

    def __str__(self) -> str:
        if isinstance(self.value, bytes):
            return f"{len(self.value)} bytes {self.value[:16].hex()}..."
        return f"{self.kind} {self.value}"


OK = Outcome("ok")


@dataclass(frozen=True)
class Setup:
    """The disks of a sequence: sizes, formats, and the seed of their first content."""

    seed: int
    sizes: tuple[int, ...]
    formats: tuple[DiskFormat, ...]

    @classmethod
    def from_seed(cls, seed: int) -> Setup:
        """1 to 3 disks of 0.5 to 1.7 MiB, mostly not a whole number of clusters."""
        chooser = random.Random(f"setup {seed}")
        count = 1 + seed % 3
        sizes = tuple(
            chooser.randrange(8, 26) * CLUSTER + chooser.choice((0, 512, 4 * KIB, 33 * 512))
            for _ in range(count)
        )
        known: tuple[DiskFormat, ...] = ("raw", "qcow2")
        formats = tuple(chooser.choice(known) for _ in range(count))
        return cls(seed, sizes, formats)

    def content(self, disk: int) -> bytes:
        """The first content of a secondary disk: data, with zeroes here and there."""
        chooser = random.Random(f"content {self.seed} {disk}")
        content = bytearray()
        while len(content) < self.sizes[disk]:
            length = chooser.randrange(1, 3 * CLUSTER)
            content += bytes(length) if chooser.random() < 0.25 else chooser.randbytes(length)
        return bytes(content[: self.sizes[disk]])


FLAG_FUA = 1
FLAG_NO_HOLE = 2

_RUNNING_VERBS = (
    (Verb.READ, 22),
    (Verb.WRITE, 38),
    (Verb.ZEROES, 8),
    (Verb.TRIM, 4),
    (Verb.FLUSH, 2),
    (Verb.BURST, 6),
    (Verb.COMPARE, 4),
    (Verb.CHECKPOINT, 7),
    (Verb.STATUS, 4),
    (Verb.JOBS, 1),
    (Verb.START, 1),
    (Verb.START_AS_PRIMARY, 1),
    (Verb.START_WITH_FAILOVER, 1),
)
# In every other stage all commands but those that lead on are wrong or ignored: try them more.
_OTHER_VERBS = (
    (Verb.READ, 16),
    (Verb.WRITE, 24),
    (Verb.ZEROES, 6),
    (Verb.TRIM, 4),
    (Verb.FLUSH, 3),
    (Verb.COMPARE, 3),
    (Verb.CHECKPOINT, 5),
    (Verb.STATUS, 5),
    (Verb.START_AS_PRIMARY, 3),
    (Verb.START_WITH_FAILOVER, 2),
    (Verb.STOP, 3),
    (Verb.STOP_AS_PRIMARY, 3),
    (Verb.FAILOVER, 3),
)


class Generator:
    """Draws a sequence. `fenced`: no primary I/O after a failover, but FENCED in its place."""

    def __init__(self, setup: Setup, *, fenced: bool) -> None:
        self.setup = setup
        self.fenced = fenced
        self._random = random.Random(f"sequence {setup.seed}")
        self._stage = Stage.NONE

    def sequence(self, count: int) -> Iterator[Op]:
        """About `count` operations: a while in *none*, a start, checkpoints, and mostly an end."""
        chooser = self._random
        start = chooser.randrange(4, 25)
        end = int(count * chooser.uniform(0.4, 0.95))
        how = (Verb.FAILOVER, Verb.STOP, Verb.FAILOVER, None, Verb.FAILOVER)[self.setup.seed % 5]
        settle = end + chooser.randrange(1, 40)
        for index in range(count):
            if index == start:
                yield from self._move(Op(Verb.START), Stage.RUNNING)
            elif index == end and how is Verb.FAILOVER:
                yield from self._move(self._failover(), Stage.FAILOVER)
            elif index == end and how is Verb.STOP:
                verb = chooser.choice((Verb.STOP, Verb.STOP_AS_PRIMARY))
                yield from self._move(Op(verb), Stage.STOPPED)
            elif index == settle and self._stage is Stage.FAILOVER:
                yield from self._move(Op(Verb.SETTLE), Stage.COMMITTED)
            else:
                yield self._draw()
        if self._stage is Stage.FAILOVER:
            yield from self._move(Op(Verb.SETTLE), Stage.COMMITTED)
        yield Op(Verb.COMPARE)

    def _move(self, op: Op, stage: Stage) -> Iterator[Op]:
        if stage is not Stage.FAILOVER:
            # Right before a failover nothing: what is in flight into the commit is the point.
            yield Op(Verb.COMPARE)
        yield op
        self._stage = stage
        if stage is not Stage.FAILOVER:
            yield Op(Verb.STATUS)
            yield Op(Verb.COMPARE)

    def _failover(self) -> Op:
        """Half of them while writes of the standby are in flight."""
        op = Op(Verb.FAILOVER, disk=self._random.randrange(len(self.setup.sizes)))
        if self._random.random() < 0.5:
            return op
        salt = self._random.getrandbits(32)
        return replace(op, length=8 * CLUSTER, salt=salt)

    def _draw(self) -> Op:
        chooser = self._random
        table = _RUNNING_VERBS if self._stage is Stage.RUNNING else _OTHER_VERBS
        verbs, weights = zip(*table, strict=True)
        verb = chooser.choices(verbs, weights)[0]
        if self._stage not in (Stage.NONE, Stage.RUNNING) and verb is Verb.START_AS_PRIMARY:
            verb = chooser.choice((Verb.START, Verb.START_AS_PRIMARY))
        if verb in NBD_VERBS or verb is Verb.BURST:
            return self._io(verb)
        return Op(verb)

    def _io(self, verb: Verb) -> Op:
        chooser = self._random
        side = chooser.choice((Side.PRIMARY, Side.STANDBY))
        if side is Side.PRIMARY and self._stage in (Stage.FAILOVER, Stage.COMMITTED):
            if self.fenced:
                return Op(Verb.FENCED, disk=chooser.randrange(len(self.setup.sizes)))
            if self._stage is Stage.FAILOVER:
                side = Side.STANDBY
        disk = chooser.randrange(len(self.setup.sizes))
        if verb is Verb.FLUSH:
            return Op(verb, disk, side)
        offset, length = self._range(self.setup.sizes[disk])
        op = Op(verb, disk, side, offset, length, salt=chooser.getrandbits(32))
        if verb is Verb.BURST:
            return replace(op, side=None)
        if verb is not Verb.READ and chooser.random() < 0.1:
            return replace(op, flags=FLAG_FUA)
        if verb is Verb.ZEROES and chooser.random() < 0.3:
            return replace(op, flags=FLAG_NO_HOLE)
        return op

    def _range(self, size: int) -> tuple[int, int]:
        """Whole clusters, sectors, single bytes, borders of clusters, and the end of the disk."""
        chooser = self._random
        kind = chooser.randrange(6)
        if kind == 0:
            offset = chooser.randrange(size // CLUSTER) * CLUSTER
            length = chooser.choice((1, 1, 2, 4)) * CLUSTER
        elif kind == 1:
            offset = chooser.randrange(size // 512) * 512
            length = chooser.choice((1, 1, 8, 8, 8, 100)) * 512
        elif kind == 2:
            offset = chooser.randrange(size)
            length = chooser.choice((1, 2, 511, 513, 4096))
        elif kind == 3:
            border = chooser.randrange(1, size // CLUSTER) * CLUSTER
            offset = border - chooser.choice((1, 7, 512, 2048, 3000))
            length = chooser.choice((1, 14, 1024, 4096, 6000))
        elif kind == 4:
            length = chooser.choice((1, 100, 512, 4096, 70000))
            offset = size - length
        else:
            offset = chooser.randrange(size)
            length = chooser.randrange(1, 5 * CLUSTER)
        return offset, min(length, size - offset)


def small_io(chooser: random.Random, size: int, sides: tuple[Side, ...]) -> Op:
    """A random request to a disk of `size` bytes, short and mostly to few places, so that the
    overlays of a large disk stay small."""
    verb = chooser.choice((Verb.READ, Verb.WRITE, Verb.WRITE, Verb.WRITE, Verb.ZEROES, Verb.TRIM))
    place = chooser.randrange(16) * (size // 16)
    offset = max(0, place + chooser.randrange(-6000, 6000))
    length = min(chooser.choice((1, 512, 2048, 5000, 20000)), size - offset)
    side = chooser.choice(sides)
    return Op(verb, 0, side, offset, length, salt=chooser.getrandbits(32))
