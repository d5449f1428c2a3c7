"""Maps: what BLOCK_STATUS must say of a disk after a history that a model followed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from libnbd_support import BLOCK
from peers import Libnbd
from peers.nbd_wire import FUA, NO_HOLE

SUBCLUSTER = 2048
"""In which the overlays keep what they have: 1/32 of a cluster of 64 KiB."""

ACTIVE, HIDDEN, SECONDARY = 1, 2, 3
"""The layers of the view, from the top, in qemu:allocation-depth."""

DATA, HOLE = 0, 3
"""In base:allocation; a hole is one of zeroes."""

Map = list[tuple[int, int]]
"""(length, status) of runs, neighbours different."""


def as_map(states: Iterable[int], size: int, unit: int = SUBCLUSTER) -> Map:
    """The states of a disk's units, one after the other, as runs."""
    runs: Map = []
    for start, state in zip(range(0, size, unit), states, strict=True):
        length = min(unit, size - start)
        if runs and runs[-1][1] == state:
            runs[-1] = (runs[-1][0] + length, state)
        else:
            runs.append((length, state))
    return runs


def as_states(found: Map, unit: int = 512) -> list[int]:
    """The other way; every run must be of whole units, but for the disk's end."""
    states: list[int] = []
    for number, (length, state) in enumerate(found):
        assert length % unit == 0 or number == len(found) - 1, (length, unit)
        states += [state] * -(-length // unit)
    return states


@dataclass
class Changes:
    """What was done to a disk since the last checkpoint, by units: `touched` at all, and `written`
    for certain (zeroes where zeroes were need no old data)."""

    before: bytes
    touched: bytearray
    written: bytearray

    @classmethod
    def of(cls, content: bytes | bytearray, unit: int = SUBCLUSTER) -> Changes:
        """None so far, to a disk with this content."""
        count = -(-len(content) // unit)
        return cls(bytes(content), bytearray(count), bytearray(count))

    def note(self, offset: int, length: int, *, zeroes: bool, unit: int = SUBCLUSTER) -> None:
        """A range was written, or made zeroes."""
        for at in range(offset // unit, -(-(offset + length) // unit)):
            self.touched[at] = 1
            changed = range(max(at * unit, offset), min((at + 1) * unit, offset + length))
            if not zeroes or any(self.before[changed.start : changed.stop]):
                self.written[at] = 1


def change(
    rng: random.Random, client: Libnbd, content: bytearray, changes: Changes, count: int,
    *, zeroes: bool = True,
) -> None:  # fmt: skip
    """Random writes, zeroes and trims through `client`, noted in `content` and `changes`."""
    for _ in range(count):
        offset = rng.randrange(len(content))
        length = min(rng.randint(1, rng.choice([512, 5000, 100_000])), len(content) - offset)
        data = bytes(length)
        match rng.choice(["write", "zero", "zero, no hole", "trim"] if zeroes else ["write"]):
            case "write":
                data = rng.randbytes(length)
                client.pwrite(data, offset, rng.choice([0, FUA]))
            case "zero":
                client.zero(length, offset)
            case "zero, no hole":
                client.zero(length, offset, NO_HOLE)
            case "trim":
                client.trim(length, offset)
        changes.note(offset, length, zeroes=not any(data))
        content[offset : offset + length] = data


def depths(primary: Iterable[int], view: Iterable[int]) -> list[int]:
    """qemu:allocation-depth of the view: who wrote last decides."""
    return [
        ACTIVE if above else HIDDEN if below else SECONDARY
        for below, above in zip(primary, view, strict=True)
    ]


class Layers:
    """What is in which layer of a sparse raw disk that is replicated, by subclusters: DATA or HOLE.

    Zeroes and trims must be of whole blocks of the file system; that an old hole becomes one again
    is no change.
    """

    def __init__(self, content: bytes | bytearray) -> None:
        self.size = len(content)
        blocks = [any(content[at : at + BLOCK]) for at in range(0, self.size, BLOCK)]
        count = -(-self.size // SUBCLUSTER)
        self.disk = [DATA if blocks[at * SUBCLUSTER // BLOCK] else HOLE for at in range(count)]
        self.hidden: dict[int, int] = {}
        self.active: dict[int, int] = {}

    def checkpoint(self) -> None:
        """Both overlays become empty."""
        self.hidden.clear()
        self.active.clear()

    def primary_writes(self, offset: int, length: int) -> None:
        """Old data goes to the hidden overlay, as bytes if it was a hole; whole blocks of the file
        become data."""
        for at in self._units(offset, length):
            self.hidden.setdefault(at, DATA)
        for at in self._units(offset // BLOCK * BLOCK, length + offset % BLOCK, BLOCK):
            self.disk[at] = DATA

    def primary_zeroes(self, offset: int, length: int) -> None:
        """Or trims."""
        for at in self._units(offset, length):
            if self.disk[at] == DATA:
                self.hidden.setdefault(at, DATA)
            self.disk[at] = HOLE

    def standby_writes(self, offset: int, length: int) -> None:
        """To the active overlay."""
        self.active.update(dict.fromkeys(self._units(offset, length), DATA))

    def standby_zeroes(self, offset: int, length: int) -> None:
        """Or trims."""
        self.active.update(dict.fromkeys(self._units(offset, length), HOLE))

    def _units(self, offset: int, length: int, unit: int = SUBCLUSTER) -> range:
        end = min(-(-(offset + length) // unit) * unit, self.size)
        return range(offset // SUBCLUSTER, -(-end // SUBCLUSTER))

    def disk_map(self) -> Map:
        """base:allocation of the secondary disk."""
        return as_map(self.disk, self.size)

    def view_map(self) -> Map:
        """base:allocation of the view."""
        return as_map(
            ({**dict(enumerate(self.disk)), **self.hidden, **self.active}).values(), self.size
        )

    def depth_map(self) -> Map:
        """qemu:allocation-depth of the view."""
        count = len(self.disk)
        states = depths(
            *([at in layer for at in range(count)] for layer in (self.hidden, self.active))
        )
        return as_map(states, self.size)

    def dirty_map(self, layer: dict[int, int]) -> Map:
        """qemu:dirty-bitmap:checkpoint of the export whose changes are in an overlay."""
        return as_map((int(at in layer) for at in range(len(self.disk))), self.size)
