"""What an earlier process left: its record, held against the configuration, the files and the boot.

    the last process                    what goes on
    ended in an orderly way             everything, if no file has changed since
    died (kill -9, a bug)               everything: the page cache has all that it wrote
    died with the host (power)          the secondary disks, with all that was flushed. The view
                                        with durability "power"; with "process" it cannot be
                                        trusted: it is lost, and never served

A secondary disk on another server has no time stamps: it is taken for what it was, if it has the
size that it had. Whether that server's host has failed, nobody here knows.

A lost view is not deleted: its overlays are set aside under `FILE.lost`. What a second power
failure finds in their place, before there is a view again, is of no use to anybody, and goes.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from replnbd.block import FileNode, is_nbd_uri
from replnbd.block.directory import new_file, rename_file, sync_directory, sync_file
from replnbd.block.threads import run_blocking
from replnbd.daemon.config import IMAGES, DiskConfig
from replnbd.errors import ConfigError
from replnbd.qcow2 import LastEnd, read_header
from replnbd.replication import DiskRecord, Durability, FileStamp, Journal, Record, Stage
from replnbd.replication.record_file import FILE_BYTES

log = logging.getLogger(__name__)

SUFFIX = ".journal"
LOST_SUFFIX = ".lost"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OVERLAYS = ("hidden", "active")
_POWER_FAILURE = "a power failure, or the host ended without replnbd: the view cannot be trusted"


class Past:
    """Where the journal of a configuration's disks is, and what it says of the last process."""

    def __init__(self, path: str, journal: Journal | None, record: Record | None) -> None:
        self.path = path
        self.journal = journal
        """None if there is none yet: `make_journal`."""
        self.record = record
        self.boot = boot_id()
        self.end: LastEnd | None = None
        """How the last process ended."""
        if record is not None:
            if record.files is not None:
                self.end = LastEnd.ORDERLY
            elif record.boot == self.boot:
                self.end = LastEnd.PROCESS_DEATH
            else:
                self.end = LastEnd.POWER_FAILURE

    async def begin(self) -> None:
        """Record that the files are in use, before one of them changes: to open an image can write
        to it, and who dies then must not leave files that seem to be changed by somebody else."""
        if self.record is not None and self.end is not LastEnd.PROCESS_DEATH:
            # Until all is put in order, a power failure remains one.
            failed = self.end is LastEnd.POWER_FAILURE
            await self._write(None, self.record.boot if failed else self.boot)

    async def give_up(self, disks: Sequence[DiskConfig]) -> None:
        """Undo `begin`: the process ends before it has served anybody, all is closed."""
        if self.end is LastEnd.ORDERLY:
            await self._write(await stamp_files(disks), self.boot)

    async def _write(self, files: dict[str, FileStamp] | None, boot: str) -> None:
        assert self.journal is not None
        assert self.record is not None
        record = msgspec.structs.replace(self.record, files=files, boot=boot)
        await self.journal.write(record, durable=True)

    async def make_journal(self) -> Journal:
        """A new one; ConfigError if that cannot be."""
        async with new_file(self.path) as file:
            # All of it now: a full disk must not keep a failover from being recorded.
            await file.pwrite(0, bytes(FILE_BYTES))
        return Journal(FileNode.open(self.path))


def boot_id() -> str:
    """Another one whenever the host starts; "" if the system does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


async def open_past(disks: Sequence[DiskConfig]) -> Past:
    """Open the journal, if there is one; ConfigError or ImageError if the record is not of these
    disks and files. Nothing has changed then."""
    path = _find_journal(disks)
    if not os.path.lexists(path):
        return Past(path, None, None)
    journal = Journal(FileNode.open(path))
    try:
        record = await journal.load()
        past = Past(path, journal, record)
        if record is not None:
            _match(past, record, disks)
            _check_files(past, record, disks)
            await _check_overlays(past, record, disks)
    except BaseException:
        await journal.close()
        raise
    return past


async def holds_views(disks: Sequence[DiskConfig]) -> bool:
    """Whether the last process that had them left something in overlays that the disks lack: a
    commit under way, for one. ConfigError or ImageError, as `open_past`."""
    past = await open_past(disks)
    if past.journal is not None:
        await past.journal.close()
    return past.record is not None and any(map(_has_view, past.record.disks))


async def remove_journal(disks: Sequence[DiskConfig]) -> None:
    """Nothing of what it says is so any more, and there are no views. ConfigError."""
    path = _find_journal(disks)
    try:
        if os.path.lexists(path):
            await run_blocking(os.unlink, path)
            await run_blocking(sync_directory, path)
    except OSError as exc:
        raise ConfigError(f"cannot remove {path}: {exc.strerror}") from exc


async def sync_names(past: Past, disks: Sequence[DiskConfig]) -> None:
    """Make the names of our files durable: who made one may have died just before. ConfigError."""
    if past.end is LastEnd.ORDERLY:
        return
    ours = [past.path, *(getattr(disk, key) for disk in disks for key in _OVERLAYS)]
    for path in {os.path.dirname(path): path for path in ours if os.path.lexists(path)}.values():
        try:
            await run_blocking(sync_directory, path)
        except OSError as exc:
            where = os.path.dirname(path)
            raise ConfigError(f"cannot sync the directory {where}: {exc.strerror}") from exc


async def set_aside_lost(past: Past, disks: Sequence[DiskConfig]) -> None:
    """After a power failure: overlays that may be anything get another name, and disks whose view
    they were have lost it. ConfigError if that cannot be done."""
    if past.end is not LastEnd.POWER_FAILURE:
        return
    assert past.record is not None
    for disk, record in zip(disks, past.record.disks, strict=True):
        if record.durability is Durability.POWER:
            continue
        for key in _OVERLAYS:
            path = getattr(disk, key)
            if not os.path.lexists(path):
                continue
            name = os.path.basename(path) + LOST_SUFFIX
            log.warning("after a power failure %s is not used any more", path)
            try:
                if record.lost is None:
                    await run_blocking(rename_file, path, name)
                else:
                    await run_blocking(os.unlink, path)
            except OSError as exc:
                raise ConfigError(f"cannot set {path} aside: {exc.strerror}") from exc
        record.emptying = []
        if _has_view(record):
            record.lost = record.error = _POWER_FAILURE


def check_size(past: Past, disk: DiskConfig, size: int) -> None:
    """ConfigError if a disk has another size than it had."""
    for record in past.record.disks if past.record is not None else ():
        if record.name == disk.name and record.size != size and record.stage is not Stage.NONE:
            raise ConfigError(
                f"{disk.secondary} has {size} bytes, and had {record.size} when the last replnbd"
                f" ended in stage '{record.stage.value}': {_begin_anew(past.path)}"
            )


async def stamp_files(disks: Sequence[DiskConfig]) -> dict[str, FileStamp]:
    """What all images are like now, durably, for the record of an orderly end; OSError."""
    stamps = {}
    for disk in disks:
        for key in IMAGES:
            path = getattr(disk, key)
            if not is_nbd_uri(path):
                await run_blocking(sync_file, path)  # a time stamp is none of what a flush is for
            stamps[_role(disk, key)] = _stamp(path)
    return stamps


def _find_journal(disks: Sequence[DiskConfig]) -> str:
    """The journal stands beside a hidden overlay: the first disk's, if it is a new one."""
    paths = [f"{disk.hidden}{SUFFIX}" for disk in disks]
    found = [path for path in paths if os.path.lexists(path)]
    if len(found) > 1:
        raise ConfigError(
            f"{found[0]} and {found[1]} are journals of two groups: serve those disks from two"
            " configurations, as before, or remove the journal of the group that is not needed"
        )
    return found[0] if found else paths[0]


