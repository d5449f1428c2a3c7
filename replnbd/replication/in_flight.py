"""What is on its way to a copy: how much of it in an epoch, and where."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from replnbd.block import Buffer, NbdConnection
from replnbd.nbd import Done


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


class Flight:
    """A request to a target that keeps no order."""

    __slots__ = ("_blocks", "_cost", "_left", "_owner", "_submit", "waits")

    def __init__(self, owner: InFlight, offset: int, length: int) -> None:
        self._owner = owner
        self._blocks = blocks = _blocks(offset, length)
        self._submit: Callable[[], object] | None = None
        self._cost = 0  # in memory, while it waits
        self._left: asyncio.Future[None] | None = None
        self.waits = owner.queue(self, blocks)
        """In how many blocks something is before it: it must not be sent before that is 0."""

    def submit(
        self,
        connection: NbdConnection,
        command: int,
        flags: int,
        offset: int,
        length: int,
        *,
        payload: Buffer | None,
        done: Done,
    ) -> None:
        """`NbdConnection.submit`, now or as soon as nothing is before it."""
        if self.waits and payload is not None:
            payload = bytes(payload)  # the caller's may change
        submit = partial(
            connection.submit, command, flags, offset, length, payload=payload, done=done
        )
        if not self.waits:
            submit()
            return
        self._submit, self._cost = submit, 0 if payload is None else length
        self._owner.requests_held += 1
        self._owner.bytes_held += self._cost

    def step(self) -> None:
        """In one block more, nothing is before it."""
        self.waits -= 1
        if not self.waits and self._submit is not None:
            self._owner.requests_held -= 1
            self._owner.bytes_held -= self._cost
            self._submit()

    def leave(self) -> None:
        """It is answered: what waited for it is sent."""
        if self._left is not None and not self._left.done():
            self._left.set_result(None)
        for following in self._owner.unqueue(self._blocks):
            following.step()

    async def wait_left(self) -> None:
        """Until it is answered."""
        if self._left is None:
            self._left = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._left)


class InFlight:
    """What is in flight, by blocks of 4 KiB: what overlaps is sent one after the other."""

    def __init__(self) -> None:
        self.requests_held = self.bytes_held = 0
        """Of what waits for others."""
        self._queues: dict[int, list[Flight]] = {}
        """Of each block; the first one is on its way."""

    def outstanding(self, connection: NbdConnection) -> tuple[int, int, int]:
        """What is on its way, with what waits here: bytes and requests; and in how many blocks."""
        size = connection.bytes_outstanding + self.bytes_held
        count = connection.requests_outstanding + self.requests_held
        return size, count, len(self._queues)

    def queue(self, flight: Flight, blocks: range) -> int:
        """Put it behind all that is there; in how many of the blocks something is."""
        queues, waits = self._queues, 0
        for block in blocks:
            queue = queues.setdefault(block, [])
            queue.append(flight)
            waits += len(queue) > 1
        return waits

    def unqueue(self, blocks: range) -> list[Flight]:
        """Remove the first ones, which are one; the first ones then, once for each block."""
        queues, following = self._queues, []
        for block in blocks:
            queue = queues[block]
            del queue[0]
            if queue:
                following.append(queue[0])
            else:
                del queues[block]
        return following

    async def wait_without(self, offset: int, length: int) -> None:
        """Until nothing is in flight in a range where nothing begins any more."""
        queues, blocks = self._queues, _blocks(offset, length)
        found = blocks if len(blocks) < len(queues) else [each for each in queues if each in blocks]
        for block in found:
            while block in queues:
                await queues[block][-1].wait_left()


def _blocks(offset: int, length: int) -> range:
    return range(offset >> 12, (offset + length - 1 >> 12) + 1)
