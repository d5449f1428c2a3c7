"""A job that becomes ready, and then keeps up with whoever makes work for it, as a mirror does."""

from __future__ import annotations

import asyncio
from typing import Any

from replnbd.events import EventBus
from replnbd.jobs import Job

SIZE = 1 << 20


class KeepingUp(Job):
    """`todo` chunks are to be done; each is a turn. It is ready when `copied` is set."""

    type = "mirror"
    can_complete = True

    def __init__(self, bus: EventBus, job_id: str = "resync", **options: Any) -> None:
        super().__init__(job_id, bus, **options)
        self.progress_current = self.progress_total = SIZE
        self.copied = asyncio.Event()
        self.todo = 0
        self.turns = 0
        self.failure: OSError | None = None
        self.ended = 0

    async def run(self) -> None:
        while not self.copied.is_set():
            await self.pause_point()
        await self.become_ready()
        while not await self.told_to_end(idle=not self.todo):
            self.turns += 1
            self.todo = max(0, self.todo - 1)
            if self.failure is not None:
                raise self.failure
        self.todo = 0

    def on_end(self) -> None:
        self.ended += 1
