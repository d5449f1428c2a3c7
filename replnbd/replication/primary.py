"""PrimaryDisk: one disk in mode primary: the local disk, and the link to its standby.

    export NAME
        |
       gate              overlapping requests wait for each other
        |
      quorum             reads: local; writes: local, then on to the copy
      /    \\
    local   link         while the stage is *running* (QEMU's replication filter, mode=primary,
                         which answers EIO in every other stage: the quorum swallows that),
                         or while it is lent

While replication does not need the link it can be *lent* to the graph, whatever the stage: for a
node that was added, as QEMU's quorum has a child without any replication filter. The commands of
replication then do as they do in a QEMU that has no such filter: nothing, and well.

What must outlive the process is in the disk's History.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack

from replnbd.block import BlockNode, RangeLock
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import QuorumNode
from replnbd.jobs import Job, JobRegistry
from replnbd.replication.history import History
from replnbd.replication.lineage import TWO_PRIMARIES, Claim, Lineage, Plan
from replnbd.replication.link import Link
from replnbd.replication.nodes import GateNode
from replnbd.replication.peer import PeerState
from replnbd.replication.session import LinkState
from replnbd.replication.stage import IO_ERROR, NOT_RUNNING, Command, Stage, next_stage
from replnbd.replication.target import Refused, decide

log = logging.getLogger(__name__)


class NoTarget:
    """A `peer.Target` that no source may write to: a primary's `disk`."""

    def __init__(self, disk: PrimaryDisk) -> None:
        self._disk = disk

    def peer_state(self) -> PeerState:
        """See `peer.Target`."""
        disk = self._disk
        return PeerState(
            name=disk.name,
            size=disk.disk.size,
            stage=disk.stage.value,
            fenced=False,
            syncing=False,
            claim=disk.history.claim,
            primary=True,
        )

    async def enter(self) -> None:
        """See `peer.Target`."""

    async def begin_sync(self, claim: Claim, begin: Plan) -> None:
        """See `peer.Target`."""
        try:
            decide(claim, self.peer_state())
        except Refused as exc:
            self._disk.refuse(str(exc))
        raise StateError(TWO_PRIMARIES)

    async def end_sync(self, lineage: Lineage, failed: int | None) -> None:
        """See `peer.Target`."""
        raise StateError(TWO_PRIMARIES)


