"""Opening images: from a path and a format to a node, and from a [[disk]] table to a disk."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from replnbd.block import BlockNode, FileNode, NbdNode, is_nbd_uri
from replnbd.daemon.config import DiskConfig
from replnbd.daemon.histories import make_history, open_history
from replnbd.errors import ConfigError, ImageUnsupportedError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.qcow2 import LastEnd, Qcow2Node, create_image, open_qcow2
from replnbd.replication import Durability, Layer, Role, StandbyDisk

log = logging.getLogger(__name__)

SECTOR = 512
"""Bytes. QEMU counts disks in sectors; one that ends within a sector has two lengths."""


async def open_image(
    path: str | Path,
    *,
    format: str | None = None,
    read_only: bool = False,
    backing: BlockNode | None = None,
    name: str = "",
    power_safe: bool | None = None,
    last_end: LastEnd | None = None,
) -> BlockNode:
    """Open a disk image as a node; close it when done.

    `path` may be an NBD URI (see `parse_nbd_uri`): then the disk is what that server exports, and
    raw. `format` is "raw" or "qcow2"; None: qcow2 if the name ends so, else raw, never guessed from
    the content. `backing` is what a qcow2's unallocated ranges show: the name that its header
    records is never opened. The file is locked, as QEMU locks it, until the node is closed.
    `power_safe` (None: a disk is, an overlay is not) and `last_end`: see `open_qcow2`.

    Raises ConfigError (missing, unreadable, in use, unknown format) or ImageError (damaged).
    """
    if isinstance(path, str) and is_nbd_uri(path):
        if format not in (None, "raw"):
            raise ConfigError(f"cannot open {path}: over NBD a disk is raw, not {format}")
        return await NbdNode.open(path, read_only=read_only, name=name)
    path = os.fspath(path)
    if format is None:
        format = "qcow2" if path.endswith(".qcow2") else "raw"
    if format not in ("raw", "qcow2"):
        raise ConfigError(f"cannot open {path}: format must be raw or qcow2, not '{format}'")
    file = FileNode.open(path, read_only=read_only, name=name)
    if format == "raw":
        return file
    try:
        return await open_qcow2(
            file,
            backing=backing,
            read_only=read_only,
            name=name,
            power_safe=backing is None if power_safe is None else power_safe,
            last_end=last_end,
        )
    except BaseException:
        await file.close()
        raise


def check_sectors(path: str, size: int) -> None:
    """ConfigError for a disk that is none in QEMU's eyes."""
    if size == 0 or size % SECTOR:
        raise ConfigError(f"{path}: its size, {size} bytes, is not a positive multiple of {SECTOR}")


async def open_disk(
    config: DiskConfig,
    bus: EventBus,
    jobs: JobRegistry,
    created: list[str],
    last_end: LastEnd | None,
) -> StandbyDisk:
    """Open, and where missing create, the images of a secondary disk.

    The paths of new images go to `created`. `last_end`: of the last process. If one of the
    images is not good, the others are closed again.
    """
    assert config.secondary is not None
    assert config.hidden is not None
    assert config.active is not None
    assert config.top_id is not None
    async with AsyncExitStack() as undo:
        secondary = await open_image(
            config.secondary,
            format=config.format,
            name=f"{config.name}-secondary",
            last_end=last_end,
        )
        undo.push_async_callback(secondary.close)
        check_sectors(config.secondary, secondary.size)
        hidden = await _open_overlay(
            config, "hidden", secondary, config.secondary, config.image_format,
            undo, created, last_end,
        )  # fmt: skip
        active = await _open_overlay(
            config, "active", hidden, config.hidden, "qcow2", undo, created, last_end,
        )  # fmt: skip
        history = await open_history(config, secondary.size)
        if history is not None:
            undo.push_async_callback(history.abandon)
        disk = StandbyDisk(
            config.name,
            config.top_id,
            secondary=secondary,
            hidden=hidden,
            active=active,
            durability=Durability(config.durability),
            identities={
                Layer.HIDDEN: hidden.header.identity,
                Layer.ACTIVE: active.header.identity,
            },
            history=history,
            make_history=partial(make_history, config, secondary.size, Role.STANDBY),
            bus=bus,
            jobs=jobs,
        )
        undo.pop_all()
    return disk


async def make_overlays(config: DiskConfig, size: int, created: list[str]) -> None:
    """What `open_disk` would create, for a disk of `size` bytes. ConfigError."""
    assert config.secondary is not None
    assert config.hidden is not None
    assert config.active is not None
    await _make_overlay(config.hidden, size, config.secondary, config.image_format, created)
    await _make_overlay(config.active, size, config.hidden, "qcow2", created)


async def _make_overlay(
    path: str, size: int, backing_path: str, backing_format: str, created: list[str]
) -> None:
    if os.path.lexists(path):
        return
    recorded = _relative(backing_path, path)
    await create_image(
        path,
        size,
        backing_file=recorded,
        backing_format=backing_format,
        identity=secrets.token_bytes(16),
    )
    created.append(path)
    log.info("created %s over %s (%d bytes)", path, recorded, size)


async def _open_overlay(
    config: DiskConfig,
    key: str,
    backing: BlockNode,
    backing_path: str,
    backing_format: str,
    undo: AsyncExitStack,
    created: list[str],
    last_end: LastEnd | None,
) -> Qcow2Node:
    path = getattr(config, key)
    await _make_overlay(path, backing.size, backing_path, backing_format, created)
    overlay = await open_image(
        path,
        format="qcow2",
        backing=backing,
        name=f"{config.name}-{key}",
        power_safe=config.durability == "power",
        last_end=last_end,
    )
    undo.push_async_callback(overlay.close)
    assert isinstance(overlay, Qcow2Node)
    if overlay.header.nb_snapshots:
        raise ImageUnsupportedError(
            f"{path}: nb_snapshots is {overlay.header.nb_snapshots}: an overlay with internal"
            " snapshots cannot be emptied; remove them with: qemu-img snapshot -d"
        )
    if overlay.header.backing_file is None:
        overlay.backing = None  # `start` refuses it, as QEMU does
    elif not _same_file(overlay.header.backing_file, path, backing_path):
        log.warning(
            "%s records '%s' as its backing file, the configuration says %s: following the"
            " configuration",
            path,
            overlay.header.backing_file,
            backing_path,
        )
    return overlay


def _relative(target: str, overlay: str) -> str:
    """`target` as an image beside it should name it: it stays true when both move together."""
    if is_nbd_uri(target):
        return target
    name = os.path.relpath(target, os.path.dirname(overlay))
    # "a:b" would be a protocol and a name to QEMU.
    return f"./{name}" if ":" in name.split("/", 1)[0] else name


def _same_file(recorded: str, overlay: str, configured: str) -> bool:
    if is_nbd_uri(configured):
        return recorded == configured
    try:
        return os.path.samefile(os.path.join(os.path.dirname(overlay), recorded), configured)
    except (OSError, ValueError):
        return False
