"""FaultNode: fails chosen operations with chosen errors, as a dying or full disk does."""

from __future__ import annotations

import errno as errno_module
import os
from dataclasses import dataclass

from replnbd.block import BlockNode, Buffer, Extent, PassThrough


@dataclass
class Fault:
    """One rule: which operations fail, and how."""

    operation: str
    errno: int
    offset: int
    end: int
    skip: int
    times: int | None


class FaultNode(PassThrough):
    """Forwards everything, but for what `fail` has set up. `calls` counts what came by."""

    driver = "fault"

    def __init__(self, name: str, file: BlockNode) -> None:
        super().__init__(name, file)
        self.calls = 0
        self._faults: list[Fault] = []

    def fail(
        self,
        operation: str,
        errno: int = errno_module.EIO,
        *,
        offset: int = 0,
        length: int = 1 << 63,
        skip: int = 0,
        times: int | None = None,
    ) -> None:
        """Let `operation` ("pread", "pwrite", ..., or "*") fail where it touches the range,
        after `skip` such calls went well, `times` times (None: until `heal`)."""
        self._faults.append(Fault(operation, errno, offset, offset + length, skip, times))

    def heal(self) -> None:
        """The disk is well again."""
        self._faults.clear()

    async def pread(self, offset: int, buffer: memoryview) -> None:
        self._check("pread", offset, len(buffer))
        await self.file.pread(offset, buffer)

    # With faults set up, `pread` and `pwrite` do it all: a call that the file did not do at once
    # would come by twice, and be counted twice.

    def pread_nowait(self, offset: int, buffer: memoryview) -> bool:
        done = not self._faults and self.file.pread_nowait(offset, buffer)
        self.calls += done
        return done

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self._check("pwrite", offset, len(data))
        await self.file.pwrite(offset, data)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        done = not self._faults and self.file.pwrite_nowait(offset, data)
        self.calls += done
        return done

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self._check("write_zeroes", offset, length)
        await self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        self._check("discard", offset, length)
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        self._check("flush", 0, 1)
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        self._check("block_status", offset, length)
        return await self.file.block_status(offset, length)

    async def truncate(self, size: int) -> None:
        self._check("truncate", 0, 1)
        await self.file.truncate(size)

    def _check(self, operation: str, offset: int, length: int) -> None:
        self.calls += 1
        for fault in self._faults:
            if fault.operation not in (operation, "*"):
                continue
            if offset >= fault.end or offset + length <= fault.offset or fault.times == 0:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
            raise OSError(fault.errno, f"{os.strerror(fault.errno)} (injected into {operation})")
