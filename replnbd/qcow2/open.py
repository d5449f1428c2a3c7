"""Opening an image: which ones, in which state, and with what put in order first."""

from __future__ import annotations

import logging
import struct
from array import array
from enum import StrEnum

from replnbd.block import BlockNode
from replnbd.errors import ImageError, ImageUnsupportedError
from replnbd.qcow2.allocation import Allocator
from replnbd.qcow2.check import repair_leaks, repair_refcounts
from replnbd.qcow2.entries import OFFSET_MASK, Shape
from replnbd.qcow2.format import (
    AUTOCLEAR_BITMAPS,
    INCOMPATIBLE_DIRTY,
    OFFSET_AUTOCLEAR_FEATURES,
    OFFSET_INCOMPATIBLE_FEATURES,
    Header,
    read_header,
)
from replnbd.qcow2.host import HostFile
from replnbd.qcow2.image import Qcow2Node
from replnbd.qcow2.mapping import Mapping, read_l1
from replnbd.qcow2.recount import recount
from replnbd.qcow2.refcounts import load_refcounts
from replnbd.qcow2.state import Image

log = logging.getLogger(__name__)


class LastEnd(StrEnum):
    """How the last process that wrote an image ended."""

    ORDERLY = "orderly end"
    PROCESS_DEATH = "process death"
    """All that it stored is there: the page cache has it."""
    POWER_FAILURE = "power failure"
    """What it flushed is there."""


CACHE_BYTES = 16 << 20
"""Of L2 slices, for one image: as much as maps 60 GiB of an overlay, at 64 KiB clusters."""

_TABLES_GUARDED_MAX = 1 << 17
"""L2 tables to remember as metadata that data must not overwrite; more would take 10 MB and up.
An image has as many from 32 TiB on, or if its clusters are tiny."""


async def open_qcow2(
    file: BlockNode,
    *,
    backing: BlockNode | None = None,
    read_only: bool = False,
    name: str = "",
    cache_bytes: int = CACHE_BYTES,
    power_safe: bool = False,
    last_end: LastEnd | None = None,
) -> Qcow2Node:
    """Open the qcow2 image in `file`. The node owns `file` from then on, but not `backing`.

    `backing` is what unallocated ranges show. It is never opened from the name in the header
    (CVE-2024-4467): the caller decides, and `Qcow2Node.header.backing_file` informs.

    `power_safe`: what is in the image survives a power failure, as on a disk: all that was flushed
    is there, and of what was not, each sector is the old or the new one. For that, new data is
    flushed before the entry that shows it (not where there is no backing: new clusters are blank
    there), and the image is marked dirty, durably, while it is open for writing, so that whoever
    opens it after an untimely end (replnbd or QEMU) first rebuilds its refcounts. Version 2 has no
    such bit: unless `last_end` tells, they are counted each time.

    `last_end`: how the last process that wrote the image ended, if that is known. After a death,
    what was leaked is given back; after a power failure, refcounts are rebuilt.

    Raises ImageError if the image is malformed, or has a backing file and no `backing` is given,
    or cannot be trusted for writing; ImageUnsupportedError if it needs what replnbd does not have.
    """
    header = await read_header(file)
    path = getattr(file, "path", None) or file.name
    if header.backing_file is not None and backing is None:
        raise ImageError(
            f"{path}: the image has a backing file ({header.backing_file!r}), and none was given"
        )
    file_size = file.size
    if not read_only:
        doubtful = power_safe and header.version < 3 and last_end is None
        doubtful = doubtful or last_end is LastEnd.POWER_FAILURE
        header, file_size = await _prepare_writing(file, path, header, doubtful=doubtful)
        if last_end is LastEnd.PROCESS_DEATH:
            await _give_back_leaks(file, path, header, file_size)
    host = HostFile(
        file, path, header, file_size, read_only=read_only, power_safe=power_safe and not read_only
    )
    shape = Shape(header)
    l1 = await read_l1(host, header.l1_table_offset, header.l1_size)
    _guard_tables(host, shape, l1)
    mapping = Mapping(host, shape, l1, header.l1_table_offset, cache_bytes)
    allocator = None
    if not read_only:
        refcounts = await load_refcounts(host, header)
        allocator = Allocator(host, refcounts, blank=power_safe and backing is None)
        mapping.allocator = allocator
        if power_safe and header.version >= 3:
            await host.mark_dirty()
    image = Image(host, header, mapping, allocator, backing)
    return Qcow2Node(image, header, name or file.name)


async def _prepare_writing(
    file: BlockNode, path: str, header: Header, *, doubtful: bool
) -> tuple[Header, int]:
    """Refuse what must not be written to, repair what is dirty, clear unknown autoclear bits.
    `doubtful`: the refcounts may be wrong even if the image is not dirty.
    Returns the header and the size of the file, which a repair may have changed."""
    file_size = file.size
    if header.corrupt:
        raise ImageError(
            f"{path}: the image is marked corrupt and can only be opened read-only; "
            "repair it with: qemu-img check -r all"
        )
    if header.autoclear_features & AUTOCLEAR_BITMAPS and header.bitmaps is not None:
        raise ImageUnsupportedError(
            f"{path}: the image has {header.bitmaps.nb_bitmaps} persistent bitmaps, which "
            "writing would make wrong; remove them with: qemu-img bitmap --remove"
        )
    if header.dirty:
        log.warning("%s: the image was not closed properly: repairing its refcounts", path)
    if header.dirty or doubtful:
        if await recount(file, header, file_size, only_leaks=False) is None:
            report = await repair_refcounts(file, header)
            file_size = max(file_size, report.image_end_offset)
        elif header.dirty:
            await file.flush()
            features = struct.pack(">Q", header.incompatible_features & ~INCOMPATIBLE_DIRTY)
            await file.pwrite(OFFSET_INCOMPATIBLE_FEATURES, features)
            await file.flush()
        header = await read_header(file, file_size=file_size)
    if header.autoclear_features:
        # "an autoclear bit ... must be cleared" by who writes and does not know it: we know none.
        await file.pwrite(OFFSET_AUTOCLEAR_FEATURES, struct.pack(">Q", 0))
    return header, file_size


async def _give_back_leaks(file: BlockNode, path: str, header: Header, file_size: int) -> None:
    leaks = await recount(file, header, file_size, only_leaks=True)
    if leaks is None:
        report = await repair_leaks(file, header, file_size=file_size)
        leaks = report.leaks_fixed
    if leaks:
        log.info("%s: gave back %d clusters that the last process had leaked", path, leaks)


def _guard_tables(host: HostFile, shape: Shape, l1: array[int]) -> None:
    if len(l1) - l1.count(0) > _TABLES_GUARDED_MAX:
        return
    # What is wrong with the others is found, and told, when they are needed.
    host.tables.update(
        entry & OFFSET_MASK for entry in l1 if entry and shape.l1_fault(entry) is None
    )
    host.tables -= host.metadata
    host.metadata |= host.tables
