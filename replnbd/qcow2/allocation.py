"""Allocator: host clusters for data and L2 tables, taken ahead in runs.

A run is some megabytes of free clusters whose refcounts are stored as 1 with one pwrite, before
anything uses them. Handing out one of them is then an addition. What is left of a run when the
disk is flushed or closed is given back, so that every flush leaves exact refcounts; after a crash
it is a leak, which harms nothing and any check repairs.

Laws.
1. A cluster's refcount is on disk before its first use.
2. Clusters are released only when nothing on disk refers to them. Released clusters wait in a list
   until there are many, or somebody flushes: then runs of neighbours are punched out of the file
   and their refcounts stored with one pwrite each.
3. What could not be given back because of an I/O error stays in the list, for the next time.
4. In a power-safe image it is durable that nothing refers to a cluster before it leaves the list.
   Where clusters are to be `blank`, they are within the file and read as zeroes, durably, before
   they are handed out: punched if they have ever been used, and flushed.
"""

from __future__ import annotations

import asyncio
import errno
import logging

from replnbd.qcow2.host import HostFile
from replnbd.qcow2.refcounts import Refcounts

log = logging.getLogger(__name__)

_RUN_BYTES = 8 << 20
"""Clusters to take at once, in bytes: 128 of 64 KiB, so that the refcounts cost little each."""
_RUN_CLUSTERS_MIN = 8
_RUN_CLUSTERS_MAX = 1024
_RELEASED_MAX = 512
"""Released clusters that wait; more are given back by the request that released them."""


