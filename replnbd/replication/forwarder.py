"""Forwarder: sends what is written to a disk on to its copy, while there is a way; what cannot be
sent is marked, and copied later.

    write --> marked --> the local disk --> on the way to the copy       (in step)
                                       \\-> BEHIND, for the sync to copy  (no way, or a full one)

Nobody waits for the copy (unless `sync`): a payload is handed over, and counted. What is on its way
is bounded (QUEUE_BYTES_MAX, QUEUE_REQUESTS_MAX); beyond that a write only falls behind, which costs
a byte a granule, whatever the client writes.

A granule is unmarked by *epochs*: once everything that was sent in one has been answered, and the
copy flushed, what was not written since is proven.

A replnbd keeps the order of overlapping requests of one connection. Others do not (of two writes to
one block in flight the second one lost in 0.1 to 1 % of the cases with QEMU, in 30 % with nbdkit):
there, what overlaps is kept here until all before it has been answered.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial

from replnbd.block import GRANULE, Buffer, DirtyMap
from replnbd.block.nbd_connection import NbdConnection
from replnbd.nbd import constants as c
from replnbd.replication.in_flight import Epoch, Flight, InFlight

QUEUE_BYTES_MAX = 32 << 20
"""Of payloads that the copy has not acknowledged: 30 ms of what a network of 10 Gbit/s takes."""

QUEUE_REQUESTS_MAX = 16 << 10
"""Of requests: one takes 600 bytes of memory, however short it is."""

QUEUE_BLOCKS_MAX = 64 << 10
"""Of 4 KiB, in requests to a copy that keeps no order, however long: one takes 250 bytes."""

UNPROVEN_MAX = 1 << 20
"""Granules. Beyond it (64 GiB written within an epoch, or trimmed) writes fall behind."""

CLEARED_MAX = 2048
"""Granules that are unmarked at a time: 5 ms, if each is a store of its own."""


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
        self.ours = False
        """Whether the copy is a replnbd's: it keeps the order of what overlaps, and what it has
        discarded reads as zeroes, as here."""
        self.bytes_sent = 0
        self._in_step = False
        """Whether the copy must not get anything while it lacks something."""
        self._gap = False
        """It lacks something, and so gets nothing."""
        self.refused = False
        """It has refused something since `keep_in_step`, and may have taken what came behind."""
        self._before_alone = before_alone
        self._on_behind = on_behind
        self._on_bad = on_bad
        self._epoch = Epoch()
        self._ended: list[Epoch] = []
        """Those that have ended, and may not have been answered."""
        self._proving = asyncio.Lock()
        self._lossy = False
        """Whether the copy lacks something that clients were told is written."""
        self._in_flight = InFlight()
        self._flush_turn = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None
        self._flush_again = False

    # Section: the way

    def connect(self, connection: NbdConnection, *, ours: bool) -> None:
        """From now on what is not BEHIND is sent. `ours`: the copy is a replnbd's."""
        self.connection, self.ours = connection, ours
        self._in_step = self._gap = False
        self._in_flight = InFlight()
        self.alone = self._lossy = False

    def keep_in_step(self) -> None:
        """From now on, nothing is sent any more once something has fallen behind. If something has
        already, that is to be copied first."""
        self._in_step, self.refused = not self.dirty.behind, False

    def go_on(self) -> None:
        """The copy knows that it lacks something: what is not BEHIND is sent again."""
        self._in_step = self._gap = False

    def disconnect(self) -> bool:
        """There is no way any more; whether the copy lacks what clients believe to be safe."""
        if self.connection is None:
            return False
        lossy = self._lossy or self.dirty.behind > 0
        lossy = lossy or any(epoch.in_flight for epoch in (*self._ended, self._epoch))
        self.connection = None
        self.dirty.all_fall_behind()
        return lossy

    def copy_late(self) -> None:
        """By now a server has done what it was sent on other connections, or never will."""
        late, self.dirty.late = self.dirty.late, set()
        for granule in late:
            self._fall_behind(granule * GRANULE, 1)

    async def prove(self) -> None:
        """End the epoch, and unmark what the copy has got in it. OSError: it cannot be known."""
        async with self._proving:  # or one would unmark what another has only begun to prove
            connection = self.connection
            if connection is None:
                raise _no_way()
            granules = self.dirty.turn()
            self._ended.append(self._epoch)
            self._epoch = Epoch()
            # Their granules are among these; who waited for them first may have been cancelled.
            while self._ended:
                await self._ended[0].wait_answered()
                del self._ended[0]
            await self._flush_in_turn(connection)
            await self._clear(sorted(granules), connection)
            if not self.dirty.behind:
                self._lossy = False  # it has been copied meanwhile

    async def _clear(self, granules: list[int], connection: NbdConnection) -> None:
        for at in range(0, len(granules), CLEARED_MAX):
            if self.connection is not connection:
                return
            self.dirty.clear(granules[at : at + CLEARED_MAX])
            await asyncio.sleep(0)

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
        self._fall_behind(offset, length)
        if isinstance(entered, Epoch):
            entered.leave()

    def write_nowait(self, offset: int, data: Buffer) -> None:
        """See `filters.Copy`."""
        self._post(self._epoch, c.CMD_WRITE, 0, offset, len(data), data)

    async def write(self, offset: int, data: Buffer, entered: object) -> None:
        """See `filters.Copy`."""
        await self._pass_on(entered, c.CMD_WRITE, 0, offset, len(data), data)

    async def zero(
        self, offset: int, length: int, entered: object, *, unmap: bool, discard: bool
    ) -> None:
        """See `filters.Copy`."""
        if discard and self.ours:
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
            await self._flush_copy(connection)
            return
        self._flush_again = True
        if self._flushing is None:  # one at a time: it costs more than a write
            self._flushing = asyncio.create_task(self._flush_while_asked(connection))

    # Section: copying (jobs.MirrorTarget)

    async def wait_answered(self, offset: int, length: int) -> None:
        """Until what is in flight in a range that is BEHIND is there, to stay. A replnbd keeps the
        order, and tells if it may have lost what was not flushed."""
        if not self.ours:
            await self._in_flight.wait_without(offset, length)
            if self.connection is not None:
                await self._flush_in_turn(self.connection)

    def copy(self, offset: int, data: memoryview) -> Awaitable[object]:
        """Send what is here, which is not BEHIND any more; OSError from the awaitable: it is again.
        In pieces, if the copy does not take as much in one."""
        step = len(data) if self.connection is None else self.connection.payload_bytes_max
        pieces = ((at, data[at : at + step]) for at in range(0, len(data), step))
        sent = (self._send_copy(c.CMD_WRITE, offset + at, len(x), x) for at, x in pieces)
        return asyncio.gather(*sent)

    def copy_zeroes(self, offset: int, length: int) -> Awaitable[object]:
        """The same of zeroes."""
        if self.connection is None or self.connection.can_zero:
            return self._send_copy(c.CMD_WRITE_ZEROES, offset, length)
        return self.copy(offset, memoryview(bytes(length)))

    def _send_copy(
        self, command: int, offset: int, length: int, payload: Buffer | None = None
    ) -> asyncio.Future[None]:
        answered = asyncio.get_running_loop().create_future()
        epoch, connection = self._epoch, self.connection
        flight = None if connection is None else self._new_flight(offset, length)

        def done(failure: OSError | None) -> None:
            if flight is not None:
                self._arrived(flight, offset, length, failure)
            if failure is not None:
                self.refused = True
                self._fall_behind(offset, length)
            epoch.leave()
            if not answered.done():
                if failure is None:
                    answered.set_result(None)
                else:
                    answered.set_exception(failure)

        epoch.in_flight += 1
        if connection is None:
            done(_no_way())
        else:
            self.bytes_sent += length if payload is not None else 0
            submit = _submitter(connection, flight)
            submit(command, 0, offset, length, payload=payload, done=done)
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
            # In its own epoch, whose end may have come: that waits for what was marked before it.
            self._post(entered, command, flags, offset, length, payload, answered)
            if answered and (await answered or self._gap or self.connection is None):
                await self._before_alone()  # before the client is told
        finally:
            entered.leave()

    def _post(
        self,
        epoch: Epoch,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: Buffer | None = None,
        answered: asyncio.Future[OSError | None] | None = None,
    ) -> None:
        """Send it on, or let it fall behind; `answered` has why the copy has not taken what was
        sent, or None: then the client may be told."""
        connection = self.connection
        dirty = self.dirty
        if (
            connection is None
            or self._gap
            or dirty.is_behind(offset, length)
            or (answered is None and self._is_full(connection))
            or dirty.unproven > UNPROVEN_MAX
            or (not self.ours and self._cannot_send(connection, offset, length, payload))
        ):
            self._fall_behind(offset, length)
            if answered is not None:
                answered.set_result(None)
            return
        epoch.in_flight += 1
        if payload is not None:
            self.bytes_sent += length
        flight = self._new_flight(offset, length)
        done = partial(self._done, epoch, flight, offset, length, answered)
        submit = _submitter(connection, flight)
        submit(command, flags, offset, length, payload=payload, done=done)

    def _new_flight(self, offset: int, length: int) -> Flight | None:
        return None if self.ours else Flight(self._in_flight, offset, length)

    def _is_full(self, connection: NbdConnection) -> bool:
        size, count, blocks = self._in_flight.outstanding(connection)
        return size > QUEUE_BYTES_MAX or count > QUEUE_REQUESTS_MAX or blocks > QUEUE_BLOCKS_MAX

    def _fall_behind(self, offset: int, length: int) -> None:
        self.dirty.fall_behind(offset, length)
        if self.connection is not None:
            self._gap = self._in_step
            self._on_behind()

    def _cannot_send(
        self, connection: NbdConnection, offset: int, length: int, payload: Buffer | None
    ) -> bool:
        """Of a target that is no replnbd: whether it does not take this request."""
        if (offset | length) % connection.block_size_min:
            return True
        return not connection.can_zero if payload is None else length > connection.payload_bytes_max

    def _done(
        self,
        epoch: Epoch,
        flight: Flight | None,
        offset: int,
        length: int,
        answered: asyncio.Future[OSError | None] | None,
        failure: OSError | None,
    ) -> None:
        if flight is not None:
            self._arrived(flight, offset, length, failure)
        if failure is not None:
            self._lossy = self.refused = True
            self._fall_behind(offset, length)
            if self.connection is not None:  # else it was we who ended the way
                self._on_bad("write", failure, offset, length)
        epoch.leave()
        if answered is not None and not answered.done():
            answered.set_result(failure)

    def _arrived(self, flight: Flight, offset: int, length: int, failure: OSError | None) -> None:
        flight.leave()
        if failure is not None and (self.connection is None or self.connection.closed):
            # A server may do it yet, after what the next connection sends.
            self.dirty.late.update(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))

    def _flush_failed(self, connection: NbdConnection) -> None:
        """What the copy has taken since the flush before may be lost, whatever later ones say."""
        if self.connection is connection and not connection.closed:
            self._lossy = True
            self.dirty.all_fall_behind()
            self._gap = self._in_step
            self._on_behind()

    async def _flush_in_turn(self, connection: NbdConnection) -> None:
        """Of two flushes at a time, a disk may tell one alone that what both are about is lost."""
        async with nullcontext() if self.ours else self._flush_turn:
            try:
                await connection.flush()
            except OSError:
                self._flush_failed(connection)
                raise

    async def _flush_copy(self, connection: NbdConnection) -> None:
        try:
            await self._flush_in_turn(connection)
        except OSError as exc:
            self._on_bad("flush", exc, 0, self.dirty.size)

    async def _flush_while_asked(self, connection: NbdConnection) -> None:
        while self._flush_again and self.connection is connection:
            self._flush_again = False
            await self._flush_copy(connection)
        self._flushing = None


def _submitter(connection: NbdConnection, flight: Flight | None) -> Callable[..., object]:
    return connection.submit if flight is None else partial(flight.submit, connection)


def _no_way() -> OSError:
    return OSError(errno.ENOTCONN, "the way to the standby is lost")
