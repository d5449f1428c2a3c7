"""PrimaryGroup: the commands over all disks in mode primary, or none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from replnbd.errors import StateError
from replnbd.replication.companions import Companions
from replnbd.replication.group_steps import check_mode
from replnbd.replication.journal import FailoverTarget
from replnbd.replication.keeper import whole
from replnbd.replication.primary import PrimaryDisk
from replnbd.replication.stage import Command, Stage


class PrimaryGroup:
    """All primary disks of a daemon. Commands run one at a time, in the order they came."""

    mode = "primary"

    def __init__(self, disks: Sequence[PrimaryDisk]) -> None:
        self.disks = tuple(disks)
        companions = Companions()
        for disk in self.disks:
            disk.link.companions = companions
        self._turn = asyncio.Lock()
        self._closed = False

    def error(self) -> str | None:
        """What `query-xen-replication-status` answers: None, or the first disk's text."""
        for disk in reversed(self.disks):
            if disk.replication_error is not None:
                return disk.replication_error
        return None

    @whole
    async def start(self, mode: str = "primary") -> None:
        """Stage *none* to *running*: what the standby lacks is copied, what is written is sent.
        StateError with QEMU's texts."""
        async with self._turn:
            for disk in (disks := self._moving(Command.START, mode)):
                if disk.to is None:
                    raise StateError(f"'{disk.name}' has no standby: there is no key 'to'")
            begun: list[PrimaryDisk] = []
            try:
                for disk in disks:
                    await disk.run()
                    begun.append(disk)
            except StateError:
                for disk in begun:
                    await disk.stop(Stage.NONE)
                raise

    async def checkpoint(self) -> None:
        """Until all that was written before has arrived, where there is a way to the standby: what
        the standby makes a checkpoint of then, is what the primary was."""
        async with self._turn:
            disks = self._moving(Command.CHECKPOINT, "primary")
            await asyncio.gather(*(disk.wait_in_step() for disk in disks))

    @whole
    async def stop(self, mode: str = "primary") -> None:
        """Stage *running* to *done*: nothing is sent any more, all is marked."""
        await self._stop(Command.STOP, mode)

    @whole
    async def failover(self, target: FailoverTarget | None = None) -> None:
        """The same: a primary has nothing to take over."""
        if target is not None:
            raise StateError("a primary has no view: 'x-replnbd-to' is for the standby")
        await self._stop(Command.FAILOVER, "primary")

    @whole
    async def reset(self, *, force: bool = False) -> None:
        """From *done* back to *none*. With `force`, in *none*: whatever the disk and its standby
        have in common is forgotten, and everything is compared at the next start."""
        async with self._turn:
            disks = self._moving(Command.RESET, "primary")
            if force:
                for disk in disks:
                    if disk.lent:
                        raise StateError(disk.taken)
            if force and all(disk.stage is Stage.NONE for disk in disks):
                for disk in disks:
                    await disk.forget()
            for disk in disks:
                await disk.stop(Stage.NONE)

    @asynccontextmanager
    async def between_commands(self) -> AsyncIterator[None]:
        """No command is under way while this is held. StateError at the end of the daemon."""
        async with self._turn:
            if self._closed:
                raise StateError("replnbd is shutting down")
            yield

    def check_demote(self) -> None:
        """StateError if a standby still follows: then there would be no primary at all."""
        for disk in self.disks:
            disk.check_demote()

    @whole
    async def demote(self) -> None:
        """All disks are a standby's from now on, and are about to be closed. StateError if that
        cannot be recorded; see also `check_demote`."""
        async with self._turn:
            self.check_demote()
            for disk in self.disks:
                await disk.demote()

    async def close(self) -> None:
        """An orderly end. OSError if a disk could not be flushed; all others are closed well."""
        async with self._turn:
            self._closed = True
            failures = await asyncio.gather(
                *(disk.close() for disk in self.disks), return_exceptions=True
            )
        for failure in failures:
            if failure is not None:
                raise failure

    async def _stop(self, command: Command, mode: str) -> None:
        async with self._turn:
            for disk in self._moving(command, mode):
                await disk.stop(Stage.DONE)

    def _moving(self, command: Command, mode: str) -> list[PrimaryDisk]:
        """The disks that `command` moves on; those that ignore it are left out.

        So are those that have moved on already, if a process has died amid a start or a stop: or
        no command would ever fit the stages of all of them again."""
        if self._closed:
            raise StateError("replnbd is shutting down")
        torn = command is not Command.RESET and len({disk.stage for disk in self.disks}) > 1
        moving: list[PrimaryDisk] = []
        refusals: list[StateError] = []
        for disk in reversed(self.disks):  # QEMU's order
            try:
                if disk.next_stage(command) is None:
                    continue
            except StateError as exc:
                if disk.lent or not torn:
                    raise
                refusals.append(exc)
                continue
            check_mode(disk.mode, mode)
            moving.append(disk)
        if refusals and not moving:
            raise refusals[0]
        return moving
