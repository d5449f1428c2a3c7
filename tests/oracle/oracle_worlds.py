"""The two worlds: an operation is sent over NBD and QMP, and what comes back is an Outcome."""

from __future__ import annotations

import errno
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from oracle_model import QEMU, REPLNBD, Difference
from oracle_ops import OK, Op, Outcome, Setup, Side, Stage, Verb
from peers import (
    Answer,
    Disk,
    NbdClient,
    NbdReplyError,
    QemuDisk,
    QemuSecondary,
    ReplnbdDaemon,
    ReplnbdDisk,
)

COMMANDS: dict[Verb, tuple[str, dict[str, Any] | None]] = {
    Verb.START: ("xen-set-replication", {"enable": True, "primary": False}),
    Verb.START_AS_PRIMARY: ("xen-set-replication", {"enable": True, "primary": True}),
    Verb.START_WITH_FAILOVER: (
        "xen-set-replication",
        {"enable": True, "primary": False, "failover": True},
    ),
    Verb.CHECKPOINT: ("xen-colo-do-checkpoint", None),
    Verb.STOP: ("xen-set-replication", {"enable": False, "primary": False}),
    Verb.STOP_AS_PRIMARY: (
        "xen-set-replication",
        {"enable": False, "primary": True, "failover": False},
    ),
    Verb.FAILOVER: ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
    Verb.STATUS: ("query-xen-replication-status", None),
}


IN_FLIGHT_MAX = 64
"""Writes of one connection. With some 300 replies unread QEMU waits for its reader, for ever."""


def outcome_of(answer: Answer) -> Outcome:
    """A QMP answer, as the model tells it."""
    if answer.ok:
        return Outcome("return", answer.value)
    return Outcome("error", (answer.error_class, answer.desc))


class World:
    """A peer with its disks, one connection to each export, and the stage it should be in."""

    differences: frozenset[Difference]
    """What tells it from QEMU's filter."""

    def __init__(self, setup: Setup, peer: QemuSecondary | ReplnbdDaemon) -> None:
        self.setup = setup
        self.peer = peer
        self.disks: tuple[Disk, ...] = tuple(peer.disks)
        self.stage = Stage.NONE
        self.clients: dict[tuple[int, Side | None], NbdClient] = {}
        for index, disk in enumerate(self.disks):
            self.clients[index, Side.PRIMARY] = peer.connect(disk.name)
            self.clients[index, Side.STANDBY] = peer.connect(disk.top_id)

    def run(self, op: Op) -> Outcome:
        """Do one operation, and follow the stage that it should lead to."""
        outcome = self._run(op)
        if op.verb is Verb.START and self.stage is Stage.NONE:
            self.stage = Stage.RUNNING
        elif op.verb in (Verb.STOP, Verb.STOP_AS_PRIMARY) and self.stage is Stage.RUNNING:
            self.stage = Stage.STOPPED
        elif op.verb is Verb.FAILOVER and (
            self.stage is Stage.RUNNING
            or (self.stage is Stage.FAILED and Difference.FAILOVER_ERRORS in self.differences)
        ):
            self.stage = Stage.FAILOVER
        elif op.verb is Verb.SETTLE:
            self.stage = Stage.COMMITTED
        return outcome

    def _run(self, op: Op) -> Outcome:
        try:
            if op.side is not None:
                return self._io(op)
            if op.verb is Verb.BURST:
                return self._burst(op)
            if op.verb is Verb.COMPARE:
                return Outcome("bytes", self._contents())
        except NbdReplyError as exc:
            return Outcome("errno", errno.errorcode.get(exc.errno or 0, exc.errno))
        if op.verb is Verb.SETTLE:
            self.peer.wait_for_commit()
            return OK
        if op.verb is Verb.FENCED:
            return Outcome("fenced", self._is_fenced(op.disk))
        if op.verb is Verb.JOBS:
            return self._jobs()
        return self._command(op)

    def _io(self, op: Op) -> Outcome:
        client = self.clients[op.disk, op.side]
        match op.verb:
            case Verb.READ:
                return Outcome("bytes", bytes(client.pread(op.offset, op.length)))
            case Verb.WRITE:
                client.pwrite(op.offset, op.data, flags=op.flags)
            case Verb.ZEROES:
                client.write_zeroes(op.offset, op.length, flags=op.flags)
            case Verb.TRIM:
                self._trim(client, op)
            case Verb.FLUSH:
                client.flush()
        return OK

    def _trim(self, client: NbdClient, op: Op) -> None:
        client.trim(op.offset, op.length, flags=op.flags)

    def _burst(self, op: Op) -> Outcome:
        writes = op.burst()
        clients = [self.clients[op.disk, side] for side in (Side.PRIMARY, Side.STANDBY)]
        for start in range(0, max(map(len, writes)), IN_FLIGHT_MAX):
            pending = [
                client.send_writes(part[start : start + IN_FLIGHT_MAX])
                for client, part in zip(clients, writes, strict=True)
            ]
            for client, cookies in zip(clients, pending, strict=True):
                client.finish(cookies)
        return OK

    def _contents(self) -> bytes:
        """See Model.contents."""
        parts = []
        for index, size in enumerate(self.setup.sizes):
            if self.stage in (Stage.NONE, Stage.RUNNING, Stage.STOPPED):
                parts.append(self.clients[index, Side.PRIMARY].pread(0, size))
            if self.stage is not Stage.NONE:
                parts.append(self.clients[index, Side.STANDBY].pread(0, size))
        return b"".join(parts)

    def _command(self, op: Op) -> Outcome:
        client = self.clients[op.disk, Side.STANDBY]
        in_flight = client.send_writes(op.burst()[1])  # none, but for some failovers
        outcome = outcome_of(self.peer.qmp.answer(*COMMANDS[op.verb]))
        client.finish(in_flight)
        return outcome

    def _is_fenced(self, disk: int) -> bool:
        return False

    def _jobs(self) -> Outcome:
        """Ids `backup-NAME` as the model has them: (type, index of the disk)."""
        numbers = {f"backup-{disk.name}": index for index, disk in enumerate(self.disks)}
        jobs = [(job["type"], numbers[job["id"]]) for job in self.peer.qmp.execute("query-jobs")]
        return Outcome("jobs", tuple(sorted(jobs)))

    def finish(self) -> list[bytes]:
        """Hang up, end the peer in order, and read the secondary disks."""
        for client in self.clients.values():
            client.close()
        self.peer.quit()
        return [disk.content() for disk in self.disks]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self.clients.values():
            client.close()
        self.peer.__exit__(kind, exc, traceback)


