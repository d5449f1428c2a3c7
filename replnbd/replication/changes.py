"""What has changed since the last checkpoint: what dirty bitmaps of the two exports show.

Nothing is kept for it. The hidden overlay has old data of exactly what the primary has changed, the
active overlay is what the standby has written; both to the subcluster (2 KiB), both empty right
after a checkpoint. Where no account is kept, everything counts as changed.
"""

from __future__ import annotations

import asyncio

from replnbd.block import STATUS_EXTENTS_MAX, OverlayNode
from replnbd.replication.disk import StandbyDisk
from replnbd.replication.history import History
from replnbd.replication.stage import Stage
from replnbd.replication.standby_peer import StandbyPeer

Runs = list[tuple[int, bool]]
"""(length, changed), from an offset on. They may fall short of what was asked."""

CHECKPOINT_BITMAP = "checkpoint"
"""Clients ask for it as the metadata context qemu:dirty-bitmap:checkpoint."""

_BYTES_MAX = 1 << 30
"""Looked at for one answer: some 16,000 clusters of an overlay."""


async def primary_changes(disk: StandbyDisk, offset: int, length: int) -> Runs:
    """Of the secondary disk: what the primary has changed since the last checkpoint."""
    if disk.stage is not Stage.RUNNING or disk.lost is not None:
        return [(length, True)]
    return await _allocated_runs(disk.hidden, offset, length)


async def standby_changes(disk: StandbyDisk, offset: int, length: int) -> Runs:
    """Of the view: what the standby has changed since the last checkpoint."""
    overlaid = disk.stage is Stage.RUNNING or (disk.stage is Stage.DONE and not disk.promoted)
    if not overlaid or disk.lost is not None:
        return [(length, True)]
    return await _allocated_runs(disk.active, offset, length)


async def unproven_changes(peer: StandbyPeer, offset: int, length: int) -> Runs:
    """Of a disk: what its peer may lack, or have otherwise."""
    if peer.history is None or peer.history.record.pair is None:
        return [(length, True)]
    return await unproven_runs(peer.history, offset, length)


async def unproven_runs(history: History, offset: int, length: int) -> Runs:
    """The same of a history."""
    return history.map.runs(offset, length, STATUS_EXTENTS_MAX)


async def _allocated_runs(overlay: OverlayNode, offset: int, length: int) -> Runs:
    runs: Runs = []
    end = offset + length
    looked_at = 0
    while offset < end and len(runs) < STATUS_EXTENTS_MAX and looked_at < _BYTES_MAX:
        allocated, count = await overlay.allocated(offset, end - offset)
        runs.append((count, allocated))
        offset += count
        await asyncio.sleep(0)  # the loop has its turn: that may have taken 10 ms
        # A longer run that is not allocated is mostly one of no L2 tables: next to no work.
        looked_at += count if allocated else min(count, _BYTES_MAX // 4)
    return runs
