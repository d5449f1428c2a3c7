"""The floor: the preads and pwrites that a cell cannot do without, in a plain loop, no protocol.

No server that keeps this state in files on this file system can be faster than what is below it.
A first touch saves the old data (primary), writes it to an overlay, stores the mapping (16 bytes
per cluster, an extended L2 entry), and, for the primary, overwrites the disk. There are two kinds
of space in the overlay: `floor` writes where the file has been written before, as an overlay that
is used again after a checkpoint; `floor-fresh` grows a new file.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from bench_load import CLUSTER_SIZE, SEED, Run, Shape

L2_ENTRY_SIZE = 16  # bytes
TIMED_S = 0.5  # there is no start-up to even out
# Bytes per write of a fill. The page cache keeps what one call wrote in one folio, and on ext4 a
# later small write walks all of it: 33 µs for 4 KiB after pieces of 1 MiB, 4 µs after these.
FILL_SIZE = 64 << 10


class Floor:
    """Files of a standby, without a server."""

    name = "floor"

    def __init__(self, directory: Path, size: int) -> None:
        directory.mkdir()
        self.size = size
        self._overlay_path = directory / "overlay"
        self._disk = os.open(directory / "disk.raw", os.O_RDWR | os.O_CREAT)
        self._overlay = os.open(self._overlay_path, os.O_RDWR | os.O_CREAT)
        self._mapping = os.open(directory / "mapping", os.O_RDWR | os.O_CREAT)
        os.truncate(self._mapping, size // CLUSTER_SIZE * L2_ENTRY_SIZE)
        block = random.Random(SEED).randbytes(FILL_SIZE)
        for offset in range(0, size, len(block)):
            os.pwrite(self._disk, block, offset)
            os.pwrite(self._overlay, block, offset)

    def close(self) -> None:
        """Close the files; they stay."""
        for fd in (self._disk, self._overlay, self._mapping):
            os.close(fd)

    def timed(self, pattern: str, shape: Shape) -> Run:
        """Random requests where everything is mapped: one read or one write each."""
        data = random.Random(SEED).randbytes(shape.size)
        buffers = [bytearray(shape.size)]
        units = self.size // shape.size
        places = [random.randrange(units) * shape.size for _ in range(4096)]
        # Of a mix, fio sends 70 % reads.
        reads = {"randread": 10, "randrw": 7, "randwrite": 0}[pattern]
        done = 0
        begin, used = time.monotonic(), time.process_time()
        while (passed := time.monotonic() - begin) < TIMED_S:
            for index in range(64):
                place = places[(done + index) & 4095]
                if index % 10 < reads:
                    os.preadv(self._disk, buffers, place)
                else:
                    os.pwrite(self._disk, data, place)
            done += 64
        return Run(done / passed, None, (time.process_time() - used) / done * 1e6)

    def touch(self, export: str, shape: Shape, count: int, *, fresh: bool) -> Run:
        """First touches, all to different clusters, in random order."""
        if fresh:
            os.ftruncate(self._overlay, 0)
        unit = max(shape.size, CLUSTER_SIZE)
        entries = bytes(unit // CLUSTER_SIZE * L2_ENTRY_SIZE)
        places = random.Random(SEED).sample(range(self.size // unit), count)
        data = random.Random(SEED).randbytes(shape.size)
        old = bytearray(shape.size)
        buffers = [old]
        disk, overlay, mapping = self._disk, self._overlay, self._mapping
        begin, used = time.monotonic(), time.process_time()
        for number, place in enumerate(places):
            if export == "disk":
                os.preadv(disk, buffers, place * unit)
                os.pwrite(overlay, old, number * unit)
                os.pwrite(mapping, entries, place * len(entries))
                os.pwrite(disk, data, place * unit)
            else:
                os.pwrite(overlay, data, number * unit)
                os.pwrite(mapping, entries, place * len(entries))
        passed, used = time.monotonic() - begin, time.process_time() - used
        if fresh:  # the other kind of space again
            block = bytes(CLUSTER_SIZE)
            for offset in range(0, self.size, CLUSTER_SIZE):
                os.pwrite(overlay, block, offset)
        return Run(count / passed, None, used / count * 1e6)
