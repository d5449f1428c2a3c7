"""HostFile: the file an image lives in, and what must never happen to it.

Laws.
1. A store that would land on known metadata is not made. It means that the image is corrupt
   (a refcount or an L2 entry lies), and going on would destroy what is still good.
2. Corruption found while running fails the request with EIO, marks the image corrupt (version 3)
   and refuses every later write. Reads of what is sound go on.
3. `power_safe`: no store refers to what is not durable, and nothing is used again or given back
   before it is durable that nothing refers to it. See the laws of the package.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct

from replnbd.block import BlockNode, Buffer
from replnbd.qcow2.format import (
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    OFFSET_INCOMPATIBLE_FEATURES,
    Header,
)

log = logging.getLogger(__name__)


class HostFile:
    """What all parts of an open image share of the file below them."""

    __slots__ = (
        "cluster_bits",
        "cluster_size",
        "corrupt",
        "end",
        "file",
        "incompatible_features",
        "lock",
        "metadata",
        "path",
        "power_safe",
        "read_only",
        "tables",
        "version",
    )

    def __init__(
        self,
        file: BlockNode,
        path: str,
        header: Header,
        file_size: int,
        *,
        read_only: bool,
        power_safe: bool = False,
    ) -> None:
        self.file = file
        self.path = path
        self.read_only = read_only
        self.power_safe = power_safe
        self.version = header.version
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.incompatible_features = header.incompatible_features
        self.corrupt = header.corrupt
        self.end = -(-file_size // header.cluster_size) * header.cluster_size
        """No cluster in use begins here or later; a multiple of the cluster size."""
        self.metadata: set[int] = set()
        """Host offsets of the clusters that hold metadata, and never a guest's data."""
        self.tables: set[int] = set()
        """Those of them that are sound L2 tables of the active L1 table; all, if they are not
        too many (see open.py)."""
        self.lock = asyncio.Lock()
        """Held while L1, L2 tables, refcounts or the header are changed."""
        self.mark(0, 1)
        self.mark(header.l1_table_offset, header.l1_size * 8)
        self.mark(header.refcount_table_offset, header.refcount_table_bytes)

    def mark(self, offset: int, length: int) -> None:
        """The clusters of these bytes hold metadata from now on."""
        size = self.cluster_size
        self.metadata.update(range(offset & -size, offset + length, size))

    def unmark(self, offset: int, length: int) -> None:
        """The clusters of these bytes hold metadata no more."""
        size = self.cluster_size
        clusters = range(offset & -size, offset + length, size)
        self.metadata.difference_update(clusters)
        self.tables.difference_update(clusters)

    def forbids(self, offset: int) -> bool:
        """Whether no cluster of data can be at host offset `offset`."""
        return not offset or offset >= self.end or offset in self.metadata

    def check_writable(self) -> None:
        """OSError if the image must not be changed: EROFS read-only, EIO found corrupt."""
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.path}: opened read-only")
        if self.corrupt:
            raise OSError(
                errno.EIO,
                f"{self.path}: the image is corrupt and not written to any more; "
                "repair it with: qemu-img check -r all",
            )

    async def corruption(self, what: str) -> OSError:
        """Record that the image is corrupt; returns the error to raise for the request."""
        if not self.corrupt:
            log.error("%s: image is corrupt: %s", self.path, what)
            self.corrupt = True
            if self.version >= 3 and not self.read_only:
                self.incompatible_features |= INCOMPATIBLE_CORRUPT
                try:
                    await self.store_features()
                except OSError as exc:
                    log.warning("%s: cannot set the corrupt bit: %s", self.path, exc)
        return OSError(errno.EIO, f"{self.path}: image is corrupt: {what}")

    async def mark_dirty(self) -> None:
        """Make it durable that refcounts may be behind from now on."""
        self.incompatible_features |= INCOMPATIBLE_DIRTY
        await self.store_features()
        await self.file.flush()

    async def mark_clean(self) -> None:
        """The inverse, at the end: refcounts are exact and durable."""
        if self.incompatible_features & INCOMPATIBLE_DIRTY and not self.corrupt:
            self.incompatible_features &= ~INCOMPATIBLE_DIRTY
            await self.store_features()
            await self.file.flush()

    async def store_features(self) -> None:
        """Write the incompatible feature bits: eight bytes, in place."""
        await self.file.pwrite(
            OFFSET_INCOMPATIBLE_FEATURES, struct.pack(">Q", self.incompatible_features)
        )

    async def order(self) -> None:
        """Between a store and one that refers to it, or that uses again what it let go of."""
        if self.power_safe:
            await self.file.flush()

    async def pwrite_ordered(self, offset: int, data: Buffer) -> None:
        """One small store, with `order` after it, and no waiting for other ones."""
        if self.power_safe:
            await self.file.pwrite_fua(offset, data)
        else:
            await self.file.pwrite(offset, data)

    async def check_target(self, offset: int, length: int, what: str) -> None:
        """OSError (and the image is corrupt) if a store of `what` would overwrite metadata."""
        metadata = self.metadata
        for cluster in range(offset & -self.cluster_size, offset + length, self.cluster_size):
            if cluster in metadata:
                raise await self.corruption(
                    f"{what} at offset {cluster:#x} would overwrite metadata; not written"
                )
