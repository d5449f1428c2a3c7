"""Keeper: has a group's journal, and suspends the group while it cannot be written.

Suspended disks serve nobody: what a client is told is done while the journal says that a command is
under way might be undone by whoever ends that command after a crash. So it costs availability, and
not data; and it ends by itself once a store succeeds.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

import msgspec

from replnbd.block import MemoryNode
from replnbd.errors import StateError
from replnbd.replication.journal import DiskRecord, FileStamp, Journal, Record

log = logging.getLogger(__name__)

P = ParamSpec("P")

RETRY_S = 1.0
"""How often a suspended group tries to write its journal."""

_TASKS: set[asyncio.Task[None]] = set()
"""The loop itself keeps tasks only weakly."""


def keep_task(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run a coroutine as a task, to its end."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)
    return task


def whole(
    command: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, Coroutine[Any, Any, None]]:
    """Run a command to its end even if its caller is cancelled (a client that timed out): half of
    one would leave disks in stages that do not belong together."""

    @functools.wraps(command)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        await asyncio.shield(keep_task(command(*args, **kwargs)))

    return run


class Keeper:
    """Commands of the group run in its `turn`, and record themselves in it.

    `journal`: loaded; None while there is nothing to remember, and `begin` makes one. `describe()`
    is the group as it is; `on_suspend(reason)` is called when nobody may be served, and with None
    when everybody may be again. `always_durable`: a view survives power failures; then what says
    that overlays are being emptied must not be found again once they have something to keep.
    """

    def __init__(
        self,
        journal: Journal | None,
        make_journal: Callable[[], Awaitable[Journal]] | None,
        describe: Callable[[], Record],
        on_suspend: Callable[[str | None], None],
        *,
        always_durable: bool = False,
    ) -> None:
        self.suspended: str | None = None
        """Why nobody is served."""
        self._journal = journal
        self._make_journal = make_journal or _journal_in_memory
        self._describe = describe
        self._on_suspend = on_suspend
        self._always_durable = always_durable
        self._lock = asyncio.Lock()
        self._stopped = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A command's turn; StateError while the group is suspended for good reason."""
        async with self._lock:
            if self.suspended is not None and not self._stopped:
                await self.settle()
                if self.suspended is not None:
                    raise StateError(self.suspended)
            yield

    async def begin(self) -> None:
        """There is something to remember from now on. Whatever making a journal raises."""
        if self._journal is None:
            self._journal = await self._make_journal()

    async def intend(self, disks: list[DiskRecord], generation: str, *, durable: bool) -> None:
        """Record what a command is about to make of some disks, and the generation: then it has
        happened, whatever comes. StateError if that fails, and it has not."""
        if self._journal is None:
            return  # nothing was ever started
        record = self._describe()
        record.generation = generation
        record.torn = False  # it reaches all of them, whoever ends it
        intended = {disk.name: disk for disk in disks}
        record.disks = [intended.get(disk.name, disk) for disk in record.disks]
        try:
            await self._journal.write(record, durable=durable or self._always_durable)
        except OSError as exc:
            await self.settle()  # it may be there all the same
            raise StateError(f"cannot write the journal: {exc.strerror}") from exc

    async def settle(self, *, durable: bool = False) -> None:
        """Record what is. If that fails the group is suspended, until it succeeds.

        After a command this need not be `durable` (unless all is): what the command intended is,
        and after a power failure that says as much."""
        if self._journal is None:
            return
        try:
            durable = durable or self._always_durable
            await self._journal.write(self._describe(), durable=durable)
        except OSError as exc:
            log.error("cannot write the journal: %s", exc.strerror)  # noqa: TRY400
            self._suspend(
                f"the journal cannot be written ({exc.strerror}): nobody is served until it can"
            )
        else:
            self._suspend(None)

    def settle_soon(self) -> None:
        """The same, in a turn of its own: for what is no command, and does no harm twice."""
        keep_task(self._settle_in_turn())

    def stop(self) -> None:
        """Record nothing more on our own."""
        self._stopped = True

    async def end(self, files: dict[str, FileStamp] | None) -> None:
        """The last record. `files`: how an orderly end has left them; None: there is no trusting
        them, and the disks' errors say why. OSError."""
        if self._journal is not None:
            record = msgspec.structs.replace(self._describe(), files=files)
            await self._journal.write(record, durable=True)

    async def close(self) -> None:
        """Let the file go."""
        if self._journal is not None:
            await self._journal.close()

    async def _settle_in_turn(self) -> None:
        async with self._lock:
            if not self._stopped:
                await self.settle(durable=True)

    def _suspend(self, reason: str | None) -> None:
        if reason == self.suspended:
            return
        before, self.suspended = self.suspended, reason
        self._on_suspend(reason)
        if before is None:
            keep_task(self._retry())

    async def _retry(self) -> None:
        while self.suspended is not None and not self._stopped:
            await asyncio.sleep(RETRY_S)
            await self._settle_in_turn()


async def _journal_in_memory() -> Journal:
    return Journal(MemoryNode())
