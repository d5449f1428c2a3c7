"""FileNode: a regular file or block device, and the one place where replnbd touches disks.

Reads run inline with RWF_NOWAIT: 1 µs for 4 KiB in the page cache, and EAGAIN where the disk would
be waited for; only then a thread takes over. Buffered writes run inline too (1.5 to 2.5 µs for
4 KiB; a thread costs 10 to 50). Everything that waits for the disk by nature (sync, punching,
truncating, very large writes) goes to a thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from replnbd.block.file_lock import lock_image
from replnbd.block.node import STATUS_EXTENTS_MAX, BlockNode, Buffer, Extent
from replnbd.block.threads import run_blocking
from replnbd.errors import ConfigError

Arguments = TypeVarTuple("Arguments")
R = TypeVar("R")

CALLS_MAX = 32
"""Of one file in threads at a time: a disk that hangs holds so many threads, and other files go on.
QEMU uses up to 64 for a device, nbdkit 16 for a connection. Where a disk answers in 100 µs, Python
reads as fast with 4 (22,000/s) as with 32 (28,000/s); the rest is for disks with longer waits."""

WRITE_INLINE_MAX = 1024 * 1024
"""Bytes: 100 to 250 µs of the loop's time. A thread would hand the interpreter's lock over at each
slice: 1,400 writes/s of 1 MiB went through one, 1,900/s go in line."""

WRITE_SLICE = 64 * 1024
"""Bytes per pwrite. The page cache keeps what one call wrote in folios of that size, and on ext4
every later small write walks its whole folio: 4 KiB cost 2 µs in a file written in pieces of 4 KiB,
4.4 µs after pieces of 64 KiB, 33 µs after pieces of 1 MiB (Linux 6.18). Writing 1 MiB in slices
costs 20 µs more than at once."""

PAGE = 4096
"""Bytes: slices end on multiples of it, and so of every sector size."""

_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10
_ZERO_CHUNK = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FileNode(BlockNode):
    """The bytes of a file. Writes past its end extend it (an image format grows its file);
    reads past its end give zeroes, as a hole would."""

    driver = "file"

    def __init__(self, fd: int, path: str, *, read_only: bool, name: str) -> None:
        """Takes ownership of `fd`; use `open`."""
        self._fd = fd
        self.path = path
        self.read_only = read_only
        self.name = name
        self.size = _size_of(fd, path)
        self._flush_failure: int | None = None
        self._sync_running: asyncio.Task[None] | None = None
        self._sync_next: asyncio.Task[None] | None = None
        self._turns = asyncio.Semaphore(CALLS_MAX)
        # Threads that punch, zero or truncate: the kernel holds the inode for as long as that
        # takes (2 to 300 ms for fragmented megabytes), and a write in line would stop the loop.
        self._freeing = 0
        # tmpfs has no RWF_NOWAIT and never waits for a disk; others that lack it go to a thread.
        self._read_flags: int | None = 0 if _on_memory_filesystem(fd) else os.RWF_NOWAIT

    @classmethod
    def open(
        cls, path: str | Path, *, read_only: bool = False, lock: bool = True, name: str = ""
    ) -> FileNode:
        """Open an existing file. Blocks for as long as open(2) does: call it at start-up.

        Raises ConfigError, in one line, if the file is missing, unreadable, no file or block
        device, or locked by another process (replnbd's or QEMU's).
        """
        path = os.fspath(path)
        try:
            flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
            fd = os.open(path, flags)
        except OSError as exc:
            raise ConfigError(f"cannot open {path}: {exc.strerror}") from exc
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise ConfigError(f"cannot open {path}: neither a regular file nor a block device")
            if lock:
                lock_image(fd, path, read_only=read_only)
            return cls(fd, path, read_only=read_only, name=name or os.path.basename(path))
        except BaseException:
            os.close(fd)
            raise

    async def pread(self, offset: int, buffer: memoryview) -> None:
        if not self.pread_nowait(offset, buffer):
            await self._in_thread(_read_all, self._fd, offset, buffer)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        flags = self._read_flags
        if flags is None:
            return False
        try:
            return os.preadv(self._fd, (buffer,), offset, flags) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            self._read_flags = None
            return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if not self.pwrite_nowait(offset, data):
            await self._in_thread(_write_all, self._fd, offset, data)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if self._freeing:
            return False
        if length <= WRITE_SLICE:
            done = os.pwrite(self._fd, data, offset)
            if done != length:
                _write_all(self._fd, offset + done, memoryview(data)[done:])
        elif length <= WRITE_INLINE_MAX:
            _write_all(self._fd, offset, data)
        else:
            return False
        return True

    async def pwrite_fua(self, offset: int, data: Buffer) -> None:
        # Of the range alone: 0.3 ms beside 300 MB of other dirty pages, which an fdatasync would
        # take 170 ms to write.
        await self._in_thread(_write_durably, self._fd, offset, data)

    async def allocate(self, size: int) -> None:
        """See to it that the file has `size` bytes of its own: a store within does not fail for
        want of space. What is new reads as zeroes."""
        await self._in_thread(os.posix_fallocate, self._fd, 0, size)

    async def copy_from(
        self, source: BlockNode, source_offset: int, offset: int, length: int
    ) -> None:
        if type(source) is FileNode:
            await self._in_thread(_copy_range, source._fd, source_offset, self._fd, offset, length)
        else:
            await super().copy_from(source, source_offset, offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE if unmap else _FALLOC_FL_ZERO_RANGE
        self._freeing += 1
        try:
            await self._in_thread(_zero, self._fd, offset, length, mode, fast)
        finally:
            self._freeing -= 1

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length, unmap=True)

    async def truncate(self, size: int) -> None:
        self._freeing += 1
        try:
            await self._in_thread(os.ftruncate, self._fd, size)
        finally:
            self._freeing -= 1
        self.size = size

    async def flush(self) -> None:
        # Group commit: who comes while a sync runs shares the next one with all others who do.
        if self._sync_next is None:
            self._sync_next = asyncio.get_running_loop().create_task(self._sync())
        await asyncio.shield(self._sync_next)

    async def _sync(self) -> None:
        if self._sync_running is not None:
            await asyncio.wait([self._sync_running])
        self._sync_running, self._sync_next = self._sync_next, None
        # After a failed fdatasync the kernel has dropped the pages it could not write, and calls
        # the next one a success. What is lost stays lost: no flush of this node succeeds any more.
        if self._flush_failure is not None:
            raise OSError(self._flush_failure, f"an earlier flush of {self.path} failed")
        try:
            await self._in_thread(os.fdatasync, self._fd)
        except OSError as exc:
            self._flush_failure = exc.errno
            raise

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self._in_thread(_holes_and_data, self._fd, offset, length)

    async def close(self) -> None:
        # A sync goes on when all who wanted it were cancelled.
        syncs = [sync for sync in (self._sync_running, self._sync_next) if sync is not None]
        if syncs:
            await asyncio.wait(syncs)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            await run_blocking(os.close, fd)

    async def _in_thread(self, function: Callable[[*Arguments], R], *args: *Arguments) -> R:
        async with self._turns:
            return await run_blocking(function, *args)


def _size_of(fd: int, path: str) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as exc:
        raise ConfigError(f"cannot find the size of {path}: {exc.strerror}") from exc


def _on_memory_filesystem(fd: int) -> bool:
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                fields, _, rest = line.partition(" - ")
                if fields.split()[2] == number:
                    return rest.split(maxsplit=1)[0] in ("tmpfs", "ramfs")
    except OSError:
        pass  # no /proc: the thread path is right everywhere, only slower
    return False


def _read_all(fd: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        done = os.preadv(fd, (buffer,), offset)
        if done == 0:  # past the end of the file
            buffer[:] = bytes(len(buffer))
            return
        buffer = buffer[done:]
        offset += done


def _write_all(fd: int, offset: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        # Slices end between sectors: who dies between two leaves none half old and half new.
        done = os.pwrite(fd, view[: WRITE_SLICE - offset % PAGE], offset)
        if done == 0:
            raise OSError(errno.EIO, "write returned 0 bytes")
        view = view[done:]
        offset += done


def _write_durably(fd: int, offset: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        try:
            done = os.pwritev(fd, (view,), offset, os.RWF_DSYNC)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            _write_all(fd, offset, view)
            os.fdatasync(fd)
            return
        if done == 0:
            raise OSError(errno.EIO, "write returned 0 bytes")
        view = view[done:]
        offset += done


def _copy_range(source: int, source_offset: int, fd: int, offset: int, length: int) -> None:
    """One call in the kernel, without the interpreter's lock: 220 µs for 1 MiB in the page cache,
    290 µs by reading and writing. Where the file system can, it shares the blocks instead."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                source, fd, length - done, source_offset + done, offset + done
            )
        except OSError as exc:
            if exc.errno not in _NO_COPY_RANGE:
                raise
            count = 0
        if count == 0:  # not between these two, or past the end of the source
            break
        done += count
    buffer = memoryview(bytearray(min(length - done, WRITE_SLICE)))
    while done < length:
        part = buffer[: length - done]
        _read_all(source, source_offset + done, part)
        _write_all(fd, offset + done, part)
        done += len(part)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _zero(fd: int, offset: int, length: int, mode: int, fast: bool) -> None:
    end = offset + length
    try:
        _fallocate(fd, mode, offset, length)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            raise
        if fast:
            raise OSError(errno.ENOTSUP, "no fast zeroing on this file system") from exc
        zeroes = memoryview(bytes(min(length, _ZERO_CHUNK)))
        while offset < end:
            part = zeroes[: end - offset]
            _write_all(fd, offset, part)
            offset += len(part)
        return
    # Punching keeps the size: zeroes past the end must extend the file like any write. By a write:
    # it cannot cut off what somebody else has just written further behind, as a truncate could.
    if mode & _FALLOC_FL_KEEP_SIZE:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and end > status.st_size:
            os.pwrite(fd, b"\0", end - 1)


def _holes_and_data(fd: int, offset: int, length: int) -> list[Extent]:
    extents: list[Extent] = []
    end = offset + length
    position = offset
    while position < end and len(extents) < STATUS_EXTENTS_MAX:
        data = _seek(fd, position, os.SEEK_DATA, end)
        if data > position:
            extents.append(Extent(data - position, zero=True, depth=0))
            position = data
            continue
        hole = _seek(fd, position, os.SEEK_HOLE, end)
        if hole <= position:  # the file changed between the two calls: call it data
            hole = end
        extents.append(Extent(hole - position, zero=False, depth=0))
        position = hole
    return extents


def _seek(fd: int, position: int, whence: int, end: int) -> int:
    try:
        return min(os.lseek(fd, position, whence), end)
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # no data from here to the end of the file
            return end
        if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # no holes here: all is data
            return position if whence == os.SEEK_DATA else end
        raise
