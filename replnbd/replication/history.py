"""History: what is known of one disk beyond this process: whose data it has, and what of it a peer
may lack. It goes with the disk, whichever role that plays: a primary, its standby, one after the
other.

The file DISK.history is a RecordFile, and from MAP_START on a DirtyMap.

Laws.
1. A record is durable before anything is answered that rests on it.
2. After a power failure nothing that was not flushed is certain, on the disk or in the map: then
   there is no pair any more, so that everything is compared.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

import msgspec

from replnbd.block import GRANULE, BlockNode, DirtyMap
from replnbd.errors import ConfigError
from replnbd.replication.lineage import Claim, Lineage, new_name
from replnbd.replication.record_file import FILE_BYTES, RecordFile
from replnbd.replication.stage import Stage

SUFFIX = ".history"
MAP_START = FILE_BYTES
_MAGIC = b"replnbdH"


class Role(StrEnum):
    """What a disk is to its peer."""

    PRIMARY = "primary"
    STANDBY = "standby"


class HistoryRecord(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """What the file says of a disk; the map is behind it."""

    size: int
    boot: str
    """Of the system that the disk is in use on."""
    orderly: bool = False
    """All is closed and durable; False while a process has it."""
    role: Role = Role.PRIMARY
    lineage: Lineage | None = None
    common: str | None = None
    """The generation in which this disk and its peer were in step last."""
    pair: str | None = None
    foreign: str | None = None
    """Where the target of the pair is, if it keeps no account of its own."""
    taking_over: bool = False
    """A failover is about to happen: whether it has, the group's journal says."""
    retracting: bool = False
    """A reset is about to give up what the disk has taken on alone: as above."""
    syncing: bool = False
    """A standby's: it is being brought up to date, and not what its source was at any moment."""
    stage: Stage = Stage.NONE
    """A primary's."""
    to: str | None = None
    """Where a standby that has taken over sends its writes."""


