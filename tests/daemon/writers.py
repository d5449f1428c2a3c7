"""A client that writes until it is cut off, and knows what must be on the disk then."""

from __future__ import annotations

import random
import threading

from peers import NbdClient

WRITE = 512


class Writer(threading.Thread):
    """Writes 512 bytes to random places, one request at a time. `part`: only to the places whose
    number leaves that remainder when divided by 3, so that three writers never meet."""

    def __init__(self, client: NbdClient, seed: int, size: int, *, part: int | None = None) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.count = 0
        self.acknowledged: dict[int, bytes] = {}
        self.unanswered: dict[int, bytes] = {}
        """Sent when the connection ended: may be there or not."""
        self._rng = random.Random(seed)
        self._places = size // WRITE
        self._part = part
        self._stopping = False

    def run(self) -> None:
        """Write until `stop`, or until the connection ends."""
        try:
            while not self._stopping:
                place = self._rng.randrange(self._places)
                if self._part is not None:
                    place = min(place - place % 3 + self._part, self._places - 1)
                    if place % 3 != self._part:
                        continue
                data = self._rng.randbytes(WRITE)
                self.unanswered = {place * WRITE: data}
                self.client.pwrite(place * WRITE, data)
                self.acknowledged |= self.unanswered
                self.unanswered = {}
                self.count += 1
        except OSError:
            pass
        self.client.close()

    def stop(self) -> None:
        """End after the write under way."""
        self._stopping = True
        self.ended()

    def ended(self) -> None:
        """Wait until it has ended."""
        self.join(10)
        assert not self.is_alive()

    def applied_to(self, before: bytes) -> bytes:
        """`before` with everything that was acknowledged."""
        expected = bytearray(before)
        for offset, data in self.acknowledged.items():
            expected[offset : offset + WRITE] = data
        return bytes(expected)

    def is_in(self, found: bytes, before: bytes) -> bool:
        """Whether `found` is `before` and everything acknowledged, and nothing else."""
        expected = bytearray(self.applied_to(before))
        for offset, data in self.unanswered.items():
            if found[offset : offset + WRITE] == data:
                expected[offset : offset + WRITE] = data
        return found == expected
