"""What each world must answer: a model of QEMU's filter, and of replnbd by its differences.

With no difference the model is QEMU 7.2's replication filter (block/replication.c's rules over
qcow2 overlays of 64 KiB clusters, replication.c's loops over the disks). Each Difference is a row
of the design's table "What differs from the seed, on purpose", as far as it shows in answers or
bytes; with all of them the model is replnbd. So the two worlds are compared exactly: where their
outcomes differ, a difference must say so, and the model must have foretold both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from oracle_ops import CLUSTER, OK, Op, Outcome, Setup, Side, Stage, Verb

NOT_RUNNING = "Block replication is not running"
RUNNING_OR_DONE = "Block replication is running or done"
BACKUP_CANCELLED = "Backup job was cancelled unexpectedly"
IO_ERROR = "I/O error occurred"
WRONG_MODE = "The parameter mode's value is invalid, needs 1, but got 0"
FAILOVER_PARAMETER = "Parameter 'failover' is only for stopping replication"

SUBCLUSTER = 2048
"""Of the overlays that replnbd makes: 64 KiB clusters with extended L2 entries."""

STANDBY_READ = (Verb.READ, Side.STANDBY)


class Difference(Enum):
    """Rows of the design's table of differences; the value says what QEMU does."""

    PLAIN_STOP = (
        "plain stop always fails, keeps the overlays, and the status says 'I/O error occurred' "
        "for ever after"
    )
    HONEST_STATUS = "status says 'I/O error occurred' while failover runs well"
    FENCE = "after failover the primary can still write the secondary disk"
    SUBCLUSTERS = "copy-before-write and the overlays move whole clusters of 64 KiB"
    GROUP = "several disks: one after the other, first error stops, no way back"
    FAILOVER_ERRORS = "failover: true never reports an error, a failed commit can't be retried"
    TRIM = "TRIM is dropped by the filter, and by copy-before-write while it is there"
    JOBS = "internal jobs are invisible"


REPLNBD = frozenset(Difference)
QEMU: frozenset[Difference] = frozenset()

# Where a difference may show in an outcome; anywhere else the two worlds must agree to the byte.
DIFFERENCES: dict[Difference, Callable[[Op, Stage], bool]] = {
    Difference.PLAIN_STOP: lambda op, stage: (
        (stage is Stage.RUNNING and op.verb in (Verb.STOP, Verb.STOP_AS_PRIMARY))
        or (
            stage is Stage.STOPPED
            and (op.verb in (Verb.STATUS, Verb.COMPARE) or (op.verb, op.side) == STANDBY_READ)
        )
    ),
    Difference.HONEST_STATUS: lambda op, stage: stage is Stage.FAILOVER and op.verb is Verb.STATUS,
    Difference.FENCE: lambda op, stage: (
        stage in (Stage.FAILOVER, Stage.FAILED, Stage.COMMITTED) and op.verb is Verb.FENCED
    ),
    # Shows only through PLAIN_STOP: elsewhere it moves bytes about that read the same.
    Difference.SUBCLUSTERS: lambda op, stage: False,
    # Shows only through PLAIN_STOP: the QEMU world repeats a plain stop for each disk.
    Difference.GROUP: lambda op, stage: False,
    Difference.FAILOVER_ERRORS: lambda op, stage: stage is Stage.NONE and op.verb is Verb.FAILOVER,
    # Never shows: where QEMU drops a TRIM, its world sends zeroes after it (QemuWorld).
    Difference.TRIM: lambda op, stage: False,
    Difference.JOBS: lambda op, stage: stage is Stage.RUNNING and op.verb is Verb.JOBS,
}
assert DIFFERENCES.keys() == set(Difference)

EIO = Outcome("errno", "EIO")
EMPTY = Outcome("return", {})


def qmp_error(desc: str) -> Outcome:
    """A GenericError."""
    return Outcome("error", ("GenericError", desc))


def status(desc: str | None) -> Outcome:
    """An answer of query-xen-replication-status."""
    if desc is None:
        return Outcome("return", {"error": False})
    return Outcome("return", {"error": True, "desc": desc})


Below = Callable[[int, int], bytes]


