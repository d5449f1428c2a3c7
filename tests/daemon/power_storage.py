"""Storage that loses its power: of the writes since the last sync, any part is there afterwards.

It stands where replnbd makes its system calls (`patched`): the files are real, and every write,
truncate, punch, rename and sync of them is recorded. A sector (512 bytes) of a file has, on the
medium, what it had when the file was last synced, or anything that it was since; each sector for
itself, so that writes are lost, kept in any order, and torn. So it is with a file's size. Names
change in order, and are there for certain once their directory is synced.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from replnbd.block import directory, file
from replnbd.daemon import daemon, recovery

SECTOR = 512
PAGE = 4096

_fallocate = file._fallocate


class Medium:
    """One file: what is certain, and what may be."""

    def __init__(self, content: bytes = b"") -> None:
        self.certain = bytearray(content)
        self.versions: dict[int, list[tuple[int, bytes]]] = {}
        """Sector -> (time, content): what it was since the last sync, oldest first."""
        self.sizes = [(0, len(content))]
        self.time = 0

    def changed(self, fd: int, offset: int, length: int) -> None:
        """Some bytes of the file are others now."""
        self.time += 1
        first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
        content = os.pread(fd, (end - first) * SECTOR, first * SECTOR)
        for sector in range(first, end):
            begin = (sector - first) * SECTOR
            self._note(sector, content[begin : begin + SECTOR])
        self.sizes.append((self.time, os.fstat(fd).st_size))

    def truncated(self, fd: int, size: int) -> None:
        """The file was cut, or made longer: behind its end are zeroes."""
        self.time += 1
        end = -(-len(self.certain) // SECTOR)
        for sector in {*range(size // SECTOR, end), *self.versions}:
            if sector >= size // SECTOR:
                self._note(sector, os.pread(fd, SECTOR, sector * SECTOR))
        self.sizes.append((self.time, size))

    def _note(self, sector: int, content: bytes) -> None:
        self.versions.setdefault(sector, []).append((self.time, content.ljust(SECTOR, b"\0")))

    def synced(self, time: int) -> None:
        """A sync that began at that time has ended."""
        for sector in list(self.versions):
            self._settle(sector, time)
        certain = [size for size in self.sizes if size[0] <= time]
        self.sizes = certain[-1:] + self.sizes[len(certain) :]

    def synced_range(self, offset: int, length: int) -> None:
        """A write with RWF_DSYNC has ended: that range, and the size, are certain."""
        for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
            self._settle(sector, self.time)
        self.sizes = self.sizes[-1:]

    def _settle(self, sector: int, time: int) -> None:
        versions = self.versions.pop(sector, [])
        later = [version for version in versions if version[0] > time]
        if later:
            self.versions[sector] = later
        if len(versions) > len(later):
            end = (sector + 1) * SECTOR
            if len(self.certain) < end:
                self.certain.extend(bytes(end - len(self.certain)))
            self.certain[end - SECTOR : end] = versions[-len(later) - 1][1]

    def draw(self, rng: random.Random) -> bytes:
        """What is there when the power comes back."""
        latest = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        size = (self.sizes[-1] if rng.random() < latest else rng.choice(self.sizes))[1]
        content = bytearray(self.certain[:size].ljust(size, b"\0"))
        for sector, versions in self.versions.items():
            if rng.random() < latest:
                chosen = versions[-1][1]
            elif rng.random() < 0.5:
                continue
            else:
                chosen = rng.choice(versions)[1]
            begin = sector * SECTOR
            content[begin : begin + SECTOR] = chosen[: max(0, size - begin)]
        return bytes(content)


class Storage:
    """A directory of files, and when their power fails."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.calls = 0
        self.off_at: int | None = None
        """At this call the power fails."""
        self.off = False
        self.boots = 0
        self.kinds: dict[str, int] = {}
        """How often each kind of call was made."""
        self._media: dict[int, Medium] = {}
        self._names: list[dict[str, Medium]] = [{}]
        """Of files: those that are certain, and after each change since."""
        self._open: set[int] = set()
        self._began: dict[int, int] = {}
        """Of syncs: their file's time."""

    def add(self, name: str, content: bytes) -> None:
        """A file that has always been there."""
        path = self.folder / name
        path.write_bytes(content)
        self._names[0][name] = self._media[path.stat().st_ino] = Medium(content)

    def adopt(self, name: str) -> None:
        """A file that somebody else has made there."""
        self.add(name, (self.folder / name).read_bytes())

    def process_ends(self) -> None:
        """The process is gone; its files are as it left them."""
        for fd in self._open:
            os.close(fd)
        self._open.clear()
        self._began.clear()
        self.off, self.off_at, self.calls = False, None, 0

    def power_fails(self) -> None:
        """The same, and the host comes up again with what is on its disk."""
        self.process_ends()
        self.boots += 1
        names = self.rng.choice(self._names)
        times = {}
        for path in self.folder.iterdir():
            if path.name in self._names[-1]:
                status = path.stat()
                times[status.st_ino] = (status.st_atime_ns, status.st_mtime_ns)
                path.unlink()
        inodes = {id(medium): inode for inode, medium in self._media.items()}
        found = {
            name: (medium.draw(self.rng), inodes[id(medium)]) for name, medium in names.items()
        }
        self._media, self._names = {}, [{}]
        for name, (content, inode) in found.items():
            self.add(name, content)
            if inode in times:
                os.utime(self.folder / name, ns=times[inode])

    # Section: system calls

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The system calls of a process come here."""
        calls = Calls(self)
        with (
            mock.patch.object(file, "os", calls),
            mock.patch.object(file, "_fallocate", calls.fallocate),
            mock.patch.object(directory, "os", calls),
            mock.patch.object(recovery, "os", calls),
            mock.patch.object(daemon, "os", calls),
            mock.patch.object(file, "run_blocking", self.run_blocking),
            mock.patch.object(directory, "run_blocking", self.run_blocking),
            mock.patch.object(recovery, "run_blocking", self.run_blocking),
            mock.patch.object(recovery, "boot_id", return_value=f"boot {self.boots}"),
        ):
            yield

    async def run_blocking(self, function: Callable[..., Any], *args: Any) -> Any:
        """Instead of a thread: others get a turn, drawn, and then the call is made. A sync makes
        certain what was there when it began."""
        if getattr(function, "__name__", "") == "fdatasync":
            self._began[args[0]] = self.medium(args[0]).time
        for _ in range(self.rng.choice([0, 0, 1, 3])):
            await asyncio.sleep(0)
        return function(*args)

    def tick(self, kind: str) -> None:
        """A call that changes something; OSError if there is no power."""
        if not self.off:
            self.calls += 1
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            self.off = self.calls == self.off_at
        self.check()

    def check(self) -> None:
        """OSError if there is no power."""
        if self.off:
            raise OSError(errno.EIO, "no power")

    def medium(self, fd: int) -> Medium:
        """Of an open file."""
        return self._media.setdefault(os.fstat(fd).st_ino, Medium())

    def rename(self, change: Callable[[dict[str, Medium]], object]) -> None:
        """Names change."""
        names = dict(self._names[-1])
        change(names)
        self._names.append(names)

    def sync(self, fd: int) -> None:
        """All of a file, or of the directory."""
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            self._names = self._names[-1:]
        else:
            medium = self.medium(fd)
            medium.synced(self._began.pop(fd, medium.time))


class Calls:
    """In the place of `os`: what changes files is counted and recorded."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777, **options: Any) -> int:
        self._storage.check()
        fd = os.open(path, flags, mode, **options)
        self._storage._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        if fd in self._storage._open:
            self._storage._open.discard(fd)
            os.close(fd)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        self._storage.check()
        return os.preadv(fd, buffers, offset, flags)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        medium = self._storage.medium(fd)
        done = self._cut(offset, len(data))
        os.pwrite(fd, memoryview(data)[:done], offset)
        medium.changed(fd, offset, done)
        self._storage.tick("write")
        return len(data)

    def pwritev(self, fd: int, buffers: Any, offset: int, flags: int) -> int:
        (data,) = buffers
        self._storage.check()
        medium = self._storage.medium(fd)
        os.pwrite(fd, data, offset)
        medium.changed(fd, offset, len(data))
        self._storage.tick("write with RWF_DSYNC")
        assert flags == os.RWF_DSYNC
        medium.synced_range(offset, len(data))
        return len(data)

    def copy_file_range(self, source: int, fd: int, length: int, at: int, offset: int) -> int:
        self._storage.check()
        done = os.copy_file_range(source, fd, self._cut(offset, length), at, offset)
        self._storage.medium(fd).changed(fd, offset, done)
        self._storage.tick("copy")
        return done

    def ftruncate(self, fd: int, size: int) -> None:
        self._storage.tick("truncate")
        os.ftruncate(fd, size)
        self._storage.medium(fd).truncated(fd, size)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._storage.tick("punch")
        _fallocate(fd, mode, offset, length)
        end = min(offset + length, os.fstat(fd).st_size)
        if offset < end:
            self._storage.medium(fd).changed(fd, offset, end - offset)

    def fdatasync(self, fd: int) -> None:
        self._storage.tick("sync")
        self._storage.sync(fd)

    fsync = fdatasync

    def link(self, source: str, name: str, *, dst_dir_fd: int) -> None:
        self._storage.tick("link")
        os.link(source, name, dst_dir_fd=dst_dir_fd)
        medium = self._storage._media[os.stat(source).st_ino]
        self._storage.rename(lambda names: names.update({name: medium}))

    def rename(self, old: str, new: str, **directories: int) -> None:
        self._storage.tick("rename")
        os.rename(old, new, **directories)
        self._storage.rename(lambda names: names.update({new: names.pop(old)}))

    def unlink(self, path: str) -> None:
        self._storage.tick("unlink")
        os.unlink(path)
        self._storage.rename(lambda names: names.pop(os.path.basename(path)))

    def _cut(self, offset: int, length: int) -> int:
        """A write within which the process dies has stored what was to go to some of the pages."""
        storage = self._storage
        storage.check()
        if storage.off_at is None or storage.calls + 1 != storage.off_at:
            return length
        ends = range(PAGE - offset % PAGE, length, PAGE)
        done: int = storage.rng.choice([0, length, *ends])
        return done
