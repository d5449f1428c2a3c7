"""Rounds of kill -9 of a real daemon with two disks, under load: what was acknowledged is there
afterwards, byte for byte, and a checkpoint has happened on both disks or on none."""

from __future__ import annotations

import random
import time
from pathlib import Path

from daemon_support import SIZE, Setup, pattern
from peers import qemu_img, wait_until
from writers import Writer

CHECKPOINT_S = 0.004
"""What one takes at most, on a calm machine."""


class Kills:
    """Two disks that replicate, and what must be on them. AssertionError where it is not."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.setup = Setup(folder, "a", "b")
        self.disks = [pattern(1), pattern(1)]
        self.views = [pattern(1), pattern(1)]
        with self.setup.serve() as running:
            running.start()
            running.process.kill()

    def kill_under_load(self) -> None:
        """A writer on each export; then all bytes are compared, and the images by QEMU."""
        rng = self.rng
        with self.setup.serve() as running:
            status = running.qmp.execute("x-replnbd-status")
            assert status["recovered-from"] == "process death"
            writers = [
                Writer(running.connect(name + suffix), rng.randrange(1 << 30), SIZE)
                for name in "ab"
                for suffix in ("", "-top")
            ]
            for writer in writers:
                writer.start()
            wait_until(lambda: min(w.count for w in writers) > 5, "writes")
            count = rng.randrange(200)
            wait_until(lambda: writers[0].count > count, "more writes")
            running.process.kill()
            for writer in writers:
                writer.ended()
        self._check_images((0, 3))  # leaks, until somebody gives them back
        with self.setup.serve() as running:
            self._check_images((0,))
            for number, name in enumerate("ab"):
                primary, standby = writers[2 * number : 2 * number + 2]
                disk = bytes(running.connect(name).pread(0, SIZE))
                view = bytes(running.connect(f"{name}-top").pread(0, SIZE))
                assert primary.is_in(disk, self.disks[number])
                assert standby.is_in(view, self.views[number])
                self.disks[number], self.views[number] = disk, view
            if rng.random() < 0.5:
                running.checkpoint()
                self.views = list(self.disks)
            running.process.kill()

    def kill_in_a_checkpoint(self) -> None:
        """All that both disks show afterwards is of one and the same checkpoint."""
        rng = self.rng
        data = rng.randbytes(512)
        with self.setup.serve() as running:
            before = running.disk()["checkpoints"]
            for number, name in enumerate("ab"):
                offset = rng.randrange(SIZE // 512) * 512
                running.connect(name).pwrite(offset, data)
                disk = self.disks[number]
                self.disks[number] = disk[:offset] + data + disk[offset + 512 :]
            running.qmp.send(("xen-colo-do-checkpoint", None))
            time.sleep(rng.choice([0, rng.random() * CHECKPOINT_S]))
            running.process.kill()
        with self.setup.serve() as running:
            (count,) = {running.disk(number)["checkpoints"] for number in (0, 1)}
            assert count in (before, before + 1)
            if count > before:
                self.views = list(self.disks)
            for number, name in enumerate("ab"):
                assert running.connect(name).pread(0, SIZE) == self.disks[number]
                assert running.connect(f"{name}-top").pread(0, SIZE) == self.views[number]
            running.process.kill()

    def _check_images(self, statuses: tuple[int, ...]) -> None:
        for disk in (0, 1):
            for key in ("hidden", "active"):
                path = self.setup.path(key, disk)
                qemu_img("check", "-U", "-q", "-f", "qcow2", path, statuses=statuses)
