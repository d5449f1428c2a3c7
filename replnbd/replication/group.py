"""Group: start, checkpoint, stop, failover and reset, over all disks or none of them.

Each command first asks every disk whether it may (an error there changes nothing anywhere), then
drains all of them, so that all move on at the same instant of their clients' requests, then does
what can fail, and last what cannot. Between the two it is recorded (journal.py): from there on, a
process that dies leaves the next one to end it, on all disks.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager

from replnbd.errors import StateError
from replnbd.replication.companions import Companions
from replnbd.replication.disk import StandbyDisk
from replnbd.replication.group_steps import (
    begin_reset,
    begin_taking_over,
    check_mode,
    end_reset,
    end_taking_over,
    ended,
    flush_checkpoint,
    intended,
    new_generation,
    not_sending,
    take_back,
    told,
)
from replnbd.replication.journal import (
    Durability,
    FailoverTarget,
    Journal,
    Layer,
    Record,
)
from replnbd.replication.keeper import Keeper, whole
from replnbd.replication.stage import Command, Stage

log = logging.getLogger(__name__)

_BOTH = (Layer.ACTIVE, Layer.HIDDEN)
_DROPPED = {
    FailoverTarget.STANDBY: (),
    FailoverTarget.CHECKPOINT: (Layer.ACTIVE,),
    FailoverTarget.LATEST: _BOTH,
}
"""What a failover does not bring into the disk."""


class Group:
    """All replicated disks of a daemon. Commands run one at a time, in the order they came."""

    mode = "secondary"

    def __init__(
        self,
        disks: Sequence[StandbyDisk],
        journal: Journal | None = None,
        *,
        boot: str = "",
        make_journal: Callable[[], Awaitable[Journal]] | None = None,
    ) -> None:
        """`journal` and `make_journal`: see Keeper; without them, nothing outlives the process.
        `boot`: see Record."""
        self.disks = tuple(disks)
        self.generation = new_generation()
        """Another one after every failover."""
        power = any(disk.durability is Durability.POWER for disk in self.disks)
        self.keeper = Keeper(
            journal, make_journal, self._record, self._suspend, always_durable=power
        )
        self._boot = boot
        self._torn = False
        """A checkpoint has failed after some disks had moved on."""
        self._closed = False
        companions = Companions()
        for disk in self.disks:
            disk.peer.companions = companions
            # Until that is recorded, a crash makes the next process commit what is committed.
            disk.on_commit_end = lambda _: self.keeper.settle_soon()
            disk.peer.turn = self.keeper.turn

    async def open(self, record: Record | None = None) -> None:
        """Go on where `record` says that an earlier process was, whose disks these are; without
        one, begin. Nobody is served yet. OSError if that cannot be done, and may be tried again."""
        if record is None:
            for disk in self.disks:
                await disk.peer.restore(promoted=False)
            return
        self.generation = record.generation
        self._torn = record.torn
        for disk, kept in zip(self.disks, record.disks, strict=True):
            for layer in kept.emptying:
                await disk.overlay(layer).make_empty()
        for disk in self.disks:
            await disk.flush_all()
        for disk, kept in zip(self.disks, record.disks, strict=True):
            await disk.peer.restore(promoted=kept.promoted)
            disk.restore(kept)
        await self.keeper.settle(durable=True)
        if self.keeper.suspended is not None:
            raise OSError(errno.EIO, self.keeper.suspended)

    def error(self) -> str | None:
        """What `query-xen-replication-status` answers: None, or the first disk's text."""
        for disk in self._in_qemu_order():
            if disk.replication_error is not None:
                return disk.replication_error
        return None

    @whole
    async def start(self, mode: str = "secondary") -> None:
        """Stage *none* to *running*, with a first checkpoint. All or nothing, and can be tried
        again. StateError with QEMU's texts."""
        async with self.keeper.turn():
            disks = self._moving(Command.START, mode)
            for disk in disks:
                disk.peer.check_in_step("a start")
                await disk.check_start()
            if disks:
                await self.keeper.begin()
            await flush_checkpoint(disks)
            async with self._drained(disks):
                await self._make_empty(disks, Command.START)
                for disk in disks:
                    disk.checkpointed()
                    disk.run()
                await self.keeper.settle()

    @whole
    async def checkpoint(self) -> None:
        """The view becomes the secondary disk as it is now; the standby's writes are dropped. Of a
        disk that has taken over: until its new standby has what was written, as a primary's."""
        async with self.keeper.turn():
            disks = self._moving(Command.CHECKPOINT)
            if sources := [disk.peer for disk in self.disks if disk.peer.sending]:
                await asyncio.gather(*(peer.wait_in_step() for peer in sources))
            for disk in disks:
                disk.peer.check_in_step("a checkpoint")
            await flush_checkpoint(disks)  # most of it, before anybody has to wait
            async with self._drained(disks):
                await self._make_empty(disks, Command.CHECKPOINT)
                for disk in disks:
                    disk.checkpointed()
                await self.keeper.settle()

    @whole
    async def stop(self) -> None:
        """Stage *running* to *done* with empty overlays: each disk is the primary's latest."""
        async with self.keeper.turn():
            disks = self._moving(Command.STOP)
            for disk in disks:
                disk.peer.check_in_step("a stop")
            async with self._drained(disks):
                await self._make_empty(disks, Command.STOP)
                ending = [disk.stop() for disk in disks]
                await self.keeper.settle()
            await ended(ending)

    @whole
    async def failover(self, target: FailoverTarget | None = None) -> None:
        """Fence the primary and make `target` (by default what the standby sees) the disk; from
        *failover-failed*, try the commit again. Returns when the commits have begun.

        StateError if there is no such state to be had: the last checkpoint has reached some disks
        and not others, or the view was lost, or the commit of another target has begun.
        """
        async with self.keeper.turn():
            disks = self._moving(Command.FAILOVER)
            for disk in disks:
                self._check_failover(disk, target)
            if not disks:
                return
            async with self._drained(disks):
                begun = [disk.target for disk in disks if disk.stage is Stage.FAILOVER_FAILED]
                chosen = begun[0] if begun else target or FailoverTarget.STANDBY
                dropped = () if begun else _DROPPED[chosen]
                generation = self.generation if begun else new_generation()
                await begin_taking_over(disks, generation)
                try:
                    await self._make_empty(disks, Command.FAILOVER, dropped, chosen, generation)
                except StateError:
                    await take_back(disks)
                    raise
                ending = [disk.fail_over(chosen) for disk in disks]
                await self.keeper.settle()
                await end_taking_over(disks)
            await ended(ending)

    def _check_failover(self, disk: StandbyDisk, target: FailoverTarget | None) -> None:
        begun = disk.stage is Stage.FAILOVER_FAILED
        if begun and target not in (None, disk.target):
            raise StateError(
                f"the failover to '{disk.target.value}' has begun on '{disk.name}': it can only"
                " be tried again"
            )
        if target is FailoverTarget.LATEST and not begun:
            disk.peer.check_in_step("a failover to 'latest'")
            return  # it needs no view
        if disk.lost is not None:
            raise StateError(
                f"the view of '{disk.name}' is lost ({disk.lost}): "
                + ("use reset with force" if begun else "fail over to 'latest', which is the disk"
                   " as the primary wrote it")
            )  # fmt: skip
        if self._torn and not begun:
            raise StateError(
                "the last checkpoint did not reach all disks: their views do not belong"
                " together; make a good checkpoint first"
            )

    @whole
    async def replicate(self, to: Mapping[str, str]) -> None:
        """After a failover: the disks, by name, are sent to standbys at these URIs from now on.
        StateError, naming the disk that it cannot be of."""
        async with self.keeper.turn():
            if self._closed:
                raise StateError("replnbd is shutting down")
            disks = {disk.name: disk for disk in self.disks}
            async with not_sending([disks[name] for name in to]):
                for name, uri in to.items():
                    await disks[name].replicate(uri)

    async def wait_committed(self) -> None:
        """Wait until no commit is under way; StateError if one has failed or was cancelled."""
        for disk in self.disks:
            if disk.stage is Stage.FAILOVER and disk.job is not None:
                await disk.job.wait()
        failed = [disk for disk in self.disks if disk.stage is Stage.FAILOVER_FAILED]
        if failed:
            raise StateError("; ".join(f"'{disk.name}': {disk.error}" for disk in failed))

    @whole
    async def reset(self, *, force: bool = False) -> None:
        """From *done* or *failover-failed* back to *none*, with empty overlays and no fence.

        StateError, saying what would be lost, while an overlay holds uncommitted data, unless
        `force`.
        """
        async with self.keeper.turn():
            disks = self._moving(Command.RESET)
            async with not_sending(disks), self._drained(disks):
                held = [] if force else [disk for disk in disks if await disk.holds_data()]
                if held:
                    names = ", ".join(f"'{disk.name}'" for disk in held)
                    raise StateError(
                        f"the overlays of {names} hold data that is in no disk, which a reset"
                        " would lose: use force"
                    )
                forget = force and all(disk.stage is Stage.NONE for disk in disks)
                await begin_reset(disks, forget=forget)
                try:
                    await self._make_empty(disks, Command.RESET)
                except StateError:
                    await end_reset(disks, happened=False)
                    raise
                await end_reset(disks, happened=True)
                for disk in disks:
                    disk.reset()
                await self.keeper.settle()

    @whole
    async def close(self) -> None:
        """An orderly end: jobs stop, everything is flushed and closed. No exports any more.
        OSError if a disk could not be flushed; all others are closed well even then."""
        self.keeper.stop()
        async with self.keeper.turn():
            self._closed = True
            for disk in self.disks:
                await disk.end_jobs()
            async with self._drained(self.disks), AsyncExitStack() as stack:
                for disk in reversed(self.disks):
                    stack.push_async_callback(disk.close)

    def _moving(self, command: Command, mode: str = "secondary") -> list[StandbyDisk]:
        """The disks that `command` moves on; those that ignore it are left out.

        With the turn taken, the answer holds: only commits change a stage by themselves, and no
        command moves a disk on that is being committed.
        """
        if self._closed:
            raise StateError("replnbd is shutting down")
        moving = []
        for disk in self._in_qemu_order():
            if disk.next_stage(command) is None:
                continue
            check_mode(disk.mode, mode)
            moving.append(disk)
        return moving

    def _in_qemu_order(self) -> list[StandbyDisk]:
        # QEMU keeps its filters in a list, newest first: with several errors, that one is told.
        return list(reversed(self.disks))

    @asynccontextmanager
    async def _drained(self, disks: Sequence[StandbyDisk]) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for disk in disks:
                await stack.enter_async_context(disk.drained())
            yield

    async def _make_empty(
        self,
        disks: Sequence[StandbyDisk],
        command: Command,
        layers: Sequence[Layer] = _BOTH,
        target: FailoverTarget | None = None,
        generation: str | None = None,
    ) -> None:
        """The part of `command` that can fail: record it, and empty `layers` of all disks. A
        failover has a `target`, and its disks the `generation` from then on.

        What can fail is done for all overlays before; then the record, and with it the command has
        happened, on all disks; then one store empties each. The active overlays go first: a store
        that fails before the hidden ones leaves the last checkpoint, without the standby's writes.
        Raises StateError as QEMU words it; the disk's `error` keeps it until the next good one.
        """
        overlays = [(disk, disk.overlay(layer)) for layer in layers for disk in disks]
        try:
            if command in (Command.START, Command.CHECKPOINT):
                await flush_checkpoint(disks)
            async with AsyncExitStack() as stack:
                clears = []
                for disk, overlay in overlays:
                    emptying = overlay.emptying(keep_space=command is Command.CHECKPOINT)
                    with told(disk, f"empty {overlay.name}"):
                        clears.append(await stack.enter_async_context(emptying))
                records = [intended(disk, command, layers, target) for disk in disks]
                generation = generation or self.generation
                durable = command is not Command.CHECKPOINT
                await self.keeper.intend(records, generation, durable=durable)
                for (disk, overlay), clear in zip(overlays, clears, strict=True):
                    with told(disk, f"empty {overlay.name}"):
                        await clear()
                    self._torn = self._torn or len(disks) > 1
                self._torn = False
                self.generation = generation
        except StateError:
            # It is told as failed: nobody may end it later, over what is written meanwhile.
            await self.keeper.settle()
            raise

    def _record(self) -> Record:
        return Record(
            generation=self.generation,
            boot=self._boot,
            torn=self._torn,
            disks=[disk.record() for disk in self.disks],
        )

    def _suspend(self, reason: str | None) -> None:
        for disk in self.disks:
            disk.suspend(reason)
