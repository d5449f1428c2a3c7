"""BlockNode, the interface; OverlayNode, what a copy-on-write layer adds; PassThrough."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview

COPY_CHUNK = 1 << 20
"""Bytes in memory at a time while one node is copied to another."""

STATUS_EXTENTS_MAX = 4096
"""Of one answer of `block_status`: some 5 ms of work, and 32 KiB for a client."""


class Extent(NamedTuple):
    """A run of `length` bytes in one state (NBD's block descriptor, QEMU's bdrv_block_status).

    `zero`: the bytes read as zeroes, and the node knows it without reading them.
    `depth`: the layer that decides the bytes: 0 this node, 1 its backing, ...; -1 none does, and
    the bytes are zeroes. A file decides all of its bytes, holes too (as QEMU counts).
    """

    length: int
    zero: bool
    depth: int


class BlockNode(ABC):
    """An array of bytes with the operations of a disk; see the laws in `replnbd.block`."""

    name: str
    """The node-name, for errors, events and `query-named-block-nodes`."""
    size: int
    """In bytes."""
    driver: str
    """QEMU's name for the kind of node: "file", "qcow2", "replication", ..."""

    def __init_subclass__(cls) -> None:
        # Whoever overrides an operation means all of its calls: a twin that is inherited would
        # pass by what the override (a mixin's, perhaps) does.
        for operation in ("pread", "pwrite"):
            twin = f"{operation}_nowait"
            owner = next(c for c in cls.__mro__ if operation in vars(c) or twin in vars(c))
            if twin not in vars(owner):
                setattr(cls, twin, getattr(BlockNode, twin))

    @abstractmethod
    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""

    @abstractmethod
    async def pwrite(self, offset: int, data: Buffer) -> None:
        """Store `data` at `offset`. Durable only after a flush; visible to readers at once."""

    async def pwrite_fua(self, offset: int, data: Buffer) -> None:
        """`pwrite`, durable when it returns (NBD_CMD_FLAG_FUA); of other writes that says nothing.

        Of an image format's file, where one small store has to be ordered: it does not wait for all
        that others have written, as a flush does."""
        await self.pwrite(offset, data)
        await self.flush()

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        """`pread`, if it need not wait for anything: True: done. False: nothing has happened
        (`buffer` may have changed), and the caller goes on with `pread`. OSError: it failed.

        What makes a request cheap: no coroutine (0.3 µs a layer), no lock, because it is atomic.
        """
        return False

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        """`pwrite`, if it need not wait for anything; as `pread_nowait`."""
        return False

    async def copy_from(
        self, source: BlockNode, source_offset: int, offset: int, length: int
    ) -> None:
        """Store at `offset` what `source` has at `source_offset`."""
        buffer = memoryview(bytearray(min(length, COPY_CHUNK)))
        for done in range(0, length, COPY_CHUNK):
            part = buffer[: length - done]
            await source.pread(source_offset + done, part)
            await self.pwrite(offset + done, part)

    @abstractmethod
    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Make a range read as zeroes. `unmap`: its space may be given back.

        `fast` (NBD_CMD_FLAG_FAST_ZERO): fail with ENOTSUP at once rather than write them as data.
        """

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more. Here they read as zeroes afterwards, always:
        nothing of what was discarded, in this layer or below, shows again."""

    @abstractmethod
    async def flush(self) -> None:
        """All that was written, by anyone, before this call is durable when it returns."""

    @abstractmethod
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Extents from `offset` on, one at least, whose lengths add up to at most `length`.

        Short where there is more to tell than STATUS_EXTENTS_MAX, or more to look at than should be
        looked at in one go: ask again from there, or use `each_extent`."""

    async def truncate(self, size: int) -> None:
        """Cut the node to `size` bytes, or extend it with zeroes. Only what an image format can
        live on (files) has it; there, a write past the end extends the node as well."""
        raise OSError(errno.ENOTSUP, f"{self.name} cannot be resized")

    @abstractmethod
    async def close(self) -> None:
        """Let in-flight operations end, write back what is cached, release files and locks."""


class OverlayNode(BlockNode):
    """A copy-on-write layer: what is not allocated here shows `backing`.

    What a replication overlay must be able to do beyond a disk: QEMU's bdrv_is_allocated and
    bdrv_make_empty, and `drop`, its inverse for a range.
    """

    backing: BlockNode | None
    granularity: int
    """Bytes (a power of two): aligned writes of this size copy nothing from `backing`."""
    power_safe: bool
    """A power failure leaves what the layer was, but for writes that were not flushed: each of
    their sectors is the old or the new one. What `copy_up` and `emptying` do is durable."""

    @abstractmethod
    async def allocated(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the byte at `offset` is allocated in this layer (data or zeroes), and for how
        many bytes from there, at least 1 and at most `length`, the same answer holds."""

    @abstractmethod
    async def copy_up(self, offset: int, length: int) -> None:
        """Store in this layer what `backing` shows in a range of which nothing is allocated here;
        if the layer is `power_safe`, durably. `offset` and `length` are multiples of
        `granularity`, but for the end of the disk."""

    def copy_up_nowait(self, offset: int, length: int) -> int:
        """See to it that all of an aligned range is allocated here, if that needs no waiting
        (which nothing does that is to be durable).
        Returns how many bytes were copied up for that; -1: not done, use `allocated` and
        `copy_up`."""
        return -1

    @abstractmethod
    async def drop(self, offset: int, length: int) -> None:
        """Make an aligned range unallocated: from now on it shows `backing` again.
        `offset` and `length` are multiples of `granularity`, but for the end of the disk."""

    @abstractmethod
    def emptying(
        self, *, keep_space: bool = False
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        """Make the whole layer unallocated, in two parts, for who empties several layers at once.

        On entry everything is done that can fail, but for one store; requests wait from then on.
        What it yields does that store, and the layer is empty, also for whoever opens it after a
        crash. Left without that call, the layer is as it was. OSError from either.

        The space is free at once, and goes back to the file system in the background: but for
        about as much as was lately needed if the layer is to be filled again (`keep_space`).
        """

    async def make_empty(self, *, keep_space: bool = False) -> None:
        """Make the whole layer unallocated: `emptying`, for one layer."""
        async with self.emptying(keep_space=keep_space) as clear:
            await clear()

    @abstractmethod
    async def settle(self) -> None:
        """Make the layer's metadata exact, as a flush does, but make nothing durable."""

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes of data clusters in use in this layer's file."""


class PassThrough(BlockNode):
    """A filter that changes nothing. A real one overrides only what it changes."""

    driver = "passthrough"

    def __init__(self, name: str, file: BlockNode) -> None:
        self.name = name
        self.file = file
        self.size = file.size

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self.file.pread(offset, buffer)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        return self.file.pread_nowait(offset, buffer)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self.file.pwrite(offset, data)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.file.pwrite_nowait(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self.file.block_status(offset, length)

    async def truncate(self, size: int) -> None:
        await self.file.truncate(size)

    async def close(self) -> None:
        await self.file.close()


async def each_extent(node: BlockNode, offset: int, length: int) -> AsyncIterator[Extent]:
    """The extents of a whole range, however many."""
    end = offset + length
    while offset < end:
        for extent in await node.block_status(offset, end - offset):
            yield extent
            offset += extent.length


async def read_bytes(node: BlockNode, offset: int, length: int) -> bytearray:
    """The bytes at `offset` as a new buffer, for callers off the data path."""
    buffer = bytearray(length)
    if length:
        await node.pread(offset, memoryview(buffer))
    return buffer
