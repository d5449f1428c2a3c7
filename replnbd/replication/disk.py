"""StandbyDisk: one replicated disk in mode secondary: its nodes, its stage, its jobs.

    export NAME                          export TOP-ID
        |                                    |
    primary gate                        standby gate
        |                                    |
        +--> refused (fenced)                +--> refused (none)
        +--> copy-before-write (running)     +--> active (running, done after stop)
        |        |        \\                  +--> split: active | secondary (failover, -failed)
        |        |         v                 |
        |        |      hidden <-------------+    active -> hidden -> secondary
        |        v                           |
        +--> secondary (none, done) <--------+--> (done after failover)

The steps here are the parts of the group's commands. `run`, `stop`, `fail_over` and `reset` are
assignments, made while both gates are drained; all that can fail comes before them. What must
outlive the process is a DiskRecord: `record` makes one, `restore` goes on from one.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from replnbd.block import BlockNode, OverlayNode, RangeLock
from replnbd.block.range_lock import EVERYTHING
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import CopyBeforeWrite
from replnbd.jobs import BackupJob, CommitJob, Job, JobRegistry
from replnbd.replication.history import History
from replnbd.replication.journal import DiskRecord, Durability, FailoverTarget, Layer
from replnbd.replication.nodes import GateNode, NotStartedNode, RefusingNode, SplitWriteNode
from replnbd.replication.stage import IO_ERROR, NOT_RUNNING, Command, Stage
from replnbd.replication.stage import next_stage as next_stage_of
from replnbd.replication.standby_peer import StandbyPeer

log = logging.getLogger(__name__)


class StandbyDisk:
    """A disk in mode secondary. Made with its nodes open; the group drives it.

    `primary` and `standby` are the nodes to export as NAME and TOP-ID; they stay the same for as
    long as this object lives. `on_fence(disk)` is called when NAME must be cut off,
    `on_unfence(disk)` when it may be served again, and `on_commit_end(disk)` when a commit has
    ended and the stage with it.
    """

    mode = "secondary"

    def __init__(
        self,
        name: str,
        top_id: str,
        *,
        secondary: BlockNode,
        hidden: OverlayNode,
        active: OverlayNode,
        durability: Durability = Durability.PROCESS,
        identities: dict[Layer, str] | None = None,
        history: History | None = None,
        make_history: Callable[[], Awaitable[History]] | None = None,
        bus: EventBus,
        jobs: JobRegistry,
    ) -> None:
        self.name = name
        self.top_id = top_id
        self.secondary = secondary
        self.hidden = hidden
        self.active = active
        self.overlays: tuple[OverlayNode, OverlayNode] = (active, hidden)
        """From the top down."""
        self.durability = durability
        """POWER if both overlays are `power_safe`."""
        self.identities = identities
        """Of the overlays: who goes on must find the same ones."""
        self.stage = Stage.NONE
        self.promoted = False
        """After a failover: the standby's disk is the disk, and NAME is fenced."""
        self.target = FailoverTarget.STANDBY
        """What the last failover has made of the disk, or is making."""
        self.lost: str | None = None
        """Why the view cannot be trusted, while that is so: then nobody gets to see it."""
        self.suspended: str | None = None
        """Why nobody is served at all, while that is so."""
        self.error: str | None = None
        """What `query-xen-replication-status` says is wrong, while something is."""
        self.checkpoint_count = 0
        self.checkpoint_time: float | None = None
        self.on_fence: Callable[[StandbyDisk], None] = lambda _: None
        self.on_unfence: Callable[[StandbyDisk], None] = lambda _: None
        self.on_commit_end: Callable[[StandbyDisk], None] = lambda _: None
        self._bus = bus
        self._jobs = jobs
        self._backup: BackupJob | None = None
        self._copy: CopyBeforeWrite | None = None
        self._commit: CommitJob | None = None
        self._is_copied: Callable[[int, int], bool] = lambda _offset, _length: False
        # What touches the same cluster of an overlay cannot be told apart.
        self._ranges = RangeLock(max(hidden.granularity, active.granularity))
        self.peer = StandbyPeer(self, self._ranges, history, make_history, bus=bus, jobs=jobs)
        self._not_started = NotStartedNode(top_id, active.size)
        self.primary = GateNode(name, secondary.size, secondary, self._ranges)
        self.standby = GateNode(top_id, active.size, self._not_started, self._ranges)

    def next_stage(self, command: Command) -> Stage | None:
        """Where `command` leads from here; None if ignored; StateError as QEMU words it."""
        return next_stage_of(self.stage, command)

    @property
    def replication_error(self) -> str | None:
        """What `query-xen-replication-status` answers: None, or QEMU's text."""
        if self.stage is Stage.NONE:
            return NOT_RUNNING
        return IO_ERROR if self.error is not None else None

    @property
    def job(self) -> Job | None:
        """The job of the present stage."""
        return self._commit or self._backup or self.peer.job

    async def check_start(self) -> None:
        """The seed's checks of the graph, with its texts; StateError."""
        if self.active.backing is None:
            raise StateError("Active disk doesn't have backing file")
        if self.hidden.backing is None:
            raise StateError("Hidden disk doesn't have backing file")
        if not self.active.size == self.hidden.size == self.secondary.size:
            raise StateError("Active disk, hidden disk, secondary disk's length are not the same")
        # QEMU's filter empties them here. But what an overlay holds before a start is of a run that
        # did not end well: a daemon stopped in the middle of a commit, say.
        if await self.holds_data():
            raise StateError(
                f"the overlays of '{self.name}' hold data of an earlier run, which a start would"
                " lose: 'reset' with force drops it, 'qemu-img commit' keeps it"
            )

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Nothing is in flight on this disk, and nothing begins, within the block."""
        key = await self._ranges.acquire(0, EVERYTHING, True)
        try:
            yield
        finally:
            self._ranges.release(key)

    def overlay(self, layer: Layer) -> OverlayNode:
        """The image of a layer."""
        return self.active if layer is Layer.ACTIVE else self.hidden

    # Section: what outlives the process

    def record(self) -> DiskRecord:
        """The disk as the journal keeps it."""
        return DiskRecord(
            name=self.name,
            top_id=self.top_id,
            size=self.secondary.size,
            durability=self.durability,
            overlays=self.identities,
            stage=self.stage,
            promoted=self.promoted,
            target=self.target,
            lost=self.lost,
            error=self.error,
            checkpoint_count=self.checkpoint_count,
            checkpoint_time=self.checkpoint_time,
        )

    def restore(self, record: DiskRecord) -> None:
        """Go on in the stage of an earlier process, jobs included. Nobody is served yet, and what
        that process was emptying is empty."""
        self.stage = record.stage
        self.promoted = record.promoted
        self.target = record.target
        self.lost = record.lost
        self.error = record.error
        self.checkpoint_count = record.checkpoint_count
        self.checkpoint_time = record.checkpoint_time
        if self.promoted:
            self.on_fence(self)
        if self.stage is Stage.RUNNING:
            self._start_backup()
        elif self.stage is Stage.DONE:
            self.peer.resume()
        elif self.stage is Stage.FAILOVER:
            if self.lost is None:
                self._make_commit().start()
            else:
                self.stage = Stage.FAILOVER_FAILED
        self._set_targets()

    async def flush_all(self) -> None:
        """Make the whole view durable, if it is to survive a power failure: an earlier process may
        have left stores in the page cache that nobody has flushed. OSError."""
        if self.durability is Durability.POWER:
            for node in (self.secondary, self.hidden, self.active):
                await node.flush()

    # Section: steps of commands

    def checkpointed(self) -> None:
        """The overlays are empty: a new checkpoint holds from here on."""
        self.checkpoint_count += 1
        self.checkpoint_time = time.time()
        self.primary.bytes_written = 0
        self.standby.bytes_written = 0
        if self._backup is not None:
            self._backup.restart_progress()
        self.error = self.lost = None
        self._set_targets()
        self._bus.emit("x-replnbd-checkpoint", device=self.name, count=self.checkpoint_count)

    def run(self) -> None:
        """Stage *running*: drained, with empty overlays."""
        self._start_backup()
        self.error = None
        self._set_stage(Stage.RUNNING)

    def stop(self) -> Job | None:
        """Stage *done* by a plain stop: drained, with empty overlays. The disk is the primary's
        latest data; the standby's writes from now on stay in the active overlay.

        Returns the job that is about to end by it.
        """
        self.error = self.lost = None
        backup = self._finish_backup()
        self._set_stage(Stage.DONE)
        return backup

    def fail_over(self, target: FailoverTarget = FailoverTarget.STANDBY) -> Job | None:
        """Stage *failover*, or once more after a failed one: drained. The fence goes up before
        anything else, and the commit begins of what is left in the overlays.

        Returns the job that is about to end by it.
        """
        self.promoted = True
        self.target = target
        self.error = self.lost = None
        self.on_fence(self)
        backup = self._finish_backup()
        commit = self._make_commit()
        self._set_stage(Stage.FAILOVER)
        commit.start()
        return backup

    def reset(self) -> None:
        """Back to stage *none*: drained, with empty overlays. The fence comes down."""
        self.promoted = False
        self.target = FailoverTarget.STANDBY
        self.error = self.lost = None
        self.checkpoint_count = 0
        self.checkpoint_time = None
        self._set_stage(Stage.NONE)
        self.on_unfence(self)

    async def replicate(self, to: str) -> None:
        """Send what is written to the promoted disk to the standby at `to`; StateError."""
        if not self.promoted or self.stage is not Stage.DONE:
            raise StateError(f"'{self.name}' ({self.stage.value}) is no disk that has taken over")
        async with self.drained():
            await self.peer.replicate(to)
            self._set_targets()

    def suspend(self, reason: str | None) -> None:
        """Serve nobody, because of `reason`; None: serve again."""
        self.suspended = reason
        self._set_targets()
        self._bus.emit("x-replnbd-suspended", device=self.name, reason=reason)

    @property
    def fence_reason(self) -> str:
        """What a primary is told that still tries to use NAME after a failover."""
        return f"'{self.name}' is fenced: the standby has taken over; 'reset' lifts the fence"

    def _set_targets(self) -> None:
        """What the exports lead to, by stage (see the head of this file)."""
        self.primary.target = self._primary_target()
        self.standby.target = self._standby_target()

    def _primary_target(self) -> BlockNode:
        if self.promoted:
            return self._refusal(self.name, errno.ESHUTDOWN, self.fence_reason)
        if self.suspended is not None:
            return self._refusal(self.name, errno.EIO, self.suspended)
        if self._copy is not None and self.lost is None:
            return self._copy
        return self.secondary

    def _standby_target(self) -> BlockNode:
        reason = self.suspended or self.lost
        if reason is not None:
            return self._refusal(self.top_id, errno.EIO, reason)
        if self.stage is Stage.NONE:
            return self._not_started
        if self.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            split = SplitWriteNode(self.top_id, self.overlays, self.secondary, self._is_copied)
            return self.peer.over(split)
        if self.promoted:
            return self.peer.over(self.secondary)
        return self.active

    def _refusal(self, name: str, code: int, reason: str) -> RefusingNode:
        return RefusingNode(name, self.secondary.size, code, reason)

    # Section: jobs

    def _start_backup(self) -> None:
        self._copy = CopyBeforeWrite(f"backup-{self.name}", self.secondary, self.hidden)
        self._backup = BackupJob(f"backup-{self.name}", self._bus, self._copy)
        self._jobs.add(self._backup)
        self._backup.start()

    def _finish_backup(self) -> Job | None:
        backup, self._backup, self._copy = self._backup, None, None
        if backup is not None:
            backup.finish()
        return backup

    def _make_commit(self) -> CommitJob:
        self._commit = CommitJob(
            f"commit-{self.name}", self._bus, self.overlays, self.secondary, self._ranges,
            self._commit_ended,
        )  # fmt: skip
        self._jobs.add(self._commit)
        # Of the job, whoever has it: one that is told to end still drops what it has copied.
        self._is_copied = self._commit.is_copied
        return self._commit

    async def holds_data(self) -> bool:
        """Whether an overlay has anything allocated, be it zeroes: what no disk has."""
        for overlay in self.overlays:
            position = 0
            while position < overlay.size:
                allocated, count = await overlay.allocated(position, overlay.size - position)
                if allocated:
                    return True
                position += count
        return False

    async def end_jobs(self) -> None:
        """For an orderly end: the jobs stop where they are, and nothing else changes."""
        await self.peer.stop_sending()
        commit, self._commit = self._commit, None
        backup = self._finish_backup()
        if commit is not None:
            commit.cancel()
            await commit.wait()
        if backup is not None:
            await backup.wait()

    async def close(self) -> None:
        """Make everything durable and close all nodes, top first. The jobs have ended, the
        exports are gone. OSError, naming the disk, if that fails; all are closed even then."""
        in_order = False
        try:
            async with AsyncExitStack() as stack:
                for node in (self.secondary, self.hidden, self.active):
                    stack.push_async_callback(node.close)
                # The overlays flush as they close; a raw disk has nothing of its own to write.
                await self.secondary.flush()
            in_order = True
        except OSError as exc:
            self.error = f"disk '{self.name}' could not be flushed at its end: {exc.strerror}"
            log.error("%s", self.error)  # noqa: TRY400
            raise OSError(exc.errno, self.error) from exc
        finally:
            await self.peer.close(in_order=in_order)

    def _set_stage(self, stage: Stage) -> None:
        previous, self.stage = self.stage, stage
        self._set_targets()
        if stage is not previous:
            log.info("disk %s: stage %s -> %s", self.name, previous.value, stage.value)
            self._bus.emit(
                "x-replnbd-stage", device=self.name, previous=previous.value, stage=stage.value
            )

    def _commit_ended(self, job: CommitJob) -> None:
        if self._commit is not job:
            return  # an orderly end of the daemon
        self._commit = None
        if job.error is None:
            # No drain: the overlays are empty, so both targets do the same from here on.
            self._follow(Command.COMMITTED)
        else:
            self.error = f"{job.id}: {job.error.strerror}"
            self._follow(Command.COMMIT_FAILED)

    def _follow(self, command: Command) -> None:
        stage = next_stage_of(self.stage, command)
        assert stage is not None
        self._set_stage(stage)
        if stage is Stage.DONE:
            self.peer.resume()
        self.on_commit_end(self)
