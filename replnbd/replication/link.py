"""Link: the way from a disk to its copy, found, lost and found again without anybody's command.

    OFF          nothing is sent
    CONNECTING   there is no way, and every so often one is looked for
    REFUSED      the target must not be overwritten, or does not let itself be: asked again rarely
    SYNCING      what is BEHIND is being copied; what is not is sent as it is written
    LIVE         the copy is in step, but for what is on its way

While there is a way there is a Session (session.py).

Two may have a disk's link, one at a time: replication, for the disk's standby, and the graph, for a
node that a user has added: either as the target of a mirror, whose job (link_mirror.py) is told of
everything then and is the only one that is seen, or as the disk's child.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from replnbd.block import BlockNode, RangeLock
from replnbd.errors import ConfigError, ProtocolError, StateError
from replnbd.events import EventBus
from replnbd.jobs import Job, JobRegistry, JobStatus, MirrorJob, VerifyJob
from replnbd.replication.companions import Companions
from replnbd.replication.forwarder import Forwarder
from replnbd.replication.history import History
from replnbd.replication.session import LinkState, Session
from replnbd.replication.target import Refused, can_tell

if TYPE_CHECKING:
    from replnbd.replication.link_mirror import LinkMirror

log = logging.getLogger(__name__)

BACK_OFF_S = (0.1, 5.0)
"""Between two attempts to connect: the first time, and at most."""
REFUSED_S = 10.0
"""Until a target that refused is asked again."""
CATCH_UP_S = 10.0
"""How long a checkpoint may wait for the target, and the next command for the checkpoint."""
FAREWELL_S = 2.0
"""How long what is on its way may take when the link ends."""
SECTOR = 512


class Link:
    """Of the disk `name`, whose bytes are those of `source`, under the locks of `ranges`.

    `forwarder` is what the disk's QuorumNode tells of its writes; it keeps account while the link
    is OFF, too. `on_error(error)` is told what goes wrong there, `on_state(state)` of changes.
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
        self.own_node_name = self.node_name = f"{name}-remote"
        """As what it is known in the graph: another one while a node that was added has it."""
        self.mirror: LinkMirror | None = None
        """The job that has started this, if one has."""
        self.from_scratch = False
        """The target is to get everything: what is known of it is not to be relied on, unless it
        is a replnbd, which knows itself."""
        self._bytes_copied = 0
        """By mirror jobs that have ended."""
        self.forwarder = Forwarder(
            history.map,
            sync=sync,
            before_alone=self.before_alone,
            on_behind=self.nudge,
            on_bad=self._bad,
        )
        self.forwarder.alone = history.is_shared
        self.companions = Companions()
        """The links of the group, set before this one is started."""
        self.source = source
        self.ranges = ranges
        self.bus = bus
        self.jobs = jobs
        self._sync = sync
        self._verifying: VerifyJob | None = None
        self._on_error = on_error
        self._on_state = on_state
        self._session: Session | None = None
        self._yanked = False
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """The state, or the reason of it."""
        self._stepping = asyncio.Lock()

    @property
    def job(self) -> Job | None:
        """What brings the copy up to date."""
        return self.mirror or self._copying

    @property
    def silence(self) -> str | None:
        """That there is a way, but no answer on it, if that is so."""
        connection = self.forwarder.connection
        return None if connection is None else connection.silence

    @property
    def _copying(self) -> MirrorJob | None:
        return None if self._session is None else self._session.job

    # Section: its owner's

    def start(self, to: str) -> None:
        """Send to the target at the URI `to` from now on, for as long as it takes."""
        self.companions.join(self)
        self._start(to)

    def start_for(self, node_name: str, to: str) -> None:
        """The same of a node that was added, as this disk's child."""
        self.node_name = node_name
        self._start(to)

    def start_by(self, mirror: LinkMirror, node_name: str, to: str, *, sync: bool) -> None:
        """The same as the target of a mirror, which is to `stop` it. `sync`: a write is answered
        when the target has it, too."""
        self.mirror, self.from_scratch = mirror, True
        self.node_name = node_name
        self.forwarder.sync = self._sync or sync
        self._start(to)

    def _start(self, to: str) -> None:
        assert self._task is None
        self.to, self._yanked = to, False
        self.set_state(LinkState.CONNECTING)
        self._task = asyncio.get_running_loop().create_task(
            self._live(to), name=f"link {self.name}"
        )

    async def stop(self) -> None:
        """Send no more. What is on its way has a moment to arrive; else it is marked."""
        task, self._task = self._task, None
        if task is None:
            return
        try:
            if self.state is LinkState.LIVE:
                with suppress(OSError, TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await self.forwarder.prove()
        finally:
            task.cancel()
        await asyncio.wait([task])
        if self._verifying is not None and self._verifying.status is not JobStatus.NULL:
            self._verifying.give_up()
            await self._verifying.wait()
        self.set_state(LinkState.OFF)
        self.companions.leave(self)
        self.mirror, self.from_scratch = None, False
        if self.node_name != self.own_node_name:
            self.node_name, self.to = self.own_node_name, None
        self.forwarder.sync = self._sync

    def yank(self) -> None:
        """Cut the way now, whatever waits for it, and look for none any more until the next start.
        Never waits."""
        task = self._task
        if task is None or task.done() or self._yanked:
            return
        self._yanked = True
        if self._session is not None and self._session.was_up:
            self._session.lose(_yanked())  # what is to be done at its end must not be cancelled
        else:
            task.cancel()
            self._end_yanked()

    async def wait_in_step(self) -> None:
        """Until everything that was written before this call has arrived. OSError if there is no
        way."""
        while True:
            if self.state is LinkState.SYNCING:
                await self.wait_changed()
            elif self.state is not LinkState.LIVE:
                raise OSError(errno.ENOTCONN, self.reason or "there is no way to the standby")
            else:
                await self.forwarder.prove()
                if not self.history.map.behind:
                    return
                await asyncio.sleep(0.01)  # the session is about to take note of what fell behind

    @property
    def catches_up(self) -> bool:
        """There is a way, and something has not been sent on it."""
        if self.state is LinkState.LIVE:
            return self.history.map.behind > 0  # the session is about to begin
        return self.state is LinkState.SYNCING

    async def wait_changed(self) -> None:
        """Until its state changes, or the reason of it."""
        self._changed.clear()
        await self._changed.wait()

    async def wait_if_up(self) -> None:
        """The same, where there is a way for the whole group: that there is none is no error of a
        checkpoint's. StateError if the target lacks too much to wait for: it is what the source was
        at no moment."""
        if self.state not in (LinkState.SYNCING, LinkState.LIVE) or not self.others_ready:
            return
        try:
            async with asyncio.timeout(CATCH_UP_S) as bound:
                await self.wait_in_step()
        except OSError as exc:
            if not bound.expired():
                log.warning("disk %s: the standby is left behind: %s", self.name, exc.strerror)
                return
            if not self.catches_up:
                why = self.silence or "its standby is slow"
                raise StateError(f"'{self.name}' has to wait: {why}") from None
            raise StateError(
                f"'{self.name}' is being synchronised: a checkpoint has to wait until its standby"
                " has all that it lacks"
            ) from None

    def check_verify(self) -> None:
        """StateError if `verify` cannot be: there is no way, or the target tells no digests."""
        connection = self.forwarder.connection
        if self.state is not LinkState.LIVE or connection is None:
            raise StateError(f"'{self.name}' is not in step with its standby ({self.state.value})")
        if not can_tell(connection):
            raise StateError(f"the standby of '{self.name}' tells no digests: it is no replnbd")
        if self._verifying is not None and self._verifying.status is not JobStatus.NULL:
            raise StateError(f"'{self._verifying.id}' is under way")

    def verify(self) -> None:
        """Begin to compare everything with the target; what differs is copied again."""
        assert self._session is not None
        self._verifying = VerifyJob(
            f"verify-{self.name}", self.bus, self.source, self.history.map, self._session
        )
        self.jobs.add(self._verifying)
        self._verifying.start()

    @property
    def bytes_copied(self) -> int:
        """By mirror jobs."""
        return self._bytes_copied + (0 if self._copying is None else self._copying.bytes_copied)

    @property
    def verified(self) -> str | None:
        """How the last comparison ended, or that it goes on; None: there was none."""
        return None if self._verifying is None else self._verifying.result

    # Section: its life

    async def _live(self, to: str) -> None:
        delay_s = BACK_OFF_S[0]
        while True:
            failure: OSError
            self._session = Session(self, to)
            try:
                await self._session.run()
            except Refused as exc:
                failure = OSError(errno.EPERM, str(exc))
                self.set_state(LinkState.REFUSED, str(exc))
                delay_s = REFUSED_S
            except (OSError, ProtocolError, ConfigError, ValueError) as exc:
                failure = exc if isinstance(exc, OSError) else OSError(errno.EPROTO, str(exc))
                self._down(failure)
                was_up = self._session.was_up
                delay_s = BACK_OFF_S[0] if was_up else min(2 * delay_s, BACK_OFF_S[1])
            except Exception:
                log.exception("link of %s: our bug", self.name)
                failure = OSError(errno.EIO, "a bug, see the log")
                self.set_state(LinkState.CONNECTING, failure.strerror)
                delay_s = BACK_OFF_S[1]
            finally:
                self._session = None
            if self._yanked:
                return self._end_yanked()
            if self.mirror is not None:
                self.mirror.way_failed(failure, final=self.state is LinkState.REFUSED)
            await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))

    def set_state(self, state: LinkState, reason: str | None = None) -> None:
        """Tell of it, if it is another one."""
        changed, news = state is not self.state, reason not in (None, self.reason)
        self.state, self.reason = state, reason
        self._changed.set()
        if self.mirror is not None:
            self.mirror.nudge()
        if changed or news:
            why = f": {reason}" if reason else ""
            log.info("link of %s to %s: %s%s", self.name, self.to, state.value, why)
        if changed:
            self._on_state(state)
            self.bus.emit("x-replnbd-link", device=self.name, state=state.value, reason=reason)

    def _down(self, reason: OSError) -> None:
        state = LinkState.REFUSED if self._yanked else LinkState.CONNECTING
        self.set_state(state, reason.strerror or str(reason))

    def _end_yanked(self) -> None:
        failure = _yanked()
        self.set_state(LinkState.REFUSED, failure.strerror)
        if self.mirror is not None:
            self.mirror.way_failed(failure, final=True)

    def job_ended(self, job: MirrorJob) -> None:
        """It has ended. If with an error, there will be another one."""
        self._bytes_copied += job.bytes_copied
        if self.mirror is not None:
            self.mirror.copied(job)

    def way_lost(self, reason: OSError) -> None:
        """A session is about to end."""
        self._on_error(reason)
        if self.mirror is None:
            # Whoever watches the child need not wait for the next write.
            self._report_bad("flush", reason, 0, 0)
        self._down(reason)  # at once: who asks now is not to hear that it is LIVE

    def disconnected(self) -> None:
        """There is no way any more; to be told before anything else can happen."""
        self.forwarder.alone = self.history.is_shared
        self.tell_ready(ready=False)

    @property
    def lent(self) -> bool:
        """Whether somebody has it for a node of his own."""
        return self.mirror is not None or self.node_name != self.own_node_name

    def tell_ready(self, *, ready: bool) -> None:
        """Whether the copy lacks nothing: see Companions."""
        self.companions.tell(self, ready=ready)

    @property
    def others_ready(self) -> bool:
        """Whether the other disks' copies lack nothing."""
        return self.companions.others_ready(self)

    # Section: what the forwarder tells

    async def before_alone(self) -> None:
        """Before clients are told of what the copy lacks: the disk goes on alone."""
        async with self._stepping:
            if self.history.is_shared:
                await self.history.step()
                self.nudge()  # should there be a way by now: the target is to know
            self.forwarder.alone = False

    def nudge(self) -> None:
        """The session has something to look at (Companion, Forwarder)."""
        if self._session is not None:
            self._session.nudge()

    def _bad(self, operation: str, error: OSError, offset: int, length: int) -> None:
        self._on_error(error)
        if self.mirror is None:
            self._report_bad(operation, error, offset, length)
        elif self.state in (LinkState.SYNCING, LinkState.LIVE):
            connection = self.forwarder.connection
            if connection is not None and not connection.closed:  # else the way has failed
                self.mirror.target_failed(error)

    def _report_bad(self, operation: str, error: OSError, offset: int, length: int) -> None:
        self.bus.emit(
            "QUORUM_REPORT_BAD",
            type=operation,
            error=error.strerror or str(error),
            node_name=self.node_name,
            sector_num=offset // SECTOR,
            sectors_count=-(-length // SECTOR),
        )


def _yanked() -> OSError:
    return OSError(errno.ECONNABORTED, "the connection was yanked")
