"""StandbySide: the disks in mode secondary, each with exports NAME, TOP-ID and x-replnbd/NAME."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from replnbd.block import BlockNode, parse_nbd_uri
from replnbd.daemon.config import DiskConfig
from replnbd.daemon.describe import standby_nodes, standby_status
from replnbd.daemon.images import open_disk
from replnbd.daemon.recovery import (
    Past,
    check_size,
    open_past,
    set_aside_lost,
    stamp_files,
    sync_names,
)
from replnbd.daemon.side import Services, Side
from replnbd.errors import ConfigError, StateError
from replnbd.replication import (
    CHECKPOINT_BITMAP,
    RESYNC_BITMAP,
    RESYNC_CONTEXT,
    Group,
    NoDisk,
    PeerNode,
    StandbyDisk,
    Target,
    peer_export,
    primary_changes,
    standby_changes,
    unproven_changes,
)
from replnbd.server import Connection, Export

log = logging.getLogger(__name__)


class StandbySide(Side):
    """See the head of this file."""

    group: Group

    def __init__(self, disks: Sequence[DiskConfig], services: Services) -> None:
        super().__init__(disks, services)
        self.group = Group(())
        self._past: Past | None = None
        self._opened = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, created: list[str]) -> None:
        """See `Side`."""
        self._past = past = await open_past(self.configs)
        self.group = Group((), past.journal)  # which closes the journal, come what may
        await sync_names(past, self.configs)
        await set_aside_lost(past, self.configs)
        try:
            await past.begin()
        except OSError as exc:
            raise ConfigError(f"cannot write {past.path}: {exc.strerror}") from exc
        await self._open_disks(past, created)

    async def close(self) -> None:
        """See `Side`; with what the next process needs to know that all is in order."""
        for task in tuple(self._tasks):
            await asyncio.wait([task])
        try:
            in_order = False
            try:
                await self.group.close()
                in_order = True
            finally:
                await self._record_end(in_order=in_order)
        finally:
            await self.group.keeper.close()

    def status(self) -> dict[str, Any]:
        """See `Side`."""
        exports = self.services.server.exports
        return {
            "generation": self.group.generation,
            "recovered-from": self._past.end if self._past is not None else None,
            "suspended": self.group.keeper.suspended,
            "disks": [standby_status(disk, exports) for disk in self.group.disks],
        }

    def nodes(self) -> list[BlockNode]:
        """See `Side`."""
        return [node for disk in self.group.disks for node in standby_nodes(disk)]

    def new_export(
        self,
        name: str,
        node_name: str,
        description: str,
        *,
        writable: bool = True,
        connections_max: int | None = None,
    ) -> Export | None:
        """See `Side`: of a gate, whatever the export is called, with its bitmaps and allow-list.

        The images below the gates belong to their disk: written from outside they would break the
        view, and read from outside they would not be coherent."""
        for disk, config in zip(self.group.disks, self.configs, strict=True):
            if node_name == disk.primary.name:
                node, allow = disk.primary, config.allow
                changes = partial(primary_changes, disk)
            elif node_name == disk.standby.name:
                node, allow = disk.standby, config.top_allow
                changes = partial(standby_changes, disk)
            else:
                continue
            export = Export(
                name,
                node,
                description,
                writable,
                bitmaps={
                    CHECKPOINT_BITMAP: changes,
                    RESYNC_BITMAP: partial(unproven_changes, disk.peer),
                },
                with_digests=node is disk.primary,
                digest_key=disk.peer.digest_key,
                allow=allow,
                connections_max=connections_max,
                writers=partial(_writers, disk) if node is disk.primary else None,
            )
            if disk.promoted and node is disk.primary:
                export.refusal = disk.fence_reason
            return export
        return None

    async def settle(self) -> None:
        """See `Side`."""
        for task in tuple(self._tasks):
            await task

    def verify(self) -> None:
        """See `control.Backend`: what has taken over is a primary's."""
        peers = [disk.peer for disk in self.group.disks if disk.peer.sending]
        links = [peer.link for peer in peers if peer.link is not None]
        if not links:
            raise StateError("a standby has nothing to compare with: ask its primary")
        for link in links:
            link.check_verify()
        for link in links:
            link.verify()

    async def replicate(self, to: str, device: str | None) -> None:
        """See `control.Backend`."""
        try:
            parse_nbd_uri(to)
        except ConfigError as exc:
            raise StateError(str(exc)) from None
        names = [disk.name for disk in self.group.disks]
        if device is None and len(names) > 1:
            raise StateError(f"of which disk? There are {', '.join(names)}")
        if device is not None and device not in names:
            raise StateError(f"there is no disk '{device}'")
        await self.group.replicate({device or names[0]: to})

    # Section: inside

    async def _open_disks(self, past: Past, created: list[str]) -> None:
        disks: list[StandbyDisk] = []
        services = self.services
        try:
            for config in self.configs:
                disk = await open_disk(config, services.events, services.jobs, created, past.end)
                disks.append(disk)
                check_size(past, config, disk.secondary.size)
        finally:
            self.group = Group(disks, past.journal, boot=past.boot, make_journal=past.make_journal)
        for config, disk in zip(self.configs, disks, strict=True):
            self._export_disk(config, disk)
        try:
            await self.group.open(past.record)
        except OSError as exc:
            raise StateError(f"cannot go on where the last process was: {exc.strerror}") from exc
        await self.settle()
        self._opened = True
        if past.record is not None:
            stages = ", ".join(f"'{disk.name}' {disk.stage.value}" for disk in disks)
            log.info("recovered from %s: %s", past.end, stages)

    async def _record_end(self, *, in_order: bool) -> None:
        try:
            if self._opened:
                await self.group.keeper.end(await stamp_files(self.configs) if in_order else None)
            elif in_order and self._past is not None:
                await self._past.give_up(self.configs)
        except OSError as exc:
            # The next process then looks at it as if this one had died.
            log.warning("cannot record the orderly end: %s", exc.strerror)

    def _export_disk(self, config: DiskConfig, disk: StandbyDisk) -> None:
        disk.on_fence = self._fence
        disk.on_unfence = self._unfence
        for name, description, most in (
            (
                disk.name,
                f"secondary disk of {disk.name}: the primary writes here",
                config.max_connections,
            ),
            (disk.top_id, f"the standby's view of {disk.name}", config.top_max_connections),
        ):
            export = self.new_export(name, name, description, connections_max=most)
            assert export is not None
            self.services.server.add_export(export)
        disk.peer.drop_sources = partial(self._drop_sources, disk)
        disk.peer.drop_strangers = partial(self._drop_strangers, disk)
        self._export_peer(disk.name, disk.peer, config.allow)
        # Without an answer there, a source would take the view for a server that is none of ours.
        view = NoDisk(disk.top_id, disk.active.size, f"the view of '{disk.name}'")
        self._export_peer(disk.top_id, view, config.top_allow)

    def _export_peer(self, of: str, target: Target, allow: list[str] | None) -> None:
        name = peer_export(of)
        node = PeerNode(name, target)
        self.services.server.add_export(Export(name, node, listed=False, allow=allow))

    def _fence(self, disk: StandbyDisk) -> None:
        # Called while the disk is drained; closing the connections waits for their requests,
        # which wait for the drain: so it goes on beside, and `settle` waits for it.
        for name in self._exports_of(disk.primary):
            self._spawn(self.services.server.fence(name, disk.fence_reason))

    async def _drop_sources(self, disk: StandbyDisk) -> None:
        await self._dismiss(disk, _is_source, "the source has a new session")

    async def _drop_strangers(self, disk: StandbyDisk) -> None:
        await self._dismiss(disk, _is_stranger, "the disk is a primary's copy now: only to be read")

    async def _dismiss(
        self, disk: StandbyDisk, chosen: Callable[[Connection], bool], reason: str
    ) -> None:
        for name in self._exports_of(disk.primary):
            await self.services.server.dismiss(name, chosen, reason)

    def _unfence(self, disk: StandbyDisk) -> None:
        for name in self._exports_of(disk.primary):
            self.services.server.unfence(name)

    def _exports_of(self, node: BlockNode) -> list[str]:
        exports = self.services.server.exports
        return [name for name, export in exports.items() if export.node is node]

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _writers(disk: StandbyDisk) -> str | None:
    """What another client wrote to a replnbd's copy, nobody would know to differ."""
    return RESYNC_CONTEXT if disk.peer.follows else None


def _is_source(client: Connection) -> bool:
    return RESYNC_CONTEXT in client.contexts  # only who synchronises asks for that


def _is_stranger(client: Connection) -> bool:
    return client.writable and not _is_source(client)
