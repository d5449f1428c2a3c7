"""A proxy between NBD clients and a server on unix sockets that counts what travels each way."""

from __future__ import annotations

from pathlib import Path

from peers.proxy import Proxy, Traffic


class CountingProxy(Proxy):
    """Listens at `path`, and changes nothing."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._counted = Traffic(0, 0)
        super().__init__(path, target)

    def count(self) -> Traffic:
        """Since the last time, or the start; waits until the clients are gone, and what they sent
        is counted."""
        self.wait_hung_up()
        counted, self._counted = self._counted, self.received
        return Traffic(*(now - then for now, then in zip(self._counted, counted, strict=True)))
