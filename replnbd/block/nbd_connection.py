"""NbdConnection: one session with an NBD server, and coroutines for all that it can do.

They wait for the reply, and cut what is longer than the server takes in one request. Each raises
OSError: with what the server said, or with why the session is over.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from typing import cast

from replnbd.block.nbd_session import NbdSession
from replnbd.block.node import Buffer
from replnbd.nbd import constants as c

EFFECT_BYTES_MAX = 1 << 30
"""Of one TRIM or WRITE_ZEROES. A server that has to write a GiB of zeroes answers in time."""

CACHE_BYTES_MAX = c.PAYLOAD_BYTES_MAX
"""Of one CACHE: as much as a READ could ask for."""

_STATUS_BYTES_MAX = (1 << 32) - (1 << 16)  # a multiple of all block sizes that fits 32 bits


class NbdConnection(NbdSession):
    """A session; `connect_nbd` makes it."""

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. Cancelled, it leaves `buffer` alone from then on."""
        done = 0
        for at, length in _parts(offset, len(buffer), self.payload_bytes_max):
            await self._request(c.CMD_READ, 0, at, length, buffer=buffer[done : done + length])
            done += length

    async def pwrite(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write; with `fua` it is durable then."""
        flags = c.CMD_FLAG_FUA if fua and self.can_fua else 0
        view = memoryview(data)
        done = 0
        for at, length in _parts(offset, len(data), self.payload_bytes_max):
            part = data if length == len(data) else view[done : done + length]
            await self._request(c.CMD_WRITE, flags, at, length, payload=part)
            done += length
        await self._flush_without_fua(fua)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        """As BlockNode's. ENOTSUP: the server cannot; with `fast`: or cannot faster than with
        data."""
        if not self.can_zero or (fast and not self.can_fast_zero):
            raise OSError(errno.ENOTSUP, f"{self.name}: the server has no (fast) WRITE_ZEROES")
        flags = c.CMD_FLAG_FUA if fua and self.can_fua else 0
        flags |= 0 if unmap else c.CMD_FLAG_NO_HOLE
        flags |= c.CMD_FLAG_FAST_ZERO if fast else 0
        for at, part in _parts(offset, length, EFFECT_BYTES_MAX):
            await self._request(c.CMD_WRITE_ZEROES, flags, at, part)
        await self._flush_without_fua(fua)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """A hint; what is read there afterwards may be anything. ENOTSUP: the server cannot."""
        if not self.can_trim:
            raise OSError(errno.ENOTSUP, f"{self.name}: the server has no TRIM")
        flags = c.CMD_FLAG_FUA if fua and self.can_fua else 0
        for at, part in _parts(offset, length, EFFECT_BYTES_MAX):
            await self._request(c.CMD_TRIM, flags, at, part)
        await self._flush_without_fua(fua)

    async def flush(self) -> None:
        """All that was acknowledged before is durable. A server that has no FLUSH has nothing to
        say of that, and we take it as QEMU does: it needs none."""
        if self.can_flush:
            await self._request(c.CMD_FLUSH, 0, 0, 0)

    async def cache(self, offset: int, length: int) -> None:
        """A hint that this will be read soon. ENOTSUP: the server cannot."""
        if not self.can_cache:
            raise OSError(errno.ENOTSUP, f"{self.name}: the server has no CACHE")
        for at, part in _parts(offset, length, CACHE_BYTES_MAX):
            await self._request(c.CMD_CACHE, 0, at, part)

    async def block_status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """(length, status flags) of extents from `offset` on, at least one for each context that
        was selected; together they may be shorter than `length`. ENOTSUP without any context."""
        if not self.contexts:
            raise OSError(errno.ENOTSUP, f"{self.name}: the server has no metadata contexts")
        if not self.extended:
            length = min(length, _STATUS_BYTES_MAX)
        statuses: dict[int, list[tuple[int, int]]] = {}
        await self._request(c.CMD_BLOCK_STATUS, 0, offset, length, statuses=statuses)
        return {name: statuses[number] for name, number in self.contexts.items()}

    async def _flush_without_fua(self, fua: bool) -> None:
        if fua and not self.can_fua:
            await self.flush()

    async def _request(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        *,
        payload: Buffer | None = None,
        buffer: memoryview | None = None,
        statuses: dict[int, list[tuple[int, int]]] | None = None,
    ) -> None:
        if (offset | length) % self.block_size_min:
            text = (
                f"{self.name}: not in blocks of {self.block_size_min}: {length} bytes at {offset}"
            )
            raise OSError(errno.EINVAL, text)
        ended = self._loop.create_future()

        def done(failure: OSError | None) -> None:
            if not ended.done():
                ended.set_result(failure)

        cookie = self.submit(
            command, flags, offset, length,
            payload=payload, buffer=buffer, statuses=statuses, done=done,
        )  # fmt: skip
        try:
            failure = cast("OSError | None", await ended)
        except asyncio.CancelledError:
            self.forget(cookie)
            raise
        if failure is not None:
            # A new one: the reason of a session's end is told to many.
            raise OSError(failure.errno, failure.strerror) from failure


def _parts(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces that a range is cut into."""
    if length <= step:
        yield offset, length
        return
    for done in range(0, length, step):
        yield offset + done, min(step, length - done)
