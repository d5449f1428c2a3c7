"""Reclaimer: gives back what an emptied image had, in the background: memory and disk space.

What an emptied image had in use is free, and its blocks stay with the file: they are what the next
writes take, for 1.1 µs per 4 KiB, where a new block costs 4.2 µs at the end of the file and 15 µs
in a hole. A file that is about to be filled again keeps as much of it as it has lately needed at
most. So a steady load never gives anything back, and disk use is bounded by the most clusters that
were in use at any one time (whole ones: written in part, they fill up as they are used again).

The rest goes in steps from the end down: freeing 100,000 extents at once takes 9 s, in which nobody
can write to the file. Each step locks the inode, too; usually for 0.2 to 0.5 ms, but for as long as
the file system's journal makes it wait (25 ms in one step of a hundred, 300 ms at worst, on ext4
with a busy disk). That is why what was needed is kept for minutes, not for a number of checkpoints.

Laws.
1. A step holds `HostFile.lock`: nobody takes clusters meanwhile, and what is in use is not touched.
2. Between steps nothing is held, and everything is in order: the image is valid, the task may end.
3. Only space is at stake: an error ends the work until the next time the image is emptied.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from replnbd.qcow2.allocation import Allocator

log = logging.getLogger(__name__)

KEEP_S = 300.0
"""What was needed is kept for so long at least, and at most twice as long."""
_STEP_BYTES = 512 << 10
"""Of the file: 0.5 ms if each 64 KiB of it are an extent (ext4), as long as the inode is locked."""
_ITEMS = 256
"""Of retired sets and lists, to free before the loop gets a turn: 0.1 ms."""
_PAUSE = 3
"""Times as long as a step takes are the requests of others undisturbed after it."""


class Reclaimer:
    """One per image that is open for writing. `start` it under `HostFile.lock`; `stop` it before
    the file is closed."""

    __slots__ = (
        "_allocator",
        "_before",
        "_host",
        "_period_end",
        "_recent",
        "_reserve",
        "_retired",
        "_stopping",
        "_task",
        "_top",
    )

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._host = allocator.host
        # Host offsets. From _top on the file has nothing, unless the image has grown since; down to
        # _reserve it may be cut. _recent and _before are the most that was needed in this period
        # and in the one before it.
        self._top = 0
        self._reserve = 0
        self._recent = 0
        self._before = 0
        self._period_end = 0.0
        self._retired: list[Callable[[], object]] = []
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def retire(self, pop: Callable[[], object]) -> None:
        """Free a set or list of the image's, which nobody uses any more, by and by: `pop` takes an
        item out. At once, a cache of 16 MiB takes 2 ms."""
        self._retired.append(pop)

    def start(self, needed: int, *, keep_space: bool) -> None:
        """The image is empty now, and before that used the file up to `needed`."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._period_end:
            self._before, self._recent = self._recent, 0
            self._period_end = loop.time() + KEEP_S
        self._recent = max(self._recent, needed)
        if not keep_space:
            self._before = self._recent = 0
        self._top = max(self._top, needed)
        self._reserve = max(self._before, self._recent)
        if self._task is None and (self._retired or self._top > self._reserve):
            self._task = loop.create_task(self._run())

    async def stop(self) -> None:
        """Wait for the step under way. What is left is space until the image is emptied again."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        host = self._host
        try:
            while (self._retired or self._top > self._reserve) and not self._stopping.is_set():
                await self._free_retired()
                async with host.lock:
                    begin = loop.time()
                    if host.corrupt:
                        break
                    if self._top > self._reserve:
                        await self._step()
                    pause = _PAUSE * (loop.time() - begin)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._stopping.wait()
        except OSError as exc:
            log.warning("%s: cannot give space back: %s", host.path, exc)
        finally:
            self._task = None

    async def _free_retired(self) -> None:
        while self._retired:
            pop = self._retired.pop()
            with suppress(LookupError):  # it is empty
                while True:
                    for _ in range(_ITEMS):
                        pop()
                    await asyncio.sleep(0)

    async def _step(self) -> None:
        host = self._host
        length = max(_STEP_BYTES, host.cluster_size)
        bottom = max(self._top - length, self._reserve)
        if host.end < self._top:
            await host.file.truncate(max(bottom, host.end))
        if bottom < host.end:
            await self._punch(bottom, min(self._top, host.end))
        self._top = bottom

    async def _punch(self, start: int, end: int) -> None:
        """Give back what is free before something in use: the refcount table, if it had to grow,
        lies high in the file."""
        bits = self._host.cluster_bits
        cluster, last = start >> bits, end >> bits
        while True:
            cluster, count = await self._allocator.refcounts.find_free(cluster, last - cluster)
            if cluster >= last:
                return
            await self._allocator.punch(cluster, min(count, last - cluster))
            cluster += count
