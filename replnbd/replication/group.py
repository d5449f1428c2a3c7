"""Group: start, checkpoint, stop, failover and reset, over all disks or none of them.

Each command first asks every disk whether it may (an error there changes nothing anywhere), then
drains all of them, so that all move on at the same instant of their clients' requests, then does
what can fail, and last what cannot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.replication.disk import StandbyDisk
from replnbd.replication.stage import Command, Stage

log = logging.getLogger(__name__)

# The numbers of QEMU's ReplicationMode, which its error text shows.
_MODES = {"primary": 0, "secondary": 1}


class Group:
    """All replicated disks of a daemon. Commands run one at a time, in the order they came."""

    def __init__(self, disks: Sequence[StandbyDisk], bus: EventBus) -> None:
        self.disks = tuple(disks)
        self._bus = bus
        self._turn = asyncio.Lock()

    def error(self) -> str | None:
        """What `query-xen-replication-status` answers: None, or the first disk's text."""
        for disk in self._in_qemu_order():
            if disk.replication_error is not None:
                return disk.replication_error
        return None

    async def start(self, mode: str = "secondary") -> None:
        """Stage *none* to *running*, with a first checkpoint. All or nothing, and can be tried
        again. StateError with QEMU's texts."""
        async with self._turn:
            disks = self._moving(Command.START, mode)
            for disk in disks:
                disk.check_start()
            async with self._drained(disks):
                await self._checkpoint(disks)
                for disk in disks:
                    disk.run()

    async def checkpoint(self) -> None:
        """The view becomes the secondary disk as it is now; the standby's writes are dropped."""
        async with self._turn:
            disks = self._moving(Command.CHECKPOINT)
            async with self._drained(disks):
                await self._checkpoint(disks)

    async def stop(self) -> None:
        """Stage *running* to *done* with empty overlays: each disk is the primary's latest."""
        async with self._turn:
            disks = self._moving(Command.STOP)
            async with self._drained(disks):
                for disk in disks:
                    await disk.make_empty()
                for disk in disks:
                    await disk.stop()

    async def failover(self) -> None:
        """Fence the primary and commit what the standby sees; from *failover-failed*, try the
        commit again. Returns when the commits have begun."""
        async with self._turn:
            disks = self._moving(Command.FAILOVER)
            async with self._drained(disks):
                for disk in disks:
                    await disk.fail_over()

    async def wait_committed(self) -> None:
        """Wait until no commit is under way; StateError if one has failed or was cancelled."""
        for disk in self.disks:
            if disk.stage is Stage.FAILOVER and disk.job is not None:
                await disk.job.wait()
        failed = [disk for disk in self.disks if disk.stage is Stage.FAILOVER_FAILED]
        if failed:
            raise StateError("; ".join(f"'{disk.name}': {disk.error}" for disk in failed))

    async def reset(self, *, force: bool = False) -> None:
        """From *done* or *failover-failed* back to *none*, with empty overlays and no fence.

        StateError, saying what would be lost, while an overlay holds uncommitted data, unless
        `force`.
        """
        async with self._turn:
            disks = self._moving(Command.RESET)
            async with self._drained(disks):
                held = {disk.name: disk.uncommitted_bytes() for disk in disks}
                if not force and any(held.values()):
                    what = ", ".join(
                        f"{count} bytes of '{name}'" for name, count in held.items() if count
                    )
                    raise StateError(
                        f"the overlays hold {what}, which a reset would lose: use force"
                    )
                for disk in disks:
                    await disk.make_empty()
                for disk in disks:
                    disk.reset()

    async def close(self) -> None:
        """An orderly end: jobs stop, everything is flushed and closed. No exports any more.
        OSError if a disk could not be flushed; all others are closed well even then."""
        async with self._turn:
            for disk in self.disks:
                await disk.end_jobs()
            async with self._drained(self.disks), AsyncExitStack() as stack:
                for disk in reversed(self.disks):
                    stack.push_async_callback(disk.close)

    def _moving(self, command: Command, mode: str = "secondary") -> list[StandbyDisk]:
        """The disks that `command` moves on; those that ignore it are left out."""
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

    async def _checkpoint(self, disks: Sequence[StandbyDisk]) -> None:
        for disk in disks:
            await disk.make_empty()
        for disk in disks:
            disk.checkpointed()