class Overlay:
    """A copy-on-write layer that allocates whole blocks of `granularity` bytes."""

    def __init__(self, granularity: int, size: int) -> None:
        self.granularity = granularity
        self.size = size
        self.blocks: dict[int, bytearray] = {}

    def _spans(self, offset: int, length: int) -> Iterable[tuple[int, int, int]]:
        """(block, first byte, end byte) for each block that the range touches."""
        end = offset + length
        while offset < end:
            block = offset // self.granularity
            stop = min((block + 1) * self.granularity, end)
            yield block, offset, stop
            offset = stop

    def read(self, offset: int, length: int, below: Below) -> bytes:
        """The bytes of a range: this layer's, and those of `below` where it has none."""
        result = bytearray()
        for block, start, end in self._spans(offset, length):
            content = self.blocks.get(block)
            if content is None:
                result += below(start, end - start)
            else:
                base = block * self.granularity
                result += content[start - base : end - base]
        return bytes(result)

    def allocate(self, offset: int, length: int, below: Below) -> None:
        """Copy every block of the range that is not here yet."""
        for block, _, _ in self._spans(offset, length):
            if block not in self.blocks:
                base = block * self.granularity
                count = min(self.granularity, self.size - base)
                self.blocks[block] = bytearray(below(base, count))

    def write(self, offset: int, data: bytes, below: Below) -> None:
        """Store `data`, after copying the rest of the blocks it touches."""
        self.allocate(offset, len(data), below)
        for block, start, end in self._spans(offset, len(data)):
            base = block * self.granularity
            self.blocks[block][start - base : end - base] = data[start - offset : end - offset]

    def has(self, position: int) -> bool:
        """Whether the block of a byte is allocated."""
        return position // self.granularity in self.blocks


class DiskModel:
    """One disk: the secondary disk's bytes, what hidden and active hold, stage and error."""

    def __init__(self, content: bytes, differences: frozenset[Difference]) -> None:
        granularity = SUBCLUSTER if Difference.SUBCLUSTERS in differences else CLUSTER
        self.differences = differences
        self.secondary = bytearray(content)
        self.hidden = Overlay(granularity, len(content))
        self.active = Overlay(granularity, len(content))
        self.stage = Stage.NONE
        self.error = False

    # -- bytes ----------------------------------------------------------------------------------

    def read_secondary(self, offset: int, length: int) -> bytes:
        """Export NAME."""
        return bytes(self.secondary[offset : offset + length])

    def _read_hidden(self, offset: int, length: int) -> bytes:
        return self.hidden.read(offset, length, self.read_secondary)

    def read_view(self, offset: int, length: int) -> bytes:
        """Export TOP-ID."""
        return self.active.read(offset, length, self._read_hidden)

    def write_secondary(self, offset: int, data: bytes) -> None:
        """The primary's write: while running, old data goes to the hidden overlay first."""
        if self.stage is Stage.RUNNING:
            self.hidden.allocate(offset, len(data), self.read_secondary)
        self.secondary[offset : offset + len(data)] = data

    def write_view(self, offset: int, data: bytes) -> None:
        """The standby's write: to the active overlay, but for two stages."""
        if self.stage is Stage.COMMITTED:
            self.secondary[offset : offset + len(data)] = data
        elif self.stage is Stage.FAILED:
            self._write_split(offset, data)
        else:
            self.active.write(offset, data, self._read_hidden)

    def _write_split(self, offset: int, data: bytes) -> None:
        for index in range(len(data)):
            position = offset + index
            if self.active.has(position) or self.hidden.has(position):
                self.active.write(position, data[index : index + 1], self._read_hidden)
            else:
                self.secondary[position] = data[index]

    def make_empty(self) -> None:
        """A checkpoint's effect."""
        self.active.blocks.clear()
        self.hidden.blocks.clear()

    def commit(self) -> None:
        """The end of a failover."""
        self.secondary[:] = self.read_view(0, len(self.secondary))
        self.make_empty()
        self.stage = Stage.COMMITTED
        self.error = False

    # -- commands: None when done or ignored, else the error's text ---------------------------

    @property
    def ignores(self) -> bool:
        """After a failover or a stop every command succeeds and does nothing."""
        return self.stage in (Stage.FAILOVER, Stage.STOPPED, Stage.COMMITTED)

    def start(self, *, primary: bool) -> str | None:
        """replication_start."""
        if self.ignores:
            return None
        if self.stage is not Stage.NONE:
            return RUNNING_OR_DONE
        if primary:
            return WRONG_MODE
        self.stage = Stage.RUNNING
        self.make_empty()
        return None

    def checkpoint(self) -> str | None:
        """replication_do_checkpoint."""
        if self.ignores:
            return None
        if self.stage is not Stage.RUNNING:
            return BACKUP_CANCELLED
        self.make_empty()
        return None

    def stop(self, *, failover: bool) -> str | None:
        """replication_stop."""
        if self.ignores:
            return None
        if (
            self.stage is Stage.FAILED
            and failover
            and Difference.FAILOVER_ERRORS in self.differences
        ):
            self.stage = Stage.FAILOVER
            return None
        if self.stage is not Stage.RUNNING:
            return NOT_RUNNING
        if failover:
            self.stage = Stage.FAILOVER
            return None
        self.stage = Stage.STOPPED
        if Difference.PLAIN_STOP in self.differences:
            self.make_empty()
            return None
        self.error = True
        return BACKUP_CANCELLED

    def commit_failed(self) -> None:
        """The end of a failover that the secondary disk refused."""
        self.stage = Stage.FAILED
        self.error = True