class Allocator:
    """Hands out host clusters of an image open for writing, and takes them back."""

    __slots__ = (
        "_blank",
        "_blank_end",
        "_can_punch",
        "_leaving",
        "_longer",
        "_next",
        "_run_clusters",
        "_run_end",
        "floor",
        "hint",
        "host",
        "refcounts",
        "released",
        "settling",
    )

    def __init__(self, host: HostFile, refcounts: Refcounts, *, blank: bool = False) -> None:
        self.host = host
        self.refcounts = refcounts
        self._blank = blank
        self._blank_end = host.end
        """From `HostFile.end` to here, the file is durably there and blank."""
        self._longer = False
        """We have made it so long: it is no block device, and may be cut."""
        run = _RUN_BYTES // host.cluster_size
        self._run_clusters = min(max(run, _RUN_CLUSTERS_MIN), _RUN_CLUSTERS_MAX)
        # Clusters from _next to _run_end are ours, with refcount 1 on disk, and in no use.
        self._next = 0
        self._run_end = 0
        self.hint = 0
        """No host cluster before this one is free, but for those before `floor`."""
        self.floor = 0
        """Clusters before this one are kept for the next table (`keep_room`)."""
        self.released: list[tuple[int, int]] = []
        """(cluster, count): references that are gone, still counted on disk."""
        self._leaving: list[tuple[int, int]] = []
        """What `settle` is giving back, or could not."""
        self._can_punch = True
        self.settling = asyncio.Lock()
        """Held by who gives back; taken before HostFile.lock."""

    # Taking

    def allocate_nowait(self) -> int:
        """The host offset of one cluster; 0 if a new run must be taken first."""
        first = self._next
        if first == self._run_end:
            return 0
        self._next = first + 1
        return first << self.host.cluster_bits

    def put_back(self, *, blank: bool) -> None:
        """Undo the `allocate_nowait` that has just been made; `blank`: nothing was stored there."""
        if self._blank and not blank:
            self.release((self._next - 1) << self.host.cluster_bits, 1)
        else:
            self._next -= 1

    async def allocate(self, count: int) -> tuple[int, int]:
        """(host offset, number) of contiguous clusters: at least one, at most `count`."""
        first = self._next
        if first == self._run_end:
            async with self.host.lock:
                return await self.allocate_locked(count)
        number = min(count, self._run_end - first)
        self._next = first + number
        return first << self.host.cluster_bits, number

    async def allocate_locked(self, count: int) -> tuple[int, int]:
        """As `allocate`, for callers that hold `HostFile.lock`."""
        if self._next == self._run_end:
            await self._take_run(max(count, self._run_clusters))
        first = self._next
        number = min(count, self._run_end - first)
        self._next = first + number
        return first << self.host.cluster_bits, number

    async def _take_run(self, wanted: int) -> None:
        cluster, count = await self._find(wanted)
        await self._claim(cluster, count)
        self._next = cluster
        self._run_end = cluster + count
        self.hint = cluster + count

    async def _find(self, wanted: int) -> tuple[int, int]:
        """A free run that a refcount block describes, making the block if there is none."""
        refcounts = self.refcounts
        while True:
            cluster, count = await refcounts.find_free(max(self.hint, self.floor), wanted)
            if (cluster + count) << self.host.cluster_bits > 1 << 56:
                raise OSError(errno.ENOSPC, f"{self.host.path}: no host offsets left below 2^56")
            if refcounts.covered(cluster):
                return cluster, count
            await refcounts.add_block(cluster)

    async def _claim(self, cluster: int, count: int) -> None:
        host = self.host
        bits = host.cluster_bits
        await host.check_target(cluster << bits, count << bits, "newly allocated data")
        if self._blank:
            await self._make_blank(cluster << bits, (cluster + count) << bits)
        await self.refcounts.set_run(cluster, count, 1)
        host.end = max(host.end, (cluster + count) << bits)

    async def _make_blank(self, start: int, end: int) -> None:
        host = self.host
        used, missing = start < host.end, end > self._blank_end
        if used:
            await host.file.write_zeroes(start, end - start)
        if missing:
            # By an eighth more than is needed: a flush each time would be felt.
            longer = end + (end >> 3 & -host.cluster_size)
            await host.file.truncate(longer)
            self._blank_end = longer
            self._longer = True
        if used or missing:
            await host.order()

    async def trim(self) -> None:
        """Cut off what the file has beyond the clusters in use; before it is closed."""
        if self._longer and self._blank_end > self.host.end:
            self._blank_end = self.host.end
            await self.host.file.truncate(self.host.end)

    async def allocate_contiguous(self, count: int) -> int | None:
        """The host offset of `count` clusters in one piece, for a table; under the lock.

        None if no refcount block describes so many (only with the smallest clusters).
        """
        cluster = await self._find_contiguous(count)
        if cluster is None:
            return None
        await self._claim(cluster, count)
        return cluster << self.host.cluster_bits

    async def keep_room(self, count: int) -> None:
        """Let the next `allocate_contiguous` of `count` find them where they fit first now."""
        cluster = await self._find_contiguous(count)
        self.floor = cluster + count if cluster is not None else 0

    async def _find_contiguous(self, count: int) -> int | None:
        refcounts = self.refcounts
        if count >= refcounts.block_entries:
            return None
        start = 0
        while True:
            cluster, found = await refcounts.find_free(start, count)
            if not refcounts.covered(cluster):
                await refcounts.add_block(cluster)
                start = cluster
            elif found < count:
                start = cluster + found
            else:
                return cluster

    # Giving back

    def release(self, offset: int, count: int) -> None:
        """A reference to each of these clusters is gone from the disk, or was never there."""
        self.released.append((offset >> self.host.cluster_bits, count))

    def release_bytes(self, offset: int, length: int) -> None:
        """As `release`, for the clusters that hold these bytes (compressed clusters)."""
        bits = self.host.cluster_bits
        first = offset >> bits
        self.released.append((first, ((offset + length - 1) >> bits) - first + 1))

    @property
    def crowded(self) -> bool:
        """Enough has been released to be worth giving back now."""
        return len(self.released) >= _RELEASED_MAX

    @property
    def idle(self) -> bool:
        """Refcounts on disk are exact: nothing to give back."""
        waiting = self.released or self._leaving or self.refcounts.orphaned
        return self._next == self._run_end and not waiting

    @property
    def spare_clusters(self) -> int:
        """Clusters that are counted on disk and hold nothing."""
        waiting = self.released + self._leaving + self.refcounts.orphaned
        return self._run_end - self._next + sum(count for _, count in waiting)

    async def settle(self, *, with_run: bool = False) -> None:
        """Give back what was released; `with_run`: the rest of the run as well, so that the
        refcounts on disk are exact."""
        async with self.settling:
            async with self.host.lock:
                if with_run:
                    await self._give_back_run()
                self._leaving = _merge(self._leaving + self.released + self.refcounts.orphaned)
                self.released = []
                self.refcounts.orphaned.clear()
                holes = await self._holes()
            if self._leaving:
                await self.host.order()
            # Their refcounts say that they are in use, so nobody can take them meanwhile; and
            # without the lock, requests need not wait while the file system frees blocks.
            for cluster, count in holes:
                await self.punch(cluster, count)
            async with self.host.lock:
                await self._drop_leaving()

    async def _give_back_run(self) -> None:
        first, count = self._next, self._run_end - self._next
        if count:
            # Out of sight first: nobody may take them while their refcounts are stored.
            self._next = self._run_end
            try:
                await self.refcounts.set_run(first, count, 0)
            except OSError:
                self.released.append((first, count))
                raise
            self.hint = min(self.hint, first)
            if (first + count) << self.host.cluster_bits == self.host.end:
                # The next run may begin here, and if it is to be blank, it is.
                self.host.end = first << self.host.cluster_bits

    async def _holes(self) -> list[tuple[int, int]]:
        """The runs among those that leave which nothing else refers to."""
        if not self._can_punch:
            return []
        holes: list[tuple[int, int]] = []
        for first, count in self._leaving:
            for cluster in range(first, first + count):
                if await self.refcounts.get(cluster) == 1:
                    if holes and sum(holes[-1]) == cluster:
                        holes[-1] = (holes[-1][0], holes[-1][1] + 1)
                    else:
                        holes.append((cluster, 1))
        return holes

    async def _drop_leaving(self) -> None:
        leaving = self._leaving
        while leaving:
            cluster, count = leaving[-1]
            try:
                done = await self._drop_some(cluster, count)
            except OSError:
                if self.host.corrupt:
                    leaving.pop()  # free already, says the image: do not fail again and again
                raise
            if done < count:
                leaving[-1] = (cluster + done, count - done)
            else:
                leaving.pop()

    async def _drop_some(self, cluster: int, count: int) -> int:
        """Take one reference from each of the first clusters of a run, as many as have the same
        refcount in the same block; returns how many. Without another reference they are free."""
        host = self.host
        bits = host.cluster_bits
        refcounts = self.refcounts
        value = await refcounts.get(cluster)
        if value == 0:
            raise await host.corruption(
                f"the refcount of the cluster at {cluster << bits:#x} is 0, but it was in use"
            )
        count = min(count, refcounts.block_entries - cluster % refcounts.block_entries)
        length = 1
        while length < count and await refcounts.get(cluster + length) == value:
            length += 1
        await refcounts.set_run(cluster, length, value - 1)
        if value == 1:
            self.hint = min(self.hint, cluster)
            host.unmark(cluster << bits, length << bits)
        return length

    async def punch(self, cluster: int, count: int) -> None:
        """Return the space of clusters to the file system, while nobody can take them yet."""
        if not self._can_punch:
            return
        bits = self.host.cluster_bits
        try:
            await self.host.file.write_zeroes(cluster << bits, count << bits, unmap=True, fast=True)
        except OSError as exc:
            # Space is all that is lost, and the clusters are used again.
            if exc.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                self._can_punch = False
            else:
                log.warning("%s: cannot punch a hole: %s", self.host.path, exc)

    def forget(self) -> None:
        """All refcounts were rewritten (make_empty); nothing is reserved or released any more."""
        self._next = self._run_end = 0
        self.released = []
        self._leaving = []
        self.hint = 0


def _merge(released: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbours. A cluster that was released twice (compressed clusters share one) stays
    in the list twice."""
    runs: list[tuple[int, int]] = []
    for cluster, count in sorted(released):
        if runs and runs[-1][0] + runs[-1][1] == cluster:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((cluster, count))
    return runs