def _match(past: Past, record: Record, disks: Sequence[DiskConfig]) -> None:
    """Bring the record's disks into the configuration's order; ConfigError if they are others.
    What was never started, or was reset, binds nobody."""
    kept = {(each.name, each.top_id): each for each in record.disks}
    wanted = [(disk.name, disk.top_id or "") for disk in disks]
    if sorted(kept) != sorted(wanted):
        if all(each.stage is Stage.NONE for each in record.disks):
            record.disks = []
        else:
            stages = ", ".join(f"'{each.name}' ({each.stage.value})" for each in record.disks)
            raise ConfigError(
                f"{past.path} is of other disks: {stages}; serve those, or {_begin_anew(past.path)}"
            )
    record.disks = [
        kept[name, top_id] if record.disks else DiskRecord(name=name, top_id=top_id, size=0)
        for name, top_id in wanted
    ]


def _check_files(past: Past, record: Record, disks: Sequence[DiskConfig]) -> None:
    """ConfigError if a view cannot be what it was, because a file is missing or has changed."""
    for disk, kept in zip(disks, record.disks, strict=True):
        for key in IMAGES if _has_view(kept) else ():
            path = getattr(disk, key)
            try:
                found = _stamp(path)
            except FileNotFoundError:
                if key in _OVERLAYS and _is_lost(past, kept):
                    continue  # set aside by a start that did not get further
                raise ConfigError(
                    f"{path} is missing, and '{disk.name}' is in stage '{kept.stage.value}':"
                    f" put it back, or {_begin_anew(past.path)}"
                ) from None
            except OSError as exc:
                raise ConfigError(f"cannot open {path}: {exc.strerror}") from exc
            if record.files is not None and found != record.files.get(_role(disk, key)):
                raise ConfigError(
                    f"{path} has changed since the last replnbd ended, and with it the view of"
                    f" '{disk.name}': put it back as it was, or {_begin_anew(past.path)}"
                )


async def _check_overlays(past: Past, record: Record, disks: Sequence[DiskConfig]) -> None:
    """ConfigError if an overlay is another one than it was: after a death, no time stamp tells."""
    for disk, kept in zip(disks, record.disks, strict=True):
        for layer, identity in (kept.overlays or {}).items() if _has_view(kept) else ():
            path = getattr(disk, layer.value)
            if _is_lost(past, kept):
                continue  # they may be anything
            file = FileNode.open(path, read_only=True, lock=False)
            try:
                found = (await read_header(file)).identity
            finally:
                await file.close()
            if found != identity:
                raise ConfigError(
                    f"{path} is not the overlay that '{disk.name}' had when the last replnbd ended"
                    f" in stage '{kept.stage.value}': put that one back, or"
                    f" {_begin_anew(past.path)}"
                )


def _is_lost(past: Past, record: DiskRecord) -> bool:
    """Whether the overlays were not to survive what happened, or have not survived before."""
    power_failure = past.end is LastEnd.POWER_FAILURE
    return record.lost is not None or (power_failure and record.durability is Durability.PROCESS)


def _has_view(record: DiskRecord) -> bool:
    """Whether the overlays have something that is not in the secondary disk."""
    if record.stage is Stage.DONE:
        return not record.promoted
    return record.stage is not Stage.NONE


def _begin_anew(path: str) -> str:
    return f"to begin anew, with a full synchronisation, remove {path} and the overlays"


def _role(disk: DiskConfig, key: str) -> str:
    return f"{disk.name}/{key}"


def _stamp(path: str) -> FileStamp:
    if is_nbd_uri(path):
        return FileStamp(0, 0)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return FileStamp(0, 0)  # the name of a device: says nothing of its content
    return FileStamp(status.st_size, status.st_mtime_ns)
