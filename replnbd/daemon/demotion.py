"""Demotion: a primary's disks become a standby's, in the same daemon and after it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from replnbd.daemon.config import DiskConfig
from replnbd.daemon.histories import role_of
from replnbd.errors import ConfigError
from replnbd.replication import Role


async def begins_as_standby(disks: Sequence[DiskConfig]) -> bool:
    """Whether disks in mode primary have been demoted. ConfigError if only some have."""
    roles = {disk.name: await role_of(disk) for disk in disks}
    standbys = [name for name, role in roles.items() if role is Role.STANDBY]
    if standbys and len(standbys) < len(roles):
        names = ", ".join(f"'{name}'" for name in standbys)
        raise ConfigError(f"{names} are disks of a standby, and the others of a primary")
    return bool(standbys)


def demoted(disk: DiskConfig) -> DiskConfig:
    """The table of a disk in mode primary, as that of a standby's: with the view NAME-top, and the
    overlays beside the disk."""
    assert disk.disk is not None
    return msgspec.structs.replace(
        disk,
        mode="secondary",
        top_id=f"{disk.name}-top",
        secondary=disk.disk,
        disk=None,
        to=None,
        sync=None,
        hidden=f"{disk.disk}.hidden.qcow2",
        active=f"{disk.disk}.active.qcow2",
    )
