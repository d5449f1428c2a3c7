"""DelayNode: every operation waits first, as on a slow disk."""

from __future__ import annotations

import asyncio

from replnbd.block import BlockNode, Buffer, Extent, PassThrough


class DelayNode(PassThrough):
    """Waits `delay_s` seconds before each operation; 0 still lets every other task run once."""

    driver = "delay"

    def __init__(self, name: str, file: BlockNode, delay_s: float = 0.0) -> None:
        super().__init__(name, file)
        self.delay_s = delay_s

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(self.delay_s)
        await self.file.pread(offset, buffer)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await asyncio.sleep(self.delay_s)
        await self.file.pwrite(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await asyncio.sleep(self.delay_s)
        await self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await asyncio.sleep(self.delay_s)
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        await asyncio.sleep(self.delay_s)
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await asyncio.sleep(self.delay_s)
        return await self.file.block_status(offset, length)

    async def truncate(self, size: int) -> None:
        await asyncio.sleep(self.delay_s)
        await self.file.truncate(size)
