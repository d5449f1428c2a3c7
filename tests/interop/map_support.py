"""Maps: what BLOCK_STATUS must say of a disk after a history that a model followed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from peers import Libnbd
from peers.nbd_wire import FUA, NO_HOLE

SUBCLUSTER = 2048
"""In which the overlays keep what they have: 1/32 of a cluster of 64 KiB."""

ACTIVE, HIDDEN, SECONDARY = 1, 2, 3
"""The layers of the view, from the top, in qemu:allocation-depth."""

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
