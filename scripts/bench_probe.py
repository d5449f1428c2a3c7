"""A small client that never pauses, to see how long a server leaves it waiting.

Run as a process of its own, it alternates 4 KiB reads of the view and writes to the disk, one at a
time, until its standard input ends, and then prints every reply that took longer than a
millisecond: [when the request went out, how long it took], in seconds of the monotonic clock.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from bench_servers import Server
from nbd_client import NbdClient

REQUEST_SIZE = 4096  # bytes
BLOCK = bytes(range(256)) * (REQUEST_SIZE // 256)
BETWEEN_LOOKS = 16  # at standard input
LONG_S = 0.001
WRITES_SIZE = 1 << 20  # bytes at the end of the disk that the writes go to


class Probe:
    """The client, as a context manager that starts and ends it."""

    def __init__(self, server: Server) -> None:
        command = [sys.executable, __file__, str(server.socket)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.waits: list[tuple[float, float]] = []
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit(f"the probe cannot work on {server.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        output, _ = self._process.communicate()
        self.waits = json.loads(output)

    def longest_s(self, begin: float, end: float) -> float:
        """The longest wait that was not over by `begin` and had begun by `end`; 0: none is long."""
        waits = [wait for sent, wait in self.waits if sent + wait >= begin and sent <= end]
        return max(waits, default=0.0)


def main() -> None:
    """Read and write until standard input ends, or the server does."""
    waits: list[tuple[float, float]] = []
    try:
        with NbdClient(sys.argv[1], "view") as view, NbdClient(sys.argv[1], "disk") as disk:
            print("ready", flush=True)
            while not select.select([sys.stdin], [], [], 0)[0]:
                for _ in range(BETWEEN_LOOKS):
                    alternate(view, disk, waits)
    except OSError:
        pass  # the bench sees for itself that the server has ended
    print(json.dumps(waits))


def alternate(view: NbdClient, disk: NbdClient, waits: list[tuple[float, float]]) -> None:
    """One read and one write."""
    sent = time.monotonic()
    view.read(random.randrange(view.size // REQUEST_SIZE) * REQUEST_SIZE, REQUEST_SIZE)
    between = time.monotonic()
    back = random.randrange(1, WRITES_SIZE // REQUEST_SIZE) * REQUEST_SIZE
    disk.write(disk.size - back, BLOCK)
    done = time.monotonic()
    for begin, end in ((sent, between), (between, done)):
        if end - begin > LONG_S:
            waits.append((begin, end - begin))


if __name__ == "__main__":
    main()
