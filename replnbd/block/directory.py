"""Names of files: one that appears complete and durable, and one that changes durably."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from replnbd.block.file import FileNode
from replnbd.block.threads import run_blocking
from replnbd.errors import ConfigError


@asynccontextmanager
async def new_file(path: str | Path) -> AsyncIterator[FileNode]:
    """A new file, mode 0600, to be filled within the block; at its end it gets its name. Where the
    file system has no nameless files, it appears first and is completed then.

    Raises ConfigError if the file exists or cannot be made; whatever is raised, no new file is
    left behind.
    """
    path = os.fspath(path)
    fd, nameless = await run_blocking(_new_file, path)
    file = FileNode(fd, path, read_only=False, name=os.path.basename(path))
    try:
        yield file
        await run_blocking(_publish, fd, path, nameless)
    except BaseException as exc:
        if not nameless:
            os.unlink(path)
        if isinstance(exc, OSError):
            raise ConfigError(f"cannot create {path}: {exc.strerror}") from exc
        raise
    finally:
        await file.close()


def _new_file(path: str) -> tuple[int, bool]:
    """(file descriptor, nameless): a file without a name if the file system can, else one that
    is already there. Raises ConfigError if the name is taken or the directory is no good."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        try:
            return os.open(os.path.dirname(path) or ".", flags | os.O_TMPFILE, 0o600), True
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), False
    except OSError as exc:
        raise ConfigError(f"cannot create {path}: {exc.strerror}") from exc


def _publish(fd: int, path: str, nameless: bool) -> None:
    """Give the finished file its name, durably; FileExistsError if it was taken meanwhile."""
    os.fsync(fd)
    with _open_directory(path) as directory:
        if nameless:
            # With a directory descriptor, because only then Python calls linkat(2), which follows.
            os.link(f"/proc/self/fd/{fd}", os.path.basename(path), dst_dir_fd=directory)
        os.fsync(directory)


def rename_file(path: str, name: str) -> None:
    """Give a file another name in its directory, durably; what has that name is replaced."""
    with _open_directory(path) as directory:
        os.rename(os.path.basename(path), name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)


def sync_directory(path: str) -> None:
    """Make the name of a file durable; OSError."""
    with _open_directory(path) as directory:
        os.fsync(directory)


def sync_file(path: str) -> None:
    """Make all of a file durable, its time stamps as well; OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _open_directory(path: str) -> Iterator[int]:
    """A descriptor of the directory that a file is in."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    directory = os.open(os.path.dirname(path) or ".", flags)
    try:
        yield directory
    finally:
        os.close(directory)
