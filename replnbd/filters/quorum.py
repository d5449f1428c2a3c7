"""QuorumNode: a local disk and its copy elsewhere, as QEMU's quorum with read-pattern=fifo and
vote-threshold=1: reads are the local disk's alone, writes go to both, an error of the local disk is
the client's, one of the copy never is.

The local disk first: what it has refused is not sent. Whoever owns this filter serialises
overlapping requests, so that both sides get them in one order.
"""

from __future__ import annotations

from typing import Protocol

from replnbd.block import BlockNode, Buffer, PassThrough


class Copy(Protocol):
    """The other child: sends what was written on, and keeps account of what it could not.

    Each write is announced before it happens, by `enter`, and then sent, or `failed`.
    """

    def enter_nowait(self, offset: int, length: int) -> bool:
        """`enter`, where the write is sent in the same breath; False: not without waiting."""

    async def enter(self, offset: int, length: int) -> object:
        """A range is about to be written; the answer goes to what ends it. OSError: it must not."""

    def failed(self, offset: int, length: int, entered: object) -> None:
        """The local disk has refused a write, of which a part may have happened."""

    def write_nowait(self, offset: int, data: Buffer) -> None:
        """What was written after `enter_nowait`. `data` may change after this call."""

    async def write(self, offset: int, data: Buffer, entered: object) -> None:
        """What was written. Returns when the client may be told."""

    async def zero(
        self, offset: int, length: int, entered: object, *, unmap: bool, discard: bool
    ) -> None:
        """What was zeroed, or discarded, which reads as zeroes."""

    async def flush(self) -> None:
        """The local disk was flushed. Returns when the client may be told."""


class QuorumNode(PassThrough):
    """`file` is the local disk, `copy` sends on what is written to it."""

    driver = "quorum"

    def __init__(self, name: str, file: BlockNode, copy: Copy) -> None:
        super().__init__(name, file)
        self.copy = copy

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        copy = self.copy
        if not copy.enter_nowait(offset, len(data)):
            return False
        try:
            if not self.file.pwrite_nowait(offset, data):
                return False
        except OSError:
            copy.failed(offset, len(data), None)
            raise
        copy.write_nowait(offset, data)
        return True

    async def pwrite(self, offset: int, data: Buffer) -> None:
        entered = await self.copy.enter(offset, len(data))
        try:
            await self.file.pwrite(offset, data)
        except BaseException:
            self.copy.failed(offset, len(data), entered)
            raise
        await self.copy.write(offset, data, entered)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        entered = await self.copy.enter(offset, length)
        try:
            await self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)
        except BaseException:
            self.copy.failed(offset, length, entered)
            raise
        await self.copy.zero(offset, length, entered, unmap=unmap, discard=False)

    async def discard(self, offset: int, length: int) -> None:
        entered = await self.copy.enter(offset, length)
        try:
            await self.file.discard(offset, length)
        except BaseException:
            self.copy.failed(offset, length, entered)
            raise
        await self.copy.zero(offset, length, entered, unmap=True, discard=True)

    async def flush(self) -> None:
        await self.file.flush()
        await self.copy.flush()
