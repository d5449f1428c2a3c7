"""Demotion: a primary's disks become a standby's, in the same daemon and after it.

Once they have taken over they are a primary's again, at the next start; but not before all that the
standby had is in the disk itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from replnbd.daemon.config import DiskConfig, has_no_place_beside
from replnbd.daemon.histories import history_path, role_of
from replnbd.daemon.recovery import holds_views, remove_journal
from replnbd.replication import Role
from replnbd.replication.history import SUFFIX


async def begins_as_standby(disks: Sequence[DiskConfig]) -> bool:
    """Whether disks in mode primary have been demoted. If only some have, their process died amid
    that command, and all are: what they took on alone is not overwritten for it. ConfigError if
    what they were as a standby's cannot be understood."""
    if await holds_views([demoted(disk) for disk in disks]):
        return True
    roles = [await role_of(disk) for disk in disks]
    return Role.STANDBY in roles


async def forget_standby(disks: Sequence[DiskConfig]) -> None:
    """They are a primary's: that they took over once, as a standby, is nobody's fence any more.
    ConfigError."""
    await remove_journal([demoted(disk) for disk in disks])


def view_name(disk: DiskConfig) -> str:
    """The export of what a disk in mode primary shows as a standby. Who uses it when that takes
    over finds it as the primary's, too."""
    return f"{disk.name}-top"


def demoted(disk: DiskConfig) -> DiskConfig:
    """The table of a disk in mode primary, as that of a standby's: with the view NAME-top, and the
    overlays beside the disk; where there is no such place, beside its history."""
    assert disk.disk is not None
    place = disk.disk
    if has_no_place_beside(place):
        place = history_path(disk).removesuffix(SUFFIX)
    return msgspec.structs.replace(
        disk,
        mode="secondary",
        top_id=view_name(disk),
        secondary=disk.disk,
        disk=None,
        to=None,
        sync=None,
        hidden=f"{place}.hidden.qcow2",
        active=f"{place}.active.qcow2",
    )