class QemuWorld(World):
    """QEMU's own filter."""

    differences = QEMU

    def __init__(self, setup: Setup, folder: Path) -> None:
        disks = [
            QemuDisk.create(folder, f"colo{index}", f"top{index}", setup.content(index), format_)
            for index, format_ in enumerate(setup.formats)
        ]
        super().__init__(setup, QemuSecondary(folder, disks))

    def _trim(self, client: NbdClient, op: Op) -> None:
        """Difference.TRIM: QEMU's filter drops a TRIM, so does copy-before-write, and qcow2 drops
        what does not cover a cluster. There zeroes follow, so that the bytes agree again."""
        super()._trim(client, op)
        exact = self.setup.formats[op.disk] == "raw" and op.side is Side.PRIMARY
        if self.stage is Stage.NONE and op.side is Side.STANDBY:
            return
        if not exact or self.stage is Stage.RUNNING:
            client.write_zeroes(op.offset, op.length)

    def _command(self, op: Op) -> Outcome:
        if op.verb in (Verb.STOP, Verb.STOP_AS_PRIMARY):
            # Difference.GROUP: a plain stop fails at the first disk, and leaves the others running.
            for _ in self.setup.sizes[1:]:
                super()._command(op)
        return super()._command(op)


class ReplnbdWorld(World):
    """replnbd, through its command line, its configuration and its sockets."""

    differences = REPLNBD

    def __init__(self, setup: Setup, folder: Path) -> None:
        disks = [
            ReplnbdDisk.create(folder, f"colo{index}", f"top{index}", setup.content(index), format_)
            for index, format_ in enumerate(setup.formats)
        ]
        super().__init__(setup, ReplnbdDaemon(folder, disks))

    def _is_fenced(self, disk: int) -> bool:
        """The old connection is dead and a new one is refused."""
        try:
            self.clients[disk, Side.PRIMARY].pread(0, 512)
        except OSError:
            pass
        else:
            return False
        try:
            self.peer.connect(self.disks[disk].name).close()
        except NbdReplyError:
            return True
        return False
