"""A proxy between NBD clients and a server on unix sockets that counts what travels each way."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from peers.nbd_client import connect
from peers.process import wait_until

RECEIVE_BYTES = 1 << 18


class Traffic(NamedTuple):
    """Bytes, all connections together."""

    to_server: int
    to_client: int


class CountingProxy:
    """A client of `path` gets a connection of its own to the server at `target`."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._to_server = self._to_client = 0
        self._clients = 0
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

    def count(self) -> Traffic:
        """Since the last time, or the start; waits until the clients are gone, and what they sent
        is counted."""
        wait_until(lambda: not self._clients, "the clients to hang up")
        with self._lock:
            traffic = Traffic(self._to_server, self._to_client)
            self._to_server = self._to_client = 0
        return traffic

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
            with self._lock:
                self._clients += 1
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, connect(self._target) as server:
                server.settimeout(None)  # a client may be silent for as long as it likes
                answers = self._start(self._pump, server, client, "_to_client")
                self._pump(client, server, "_to_server")
                answers.join()
        finally:
            with self._lock:
                self._clients -= 1

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
