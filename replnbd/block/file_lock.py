"""Locks on image files, against a second daemon and against QEMU.

QEMU (block/file-posix.c, its option "locking") locks single bytes of an image with OFD locks:
byte 100 + n, shared, for each permission n it uses, and byte 200 + n, shared, for each permission
it does not allow others. Before that counts, it tests that nobody forbids what it uses (200 + n)
and nobody uses what it forbids (100 + n). We do the same, with the permissions of a format driver
that owns its image: uses read, write and resize; allows others only to read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from replnbd.errors import ConfigError

_PERMISSION_BASE = 100
_FORBIDDEN_BASE = 200

_READ = 0  # BLK_PERM_CONSISTENT_READ
_WRITE = 1  # BLK_PERM_WRITE
_RESIZE = 3  # BLK_PERM_RESIZE

_USED_WRITER = (_READ, _WRITE, _RESIZE)
_USED_READER = (_READ,)
_FORBIDDEN_BY_WRITER = (_WRITE, _RESIZE)
_FORBIDDEN_BY_READER = (_WRITE, _RESIZE)

_FLOCK = struct.Struct("hhqqi4x")  # struct flock, 64-bit Linux


def lock_image(fd: int, path: str, *, read_only: bool) -> None:
    """Lock an open image file until `fd` is closed; ConfigError if another process has it."""
    used = _USED_READER if read_only else _USED_WRITER
    forbidden = _FORBIDDEN_BY_READER if read_only else _FORBIDDEN_BY_WRITER
    try:
        for permission in used:
            _ofd_lock(fd, _PERMISSION_BASE + permission)
        for permission in forbidden:
            _ofd_lock(fd, _FORBIDDEN_BASE + permission)
        taken = any(_held_by_other(fd, _FORBIDDEN_BASE + permission) for permission in used)
        taken = taken or any(_held_by_other(fd, _PERMISSION_BASE + p) for p in forbidden)
    except OSError as exc:
        if exc.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            return  # a file system without locks: QEMU goes on without them, too
        if exc.errno not in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"cannot lock {path}: {os.strerror(exc.errno or 0)}") from exc
        taken = True
    if taken:
        raise ConfigError(
            f"{path} is in use by another process (another replnbd, or QEMU): stop that one first"
        )


def _ofd_lock(fd: int, byte: int) -> None:
    flock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)


def _held_by_other(fd: int, byte: int) -> bool:
    flock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, flock)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
