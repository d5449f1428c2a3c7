"""Group: start, checkpoint, stop, failover and reset, over all disks or none of them.

Each command first asks every disk whether it may (an error there changes nothing anywhere), then
drains all of them, so that all move on at the same instant of their clients' requests, then does
what can fail, and last what cannot.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, ParamSpec

from replnbd.block import OverlayNode
from replnbd.errors import StateError
from replnbd.jobs import Job
from replnbd.replication.disk import StandbyDisk
from replnbd.replication.stage import Command, Stage

P = ParamSpec("P")

_RUNNING: set[asyncio.Task[None]] = set()
"""Commands under way: the loop itself keeps tasks only weakly."""

# The numbers of QEMU's ReplicationMode, which its error text shows.
_MODES = {"primary": 0, "secondary": 1}


def _whole(
    command: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, Coroutine[Any, Any, None]]:
    """Run a command to its end even if its caller is cancelled (a client that timed out): half of
    one would leave disks in stages that do not belong together."""

    @functools.wraps(command)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        task = asyncio.get_running_loop().create_task(command(*args, **kwargs))
        _RUNNING.add(task)
        task.add_done_callback(_RUNNING.discard)
        await asyncio.shield(task)

    return run


class Group:
    """All replicated disks of a daemon. Commands run one at a time, in the order they came."""

    def __init__(self, disks: Sequence[StandbyDisk]) -> None:
        self.disks = tuple(disks)
        self._turn = asyncio.Lock()
        self._torn = False
        """A checkpoint has failed after some disks had moved on."""
        self._closed = False

    def error(self) -> str | None:
        """What `query-xen-replication-status` answers: None, or the first disk's text."""
        for disk in self._in_qemu_order():
            if disk.replication_error is not None:
                return disk.replication_error
        return None

    @_whole
    async def start(self, mode: str = "secondary") -> None:
        """Stage *none* to *running*, with a first checkpoint. All or nothing, and can be tried
        again. StateError with QEMU's texts."""
        async with self._turn:
            disks = self._moving(Command.START, mode)
            for disk in disks:
                await disk.check_start()
            async with self._drained(disks):
                await self._make_empty(disks)
                for disk in disks:
                    disk.checkpointed()
                    disk.run()

    @_whole
    async def checkpoint(self) -> None:
        """The view becomes the secondary disk as it is now; the standby's writes are dropped."""
        async with self._turn:
            disks = self._moving(Command.CHECKPOINT)
            async with self._drained(disks):
                await self._make_empty(disks, keep_space=True)
                for disk in disks:
                    disk.checkpointed()

    @_whole
    async def stop(self) -> None:
        """Stage *running* to *done* with empty overlays: each disk is the primary's latest."""
        async with self._turn:
            disks = self._moving(Command.STOP)
            async with self._drained(disks):
                await self._make_empty(disks)
                ending = [disk.stop() for disk in disks]
            await _ended(ending)

    @_whole
    async def failover(self) -> None:
        """Fence the primary and commit what the standby sees; from *failover-failed*, try the
        commit again. Returns when the commits have begun.

        StateError if the last checkpoint has reached some disks and not others: what the standby
        sees is then no state that the primary's disks ever had together.
        """
        async with self._turn:
            disks = self._moving(Command.FAILOVER)
            if self._torn and disks:
                raise StateError(
                    "the last checkpoint did not reach all disks: their views do not belong"
                    " together; make a good checkpoint first"
                )
            async with self._drained(disks):
                ending = [disk.fail_over() for disk in disks]
            await _ended(ending)

    async def wait_committed(self) -> None:
        """Wait until no commit is under way; StateError if one has failed or was cancelled."""
        for disk in self.disks:
            if disk.stage is Stage.FAILOVER and disk.job is not None:
                await disk.job.wait()
        failed = [disk for disk in self.disks if disk.stage is Stage.FAILOVER_FAILED]
        if failed:
            raise StateError("; ".join(f"'{disk.name}': {disk.error}" for disk in failed))

    @_whole
    async def reset(self, *, force: bool = False) -> None:
        """From *done* or *failover-failed* back to *none*, with empty overlays and no fence.

        StateError, saying what would be lost, while an overlay holds uncommitted data, unless
        `force`.
        """
        async with self._turn:
            disks = self._moving(Command.RESET)
            async with self._drained(disks):
                held = [] if force else [disk for disk in disks if await disk.holds_data()]
                if held:
                    names = ", ".join(f"'{disk.name}'" for disk in held)
                    raise StateError(
                        f"the overlays of {names} hold data that is in no disk, which a reset"
                        " would lose: use force"
                    )
                await self._make_empty(disks)
                for disk in disks:
                    disk.reset()

    @_whole
    async def close(self) -> None:
        """An orderly end: jobs stop, everything is flushed and closed. No exports any more.
        OSError if a disk could not be flushed; all others are closed well even then."""
        async with self._turn:
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
            if disk.mode != mode:
                raise StateError(
                    f"The parameter mode's value is invalid, needs {_MODES[disk.mode]},"
                    f" but got {_MODES[mode]}"
                )
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

    async def _make_empty(self, disks: Sequence[StandbyDisk], *, keep_space: bool = False) -> None:
        """Let all views be the secondary disks as they are now. The active overlays go first:
        dying before the hidden ones leaves the last checkpoint, without the standby's writes.

        What can fail is done for all overlays before the first one is empty; then one store
        empties each. Raises StateError as QEMU words it; the disk's `error` keeps it until the
        next good one.
        """
        overlays = [(disk, disk.active) for disk in disks] + [(disk, disk.hidden) for disk in disks]
        async with AsyncExitStack() as stack:
            clears = []
            for disk, overlay in overlays:
                with _emptying(disk, overlay):
                    clear = await stack.enter_async_context(overlay.emptying(keep_space=keep_space))
                clears.append(clear)
            for (disk, overlay), clear in zip(overlays, clears, strict=True):
                with _emptying(disk, overlay):
                    await clear()
                self._torn = self._torn or len(disks) > 1
            self._torn = False


@contextmanager
def _emptying(disk: StandbyDisk, overlay: OverlayNode) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        disk.error = f"Failed to empty {overlay.name}: {exc.strerror}"
        raise StateError(disk.error) from exc


async def _ended(jobs: Sequence[Job | None]) -> None:
    for job in jobs:
        if job is not None:
            await job.wait()
