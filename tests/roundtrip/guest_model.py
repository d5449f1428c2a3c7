"""What must be on a disk: a client that writes it as a VM does, and knows what was acknowledged."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable

from peers import NbdClient, NbdReplyError

SECTOR = 512
LONGEST = 200_000
SLOT = 256 << 10

Write = tuple[int, bytes]


class Content:
    """A disk's bytes, as far as they are known: what was not acknowledged when its connection
    ended has happened or not, sector by sector."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.unsure: list[Write] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def apply(self, write: Write) -> None:
        """It was acknowledged."""
        offset, data = write
        self.data[offset : offset + len(data)] = data

    def settle(self, found: bytes | bytearray, what: str) -> None:
        """`found` is what the disk has: AssertionError if it cannot be."""
        touched: dict[int, list[Write]] = {}
        for offset, new in self.unsure:
            for at in range(offset - offset % SECTOR, offset + len(new), SECTOR):
                touched.setdefault(at, []).append((offset, new))
        for at, writes in touched.items():
            sector = bytes(found[at : at + SECTOR])
            # Several may share a sector, each with bytes of its own: any of them have happened.
            for some in range(1 << len(writes)):
                chosen = [write for number, write in enumerate(writes) if some >> number & 1]
                if self._sector_with(at, chosen) == sector:
                    self.data[at : at + SECTOR] = sector
                    break
        self.unsure = []
        check_equal(found, self.data, what)

    def _sector_with(self, at: int, writes: list[Write]) -> bytes:
        sector = bytearray(self.data[at : at + SECTOR])
        for offset, new in writes:
            start, stop = max(offset, at), min(offset + len(new), at + len(sector))
            sector[start - at : stop - at] = new[start - offset : stop - offset]
        return bytes(sector)


def check_equal(found: bytes | bytearray, expected: bytes | bytearray, what: str) -> None:
    """AssertionError, with the places, if two disks differ."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{what}: {len(found)} bytes, not {len(expected)}"
    wrong = [
        at
        for at in range(0, len(expected), SECTOR)
        if found[at : at + SECTOR] != expected[at : at + SECTOR]
    ]
    runs: list[list[int]] = []
    for at in wrong:
        if runs and runs[-1][1] == at:
            runs[-1][1] = at + SECTOR
        else:
            runs.append([at, at + SECTOR])
    places = ", ".join(f"{start:#x}-{end:#x}" for start, end in runs[:6])
    raise AssertionError(f"{what}: {len(wrong)} sectors are wrong: {places}")


class Guest(threading.Thread):
    """Writes to a disk through `connect`'s client until it is told to stop or its connection ends:
    overlapping and unaligned writes, several in flight, zeroes, trims, flushes."""

    def __init__(self, connect: Callable[[], NbdClient], content: Content, seed: int) -> None:
        super().__init__(daemon=True)
        self.content = content
        self.count = 0
        """Requests that were acknowledged."""
        self.failure: BaseException | None = None
        """What no client may ever see."""
        self.expects_shutdown = False
        """Whether its server is about to end in order, and may say so."""
        self._client = connect()
        self._rng = random.Random(seed)
        self._stopping = False
        self.turn = threading.Lock()
        """Whoever has it keeps the guest from its next request."""

    def run(self) -> None:
        """See the class."""
        try:
            while not self._stopping:
                with self.turn:
                    self._one()
                    self.count += 1
                time.sleep(self._rng.choice([0, 0, 0.0005, 0.002]))
        except NbdReplyError as exc:
            if not (self.expects_shutdown and exc.errno == errno.ESHUTDOWN):
                self.failure = exc
        except OSError:
            pass
        except BaseException as exc:
            self.failure = exc
        self._client.close()

    def stop(self) -> None:
        """End after the request under way."""
        self._stopping = True
        self.ended()

    def ended(self) -> None:
        """Wait until it has ended, and see how."""
        self.join(30)
        assert not self.is_alive()
        assert self.failure is None, f"a client was told {self.failure!r}"

    def _one(self) -> None:
        rng, client = self._rng, self._client
        kind = rng.choice(["write"] * 6 + ["several"] * 3 + ["zero"] * 2 + ["trim", "flush"])
        offset, length = self._place()
        if kind == "flush":
            client.flush()
        elif kind == "several":
            self._several()
        elif kind == "write":
            data = rng.randbytes(length)
            self._do([(offset, data)], lambda: client.pwrite(offset, data))
        else:
            call = client.write_zeroes if kind == "zero" else client.trim
            self._do([(offset, bytes(length))], lambda: call(offset, length))

    def _place(self) -> tuple[int, int]:
        rng = self._rng
        length = rng.choice([rng.randint(1, 5000), rng.randint(1, LONGEST), 4096, 65536])
        offset = rng.randrange(self.content.size - length + 1)
        if rng.random() < 0.3:  # a place that is written again and again
            offset %= max(1, min(1 << 20, self.content.size - length + 1))
        return (offset - offset % 4096 if rng.random() < 0.4 else offset), length

    def _several(self) -> None:
        """Each in a place of its own: what comes last of overlapping ones is nobody's to say."""
        rng = self._rng
        slots = rng.sample(range(self.content.size // SLOT), rng.randint(2, 12))
        writes = []
        for slot in slots:
            length = rng.randint(1, rng.choice([4096, SLOT // 2]))
            writes.append((slot * SLOT + rng.randrange(SLOT // 2), rng.randbytes(length)))
        self._do(writes, lambda: self._client.finish(self._client.send_writes(writes)))

    def _do(self, writes: list[Write], do: Callable[[], None]) -> None:
        self.content.unsure = writes
        do()
        for write in writes:
            self.content.apply(write)
        self.content.unsure = []
