"""RangeLock: overlapping requests wait for each other; all others do not know it exists.

A coroutine that does not suspend is atomic, so on the common path the lock is empty and costs a
dict store and a delete (0.3 µs together). A holder that is still there when another request
begins has suspended: then, and only then, is there anything to compare.

Fair: a request waits for every conflicting one that came before it, waiting ones included, so a
stream of readers cannot starve a writer, and `acquire` of everything is a drain: it lets what is
in flight end and holds back what comes later.
"""

from __future__ import annotations

import asyncio

EVERYTHING = 1 << 63
"""Longer than any disk (NBD and qcow2 offsets are 63 bits): the range a drain acquires."""


class RangeLock:
    """Shared and exclusive locks on ranges of bytes, rounded outwards to `granularity`.

    `granularity` is a power of two: the size below which requests cannot be told apart, because
    they touch the same cluster.
    """

    __slots__ = ("_next", "_shift", "_waiters", "held")

    def __init__(self, granularity: int = 1) -> None:
        assert granularity > 0
        assert granularity & (granularity - 1) == 0
        self._shift = granularity.bit_length() - 1
        self.held: dict[int, tuple[int, int, bool]] = {}
        """By key: start, end, exclusive; of holders and of those who wait. Empty nearly always."""
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}
        self._next = 0

    def __bool__(self) -> bool:
        """Whether anyone holds or waits for a range."""
        return bool(self.held)

    def is_free(self, offset: int, length: int, exclusive: bool) -> bool:
        """Whether `acquire` would not wait. Then an operation that does not suspend may go ahead
        without the lock; whoever is in a hurry asks `held` first."""
        start = offset >> self._shift
        end = ((offset + length - 1) >> self._shift) + 1
        return not any(s < end and start < e and (exclusive or x) for s, e, x in self.held.values())

    async def acquire(self, offset: int, length: int, exclusive: bool) -> int:
        """Wait until no earlier request conflicts; returns the key for `release`.

        Two requests conflict if their ranges overlap and one of them is exclusive.
        """
        shift = self._shift
        start = offset >> shift
        end = ((offset + length - 1) >> shift) + 1
        held = self.held
        key = self._next
        self._next = key + 1
        if not held:
            held[key] = (start, end, exclusive)
            return key
        earlier = [
            other for other, (s, e, x) in held.items() if s < end and start < e and (exclusive or x)
        ]
        held[key] = (start, end, exclusive)
        if earlier:
            try:
                for other in earlier:
                    if other in held:
                        await self._released(other)
            except BaseException:
                self.release(key)
                raise
        return key

    def release(self, key: int) -> None:
        """Give a range back and wake who waited for it."""
        del self.held[key]
        if self._waiters:
            for future in self._waiters.pop(key, ()):
                if not future.done():
                    future.set_result(None)

    def _released(self, key: int) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, []).append(future)
        return future
