"""MemoryNode: a disk in memory, for tests and throw-away exports."""

from __future__ import annotations

from replnbd.block.node import BlockNode, Buffer, Extent


class MemoryNode(BlockNode):
    """`size` bytes in memory, or as many as a write reaches: a stand-in for FileNode too."""

    driver = "memory"

    def __init__(self, size: int = 0, *, name: str = "memory") -> None:
        self.name = name
        self.size = size
        self.data = bytearray(size)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        MemoryNode.pread_nowait(self, offset, buffer)

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        if len(part) < len(buffer):
            buffer[len(part) :] = bytes(len(buffer) - len(part))
        return True

    async def pwrite(self, offset: int, data: Buffer) -> None:
        MemoryNode.pwrite_nowait(self, offset, data)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        self._grow(offset + len(data))
        self.data[offset : offset + len(data)] = data
        return True

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self._grow(offset + length)
        self.data[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def truncate(self, size: int) -> None:
        del self.data[size:]
        self.size = min(self.size, size)
        self._grow(size)

    async def flush(self) -> None:
        # Nothing to do: memory has no stable storage behind it.
        return

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, zero=False, depth=0)]

    async def close(self) -> None:
        return

    def _grow(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))
            self.size = len(self.data)
