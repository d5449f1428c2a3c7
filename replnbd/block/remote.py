"""NbdNode: an export of another server as a node, with a session that is made anew when it breaks.

Reconnecting, as QEMU's NBD driver does it: whenever the session is over, the node connects again
until it succeeds. For `reconnect_delay_s` from the break on, requests wait: new ones, and those
that were in flight, which are sent once more. After that, and with the default of 0 at once, they
fail with EIO, until there is a session again. Each request waits that long at most, however often
the session breaks.

To send a request once more is safe, because it has not been acknowledged: nobody may rely on what
it has done or not done. Two things are not ours to know: whether the server that is back still has
what it acknowledged and nobody flushed (its host may have died), and whether the old one is still
at work on what the session took with it. For both, as with QEMU, one has to know one's server.

If the export has changed meanwhile (its size, or that it can be written), it is another disk:
everything fails from then on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from replnbd.block.nbd_connect import CONNECT_TIMEOUT_S, connect_nbd
from replnbd.block.nbd_connection import NbdConnection
from replnbd.block.nbd_uri import NbdTarget, parse_nbd_uri
from replnbd.block.node import COPY_CHUNK, STATUS_EXTENTS_MAX, BlockNode, Buffer, Extent
from replnbd.block.range_lock import RangeLock
from replnbd.errors import ConfigError, ProtocolError, ReplnbdError
from replnbd.nbd import BASE_ALLOCATION
from replnbd.nbd.constants import AllocationState

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
"""Between attempts to connect; doubled each time, and up to a quarter more at random, so that many
clients of a server that comes back do not come all at once."""

_ZEROES = bytes(COPY_CHUNK)
_ZERO = int(AllocationState.ZERO)


class NbdNode(BlockNode):
    """An export of an NBD server."""

    driver = "nbd"

    def __init__(
        self,
        target: NbdTarget,
        connection: NbdConnection,
        *,
        name: str,
        read_only: bool,
        reconnect_delay_s: float,
    ) -> None:
        """Takes over `connection`; use `open`."""
        self.target = target
        self.path = str(target)
        self.name = name
        self.size = connection.size
        self.read_only = read_only
        self._reconnect_delay_s = reconnect_delay_s
        self._loop = asyncio.get_running_loop()
        # The session, and its successor
        self._over: OSError | None = None
        """Why there will be no other session."""
        self._reconnecting: asyncio.Task[None] | None = None
        self._retry_s = 0.0
        self._patience_ends = 0.0
        self._waiting: set[asyncio.Future[None]] = set()  # for a session, or the news of none
        self._flush_failure: OSError | None = None
        self._adopt(connection)
        # A server that knows blocks only: a part of one is written by reading the rest of it. What
        # is aligned needs no lock then but while that goes on.
        self._block_size = connection.block_size_min
        self._lock = RangeLock(self._block_size)

    @classmethod
    async def open(
        cls,
        uri: str | NbdTarget,
        *,
        name: str = "",
        read_only: bool = False,
        reconnect_delay_s: float = 0.0,
        open_timeout_s: float = 0.0,
    ) -> NbdNode:
        """Connect to an export. `open_timeout_s`: try so long, if the server is not there yet; one
        attempt takes up to CONNECT_TIMEOUT_S. `reconnect_delay_s`: see above.

        Raises ConfigError, in one line: a URI or credentials that are no good, no such server or
        export, or it is read-only and is not to be.
        """
        target = parse_nbd_uri(uri) if isinstance(uri, str) else uri
        connection = await _connect_in_time(target, open_timeout_s)
        if connection.read_only and not read_only:
            await connection.close()
            raise ConfigError(f"cannot open {target}: the export is read-only")
        return cls(
            target,
            connection,
            name=name or target.export or "nbd",
            read_only=read_only,
            reconnect_delay_s=reconnect_delay_s,
        )

    @property
    def connected(self) -> bool:
        """Whether there is a session now."""
        return not self._connection.closed

    # Section: operations

    async def pread(self, offset: int, buffer: memoryview) -> None:
        size = self._block_size
        if size == 1 or not (offset | len(buffer)) % size:
            await self._run(lambda session: session.pread(offset, buffer))
            return
        start = offset - offset % size
        whole = bytearray(-(-(offset + len(buffer)) // size) * size - start)
        await self._run(lambda session: session.pread(start, memoryview(whole)))
        buffer[:] = memoryview(whole)[offset - start : offset - start + len(buffer)]

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._write(offset, data, fua=False)

    async def pwrite_fua(self, offset: int, data: Buffer) -> None:
        await self._write(offset, data, fua=True)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self._check_writable()
        size = self._block_size
        start, end = -(-offset // size) * size, (offset + length) // size * size
        if start >= end:
            if fast:
                raise OSError(errno.ENOTSUP, f"{self.name}: less than a block is written as data")
            await self._write_as_data(offset, length)
            return
        # Aligned body (if that cannot be done fast, nothing is), unaligned head and tail.
        async with self._exclusion(start, end - start, exclusive=False):
            written = await self._zero(start, end - start, unmap=unmap, fast=fast)
        if not written:
            await self._write_as_data(start, end - start)
        if offset < start:
            await self._write_as_data(offset, start - offset)
        if end < offset + length:
            await self._write_as_data(end, offset + length - end)

    async def discard(self, offset: int, length: int) -> None:
        # Not by TRIM: after it "a client MUST NOT make any assumptions about the contents".
        await self.write_zeroes(offset, length, unmap=True)

    async def flush(self) -> None:
        if self._flush_failure is not None:
            text = f"an earlier flush of {self.name} failed"
            raise OSError(self._flush_failure.errno, text)
        await self._run(self._flush)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        size = self._block_size
        start = offset - offset % size
        end = -(-(offset + length) // size) * size

        async def ask(session: NbdConnection) -> list[tuple[int, int]]:
            if BASE_ALLOCATION not in session.contexts:
                return [(end - start, 0)]
            return (await session.block_status(start, end - start))[BASE_ALLOCATION]

        extents: list[Extent] = []
        before = offset - start  # of what we are told, and was not asked
        for told, flags in (await self._run(ask))[: STATUS_EXTENTS_MAX + 1]:
            kept = min(told - before, length)
            before = max(before - told, 0)
            if kept > 0:
                extents.append(Extent(kept, zero=bool(flags & _ZERO), depth=0))
                length -= kept
        return extents[:STATUS_EXTENTS_MAX]

    async def close(self) -> None:
        if self._over is None:
            self._end(OSError(errno.EIO, f"{self.name} is closed"))
        task, self._reconnecting = self._reconnecting, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._connection.close()

    # Section: writing, in whole blocks

    async def _write(self, offset: int, data: Buffer, *, fua: bool) -> None:
        self._check_writable()
        size = self._block_size
        if size == 1:
            await self._run(lambda session: session.pwrite(offset, data, fua=fua))
            return
        start = offset - offset % size
        end = -(-(offset + len(data)) // size) * size
        partial = (start, end) != (offset, offset + len(data))
        async with self._exclusion(start, end - start, exclusive=partial):
            if partial:
                data = await self._complete(start, end, offset, data)
            await self._run(lambda session: session.pwrite(start, data, fua=fua))

    async def _complete(self, start: int, end: int, offset: int, data: Buffer) -> Buffer:
        """`data` at `offset` with what the export has around it, from `start` to `end`."""
        size = self._block_size
        whole = bytearray(end - start)
        view = memoryview(whole)
        for at in {start, end - size}:
            if at < offset or at + size > offset + len(data):
                block = view[at - start : at - start + size]
                await self._read_block(at, block)
        view[offset - start : offset - start + len(data)] = data
        return whole

    async def _read_block(self, at: int, block: memoryview) -> None:
        await self._run(lambda session: session.pread(at, block))

    async def _write_as_data(self, offset: int, length: int) -> None:
        for done in range(0, length, COPY_CHUNK):
            part = memoryview(_ZEROES)[: min(length - done, COPY_CHUNK)]
            await self._write(offset + done, part, fua=False)

    async def _zero(self, offset: int, length: int, *, unmap: bool, fast: bool) -> bool:
        """Zero whole blocks; whether the server could."""

        async def zero(session: NbdConnection) -> bool:
            try:
                await session.write_zeroes(offset, length, unmap=unmap, fast=fast)
            except OSError as exc:
                # EOVERFLOW: it would take too much of the server, all at once.
                if fast or session.closed or exc.errno not in (errno.ENOTSUP, errno.EOVERFLOW):
                    raise
                return False
            return True

        return await self._run(zero)

    @asynccontextmanager
    async def _exclusion(
        self, offset: int, length: int, *, exclusive: bool
    ) -> AsyncIterator[None]:  # fmt: skip
        if self._block_size == 1:
            yield
            return
        key = await self._lock.acquire(offset, length, exclusive)
        try:
            yield
        finally:
            self._lock.release(key)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.name} is read-only")

    async def _flush(self, session: NbdConnection) -> None:
        try:
            await session.flush()
        except OSError as exc:
            # The server's answer, and not the session's end: what it could not write is lost, and
            # its next flush may know nothing of that.
            if not session.closed:
                self._flush_failure = exc
            raise

    # Section: sessions

    async def _run(self, operation: Callable[[NbdConnection], Awaitable[T]]) -> T:
        """Do it, in another session if this one breaks; EIO if there is none in time."""
        session = self._connection
        deadline = None
        while True:
            if session.closed:
                if deadline is None:
                    deadline = self._loop.time() + self._reconnect_delay_s
                session = await self._next_session(deadline)
            try:
                return await operation(session)
            except OSError as exc:
                if not session.closed:
                    raise
                if not self._reconnect_delay_s:
                    raise OSError(errno.EIO, exc.strerror) from exc

    async def _next_session(self, deadline: float) -> NbdConnection:
        while self._connection.closed:
            if self._over is not None:
                raise OSError(errno.EIO, self._over.strerror)
            ends = min(deadline, self._patience_ends)
            if self._loop.time() >= ends:
                raise OSError(errno.EIO, f"{self.name}: no session with {self.target}")
            # No asyncio.timeout: operations need not run in a task.
            ready = self._loop.create_future()
            timer = self._loop.call_at(ends, _wake, ready)
            self._waiting.add(ready)
            try:
                await ready
            finally:
                timer.cancel()
                self._waiting.discard(ready)
        return self._connection

    def _adopt(self, connection: NbdConnection) -> None:
        self._connection = connection
        self._began = self._loop.time()
        connection.on_closed = self._lost
        self._wake_all()

    def _lost(self, reason: OSError) -> None:
        if self._over is not None:
            return
        log.warning("%s: %s; connecting again", self.name, reason.strerror)
        now = self._loop.time()
        if now - self._began > RETRY_MAX_S:
            self._retry_s = 0.0
        self._patience_ends = now + self._reconnect_delay_s
        self._reconnecting = self._loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        told = ""
        while True:
            # At once, unless the last session broke as soon as it was there.
            await asyncio.sleep(self._retry_s * random.uniform(1, 1.25))
            self._retry_s = min(max(2 * self._retry_s, RETRY_MIN_S), RETRY_MAX_S)
            try:
                connection = await connect_nbd(self.target)
            except (OSError, ReplnbdError) as exc:
                text = (isinstance(exc, OSError) and exc.strerror) or str(exc)
                if text != told:
                    log.warning("%s: %s", self.name, text)
                told = text
                continue
            misfit = self._misfit(connection)
            if misfit is not None:
                log.error("%s: not used any more: %s", self.name, misfit)
                self._end(OSError(errno.EIO, f"{self.name}: {misfit}"))
                await connection.close()
                return
            log.warning("%s: connected to %s again", self.name, self.target)
            self._adopt(connection)
            return

    def _misfit(self, connection: NbdConnection) -> str | None:
        """Why this export cannot be the one that we had."""
        if connection.size != self.size:
            return f"{self.target} has {connection.size} bytes now, and had {self.size}"
        if connection.read_only and not self.read_only:
            return f"{self.target} is read-only now"
        if connection.block_size_min > self._block_size:
            return f"{self.target} wants blocks of {connection.block_size_min} bytes now"
        return None

    def _end(self, reason: OSError) -> None:
        self._over = reason
        self._wake_all()

    def _wake_all(self) -> None:
        for ready in self._waiting:
            _wake(ready)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _connect_in_time(target: NbdTarget, open_timeout_s: float) -> NbdConnection:
    loop = asyncio.get_running_loop()
    ends = loop.time() + open_timeout_s
    retry_s = RETRY_MIN_S
    while True:
        try:
            return await connect_nbd(target, timeout_s=CONNECT_TIMEOUT_S)
        except ProtocolError as exc:
            raise ConfigError(str(exc)) from exc
        except OSError as exc:
            if loop.time() + retry_s > ends:
                raise ConfigError(exc.strerror or str(exc)) from exc
        await asyncio.sleep(retry_s)
        retry_s = min(2 * retry_s, RETRY_MAX_S)
