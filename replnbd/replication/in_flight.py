"""What is on its way to a copy: how much of it in an epoch, and where."""

from __future__ import annotations

import asyncio


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


class InFlight:
    """The blocks of 4 KiB in which something is in flight; for targets that keep no order."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._left = asyncio.Event()

    def __contains__(self, span: tuple[int, int]) -> bool:
        offset, length = span
        blocks = self._blocks
        if not blocks:
            return False
        wanted = _blocks(offset, length)
        if len(wanted) > len(blocks):
            return any(block in wanted for block in blocks)
        return any(block in blocks for block in wanted)

    def add(self, offset: int, length: int) -> None:
        """A request is sent."""
        blocks = self._blocks
        for block in _blocks(offset, length):
            blocks[block] = blocks.get(block, 0) + 1

    def remove(self, offset: int, length: int) -> None:
        """It is answered."""
        blocks = self._blocks
        for block in _blocks(offset, length):
            left = blocks.pop(block) - 1
            if left:
                blocks[block] = left
        self._left.set()

    async def wait_without(self, offset: int, length: int) -> None:
        """Until nothing is in flight in a range where nothing begins any more."""
        while (offset, length) in self:
            self._left.clear()
            await self._left.wait()


def _blocks(offset: int, length: int) -> range:
    return range(offset >> 12, (offset + length - 1 >> 12) + 1)
