"""A proxy between NBD clients and a server on unix sockets that counts what travels each way."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from peers.nbd_client import connect

RECEIVE_BYTES = 1 << 18


class CountingProxy:
    """Clients of `path` are connected to the server at `target`, each with a connection of its own.

    `to_server` and `to_client` are bytes since the last `reset`, all connections together. Read
    them when the clients are gone: what is on its way is not counted yet.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.to_server = self.to_client = self.connections = 0
        self._target = target
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._start(self._accept)

    def uri(self, export: str) -> str:
        """The NBD URI of an export behind it."""
        return f"nbd+unix:///{export}?socket={self.path}"

    def reset(self) -> None:
        """Count from 0."""
        with self._lock:
            self.to_server = self.to_client = self.connections = 0

    def _start(self, run: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, connect(self._target) as server:
            with self._lock:
                self.connections += 1
            answers = self._start(self._pump, server, client, "to_client")
            self._pump(client, server, "to_server")
            answers.join()

    def _pump(self, source: socket.socket, sink: socket.socket, count: str) -> None:
        try:
            while part := source.recv(RECEIVE_BYTES):
                with self._lock:
                    setattr(self, count, getattr(self, count) + len(part))
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side is gone: then the other has nobody to talk to.
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No more clients; those that are there are gone by now."""
        # To close a listener does not wake up who accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
