"""Histories: where the history of a disk is, and how it is opened, made and looked at."""

from __future__ import annotations

import os

from replnbd.block import FileNode
from replnbd.block.directory import new_file
from replnbd.daemon.config import DiskConfig
from replnbd.daemon.recovery import boot_id
from replnbd.qcow2 import LastEnd
from replnbd.replication import History, Role
from replnbd.replication.history import SUFFIX, HistoryRecord, file_bytes, read_record


def history_path(config: DiskConfig) -> str:
    """Where the history of a disk is: beside it, unless the configuration says so."""
    return config.history or f"{config.image}{SUFFIX}"


async def open_history(config: DiskConfig, size: int) -> History | None:
    """The history of a disk, if it has one. ConfigError, ImageError."""
    path = _existing_history(config)
    if path is None:
        return None
    file = FileNode.open(path)
    try:
        return await History.open(file, size, boot_id(), Role.PRIMARY)
    except BaseException:
        await file.close()
        raise


async def make_history(config: DiskConfig, size: int, role: Role) -> History:
    """A new one. ConfigError."""
    path = history_path(config)
    async with new_file(path) as file:
        # All of it now: a full disk must not refuse writes later.
        await file.allocate(file_bytes(size))
    file = FileNode.open(path)
    try:
        return await History.open(file, size, boot_id(), role)
    except BaseException:
        await file.close()
        raise


async def role_of(config: DiskConfig) -> Role | None:
    """What a disk was to its peer last; None if it has no history. ConfigError, ImageError."""
    record = await _read_record(config)
    return None if record is None else record.role


async def last_end_of(config: DiskConfig) -> LastEnd | None:
    """How the last process that had a disk ended; None if it has no history, as above."""
    record = await _read_record(config)
    if record is None:
        return None
    if record.orderly:
        return LastEnd.ORDERLY
    return LastEnd.PROCESS_DEATH if record.boot == boot_id() else LastEnd.POWER_FAILURE


async def _read_record(config: DiskConfig) -> HistoryRecord | None:
    path = _existing_history(config)
    if path is None:
        return None
    file = FileNode.open(path, read_only=True, lock=False)
    try:
        return await read_record(file)
    finally:
        await file.close()


def _existing_history(config: DiskConfig) -> str | None:
    path = history_path(config)
    return path if os.path.lexists(path) else None
