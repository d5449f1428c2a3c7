"""Link: the way from a disk to its copy, found, lost and found again without anybody's command.

    OFF          nothing is sent
    CONNECTING   there is no way, and every so often one is looked for
    REFUSED      the target must not be overwritten, or does not let itself be: asked again rarely
    SYNCING      what is BEHIND is being copied; what is not is sent as it is written
    LIVE         the copy is in step, but for what is on its way

A session:  connect, compare claims (lineage.py), tell the target that it begins, copy (MirrorJob),
tell it that all has arrived; then prove, epoch by epoch, and begin again whenever something falls
behind. It ends when the way is lost. The target may be a replnbd, which keeps account of it, or any
NBD server: then this side alone does, and goes by its map.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from enum import StrEnum
from typing import Any

from replnbd.block import BlockNode, RangeLock
from replnbd.block.nbd_connection import NbdConnection
from replnbd.block.nbd_uri import parse_nbd_uri
from replnbd.errors import ProtocolError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry, MirrorJob
from replnbd.replication.forwarder import Forwarder
from replnbd.replication.history import History
from replnbd.replication.lineage import OUTDATED, STRANGERS, Plan, plan
from replnbd.replication.peer import Begin, End, PeerState
from replnbd.replication.target import (
    Refused,
    ask,
    connect,
    connect_peer,
    contexts_for,
    known_digests,
    marks,
    say,
)

log = logging.getLogger(__name__)

BACK_OFF_S = (0.1, 5.0)
"""Between two attempts to connect: the first time, and at most."""
REFUSED_S = 10.0
"""Until a target that refused is asked again."""
FAILED_COPY_S = 2.0
"""Until what the target could not store is sent again."""
SECTOR = 512
PROVE_S = 2.0
"""An epoch: so much more than necessary a resync compares at most."""
FAREWELL_S = 2.0
"""How long what is on its way may take when the link ends."""
HEARTBEAT_S = 5.0
"""How often a target is asked what it is, which also shows that it is there."""
RESPONSE_TIMEOUT_S = 20.0
"""How long a target may leave everything unanswered."""


class LinkState(StrEnum):
    """See the head of this file."""

    OFF = "off"
    CONNECTING = "connecting"
    REFUSED = "refused"
    SYNCING = "syncing"
    LIVE = "live"


class Link:
    """Of the disk `name`, whose bytes are those of `source`, under the locks of `ranges`.

    `forwarder` is what the disk's QuorumNode tells of its writes; it keeps account while the link
    is OFF, too.
    """

    def __init__(
        self,
        name: str,
        source: BlockNode,
        ranges: RangeLock,
        history: History,
        *,
        bus: EventBus,
        jobs: JobRegistry,
        sync: bool = False,
        on_error: Callable[[OSError], None] = lambda _: None,
        on_state: Callable[[LinkState], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.history = history
        self.state = LinkState.OFF
        self.reason: str | None = None
        """Why there is no way, or none may be."""
        self.to: str | None = None
        self.node_name = f"{name}-remote"
        self.peer: PeerState | None = None
        """What the target said last; None if it is no replnbd."""
        self.job: MirrorJob | None = None
        self.bytes_copied = 0
        """By jobs that have ended."""
        self.forwarder = Forwarder(
            history.map,
            sync=sync,
            before_alone=self._before_alone,
            on_behind=self._fell_behind,
            on_bad=self._bad,
        )
        self.forwarder.alone = history.is_shared
        self._source = source
        self._ranges = ranges
        self._bus = bus
        self._jobs = jobs
        self._on_error = on_error
        self._on_state = on_state
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        """Something has fallen behind, or the way is lost."""
        self._settled = asyncio.Event()
        """The state is not SYNCING (any more)."""
        self._lost: OSError | None = None
        self._stepping = asyncio.Lock()

    # Section: its owner's

    def start(self, to: str) -> None:
        """Send to the target at the URI `to` from now on, for as long as it takes."""
        assert self._task is None
        self.to = to
        self._set_state(LinkState.CONNECTING)
        self._task = asyncio.get_running_loop().create_task(
            self._live(to), name=f"link {self.name}"
        )

    async def stop(self) -> None:
        """Send no more. What is on its way has a moment to arrive; else it is marked."""
        task, self._task = self._task, None
        if task is None:
            return
        if self.state is LinkState.LIVE:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self.forwarder.prove()
        task.cancel()
        await asyncio.wait([task])
        self._set_state(LinkState.OFF)

    async def wait_in_step(self) -> None:
        """Until everything that was written before this call has arrived. OSError if there is no
        way."""
        while self.state is LinkState.SYNCING:
            self._settled.clear()
            await self._settled.wait()
        if self.state is not LinkState.LIVE:
            raise OSError(errno.ENOTCONN, self.reason or "there is no way to the standby")
        await self.forwarder.prove()

    def describe(self) -> dict[str, Any]:
        """For `x-replnbd-status`; sizes in bytes."""
        connection = self.forwarder.connection
        job = self.job
        return {
            "to": self.to,
            "state": self.state.value,
            "reason": self.reason,
            "behind-bytes": self.history.map.behind_bytes,
            "unproven-bytes": self.history.map.unproven_bytes,
            "queued-bytes": 0 if connection is None else connection.bytes_outstanding,
            "sent-bytes": self.forwarder.bytes_sent,
            "copied-bytes": self.bytes_copied + (0 if job is None else job.bytes_copied),
        }

    # Section: sessions

    async def _live(self, to: str) -> None:
        delay_s = BACK_OFF_S[0]
        while True:
            try:
                await self._session(to)
            except Refused as exc:
                self._set_state(LinkState.REFUSED, str(exc))
                delay_s = REFUSED_S
            except (OSError, ProtocolError, ValueError) as exc:
                was_up = self.state in (LinkState.SYNCING, LinkState.LIVE)
                self._set_state(LinkState.CONNECTING, getattr(exc, "strerror", None) or str(exc))
                delay_s = BACK_OFF_S[0] if was_up else min(2 * delay_s, BACK_OFF_S[1])
            except Exception:
                log.exception("link of %s: our bug", self.name)
                self._set_state(LinkState.CONNECTING, "a bug, see the log")
                delay_s = BACK_OFF_S[1]
            await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))

    async def _session(self, to: str) -> None:
        """From connecting to the end of the way, which is an exception."""
        target = parse_nbd_uri(to)
        async with AsyncExitStack() as stack:
            peer = await connect_peer(target, stack)
            begin = await self._compare(peer, to)
            data = await connect(target, contexts_for(peer), stack)
            self._check(data)
            if begin is Plan.FULL:
                await self.history.begin_pair(None if peer is not None else to)
            elif peer is not None:
                # What the target has changed on its own is to be overwritten.
                async for offset, length in marks(data):
                    await self.history.map.mark_behind(offset, length)
            self._lost = None
            data.on_closed = self._lose
            self.forwarder.connect(data, discards=peer is not None)
            stack.push_async_callback(self._disconnect)
            tending = asyncio.get_running_loop().create_task(self._tend(peer))
            stack.push_async_callback(_end, tending)
            await self._follow(peer, begin)

    async def _compare(self, peer: NbdConnection | None, to: str) -> Plan:
        """What has to be done; Refused if it must not."""
        record = self.history.record
        if peer is None:
            self.peer = None
            known = record.pair is not None and record.foreign == to
            return Plan.INCREMENTAL if known else Plan.FULL
        self.peer = state = await ask(peer)
        if state.size != record.size:
            raise Refused(f"it has {state.size} bytes, and this disk {record.size}")
        decided = plan(self.history.claim, state.claim)
        if state.fenced and decided in (Plan.FULL, Plan.INCREMENTAL, STRANGERS):
            decided = OUTDATED
        if not isinstance(decided, Plan):
            with suppress(OSError):  # it is to know, too
                await say(peer, Begin(claim=self.history.claim, plan=Plan.INCREMENTAL))
            raise Refused(decided)
        return decided

    def _check(self, data: NbdConnection) -> None:
        if data.size != self.history.record.size:
            raise Refused(f"it has {data.size} bytes, and this disk {self.history.record.size}")
        if data.read_only:
            raise Refused("it can only be read")

    async def _follow(self, peer: NbdConnection | None, begin: Plan) -> None:
        """Bring the target in step, and keep it there."""
        lineage = self.history.record.lineage
        in_step = self.peer is None or (
            self.peer.claim.lineage == lineage and not self.peer.syncing
        )
        while True:
            self._wake.clear()
            if self._lost is not None:
                raise self._lost
            if self.history.map.behind or not in_step:
                in_step = await self._sync(peer, begin)
                if not in_step:
                    continue
            begin = Plan.INCREMENTAL
            self._set_state(LinkState.LIVE)
            await self._wake.wait()

    async def _sync(self, peer: NbdConnection | None, begin: Plan) -> bool:
        """Whether all has been copied; False: the target could not store all of it."""
        self._set_state(LinkState.SYNCING)
        if peer is not None:
            try:
                await say(peer, Begin(claim=self.history.claim, plan=begin))
            except OSError as exc:
                if exc.errno == errno.EPERM:
                    raise Refused(exc.strerror) from exc
                raise
        if self.history.record.lineage is None:
            await self.history.step()
        self.job = MirrorJob(
            f"mirror-{self.name}", self._bus, self._source, self._ranges, self.history.map, self
        )
        self._jobs.add(self.job)
        self.job.start()
        await self.job.wait()
        job, self.job = self.job, None
        self.bytes_copied += job.bytes_copied
        if self._lost is not None:
            raise self._lost
        if job.error is not None:
            self.reason = f"{job.id}: {job.error.strerror}"
            await asyncio.sleep(FAILED_COPY_S)
            return False
        await self.forwarder.prove()
        lineage = self.history.record.lineage
        assert lineage is not None
        if peer is not None:
            await say(peer, End(lineage=lineage))
        await self.history.in_step()
        return True

    async def _tend(self, peer: NbdConnection | None) -> None:
        """What goes on beside: prove, and ask the target how it is."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        try:
            while True:
                await asyncio.sleep(PROVE_S)
                if self.history.map.unproven:
                    await self.forwarder.prove()
                if peer is not None and loop.time() - asked >= HEARTBEAT_S:
                    self.peer = await ask(peer)
                    asked = loop.time()
                    if self.peer.fenced:
                        raise OSError(errno.ESHUTDOWN, OUTDATED)
        except (OSError, ProtocolError, ValueError) as exc:
            self._lose(exc if isinstance(exc, OSError) else OSError(errno.EPROTO, str(exc)))

    async def _disconnect(self) -> None:
        """The session is over: what was on its way is marked."""
        lossy = self.forwarder.disconnect()
        self.forwarder.alone = self.history.is_shared
        if self.job is not None:
            job, self.job = self.job, None
            self.bytes_copied += job.bytes_copied
            job.give_up()
            await job.wait()
        if lossy:
            # What its clients know to be written may not be there.
            await self._before_alone()

    # Section: what the forwarder and the connection tell

    async def _before_alone(self) -> None:
        async with self._stepping:
            if self.history.is_shared:
                await self.history.step()
            self.forwarder.alone = False

    def _fell_behind(self) -> None:
        self._wake.set()

    def _bad(self, operation: str, error: OSError, offset: int, length: int) -> None:
        self._on_error(error)
        self._bus.emit(
            "QUORUM_REPORT_BAD",
            type=operation,
            error=error.strerror or str(error),
            node_name=self.node_name,
            sector_num=offset // SECTOR,
            sectors_count=-(-length // SECTOR),
        )

    def _lose(self, reason: OSError) -> None:
        if self._lost is None:
            self._lost = reason
            self._on_error(reason)
        self._wake.set()
        if self.job is not None:
            self.job.give_up()
        connection = self.forwarder.connection
        if connection is not None and not connection.closed:
            connection.abort(reason)

    def _set_state(self, state: LinkState, reason: str | None = None) -> None:
        changed = state is not self.state
        self.state, self.reason = state, reason
        if state is not LinkState.SYNCING:
            self._settled.set()
        if changed:
            self._on_state(state)
            log.info(
                "link of %s to %s: %s%s",
                self.name,
                self.to,
                state.value,
                f": {reason}" if reason else "",
            )
            self._bus.emit("x-replnbd-link", device=self.name, state=state.value, reason=reason)

    # Section: MirrorTarget

    async def digests(self, offset: int, length: int) -> list[tuple[int, int | None]] | None:
        """See `jobs.MirrorTarget`."""
        return await known_digests(self._way(), offset, length)

    def copy(self, offset: int, data: memoryview) -> Awaitable[None]:
        """See `jobs.MirrorTarget`."""
        return self.forwarder.copy(offset, data)

    def copy_zeroes(self, offset: int, length: int) -> Awaitable[None]:
        """See `jobs.MirrorTarget`."""
        return self.forwarder.copy_zeroes(offset, length)

    def _way(self) -> NbdConnection:
        connection = self.forwarder.connection
        if connection is None:
            raise self._lost or OSError(errno.ENOTCONN, "the way to the standby is lost")
        return connection


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
