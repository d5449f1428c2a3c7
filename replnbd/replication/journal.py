"""Journal: what a group is, in a file, so that the next process goes on where the last one ended.

The file has four slots. A record is whole or it is nothing, by its checksum, and the newest whole
one counts. Durable records take turns in the slots 0 and 1, all others in 2 and 3. So a store that
is cut short leaves the record before it, if the process died; and if the host did, the last durable
one at least. Integers are big-endian:

    0    8 bytes   "replnbdJ"
    8    u32       format of the payload: 1
    12   u32       length of the payload
    16   u64       sequence number: of two whole records, the higher one counts
    24   32 bytes  BLAKE2b of the 24 bytes before it and the payload
    56             the payload: Record as JSON

Laws.
1. A command is recorded before it changes what a crash must find again; it has happened once its
   record is there. What it empties is named in the record (`emptying`): whoever finds that ends it.
2. Nobody is served before the record says what is (`emptying` is empty again).
3. No request of a client causes a store here.
"""

from __future__ import annotations

import asyncio
import struct
from enum import StrEnum
from hashlib import blake2b

import msgspec

from replnbd.block import BlockNode, read_bytes
from replnbd.errors import ImageError
from replnbd.replication.stage import Stage

SLOT_BYTES = 64 << 10
"""Room for more than a hundred disks."""
FILE_BYTES = 4 * SLOT_BYTES

_MAGIC = b"replnbdJ"
_FORMAT = 1
_HEAD = struct.Struct(">8sIIQ")
_DIGEST_SIZE = 32
_PAYLOAD = _HEAD.size + _DIGEST_SIZE
PAYLOAD_BYTES_MAX = SLOT_BYTES - _PAYLOAD


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


class Journal:
    """The journal in `file`, which this owns. `load` comes first."""

    def __init__(self, file: BlockNode) -> None:
        self.file = file
        self._sequence = 0
        self._newest = {True: 1, False: 3}
        """Which slots have the newest records: a durable one, and one that is not."""
        self._lock = asyncio.Lock()

    async def load(self) -> Record | None:
        """The newest record; None in a file that never had one.

        Raises ImageError if the file is no journal, or damaged, and OSError if it cannot be read.
        """
        found: list[tuple[int, Record]] = []
        blank = True
        newest = dict.fromkeys(self._newest, -1)
        for slot in range(4):
            head = bytes(await read_bytes(self.file, slot * SLOT_BYTES, _PAYLOAD))
            # The first record goes to the slot 0, and is there before anything depends on it.
            blank = blank and (slot == 0 or not any(head))
            record = await self._decode(slot, head)
            if record is not None:
                sequence = _HEAD.unpack_from(head)[3]
                found.append((sequence, record))
                if sequence > newest[slot < 2]:
                    newest[slot < 2] = sequence
                    self._newest[slot < 2] = slot
        if not found:
            if blank:
                return None
            raise ImageError(f"{self._path}: no record in it is whole: the journal is damaged")
        self._sequence, record = max(found, key=lambda each: each[0])
        return record

    async def write(self, record: Record, *, durable: bool) -> None:
        """Make `record` the newest; `durable`: a power failure does not undo that.

        If OSError is raised, the newest one is this or the one before it.
        """
        payload = msgspec.json.encode(record)
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise ImageError(
                f"{self._path}: a record of {len(payload)} bytes, more than {PAYLOAD_BYTES_MAX}"
            )
        async with self._lock:
            # Whatever comes of it, this number is used up.
            self._sequence += 1
            head = _HEAD.pack(_MAGIC, _FORMAT, len(payload), self._sequence)
            data = b"".join((head, _digest(head, payload), payload))
            slot = self._newest[durable] ^ 1
            if durable:
                await self.file.pwrite_fua(slot * SLOT_BYTES, data)
            else:
                await self.file.pwrite(slot * SLOT_BYTES, data)
            self._newest[durable] = slot

    async def close(self) -> None:
        """Close the file."""
        await self.file.close()

    @property
    def _path(self) -> str:
        return str(getattr(self.file, "path", self.file.name))

    async def _decode(self, slot: int, head: bytes) -> Record | None:
        magic, version, length, _ = _HEAD.unpack_from(head)
        if magic != _MAGIC or length > PAYLOAD_BYTES_MAX:
            return None
        payload = bytes(await read_bytes(self.file, slot * SLOT_BYTES + _PAYLOAD, length))
        if head[_HEAD.size :] != _digest(head[: _HEAD.size], payload):
            return None
        if version != _FORMAT:
            raise ImageError(
                f"{self._path}: format {version} of a later replnbd; this one knows {_FORMAT}"
            )
        try:
            return msgspec.json.decode(payload, type=Record)
        except msgspec.ValidationError as exc:
            raise ImageError(f"{self._path}: not what a replnbd writes: {exc}") from exc


def _digest(head: bytes, payload: bytes) -> bytes:
    return blake2b(head + payload, digest_size=_DIGEST_SIZE).digest()
