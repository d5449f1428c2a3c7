"""PrimarySide: the disks in mode primary, each with its export NAME."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from replnbd.block import BlockNode
from replnbd.daemon.config import DiskConfig
from replnbd.daemon.demotion import demoted, forget_standby, view_name
from replnbd.daemon.describe import primary_nodes, primary_status
from replnbd.daemon.histories import history_path, last_end_of, make_history, open_history
from replnbd.daemon.images import check_sectors, make_overlays, open_image
from replnbd.daemon.quorum import PrimaryQuorum
from replnbd.daemon.side import Services, Side
from replnbd.errors import ConfigError, StateError
from replnbd.replication import (
    RESYNC_BITMAP,
    History,
    NoTarget,
    PeerNode,
    PrimaryDisk,
    PrimaryGroup,
    Role,
    peer_export,
    unproven_runs,
)
from replnbd.server import Export

log = logging.getLogger(__name__)


class PrimarySide(Side):
    """See the head of this file."""

    group: PrimaryGroup

    def __init__(self, disks: Sequence[DiskConfig], services: Services) -> None:
        super().__init__(disks, services)
        self.group = PrimaryGroup(())
        self._quorums: list[PrimaryQuorum] = []

    async def open(self, created: list[str]) -> None:
        """See `Side`."""
        disks: list[PrimaryDisk] = []
        try:
            for config in self.configs:
                disk = await self._open_disk(config, created)
                disks.append(disk)
        finally:
            self.group = group = PrimaryGroup(disks)
            bus = self.services.events
            self._quorums = [PrimaryQuorum(disk, group, bus) for disk in disks]
        await forget_standby(self.configs)
        for config, disk in zip(self.configs, disks, strict=True):
            export = self.new_export(disk.name, disk.name, f"disk {disk.name}")
            assert export is not None
            export.connections_max = config.max_connections
            self.services.server.add_export(export)
            # Without it a source would take this for a server that is none of ours.
            node = PeerNode(peer_export(disk.name), NoTarget(disk))
            self.services.server.add_export(
                Export(node.name, node, listed=False, allow=config.allow)
            )
            disk.resume()
        for config, disk in zip(self.configs, disks, strict=True):
            again = self.new_export(view_name(config), disk.name, f"disk {disk.name}")
            if again is not None and again.name not in self.services.server.exports:
                again.listed, again.connections_max = False, config.max_connections
                self.services.server.add_export(again)

    async def close(self) -> None:
        """See `Side`."""
        await self.group.close()

    async def demote(self) -> None:
        """Whatever becomes of the disks: from now on they are a standby's. StateError if it cannot
        be, and nothing has changed."""
        self.group.check_demote()
        created: list[str] = []
        try:
            for config, disk in zip(self.configs, self.group.disks, strict=True):
                await make_overlays(demoted(config), disk.disk.size, created)
            await self.group.demote()
        except (ConfigError, StateError) as exc:
            for path in created:
                os.unlink(path)
            raise StateError(str(exc)) from exc

    def verify(self) -> None:
        """See `control.Backend`."""
        for disk in self.group.disks:
            disk.link.check_verify()
        for disk in self.group.disks:
            disk.link.verify()

    def status(self) -> dict[str, Any]:
        """See `Side`."""
        exports = self.services.server.exports
        return {"disks": [primary_status(disk, exports) for disk in self.group.disks]}

    def nodes(self) -> list[BlockNode]:
        """See `Side`."""
        return [node for disk in self.group.disks for node in primary_nodes(disk)]

    def quorums(self) -> list[PrimaryQuorum]:
        """See `Side`."""
        return self._quorums

    def new_export(
        self, name: str, node_name: str, description: str, *, writable: bool = True
    ) -> Export | None:
        """See `Side`."""
        for disk, config in zip(self.group.disks, self.configs, strict=True):
            if node_name == disk.node.name:
                return Export(
                    name,
                    disk.node,
                    description,
                    writable,
                    bitmaps={RESYNC_BITMAP: partial(unproven_runs, disk.history)},
                    with_digests=True,
                    digest_key=disk.history.digest_key,
                    allow=config.allow,
                )
        return None

    async def _open_disk(self, config: DiskConfig, created: list[str]) -> PrimaryDisk:
        assert config.disk is not None
        node = await open_image(
            config.disk,
            format=config.format,
            name=f"{config.name}-disk",
            last_end=await last_end_of(config),
        )
        try:
            check_sectors(config.disk, node.size)
            history = await self._open_history(config, node.size, created)
        except BaseException:
            await node.close()
            raise
        to = config.to or history.record.to
        if history.record.to is not None:
            # It took over once, as a standby, and sends its writes since.
            await history.end_as_standby()
        return PrimaryDisk(
            config.name,
            node,
            history,
            to,
            sync=bool(config.sync),
            bus=self.services.events,
            jobs=self.services.jobs,
        )

    async def _open_history(self, config: DiskConfig, size: int, created: list[str]) -> History:
        history = await open_history(config, size)
        if history is None:
            history = await make_history(config, size, Role.PRIMARY)
            created.append(history_path(config))
        elif history.record.role is Role.STANDBY:
            await history.abandon()
            raise StateError(f"'{config.name}' is a standby's disk: its primary has the truth")
        return history
