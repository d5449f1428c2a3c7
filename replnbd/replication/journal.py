"""Journal: what a group is, in a file (record_file.py), so that the next process goes on where the
last one ended.

Laws.
1. A command is recorded before it changes what a crash must find again; it has happened once its
   record is there. What it empties is named in the record (`emptying`): whoever finds that ends it.
2. Nobody is served before the record says what is (`emptying` is empty again).
3. No request of a client causes a store here.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from replnbd.block import BlockNode
from replnbd.replication.record_file import RecordFile
from replnbd.replication.stage import Stage

_MAGIC = b"replnbdJ"


class Layer(StrEnum):
    """An overlay of a disk."""

    ACTIVE = "active"
    HIDDEN = "hidden"


class FailoverTarget(StrEnum):
    """What a failover makes of the disk: a standby has three states worth having."""

    STANDBY = "standby"
    """The last checkpoint and the standby's own writes since: what the seed does."""
    CHECKPOINT = "checkpoint"
    """The last checkpoint alone."""
    LATEST = "latest"
    """Every write of the primary."""


class Durability(StrEnum):
    """What of a view survives."""

    PROCESS = "process"
    """The death of the process loses nothing; after a power failure the view is lost."""
    POWER = "power"
    """A power failure does not lose the view, either."""


class FileStamp(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """What tells whether a file was changed while nobody had it open. Bytes, and nanoseconds."""

    size: int
    mtime_ns: int


class DiskRecord(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """One disk; the members are those of StandbyDisk."""

    name: str
    top_id: str
    size: int
    durability: Durability = Durability.PROCESS
    """With which the overlays were written."""
    overlays: dict[Layer, str] | None = None
    """Their identities (Header.identity)."""
    stage: Stage = Stage.NONE
    promoted: bool = False
    target: FailoverTarget = FailoverTarget.STANDBY
    lost: str | None = None
    error: str | None = None
    checkpoint_count: int = 0
    checkpoint_time: float | None = None
    emptying: list[Layer] = []
    """What the command under way empties."""


class Record(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """A whole group."""

    generation: str
    """Another one after every failover: 32 hexadecimal digits."""
    boot: str
    """Of the system that the files are in use on (/proc/sys/kernel/random/boot_id)."""
    files: dict[str, FileStamp] | None = None
    """By path, after an orderly end; None while a process has them."""
    torn: bool = False
    """A checkpoint has reached some disks and not others."""
    disks: list[DiskRecord]


class Journal(RecordFile[Record]):
    """The journal in `file`, which this owns. `load` comes first."""

    def __init__(self, file: BlockNode) -> None:
        super().__init__(file, Record, _MAGIC, "journal")