class Model:
    """All disks of a set-up. `apply` foretells the outcomes one of which an operation must have."""

    def __init__(self, setup: Setup, differences: frozenset[Difference]) -> None:
        self.differences = differences
        self.disks = [
            DiskModel(setup.content(disk), differences) for disk in range(len(setup.sizes))
        ]

    def apply(self, op: Op) -> list[Outcome]:
        """Do the operation; the outcomes that are right."""
        if op.side is not None:
            return [self._io(op)]
        if op.verb is Verb.BURST:
            return [self._burst(op)]
        if op.verb is Verb.COMPARE:
            return [Outcome("bytes", self.contents())]
        if op.verb is Verb.SETTLE:
            for disk in self.disks:
                disk.commit()
            return [OK]
        if op.verb is Verb.FENCED:
            return [Outcome("fenced", Difference.FENCE in self.differences)]
        return self._command(op)

    def contents(self) -> bytes:
        """What COMPARE reads: of each disk the exports that can be read in its stage."""
        parts = []
        for disk in self.disks:
            size = len(disk.secondary)
            if disk.stage in (Stage.NONE, Stage.RUNNING, Stage.STOPPED):
                parts.append(disk.read_secondary(0, size))
            if disk.stage is not Stage.NONE:
                parts.append(disk.read_view(0, size))
        return b"".join(parts)

    def _io(self, op: Op) -> Outcome:
        disk = self.disks[op.disk]
        standby = op.side is Side.STANDBY
        if op.verb is Verb.FLUSH:
            return OK
        if op.verb is Verb.TRIM and standby and disk.stage is Stage.NONE:
            return OK  # never asked: the filter has no discard
        if standby and disk.stage is Stage.NONE:
            return EIO
        if op.verb is Verb.READ:
            read = disk.read_view if standby else disk.read_secondary
            return Outcome("bytes", read(op.offset, op.length))
        write = disk.write_view if standby else disk.write_secondary
        write(op.offset, op.data if op.verb is Verb.WRITE else bytes(op.length))
        return OK

    def _burst(self, op: Op) -> Outcome:
        disk = self.disks[op.disk]
        primary, standby = op.burst()
        for offset, data in primary:
            disk.write_secondary(offset, data)
        for offset, data in standby:
            disk.write_view(offset, data)
        return OK

    # -- QMP ------------------------------------------------------------------------------------

    def _command(self, op: Op) -> list[Outcome]:
        match op.verb:
            case Verb.START_WITH_FAILOVER:
                return [qmp_error(FAILOVER_PARAMETER)]
            case Verb.START | Verb.START_AS_PRIMARY:
                primary = op.verb is Verb.START_AS_PRIMARY
                return [self._for_all(lambda disk: disk.start(primary=primary))]
            case Verb.CHECKPOINT:
                return [self._for_all(DiskModel.checkpoint)]
            case Verb.STOP | Verb.STOP_AS_PRIMARY:
                return [self._stop()]
            case Verb.FAILOVER:
                for offset, data in op.burst()[1]:
                    self.disks[op.disk].write_view(offset, data)
                outcome = self._for_all(lambda disk: disk.stop(failover=True))
                return [outcome if Difference.FAILOVER_ERRORS in self.differences else EMPTY]
            case Verb.STATUS:
                return self._status()
            case Verb.JOBS:
                return [self._jobs()]
        raise AssertionError(op)

    def _for_all(self, command: Callable[[DiskModel], str | None]) -> Outcome:
        """QEMU takes the disks last-added first, and stops at the first error. replnbd's group is
        always in one stage, so that its error is the same whichever disk gives it."""
        for disk in reversed(self.disks):
            error = command(disk)
            if error is not None:
                return qmp_error(error)
        return EMPTY

    def _stop(self) -> Outcome:
        """The QEMU world repeats a plain stop for each disk: one fails, and stops, each time."""
        outcome = EMPTY
        for _ in self.disks:
            outcome = self._for_all(lambda disk: disk.stop(failover=False))
        return outcome

    def _status(self) -> list[Outcome]:
        for disk in reversed(self.disks):
            if disk.stage is Stage.NONE:
                return [status(NOT_RUNNING)]
            if disk.stage is Stage.FAILOVER and Difference.HONEST_STATUS not in self.differences:
                # The commit ends, and takes the error back, at a moment of its own.
                return [status(IO_ERROR), status(None)]
            if disk.error:
                return [status(IO_ERROR)]
        return [status(None)]

    def _jobs(self) -> Outcome:
        if Difference.JOBS not in self.differences:
            return Outcome("jobs", ())
        return Outcome("jobs", tuple(("backup", index) for index in range(len(self.disks))))
