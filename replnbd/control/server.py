"""The control socket: listening, its clients, and the way of events to all of them."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replnbd.control.backend import Backend
from replnbd.control.session import Session
from replnbd.control.throttle import Throttle
from replnbd.control.wire import encode, error_message, event_message
from replnbd.errors import ConfigError

log = logging.getLogger(__name__)

CLIENTS_MAX = 64
"""A manager, a watcher and a few command lines at a time; QEMU's monitor takes one client."""

# From Python 3.13 on, the loop removes a unix socket's file by itself, also one that is not ours.
_KEEP_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

_BACKLOG = 16
_LOCK_ATTEMPTS = 200
_LOCK_INTERVAL_S = 0.01


class ControlServer:
    """Serves QMP on a unix socket that only its owner (and root) may connect to."""

    def __init__(
        self, backend: Backend, path: str | Path, listener: socket.socket | None = None
    ) -> None:
        """`listener`: a socket that listens already, at `path` if it has one; its file and who
        may connect to it are the business of whoever made it."""
        self._backend = backend
        self._listener = listener
        self.path = os.fspath(path)
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._server: asyncio.Server | None = None
        self._identity: tuple[int, int] | None = None
        self._throttle: Throttle | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._refusal: str | None = None

    async def start(self) -> None:
        """Listen. Raises ConfigError, in one line, if the path cannot be used: another server
        answers there, it is no socket, or the directory is not ours to write."""
        assert self._server is None
        listener = self._listener or await _bind(self.path)
        try:
            if listener is not self._listener:
                status = os.stat(self.path)
                self._identity = (status.st_dev, status.st_ino)
            self._server = await asyncio.start_unix_server(
                self._accept, sock=listener, backlog=_BACKLOG, **_KEEP_FILE
            )
        except BaseException:
            listener.close()
            raise
        self._throttle = Throttle(self._send_event, asyncio.get_running_loop().call_later)
        self._unsubscribe = self._backend.events.subscribe(self._on_event)
        log.info("control: listening on %s", self.path)

    def refuse_changes(self, reason: str) -> None:
        """From now on answer `reason` to every command that is no query; replies under way and
        events still go out. For the time between the decision to end and `close`."""
        self._refusal = reason
        for session in self._sessions.values():
            session.refusal = reason

    async def close(self, timeout_s: float = 1.0) -> None:
        """Stop listening, let commands end and clients read what was sent to them, for
        `timeout_s` at most, then cut them off. The socket file is removed first."""
        if self._server is None:
            return
        server, self._server = self._server, None
        self._remove_socket()
        server.close()
        if self._unsubscribe is not None:
            self._unsubscribe()
        if self._throttle is not None:
            self._throttle.close()
        for session in tuple(self._sessions.values()):
            session.stop()
        if self._sessions:
            await asyncio.wait(tuple(self._sessions), timeout=timeout_s)
        for session in tuple(self._sessions.values()):
            session.abort()
        if self._sessions:
            await asyncio.wait(tuple(self._sessions))
        await server.wait_closed()

    def _remove_socket(self) -> None:
        if self._identity is None:
            return
        try:
            status = os.lstat(self.path)
            # A socket that another server put in our file's place is not ours to remove.
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                log.warning("control: cannot remove %s: %s", self.path, exc.strerror)

    # Section: loop callbacks

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        if len(self._sessions) >= CLIENTS_MAX:
            log.warning("control: %d clients already, refusing another", CLIENTS_MAX)
            writer.write(encode(error_message(f"Too many clients, {CLIENTS_MAX} at most")))
            writer.close()
            return
        session = Session(self._backend, reader, writer)
        session.refusal = self._refusal
        task = session.start()
        self._sessions[task] = session
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # A task cancelled before its first step has not closed its connection.
        self._sessions.pop(task).abort()
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("control: bug in a session", exc_info=exc)

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        if self._sessions and self._throttle is not None:
            self._throttle.pass_on(event_message(name, data))

    def _send_event(self, message: dict[str, Any]) -> None:
        line = encode(message)
        for session in self._sessions.values():
            session.send_event(line)


async def _bind(path: str) -> socket.socket:
    """A listening socket; a dead server's socket file gives way."""
    try:
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise _unusable(path, exc) from exc
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await _lock(directory, path)
        _remove_stale(path)
        listener.bind(path)
        # Nobody can connect before listen(), so nobody connects before the mode is right.
        os.chmod(path, 0o600)
        # Before the lock is given up: who probes us next must find us alive.
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise _unusable(path, exc) from exc
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


async def _lock(directory: int, path: str) -> None:
    """Two daemons that start at once must not each remove the other's socket as a dead one.

    The lock is held for a moment and given up when `directory` is closed. It is not waited for
    without end: in a directory like /tmp anyone can take it.
    """
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            await asyncio.sleep(_LOCK_INTERVAL_S)
    raise ConfigError(f"control socket {path}: another process holds a lock on its directory")


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on; ConfigError if someone does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            # What is no socket refuses too.
            if os.path.exists(path) and not Path(path).is_socket():
                raise ConfigError(
                    f"control socket {path}: the file exists and is no socket"
                ) from None
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # a live server whose backlog is full
    raise ConfigError(f"control socket {path}: in use by another process, stop that one first")


def _unusable(path: str, exc: OSError) -> ConfigError:
    return ConfigError(f"control socket {path}: {exc.strerror or exc}")
