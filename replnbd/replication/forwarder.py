"""Forwarder: sends what is written to a disk on to its copy, while there is a way; what cannot be
sent is marked, and copied later.

    write --> marked --> the local disk --> on the way to the copy       (in step)
                                       \\-> BEHIND, for the sync to copy  (no way, or a full one)

Nobody waits for the copy (unless `sync`): a payload is handed over, and counted. What is on its way
is bounded (QUEUE_BYTES_MAX); beyond that a write only falls behind, which costs a byte a granule,
whatever the client writes.

A granule is unmarked by *epochs*: once everything that was sent in one has been answered, and the
copy flushed, what was not written since is proven.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from functools import partial

from replnbd.block import Buffer, DirtyMap
from replnbd.block.nbd_connection import NbdConnection
from replnbd.nbd import constants as c

QUEUE_BYTES_MAX = 32 << 20
"""Of payloads that the copy has not acknowledged: 30 ms of what a network of 10 Gbit/s takes."""

UNPROVEN_MAX = 1 << 20
"""Granules. Beyond it (64 GiB written within an epoch, or trimmed) writes fall behind."""


class Epoch:
    """What is sent until the next turn, and has not been answered."""

    __slots__ = ("_answered", "in_flight")

    def __init__(self) -> None:
        self.in_flight = 0
        self._answered: asyncio.Future[None] | None = None

    def leave(self) -> None:
        """One less."""
        self.in_flight -= 1
        if not self.in_flight and self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    async def wait_answered(self) -> None:
        """Until nothing is in flight any more; nothing may begin in it any more."""
        if self.in_flight:
            self._answered = asyncio.get_running_loop().create_future()
            await self._answered


class Forwarder:
    """A `filters.Copy`. `before_alone()` is awaited before the first write that the copy does not
    get; `on_behind()` is called when something has fallen behind while there is a way, and
    `on_bad(operation, error, offset, length)` when the copy has refused something."""

    def __init__(
        self,
        dirty: DirtyMap,
        *,
        sync: bool,
        before_alone: Callable[[], Awaitable[None]],
        on_behind: Callable[[], None],
        on_bad: Callable[[str, OSError, int, int], None],
    ) -> None:
        self.dirty = dirty
        self.sync = sync
        self.connection: NbdConnection | None = None
        """The way to the copy."""
        self.alone = False
        """Whether `before_alone` has to be asked."""
        self.discards = False
        """Whether what the copy discards reads as zeroes, as here."""
        self.bytes_sent = 0
        self._before_alone = before_alone
        self._on_behind = on_behind
        self._on_bad = on_bad
        self._epoch = Epoch()
        self._flushing = False
        self._flush_again = False

    # Section: the way

    def connect(self, connection: NbdConnection, *, discards: bool) -> None:
        """From now on what is not BEHIND is sent."""
        self.connection, self.discards = connection, discards
        self.alone = False

    def disconnect(self) -> bool:
        """There is no way any more; whether something was on it that clients believe to be safe."""
        if self.connection is None:
            return False
        lossy = not self.sync and self._epoch.in_flight > 0
        self.connection = None
        self.dirty.all_fall_behind()
        return lossy

    async def prove(self) -> None:
        """End the epoch, and unmark what the copy has got in it. OSError: it cannot be known."""
        connection = self.connection
        assert connection is not None
        granules, epoch = self.dirty.turn(), self._epoch
        self._epoch = Epoch()
        await epoch.wait_answered()
        if connection.can_flush:
            await connection.flush()
        if self.connection is connection:
            self.dirty.clear(granules)

    # Section: writes (filters.Copy)

    def enter_nowait(self, offset: int, length: int) -> bool:
        """See `filters.Copy`."""
        if self.alone or self.sync:
            return False
        return self.dirty.mark_nowait(offset, length)

    async def enter(self, offset: int, length: int) -> Epoch:
        """See `filters.Copy`."""
        epoch = self._epoch
        epoch.in_flight += 1  # what is marked now must not be proven before it is sent
        try:
            if self.alone:
                await self._before_alone()
            await self.dirty.mark(offset, length)
        except BaseException:
            epoch.leave()
            raise
        return epoch

    def failed(self, offset: int, length: int, entered: object) -> None:
        """See `filters.Copy`."""
        self.dirty.fall_behind(offset, length)
        if isinstance(entered, Epoch):
            entered.leave()
        if self.connection is not None:
            self._on_behind()

    def write_nowait(self, offset: int, data: Buffer) -> None:
        """See `filters.Copy`."""
        self._post(c.CMD_WRITE, 0, offset, len(data), data)

    async def write(self, offset: int, data: Buffer, entered: object) -> None:
        """See `filters.Copy`."""
        await self._pass_on(entered, c.CMD_WRITE, 0, offset, len(data), data)

    async def zero(
        self, offset: int, length: int, entered: object, *, unmap: bool, discard: bool
    ) -> None:
        """See `filters.Copy`."""
        if discard and self.discards:
            await self._pass_on(entered, c.CMD_TRIM, 0, offset, length)
            return
        # Elsewhere a TRIM promises nothing of what is read afterwards.
        flags = 0 if unmap else c.CMD_FLAG_NO_HOLE
        await self._pass_on(entered, c.CMD_WRITE_ZEROES, flags, offset, length)

    async def flush(self) -> None:
        """See `filters.Copy`."""
        connection = self.connection
        if connection is None or not connection.can_flush:
            return
        if self.sync:
            try:
                await connection.flush()
            except OSError as exc:
                self._on_bad("flush", exc, 0, self.dirty.size)
        elif self._flushing:
            self._flush_again = True  # one at a time: it costs more than a write
        else:
            self._flush_copy(connection)

    # Section: copying (jobs.MirrorTarget)

    def copy(self, offset: int, data: memoryview) -> asyncio.Future[None]:
        """Send what is here, which is not BEHIND any more; OSError from the future: it is again."""
        return self._send_copy(c.CMD_WRITE, offset, len(data), data)

    def copy_zeroes(self, offset: int, length: int) -> asyncio.Future[None]:
        """The same of zeroes."""
        if self.connection is None or self.connection.can_zero:
            return self._send_copy(c.CMD_WRITE_ZEROES, offset, length)
        return self._send_copy(c.CMD_WRITE, offset, length, bytes(length))

    def _send_copy(
        self, command: int, offset: int, length: int, payload: Buffer | None = None
    ) -> asyncio.Future[None]:
        answered = asyncio.get_running_loop().create_future()
        epoch = self._epoch

        def done(failure: OSError | None) -> None:
            if failure is not None:
                self.dirty.fall_behind(offset, length)
            epoch.leave()
            if not answered.done():
                if failure is None:
                    answered.set_result(None)
                else:
                    answered.set_exception(failure)

        epoch.in_flight += 1
        if self.connection is None:
            done(OSError(errno.ENOTCONN, "the way to the standby is lost"))
        else:
            self.bytes_sent += length if payload is not None else 0
            self.connection.submit(command, 0, offset, length, payload=payload, done=done)
        return answered

    # Section: inside

    async def _pass_on(
        self,
        entered: object,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: Buffer | None = None,
    ) -> None:
        assert isinstance(entered, Epoch)
        answered = asyncio.get_running_loop().create_future() if self.sync else None
        try:
            self._post(command, flags, offset, length, payload, answered)
            if answered is not None:
                await answered
        finally:
            entered.leave()

    def _post(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: Buffer | None = None,
        answered: asyncio.Future[None] | None = None,
    ) -> None:
        """Send it on, or let it fall behind; `answered` is done when the client may be told."""
        connection = self.connection
        dirty = self.dirty
        if (
            connection is None
            or dirty.is_behind(offset, length)
            or (
                (connection.bytes_outstanding + length > QUEUE_BYTES_MAX and payload is not None)
                and answered is None
            )
            or dirty.unproven > UNPROVEN_MAX
            or (payload is None and not self._can_zero(connection, command))
        ):
            dirty.fall_behind(offset, length)
            if connection is not None:
                self._on_behind()
            if answered is not None:
                answered.set_result(None)
            return
        epoch = self._epoch
        epoch.in_flight += 1
        self.bytes_sent += length
        connection.submit(
            command, flags, offset, length,
            payload=payload, done=partial(self._done, epoch, offset, length, answered),
        )  # fmt: skip

    def _can_zero(self, connection: NbdConnection, command: int) -> bool:
        return connection.can_trim if command == c.CMD_TRIM else connection.can_zero

    def _done(
        self,
        epoch: Epoch,
        offset: int,
        length: int,
        answered: asyncio.Future[None] | None,
        failure: OSError | None,
    ) -> None:
        if failure is not None:
            self.dirty.fall_behind(offset, length)
            self._on_bad("write", failure, offset, length)
            if self.connection is not None:
                self._on_behind()
        epoch.leave()
        if answered is not None and not answered.done():
            answered.set_result(None)

    def _flush_copy(self, connection: NbdConnection) -> None:
        self._flushing, self._flush_again = True, False
        connection.submit(c.CMD_FLUSH, 0, 0, 0, done=partial(self._flushed, connection))

    def _flushed(self, connection: NbdConnection, failure: OSError | None) -> None:
        self._flushing = False
        if failure is not None:
            self._on_bad("flush", failure, 0, self.dirty.size)
        elif self._flush_again and self.connection is connection:
            self._flush_copy(connection)
