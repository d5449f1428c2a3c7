"""A peer that runs and is driven over QMP; it does not outlive the block that it is used in."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from peers.process import PeerError, Process
from peers.qmp_client import QmpClient


class Daemon:
    """`process` and `qmp` are set by who starts it."""

    process: Process
    qmp: QmpClient

    def quit(self) -> None:
        """An orderly end: SIGTERM, and exit status 0."""
        self.qmp.close()
        status = self.process.terminate()
        if status:
            raise PeerError(self.process.failure(f"ended with {status}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.qmp.close()
        self.process.kill()
