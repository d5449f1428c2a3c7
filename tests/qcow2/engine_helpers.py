"""A qcow2 image under test beside a bytearray that says what it must contain, and files that
suspend, fail, or remember every state they were in."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replnbd.block import BlockNode, Buffer, MemoryNode, PassThrough, read_bytes
from replnbd.qcow2 import Qcow2Node, create_qcow2, open_qcow2


@dataclass(frozen=True)
class Shape:
    """How to make an image."""

    cluster_size: int = 65536
    extended_l2: bool = False
    version: int = 3
    refcount_bits: int = 16
    size: int = 1 << 20
    backing: bool = True

    def __str__(self) -> str:
        kind = "ext" if self.extended_l2 else f"v{self.version}"
        backing = "-backing" if self.backing else ""
        return f"{self.cluster_size}-{kind}-rc{self.refcount_bits}{backing}"


SHAPES = [
    Shape(65536, extended_l2=True, size=(3 << 20) + 512),
    Shape(65536, extended_l2=True, size=3 << 20, backing=False),
    Shape(65536, size=3 << 20),
    Shape(65536, size=(1 << 20) + 1536, backing=False),
    Shape(16384, extended_l2=True, refcount_bits=1, size=(1 << 20) + 512),
    Shape(16384, extended_l2=True, refcount_bits=64, size=1 << 20, backing=False),
    Shape(512, refcount_bits=64, size=1 << 20),
    Shape(512, refcount_bits=1, size=300 * 512, backing=False),
    Shape(1024, refcount_bits=2, size=1 << 20),
    Shape(4096, refcount_bits=4, size=1 << 20),
    Shape(4096, refcount_bits=8, size=1 << 20, backing=False),
    Shape(8192, refcount_bits=32, size=1 << 20),
    Shape(512, version=2, size=1 << 20),
    Shape(4096, version=2, size=1 << 20, backing=False),
    Shape(65536, version=2, size=2 << 20),
    Shape(2 << 20, size=5 << 20),
    Shape(2 << 20, extended_l2=True, size=5 << 20),
]


def qemu_img(
    *arguments: str | Path, ok: tuple[int, ...] = (0,)
) -> subprocess.CompletedProcess[str]:
    """Run qemu-img; the exit code must be one of `ok`."""
    done = subprocess.run(
        ["qemu-img", *(os.fspath(a) for a in arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in ok, (arguments, done.returncode, done.stdout + done.stderr)
    return done


def qemu_options(shape: Shape) -> str:
    """Of `qemu-img create -o`."""
    if shape.version == 2:
        return f"cluster_size={shape.cluster_size},compat=0.10"
    extended = ",extended_l2=on" if shape.extended_l2 else ""
    return f"cluster_size={shape.cluster_size},refcount_bits={shape.refcount_bits}{extended}"


async def make_image(shape: Shape, file: BlockNode | None = None) -> MemoryNode:
    """A new image in memory."""
    memory = MemoryNode()
    await create_qcow2(
        memory,
        shape.size,
        cluster_size=shape.cluster_size,
        extended_l2=shape.extended_l2,
        version=shape.version,
        refcount_bits=shape.refcount_bits,
    )
    return memory


def copy_of(memory: MemoryNode) -> MemoryNode:
    """An independent file with the same bytes."""
    copy = MemoryNode()
    copy.data = bytearray(memory.data)
    copy.size = len(copy.data)
    return copy


class World:
    """An open image, its backing, and the model; random operations change both."""

    def __init__(self, node: Qcow2Node, backing: BlockNode | None, base: bytes, seed: int) -> None:
        self.node = node
        self.backing = backing
        self.base = base
        """What an empty image shows."""
        self.model = bytearray(base)
        self.rng = random.Random(seed)

    @classmethod
    async def create(
        cls, file: BlockNode, size: int, seed: int, *, backing: bool, **options: Any
    ) -> World:
        rng = random.Random(seed ^ 0x5EED)
        base = bytearray(size)
        below: MemoryNode | None = None
        if backing:
            below = MemoryNode(rng.choice((size, size // 2 + 77, size + 4096)))
            below.data[:] = rng.randbytes(below.size)
            shown = min(size, below.size)
            base[:shown] = below.data[:shown]
        node = await open_qcow2(file, backing=below, **options)
        return cls(node, below, bytes(base), seed)

    async def verify(self) -> None:
        """Every byte is what the model says."""
        assert_same(await read_bytes(self.node, 0, self.node.size), self.model)

    def range(self) -> tuple[int, int]:
        """(offset, length) anywhere, aligned to 512 bytes half of the time."""
        rng = self.rng
        size = self.node.size
        cluster = self.node.header.cluster_size
        longest = rng.choice((1, 512, 4096, cluster, 3 * cluster, size))
        offset = rng.randrange(size)
        if rng.random() < 0.5:
            offset &= ~511
            length = rng.randint(1, longest // 512 + 1) * 512
        else:
            length = rng.randint(1, longest)
        return offset, min(length, size - offset)

    def aligned_range(self) -> tuple[int, int]:
        """(offset, length) in whole subclusters."""
        rng = self.rng
        unit = self.node.granularity
        units = -(-self.node.size // unit)
        first = rng.randrange(units)
        count = rng.randint(1, min(units - first, rng.choice((1, 3, 40, units))))
        offset = first * unit
        return offset, min(count * unit, self.node.size - offset)

    def choose(self) -> tuple[str, int, int]:
        """A random change of the disk: (operation, offset, length)."""
        operation = self.rng.choices(
            ("write", "zero", "zero-keep", "discard", "drop", "empty"), (50, 12, 12, 12, 12, 2)
        )[0]
        offset, length = self.aligned_range() if operation == "drop" else self.range()
        return operation, offset, length

    def expected(self, operation: str, offset: int, length: int, data: bytes) -> bytearray:
        """The model after a change."""
        after = bytearray(self.model)
        end = offset + length
        if operation == "write":
            after[offset:end] = data
        elif operation == "drop":
            after[offset:end] = self.base[offset:end]
        elif operation == "empty":
            after[:] = self.base
        else:
            after[offset:end] = bytes(length)
        return after

    async def apply(self, operation: str, offset: int, length: int, data: bytes) -> None:
        """Make a change to the image alone."""
        node = self.node
        if operation == "write":
            await node.pwrite(offset, data)
        elif operation == "drop":
            await node.drop(offset, length)
        elif operation == "empty":
            await node.make_empty()
        elif operation == "discard":
            await node.discard(offset, length)
        else:
            await node.write_zeroes(offset, length, unmap=operation == "zero")

    async def step(self) -> None:
        """A random change to the image and the model."""
        operation, offset, length = self.choose()
        data = self.rng.randbytes(length)
        await self.apply(operation, offset, length, data)
        self.model = self.expected(operation, offset, length, data)


async def write_hurriedly(node: BlockNode, offset: int, data: Buffer) -> bool:
    """Write as the server does; whether it was done at once."""
    if node.pwrite_nowait(offset, data):
        return True
    await node.pwrite(offset, data)
    return False


async def read_hurriedly(node: BlockNode, offset: int, length: int) -> bytearray:
    """Read as the server does."""
    buffer = bytearray(length)
    if not node.pread_nowait(offset, memoryview(buffer)):
        await node.pread(offset, memoryview(buffer))
    return buffer


def assert_same(got: bytes | bytearray, wanted: bytes | bytearray) -> None:
    """All bytes equal; names the first that is not."""
    if got != wanted:
        assert len(got) == len(wanted)
        where = next(i for i in range(len(got)) if got[i] != wanted[i])
        count = sum(a != b for a, b in zip(got, wanted, strict=True))
        raise AssertionError(f"{count} bytes differ, the first at {where:#x}")


class Suspending(PassThrough):
    """A file whose every operation lets other requests run, before and after it takes effect."""

    def __init__(self, file: BlockNode, seed: int) -> None:
        super().__init__(file.name, file)
        self.rng = random.Random(seed)

    async def _wait(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self._wait()
        await super().pread(offset, buffer)
        await self._wait()

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._wait()
        await super().pwrite(offset, data)
        await self._wait()

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await self._wait()
        await super().write_zeroes(offset, length, unmap=unmap, fast=fast)
        await self._wait()

    async def truncate(self, size: int) -> None:
        await self._wait()
        await super().truncate(size)
        await self._wait()

    async def flush(self) -> None:
        await self._wait()


class Reluctant(Suspending):
    """A file that at times does at once what it is asked for, and at times wants to wait."""

    eager = 0.7
    """How often it does it at once."""

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        return self.rng.random() < self.eager and self.file.pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.rng.random() < self.eager and self.file.pwrite_nowait(offset, data)


class Failing(PassThrough):
    """A file whose n-th operation from `arm` on fails; `torn` says how much of a failing write
    reaches the file: "none", "half" or "all". With `lasting`, all later ones fail as well."""

    def __init__(self, file: BlockNode) -> None:
        super().__init__(file.name, file)
        self.left = -1
        self.code = errno.EIO
        self.torn = "none"
        self.lasting = False

    def arm(self, nth: int, code: int, torn: str, *, lasting: bool = False) -> None:
        self.left, self.code, self.torn, self.lasting = nth, code, torn, lasting

    def disarm(self) -> bool:
        """Whether it has failed since."""
        failed = self.left == 0
        self.left = -1
        return failed

    def _due(self) -> bool:
        if self.left == 0:
            return self.lasting
        if self.left > 0:
            self.left -= 1
        return self.left == 0

    def _error(self) -> OSError:
        return OSError(self.code, os.strerror(self.code))

    async def pread(self, offset: int, buffer: memoryview) -> None:
        if self._due():
            raise self._error()
        await super().pread(offset, buffer)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        if self._due():
            raise self._error()
        return self.file.pread_nowait(offset, buffer)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        if self._due():
            whole = bytes(data)
            part = {"none": 0, "half": len(whole) // 2 & ~7, "all": len(whole)}[self.torn]
            assert not part or self.file.pwrite_nowait(offset, whole[:part])
            raise self._error()
        return self.file.pwrite_nowait(offset, data)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if self._due():
            whole = bytes(data)
            part = {"none": 0, "half": len(whole) // 2 & ~7, "all": len(whole)}[self.torn]
            if part:
                await super().pwrite(offset, whole[:part])
            raise self._error()
        await super().pwrite(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        if self._due():
            raise self._error()
        await super().write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def truncate(self, size: int) -> None:
        if self._due():
            raise self._error()
        await super().truncate(size)

    async def flush(self) -> None:
        if self._due():
            raise self._error()
        await super().flush()


class Recording(PassThrough):
    """A file in memory that keeps a copy of itself as it was after every change."""

    def __init__(self, file: MemoryNode) -> None:
        super().__init__(file.name, file)
        self.memory = file
        self.states: list[MemoryNode] = []

    def _keep(self) -> None:
        self.states.append(copy_of(self.memory))

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        done = self.file.pwrite_nowait(offset, data)
        self._keep()
        return done

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await super().pwrite(offset, data)
        self._keep()

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await super().write_zeroes(offset, length, unmap=unmap, fast=fast)
        self._keep()

    async def truncate(self, size: int) -> None:
        await super().truncate(size)
        self._keep()
