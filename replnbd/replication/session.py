"""Session: a link while there is a way.

    connect         to the target's export, and to the one where two replnbd speak (peer.py)
    compare         whose data both have (lineage.py): what is to be copied, or why nothing may be
    enter           the target ends what it still has of earlier sessions: what a network has held
                    back of those must not come behind what is newer
    begin           the target is told, before anything reaches it that it is not to be shown
    copy            what is BEHIND (MirrorJob), while all other writes are sent
    end             the target is told that all has arrived: it is in step
    prove           epoch by epoch, until something falls behind; then begin again

A target that is in step holds at every moment what the source was at some moment: so once something
falls behind, nothing is sent any more before it has been told of the next beginning.

The target may be a replnbd, which keeps account of all that, or any NBD server: then this side does
so alone, and goes by its map.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable
from contextlib import AsyncExitStack, suppress
from enum import StrEnum
from typing import TYPE_CHECKING

from replnbd.block import NbdConnection, parse_nbd_uri
from replnbd.errors import ProtocolError
from replnbd.events import EventBus
from replnbd.jobs import MirrorJob
from replnbd.replication.lineage import NO_ACCOUNT, OUTDATED, Lineage, Plan, new_name
from replnbd.replication.peer import Begin, End, Enter
from replnbd.replication.target import (
    RESPONSE_TIMEOUT_S,
    Refused,
    ask,
    check,
    connect,
    connect_peer,
    contexts_for,
    decide,
    known_digests,
    marks,
    say,
)

if TYPE_CHECKING:
    from replnbd.replication.link import Link

PROVE_S = 2.0
"""An epoch: so much more than necessary a resync compares at most."""
HEARTBEAT_S = 5.0
"""How often a target is asked what it is, which also shows that it is there."""
LATE_S = RESPONSE_TIMEOUT_S
"""How long a server may take to do what it was sent on a connection that has ended."""
FAILED_COPY_S = 2.0
"""Until what the target could not store is sent again."""


class LinkState(StrEnum):
    """See the head of link.py."""

    OFF = "off"
    CONNECTING = "connecting"
    REFUSED = "refused"
    SYNCING = "syncing"
    LIVE = "live"


class Session:
    """Of a link with the target at the URI `to`; a `jobs.MirrorTarget`."""

    def __init__(self, link: Link, to: str) -> None:
        self.job: MirrorJob | None = None
        self.was_up = False
        """Whether there has been a way."""
        self._link = link
        self._to = to
        self._history = link.history
        self._forwarder = link.forwarder
        self._peer: NbdConnection | None = None
        self._name = new_name()
        """By which the target knows what is of this session."""
        self._agreed: Lineage | None = None
        """The target's lineage, as long as it is in step."""
        self._wake = asyncio.Event()
        """Something has fallen behind, or the way is lost."""
        self._has_synced = False
        """Once: what has fallen behind since is what was just written."""
        self._lost: OSError | None = None

    async def run(self) -> None:
        """From connecting to the end of the way, which is an exception: Refused, or OSError,
        ProtocolError, ValueError, ConfigError."""
        target = parse_nbd_uri(self._to)
        async with AsyncExitStack() as stack:
            self._peer = await connect_peer(target, stack)
            if self._peer is None:
                await self._wait_for_the_dead()
            decided = await self._compare()
            if self._peer is not None:
                await say(self._peer, Enter(session=self._name))
            data = await connect(target, contexts_for(self._peer), stack)
            check(data, self._history.record.size)
            await self._mark(decided, data)
            if self._must_sync:
                await self._begin(decided)
            data.on_closed = self.lose
            self._forwarder.connect(data, ours=self._peer is not None)
            self.was_up = True
            stack.push_async_callback(self._disconnect)
            tending = asyncio.get_running_loop().create_task(self._tend())
            stack.push_async_callback(_end, tending)
            await self._follow()

    def nudge(self) -> None:
        """Something has fallen behind."""
        self._wake.set()

    # Section: before anything is sent

    async def _wait_for_the_dead(self) -> None:
        """What a process before this one has sent may not be done yet: it must not be done after
        what this one sends."""
        if self._history.found_marks:
            loop = asyncio.get_running_loop()
            rest_s = self._history.opened_at + LATE_S - loop.time()
            if rest_s > 0:
                reason = f"what was sent before the last restart has {LATE_S:g} s to arrive"
                self._link.set_state(LinkState.CONNECTING, reason)
                await asyncio.sleep(rest_s)

    async def _compare(self) -> Plan:
        """What has to be done; Refused if it must not."""
        record = self._history.record
        if self._peer is None:
            known = record.pair is not None and record.foreign == self._to
            if record.pair is not None and record.foreign is None and not self._link.lent:
                raise Refused(NO_ACCOUNT)
            known = known and not self._link.from_scratch
            return Plan.INCREMENTAL if known else Plan.FULL
        state = await ask(self._peer)
        if state.size != record.size:
            raise Refused(f"it has {state.size} bytes, and this disk {record.size}")
        self._agreed = None if state.syncing else state.claim.lineage
        try:
            return decide(self._history.claim, state)
        except Refused:
            with suppress(OSError):  # it is to know, too
                await say(self._peer, Begin(claim=self._history.claim, plan=Plan.INCREMENTAL))
            raise

    async def _mark(self, decided: Plan, data: NbdConnection) -> None:
        """What the target has otherwise is to be copied."""
        if decided is Plan.FULL:
            await self._history.begin_pair(None if self._peer is not None else self._to)
            self._link.from_scratch = False
        elif self._peer is not None:
            async for offset, length in marks(data):
                await self._history.map.mark_behind(offset, length)

    @property
    def _must_sync(self) -> bool:
        agreed = self._peer is None or self._agreed == self._history.record.lineage
        return bool(self._history.map.behind) or not agreed

    # Section: while it lasts

    async def _follow(self) -> None:
        """Bring the target in step, and keep it there. The first sync has begun already."""
        while True:
            self._wake.clear()
            self._check_way()
            if self._must_sync and not await self._sync():
                await asyncio.sleep(FAILED_COPY_S)
                continue
            self._check_way()
            if not self._history.map.behind:
                self._forwarder.keep_in_step()
                self._link.tell_ready(ready=True)
                if not self._must_sync and self._link.others_ready:
                    if self._link.state is not LinkState.LIVE and self._peer is None:
                        await self._forwarder.prove()  # LIVE says that what was written is there
                    if not self._wake.is_set():
                        self._link.set_state(LinkState.LIVE)
                        await self._wake.wait()
                elif self._must_sync or self._peer is None:  # until the others are ready, too
                    self._link.set_state(LinkState.SYNCING)
                    await self._wake.wait()
            self._check_way()
            left_alone = self._peer is not None and not self._link.others_ready
            if self._history.map.behind or (left_alone and not self._must_sync):
                await self._begin(Plan.INCREMENTAL)
                self._forwarder.go_on()

    async def _begin(self, decided: Plan) -> None:
        self._link.set_state(LinkState.SYNCING)
        self._agreed = None
        if self._peer is not None:
            claim = self._history.claim
            try:
                await say(self._peer, Begin(claim=claim, plan=decided, session=self._name))
            except OSError as exc:
                if exc.errno == errno.EPERM:
                    raise Refused(exc.strerror) from exc
                raise

    async def _sync(self) -> bool:
        """Whether all has been copied; False: the target could not store all of it."""
        if self._history.map.behind and not await self._copy():
            return False
        self._forwarder.keep_in_step()
        if self._history.map.behind:
            return True  # once more
        failed = None if self._peer is None else (await ask(self._peer)).failed
        await self._forwarder.prove()
        if self._forwarder.refused:
            return True  # once more
        self._has_synced = True
        self._link.tell_ready(ready=True)
        if self._peer is not None and not self._link.others_ready:
            return True  # they are in step together
        # First here: who dies in between must not go on alone under the generation of the target.
        lineage = await self._history.in_step()
        if self._peer is not None:
            await say(self._peer, End(lineage=lineage, session=self._name, failed=failed))
            self._agreed = lineage
        return True

    async def _copy(self) -> bool:
        """Whether all that was BEHIND has been copied."""
        link = self._link
        link.tell_ready(ready=False)
        self.job = job = self._new_job()
        await job.wait()
        self.job = None
        link.job_ended(job)
        self._check_way()
        if job.error is not None:
            link.set_state(LinkState.SYNCING, f"{job.id}: {job.error.strerror}")
            return False
        return True

    def _new_job(self) -> MirrorJob:
        """To copy what is BEHIND, and started."""
        link, mirror = self._link, self._link.mirror
        bus = link.bus if mirror is None else EventBus()  # nobody hears of it: see the mirror
        job = MirrorJob(
            f"mirror-{link.name}", bus, link.source, link.ranges, self._history.map, self,
            compare=not self._has_synced,
        )  # fmt: skip
        if mirror is None:
            link.jobs.add(job)
        job.start()
        if mirror is not None:
            mirror.copies_by(job)
        return job

    async def _tend(self) -> None:
        """What goes on beside: prove, and ask the target how it is."""
        loop = asyncio.get_running_loop()
        began = asked = loop.time()
        try:
            while True:
                await asyncio.sleep(PROVE_S)
                if loop.time() - began >= LATE_S:
                    self._forwarder.copy_late()
                if self._history.map.unproven:
                    await self._forwarder.prove()
                if self._peer is not None and loop.time() - asked >= HEARTBEAT_S:
                    agreed = self._agreed
                    state = await ask(self._peer)
                    asked = loop.time()
                    if agreed not in (None, state.claim.lineage) and self._agreed is agreed:
                        raise OSError(errno.ESTALE, "the standby is not this disk's copy any more")
                    if state.fenced:
                        raise OSError(errno.ESHUTDOWN, OUTDATED)
        except (OSError, ProtocolError, ValueError) as exc:
            self.lose(exc if isinstance(exc, OSError) else OSError(errno.EPROTO, str(exc)))

    def lose(self, reason: OSError) -> None:
        """There is no way any more: what waits for it fails."""
        if self._lost is None:
            self._lost = reason
            self._link.way_lost(reason)
        self._wake.set()
        if self.job is not None:
            self.job.give_up()
        for connection in (self._forwarder.connection, self._peer):
            if connection is not None and not connection.closed:
                connection.abort(reason)

    def _check_way(self) -> None:
        if self._lost is not None:
            raise self._lost

    async def _disconnect(self) -> None:
        """What was on its way is marked."""
        connection = self._forwarder.connection
        if connection is not None:
            connection.on_closed = None  # if we close it, nothing is lost
        lossy = self._forwarder.disconnect()
        self._link.disconnected()
        job, self.job = self.job, None
        if job is not None:
            if connection is not None:
                # What is on its way is BEHIND already: nobody has to wait until it is answered.
                connection.abort(OSError(errno.ESHUTDOWN, "the synchronisation ends here"))
            job.give_up()
            await job.wait()
            self._link.job_ended(job)
        if lossy:
            await self._link.before_alone()

    # Section: MirrorTarget

    def digest_key(self) -> bytes:
        """See `jobs.MirrorTarget`."""
        return self._history.digest_key()

    async def digests(self, offset: int, length: int) -> list[tuple[int, int | None]] | None:
        """See `jobs.MirrorTarget`."""
        connection = self._forwarder.connection
        if connection is None:
            raise self._lost or OSError(errno.ENOTCONN, "the way to the standby is lost")
        return await known_digests(connection, offset, length, self.digest_key())

    async def wait_answered(self, offset: int, length: int) -> None:
        """See `jobs.MirrorTarget`."""
        await self._forwarder.wait_answered(offset, length)

    def copy(self, offset: int, data: memoryview) -> Awaitable[object]:
        """See `jobs.MirrorTarget`."""
        return self._forwarder.copy(offset, data)

    def copy_zeroes(self, offset: int, length: int) -> Awaitable[object]:
        """See `jobs.MirrorTarget`."""
        return self._forwarder.copy_zeroes(offset, length)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
