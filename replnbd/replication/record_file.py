"""RecordFile: one record, in a file, that is found again whole after any death.

The file has four slots. A record is whole or it is nothing, by its checksum, and the newest whole
one counts. Durable records take turns in the slots 0 and 1, all others in 2 and 3. So a store that
is cut short leaves the record before it, if the process died; and if the host did, the last durable
one at least. Integers are big-endian:

    0    8 bytes   what the file is: "replnbdJ" or the like
    8    u32       format of the payload: 1
    12   u32       length of the payload
    16   u64       sequence number: of two whole records, the higher one counts
    24   32 bytes  BLAKE2b of the 24 bytes before it and the payload
    56             the payload: the record as JSON
"""

from __future__ import annotations

import asyncio
import struct
from hashlib import blake2b
from typing import Generic, TypeVar

import msgspec

from replnbd.block import BlockNode, read_bytes
from replnbd.errors import ImageError

SLOT_BYTES = 64 << 10
"""Room for more than a hundred disks."""
FILE_BYTES = 4 * SLOT_BYTES

_FORMAT = 1
_HEAD = struct.Struct(">8sIIQ")
_DIGEST_SIZE = 32
_PAYLOAD = _HEAD.size + _DIGEST_SIZE
PAYLOAD_BYTES_MAX = SLOT_BYTES - _PAYLOAD

R = TypeVar("R", bound=msgspec.Struct)


class RecordFile(Generic[R]):
    """A record of `kind` in `file`, which this owns; `magic` and `what` say what the file is.
    `load` comes first."""

    def __init__(self, file: BlockNode, kind: type[R], magic: bytes, what: str) -> None:
        self.file = file
        self._kind = kind
        self._magic = magic
        self._what = what
        self._sequence = 0
        self._newest = {True: 1, False: 3}
        """Which slots have the newest records: a durable one, and one that is not."""
        self._lock = asyncio.Lock()

    async def load(self) -> R | None:
        """The newest record; None in a file that never had one.

        Raises ImageError if the file is none of ours, or damaged, and OSError if it is unreadable.
        """
        found: list[tuple[int, R]] = []
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
            text = f"no record in it is whole: the {self._what} is damaged"
            raise ImageError(f"{self._path}: {text}")
        self._sequence, record = max(found, key=lambda each: each[0])
        return record

    async def write(self, record: R, *, durable: bool) -> None:
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
            head = _HEAD.pack(self._magic, _FORMAT, len(payload), self._sequence)
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

    async def _decode(self, slot: int, head: bytes) -> R | None:
        magic, version, length, _ = _HEAD.unpack_from(head)
        if magic != self._magic or length > PAYLOAD_BYTES_MAX:
            return None
        payload = bytes(await read_bytes(self.file, slot * SLOT_BYTES + _PAYLOAD, length))
        if head[_HEAD.size :] != _digest(head[: _HEAD.size], payload):
            return None
        if version != _FORMAT:
            raise ImageError(
                f"{self._path}: format {version} of a later replnbd; this one knows {_FORMAT}"
            )
        try:
            return msgspec.json.decode(payload, type=self._kind)
        except msgspec.ValidationError as exc:
            raise ImageError(f"{self._path}: not what a replnbd writes: {exc}") from exc


def _digest(head: bytes, payload: bytes) -> bytes:
    return blake2b(head + payload, digest_size=_DIGEST_SIZE).digest()
