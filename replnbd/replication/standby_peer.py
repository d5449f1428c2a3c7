"""StandbyPeer: what a standby's disk is to another replnbd: first the copy of its disk; after a
failover a source itself, which the old primary can become the standby of.

Nothing is kept while replication runs: what the standby lacks, the primary has marked. A failover
marks what makes the two differ (what either side has written since the checkpoint that becomes the
disk), takes a generation of its own, and marks every write from then on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import NoReturn, Protocol

from replnbd.block import BlockNode, OverlayNode, RangeLock
from replnbd.errors import ReplnbdError, StateError
from replnbd.events import EventBus
from replnbd.filters import QuorumNode
from replnbd.jobs import Job, JobRegistry
from replnbd.replication.companions import Companions
from replnbd.replication.history import History, Role
from replnbd.replication.lineage import OUTDATED, STRANGERS, Claim, Lineage, Plan, plan
from replnbd.replication.link import Link
from replnbd.replication.nodes import GateNode
from replnbd.replication.peer import PeerState
from replnbd.replication.session import LinkState
from replnbd.replication.stage import Stage

log = logging.getLogger(__name__)


class PeeredDisk(Protocol):
    """What is asked of the disk itself."""

    name: str
    secondary: BlockNode
    primary: GateNode
    stage: Stage
    promoted: bool
    suspended: str | None


class StandbyPeer:
    """Of `disk`, whose requests `ranges` locks; a `peer.Target`. `history` is None until there is
    something to remember, and `make_history` makes one; without that, there is no peer to be had.

    The group's commands come one at a time; what a source says takes its turn by `turn`.
    """

    def __init__(
        self,
        disk: PeeredDisk,
        ranges: RangeLock,
        history: History | None,
        make_history: Callable[[], Awaitable[History]] | None,
        *,
        bus: EventBus,
        jobs: JobRegistry,
    ) -> None:
        self.history = history
        self.link: Link | None = None
        """Once the disk has taken over."""
        self.refused: str | None = None
        """Why a source was refused last, until one is not."""
        self._failed_before = 0
        """`writes_failed` of the primary's gate, when they were in step last."""
        self._begun: Claim | None = None
        """What the source said of its disk when it began, in this process."""
        self.turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
        self.companions = Companions()
        """The links of the group, for one that is made."""
        self.drop_sources: Callable[[], Awaitable[None]] = _nobody
        """Ends the connections of sources to the disk; nothing of theirs is under way then."""
        self.drop_strangers: Callable[[], Awaitable[None]] = _nobody
        """The same of others that may write it."""
        self._disk = disk
        self._name = disk.name
        self._ranges = ranges
        self._make_history = make_history
        self._bus = bus
        self._jobs = jobs

    @property
    def claim(self) -> Claim:
        """What this side says of its disk."""
        return Claim() if self.history is None else self.history.claim

    def digest_key(self) -> bytes:
        """See `History.digest_key`."""
        return b"" if self.history is None else self.history.digest_key()

    @property
    def syncing(self) -> bool:
        """Whether a source is bringing the disk up to date: it is not what the source was at any
        moment."""
        return self.history is not None and self.history.record.syncing

    @property
    def follows(self) -> bool:
        """Whether the disk is another replnbd's copy, which that alone may write."""
        if self.history is None or self.history.record.pair is None:
            return False
        record = self.history.record
        return record.foreign is None and (record.role is Role.STANDBY or record.retracting)

    @property
    def sending(self) -> bool:
        """Whether this disk is a source, or looks for a standby."""
        return self.link is not None and self.link.state is not LinkState.OFF

    @property
    def job(self) -> Job | None:
        """What brings the new standby up to date, once this disk is a source."""
        return None if self.link is None else self.link.job

    def check_in_step(self, what: str) -> None:
        """StateError while the disk is no state to go on from."""
        if self.syncing or self._missed:
            raise StateError(
                f"'{self._name}' is being synchronised: {what} has to wait until its primary has"
                " sent all that it lacks"
            )

    @property
    def _missed(self) -> bool:
        """Whether a write of its primary has failed here since they were in step: the primary will
        say so and send it again, but may have sent others behind it."""
        return self.follows and self._disk.primary.writes_failed != self._failed_before

    # Section: as a target

    def peer_state(self) -> PeerState:
        """See `peer.Target`."""
        disk = self._disk
        return PeerState(
            name=disk.name,
            size=disk.secondary.size,
            stage=disk.stage.value,
            fenced=disk.promoted,
            syncing=self.syncing,
            claim=self.claim,
            failed=disk.primary.writes_failed,
        )

    async def enter(self) -> None:
        """See `peer.Target`."""
        await self.drop_sources()

    async def begin_sync(self, claim: Claim, begin: Plan) -> None:
        """See `peer.Target`."""
        async with self.turn():
            await self._begin_sync(claim, begin)
        await self.drop_strangers()

    async def end_sync(self, lineage: Lineage, failed: int | None) -> None:
        """See `peer.Target`."""
        async with self.turn():
            begun = self._begun
            if self.history is None or begun is None or not self.syncing:
                raise StateError(f"no synchronisation of '{self._name}' has begun")
            failed_now = self._disk.primary.writes_failed
            if failed not in (None, failed_now):
                raise StateError(f"a write to '{self._name}' has failed meanwhile")
            began_as = None if begun.lineage is None else begun.lineage.generation
            if began_as not in (None, lineage.generation, *lineage.ancestors):
                raise StateError(f"the synchronisation of '{self._name}' is another source's")
            with self._recorded():
                await self.history.end_following(lineage)
            self._begun = None
            self._failed_before = failed_now
            self._tell_syncing(False)

    async def _begin_sync(self, claim: Claim, begin: Plan) -> None:
        if self._disk.suspended is not None:
            raise StateError(self._disk.suspended)
        await self._retract_late()
        decided = plan(claim, self.claim)
        if self._disk.promoted and decided in (Plan.FULL, Plan.INCREMENTAL, STRANGERS):
            decided = OUTDATED
        if not isinstance(decided, Plan):
            self._refuse(decided)
        if claim.pair is None or (begin is Plan.INCREMENTAL and claim.pair != self.claim.pair):
            self._refuse("the peer takes it for another disk")
        self.refused = None
        history = await self._require_history()
        was_syncing = history.record.syncing
        with self._recorded():
            await history.begin_following(claim.pair)
        self._begun = claim
        if not was_syncing:
            self._tell_syncing(True)

    async def _retract_late(self) -> None:
        """What a reset could not record."""
        if self.history is not None and self.history.record.retracting:
            with self._recorded():
                await self.history.end_retracting(happened=not self._disk.promoted)

    def _refuse(self, reason: str) -> NoReturn:
        if reason != self.refused:
            log.warning("disk %s: a primary is refused: %s", self._name, reason)
            self._bus.emit("x-replnbd-refused", device=self._name, reason=reason)
        self.refused = reason
        raise StateError(reason)

    def _tell_syncing(self, syncing: bool) -> None:
        log.info("disk %s: synchronisation %s", self._name, "begins" if syncing else "is complete")
        self._bus.emit("x-replnbd-sync", device=self._name, syncing=syncing)

    # Section: taking over

    async def before_failover(self, overlays: tuple[OverlayNode, ...], generation: str) -> None:
        """Drained, and before anything is dropped: mark where the old primary will differ."""
        history = self.history
        if history is None:
            return
        record = history.record
        if record.pair is not None:
            await _mark_allocated(history, overlays)
            self._follow_writes(history)
        await history.begin_taking_over(generation)

    async def failover_failed(self) -> None:
        """It has not happened after all."""
        self.link = None
        if self.history is not None:
            await self.history.end_taking_over(happened=False)

    async def taken_over(self) -> None:
        """It has happened: this disk goes on alone."""
        if self.history is not None:
            await self.history.end_taking_over(happened=True)

    async def restore(self, *, promoted: bool) -> None:
        """Bring the history in line with what the group's journal says. OSError."""
        history = self.history
        if history is None:
            return
        if history.record.taking_over:
            await history.end_taking_over(happened=promoted)
        if history.record.retracting:
            await history.end_retracting(happened=not promoted)
        if promoted and (history.record.pair is not None or history.record.to is not None):
            self._follow_writes(history)

    def over(self, node: BlockNode) -> BlockNode:
        """`node`, of a disk that has taken over, with its writes marked and sent."""
        if self.link is None:
            return node
        return QuorumNode(node.name, node, self.link.forwarder)

    def _follow_writes(self, history: History) -> Link:
        if self.link is None:
            self.link = Link(
                self._name,
                self._disk.secondary,
                self._ranges,
                history,
                bus=self._bus,
                jobs=self._jobs,
            )
            self.link.companions = self.companions
        return self.link

    # Section: as a source

    async def replicate(self, to: str) -> None:
        """Send to the standby at `to` from now on: the disk has taken over, and all is committed.
        StateError if it cannot be. The caller has this disk drained, and sets its targets."""
        history = await self._require_history()
        with self._recorded():
            await history.set_target(to)
        link = self._follow_writes(history)
        await link.stop()
        link.start(to)

    def resume(self) -> None:
        """All is committed: go on sending to where the last process did."""
        link, history = self.link, self.history
        if link is None or history is None or self.sending:
            return
        if history.record.to is not None:
            link.start(history.record.to)

    async def wait_in_step(self) -> None:
        """Until all that was written has arrived at the new standby, if there is a way to one."""
        if self.link is not None:
            await self.link.wait_if_up()

    async def stop_sending(self) -> None:
        """Nothing is sent any more; where, is not forgotten."""
        if self.link is not None:
            await self.link.stop()

    # Section: a reset

    async def before_reset(self, *, forget: bool) -> None:
        """A standby again, that any side may overwrite with which it was in step once; `forget`:
        any side at all. Whether a disk that has taken over is one, the group decides. OSError."""
        history = self.history
        if history is None:
            return
        if forget:
            await history.forget()
        elif self._disk.promoted:
            await history.begin_retracting()
        else:
            await history.retract()

    async def end_reset(self, *, happened: bool) -> None:
        """It has happened, or has not after all. OSError: that will be recorded later."""
        if happened:
            self.link = None
            self.refused = None
        if self.history is not None and self.history.record.retracting:
            await self.history.end_retracting(happened=happened)

    async def close(self, *, in_order: bool) -> None:
        """The disk is closed; `in_order`: and has been flushed. OSError."""
        if self.history is not None:
            await (self.history.close() if in_order else self.history.abandon())

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """An OSError within the block becomes a StateError."""
        try:
            yield
        except OSError as exc:
            raise StateError(f"cannot write the history of '{self._name}': {exc.strerror}") from exc

    async def _require_history(self) -> History:
        if self.history is None:
            if self._make_history is None:
                raise StateError(f"'{self._name}' keeps no history of what it is a copy of")
            try:
                self.history = await self._make_history()
            except (OSError, ReplnbdError) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else str(exc)
                raise StateError(f"cannot make the history of '{self._name}': {reason}") from exc
        return self.history


async def _nobody() -> None:
    return


async def _mark_allocated(history: History, overlays: tuple[OverlayNode, ...]) -> None:
    for overlay in overlays:
        position = 0
        while position < overlay.size:
            allocated, count = await overlay.allocated(position, overlay.size - position)
            if allocated:
                await history.map.mark_behind(position, count)
            position += count
            await asyncio.sleep(0)