class PrimaryDisk:
    """A disk in mode primary. Made with its nodes open; the group drives it. `node` is what to
    export as NAME."""

    mode = "primary"

    def __init__(
        self,
        name: str,
        disk: BlockNode,
        history: History,
        to: str | None,
        *,
        sync: bool = False,
        bus: EventBus,
        jobs: JobRegistry,
    ) -> None:
        self.name = name
        self.disk = disk
        self.history = history
        self.to = to
        """The standby's URI."""
        self.stage = history.record.stage
        self.error: str | None = None
        """What `query-xen-replication-status` says is wrong, while something is."""
        self.lent = False
        """Whether the graph has the link."""
        self.refused: str | None = None
        """Why somebody who took this disk for a standby's was refused last."""
        self._bus = bus
        self._ranges = RangeLock()
        self.link = Link(
            name, disk, self._ranges, history,
            bus=bus, jobs=jobs, sync=sync, on_error=self._failed, on_state=self._link_is,
        )  # fmt: skip
        quorum = QuorumNode(f"{name}-quorum", disk, self.link.forwarder)
        self.node = GateNode(name, disk.size, quorum, self._ranges)

    @property
    def replication_error(self) -> str | None:
        """What `query-xen-replication-status` answers: None, or QEMU's text."""
        if self.stage is Stage.NONE and not self.lent:
            return NOT_RUNNING
        return IO_ERROR if self.error is not None else None

    @property
    def job(self) -> Job | None:
        """The job that brings the standby up to date."""
        return self.link.job

    def next_stage(self, command: Command) -> Stage | None:
        """Where `command` leads from here; None if ignored; StateError as QEMU words it."""
        if command is Command.CHECKPOINT:
            return self.stage  # QEMU's filter does nothing then, in any stage
        if command is Command.FAILOVER:
            command = Command.STOP  # the same, for a primary
        if self.lent and command is not Command.RESET:
            if command is Command.START and self.to is not None:
                raise StateError(self.taken)
            return None
        return next_stage(self.stage, command)

    # Section: the link, lent

    @property
    def taken(self) -> str:
        """Why nobody else can have the link."""
        node_name = self.link.node_name
        return f"Node '{self.name}' has one copy at a time, and that is '{node_name}' now"

    def lend(self) -> None:
        """The link is the graph's, until `take_back`. StateError if it is in use."""
        if self.lent or self.link.state is not LinkState.OFF:
            raise StateError(self.taken)
        self.lent = True

    def take_back(self) -> None:
        """The graph has stopped the link."""
        assert self.link.state is LinkState.OFF
        self.lent = False
        self.error = None

    # Section: the group's commands

    def resume(self) -> None:
        """Go on in the stage of an earlier process."""
        if self.stage is Stage.RUNNING and self.to is not None:
            self.link.start(self.to)

    def refuse(self, reason: str) -> None:
        """Somebody takes this disk for a standby's. StateError."""
        if reason != self.refused:
            log.warning("disk %s: another primary is refused: %s", self.name, reason)
            self._bus.emit("x-replnbd-refused", device=self.name, reason=reason)
        self.refused = reason
        raise StateError(reason)

    async def run(self) -> None:
        """Stage *running*. StateError if that cannot be recorded."""
        await self._set_stage(Stage.RUNNING)
        self.resume()

    async def stop(self, stage: Stage) -> None:
        """Stage *done* or *none*: nothing is sent any more. StateError if it is not recorded."""
        await self._set_stage(stage)
        if not self.lent:
            await self.link.stop()

    def check_demote(self) -> None:
        """StateError if its standby takes what this disk sends: it has not taken over."""
        if not self.lent and self.link.state in (LinkState.SYNCING, LinkState.LIVE):
            raise StateError(
                f"the standby of '{self.name}' has not taken over: 'failover' there comes first"
                " (or 'stop' here)"
            )

    async def demote(self) -> None:
        """This disk is a standby's from now on. StateError if that cannot be recorded."""
        await self.link.stop()
        try:
            await self.history.demote()
        except OSError as exc:
            self.resume()
            raise StateError(f"cannot write the history of '{self.name}': {exc.strerror}") from exc

    async def forget(self) -> None:
        """Whatever this disk has in common with a standby: at the next start all is compared."""
        await self.history.forget()

    async def wait_in_step(self) -> None:
        """Until all that was written has arrived, if there is a way; a standby that cannot be
        reached is no error of the primary's, and one that lacks a lot is: StateError."""
        if self.stage is Stage.RUNNING or self.lent:
            await self.link.wait_if_up()

    async def close(self) -> None:
        """Make everything durable and close all, the export is gone. OSError, naming the disk."""
        await self.link.stop()
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self.history.abandon)
                stack.push_async_callback(self.disk.close)
                await self.disk.flush()
                stack.pop_all()
                await self.disk.close()
                await self.history.close()
        except OSError as exc:
            self.error = f"disk '{self.name}' could not be flushed at its end: {exc.strerror}"
            log.error("%s", self.error)  # noqa: TRY400
            raise OSError(exc.errno, self.error) from exc

    async def _set_stage(self, stage: Stage) -> None:
        try:
            await self.history.set_stage(stage)
        except OSError as exc:
            raise StateError(f"cannot write the history of '{self.name}': {exc.strerror}") from exc
        previous, self.stage = self.stage, stage
        self.error = None
        if stage is not previous:
            log.info("disk %s: stage %s -> %s", self.name, previous.value, stage.value)
            self._bus.emit(
                "x-replnbd-stage", device=self.name, previous=previous.value, stage=stage.value
            )

    def _failed(self, error: OSError) -> None:
        self.error = error.strerror or str(error)

    def _link_is(self, state: LinkState) -> None:
        if state is LinkState.LIVE:
            self.error = None