def file_bytes(size: int) -> int:
    """Of the history of a disk of `size` bytes."""
    return MAP_START + -(-size // GRANULE)


async def read_record(file: BlockNode) -> HistoryRecord | None:
    """What the last process said of a disk; None in a new file. ImageError, OSError."""
    return await RecordFile(file, HistoryRecord, _MAGIC, "history").load()


class History:
    """Of one disk. `record` is changed by the methods here alone, which make it durable."""

    def __init__(self, record: HistoryRecord, records: RecordFile[HistoryRecord]) -> None:
        self.record = record
        self.map = DirtyMap(record.size, records.file, MAP_START)
        self.opened_at = asyncio.get_running_loop().time()
        self.found_marks = False
        """Whether a process before this one may have sent what has not arrived yet."""
        self._records = records
        self._lock = asyncio.Lock()

    @classmethod
    async def open(cls, file: BlockNode, size: int, boot: str, role: Role) -> History:
        """In a file that is new (`role` is what the disk begins as), or from an earlier process.
        Owns `file`. ConfigError if it is of a disk of another size, ImageError, OSError."""
        records = RecordFile(file, HistoryRecord, _MAGIC, "history")
        record = await records.load()
        if record is None:
            record = HistoryRecord(size=size, boot=boot, role=role)
        if record.size != size:
            path = getattr(file, "path", file.name)
            raise ConfigError(
                f"{path} is of a disk of {record.size} bytes, and this one has {size}: remove it,"
                " and everything is compared with the peer anew"
            )
        history = cls(record, records)
        await history.map.load()
        history.found_marks = history.map.dirty > 0
        lost = not record.orderly and record.boot != boot
        await history._update(boot=boot, orderly=False, pair=None if lost else record.pair)
        return history

    @property
    def claim(self) -> Claim:
        """What this side says of its disk."""
        return Claim(self.record.lineage, self.record.pair)

    def digest_key(self) -> bytes:
        """By which both sides of a pair compare: nobody who writes to the disk knows it."""
        pair = self.record.pair
        return b"" if pair is None else pair.encode()

    @property
    def is_shared(self) -> bool:
        """Whether the present generation may be the peer's, too: before a write that the peer does
        not get, `step`."""
        record = self.record
        return record.lineage is not None and record.lineage.generation == record.common

    async def step(self) -> None:
        """The disk goes on alone from here."""
        await self._update(lineage=self._next(new_name()))

    async def begin_taking_over(self, generation: str) -> None:
        """A failover is about to happen, which gives the disk a generation of its own."""
        await self._update(lineage=self._next(generation), taking_over=True)

    async def end_taking_over(self, *, happened: bool) -> None:
        """It has happened, or has not after all."""
        record = self.record
        if happened:
            await self._update(taking_over=False, role=Role.PRIMARY, syncing=False)
        elif record.taking_over:
            assert record.lineage is not None
            before = record.lineage.ancestors[0] if record.lineage.ancestors else None
            lineage = record.lineage.back_to(before) if before is not None else None
            await self._update(lineage=lineage, taking_over=False)

    def _next(self, generation: str) -> Lineage:
        lineage = self.record.lineage
        return Lineage(generation) if lineage is None else lineage.step(generation)

    async def retract(self) -> None:
        """Give up what this disk took on alone: whoever was in step with it may overwrite it. What
        it has marked says where."""
        record = self.record
        lineage = record.lineage
        if lineage is not None:
            lineage = lineage.back_to(record.common) if record.common is not None else None
        await self._update(
            lineage=lineage, role=Role.STANDBY, to=None, taking_over=False, retracting=False
        )

    async def begin_retracting(self) -> None:
        """A reset is about to happen: `retract`, once it has."""
        await self._update(retracting=True)

    async def end_retracting(self, *, happened: bool) -> None:
        """It has happened, or has not after all."""
        if happened:
            await self.retract()
        else:
            await self._update(retracting=False)

    async def forget(self) -> None:
        """Whatever the disk was a copy of: it is nobody's now."""
        await self._update(
            lineage=None, common=None, pair=None, foreign=None, syncing=False, taking_over=False
        )

    async def begin_pair(self, foreign: str | None) -> None:
        """As a source: everything is to be compared with a target, of a pair from now on."""
        await self.map.mark_everything()
        lineage = self.record.lineage or Lineage(new_name())
        await self._update(lineage=lineage, pair=new_name(), foreign=foreign)

    async def begin_following(self, pair: str) -> None:
        """As a target: the source writes from now on what makes this its copy."""
        another = pair != self.record.pair
        await self._update(pair=pair, syncing=True, role=Role.STANDBY)
        if another:
            await self.map.clear_everything()  # at the source, everything is marked

    async def end_following(self, lineage: Lineage) -> None:
        """As a target: this is a copy of a disk of that lineage."""
        await self._update(lineage=lineage, common=lineage.generation, syncing=False)
        await self.map.clear_everything()

    async def in_step(self) -> Lineage:
        """As a source: the target is a copy of this, and about to be told so. Returns what it is to
        be told."""
        lineage = self.record.lineage
        assert lineage is not None
        if self.record.common != lineage.generation:
            await self._update(common=lineage.generation)
        return lineage

    async def demote(self) -> None:
        """A primary's: this is a standby's from now on."""
        await self._update(stage=Stage.NONE, role=Role.STANDBY)

    async def set_stage(self, stage: Stage) -> None:
        """Where a primary stands."""
        await self._update(stage=stage)

    async def end_as_standby(self) -> None:
        """A standby that took over, and sends its writes since, is opened as a primary: it goes
        on."""
        await self._update(stage=Stage.RUNNING, to=None)

    async def set_target(self, to: str | None) -> None:
        """Where a standby that has taken over sends its writes."""
        await self._update(to=to)

    async def close(self) -> None:
        """The disk has been flushed and closed: an orderly end. OSError; closed even then."""
        try:
            await self._records.file.flush()
            await self._update(orderly=True)
        finally:
            await self.abandon()

    async def abandon(self) -> None:
        """Close the file, without a word of how the disk has ended."""
        await self._records.close()

    async def _update(self, **changes: object) -> None:
        async with self._lock:
            record = msgspec.structs.replace(self.record, **changes)
            await self._records.write(record, durable=True)
            self.record = record
