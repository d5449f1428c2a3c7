"""Standby: the library's door. A standby inside another asyncio program, driven by it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from replnbd.block import BlockNode
from replnbd.daemon.config import Config, DiskConfig, ServerConfig, check_config
from replnbd.daemon.daemon import Daemon
from replnbd.errors import ConfigError, StateError
from replnbd.events import EventBus


class Standby:
    """One or more secondary disks that a program serves and drives itself.

        disk = replnbd.DiskConfig(name="colo0", mode="secondary", top_id="top0",
                                  secondary="colo0.raw")
        async with replnbd.Standby([disk], listen=["nbd://127.0.0.1:10809"]) as standby:
            await standby.start()
            ...                          # the primary writes colo0, the standby uses top0
            await standby.checkpoint()
            ...
            await standby.failover()     # returns when all is committed

    Several disks are one group: every command acts on all of them or on none. With `control`, the
    same standby is driven over QMP as well. Within the block, `node` gives the disks to the
    program itself; nodes are safe to use from any task of the loop that entered the block.
    """

    def __init__(
        self,
        disks: Sequence[DiskConfig],
        *,
        listen: Sequence[str] = (),
        control: str | Path | None = None,
    ) -> None:
        """`listen`: NBD URIs, none by default. Relative paths are from the working directory.

        Raises ConfigError for what is wrong without opening anything.
        """
        server = ServerConfig(
            listen=list(listen), control=None if control is None else os.fspath(control)
        )
        config = check_config(Config(server=server, disk=list(disks)), Path.cwd())
        if config.mode != "secondary":
            raise ConfigError('a Standby has disks of mode = "secondary"')
        self._daemon = Daemon(config)

    async def __aenter__(self) -> Standby:
        """Open everything; ConfigError or ImageError if that cannot be, and nothing changed."""
        await self._daemon.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drain, flush and close everything."""
        await self._daemon.close()

    @property
    def events(self) -> EventBus:
        """Subscribe here for stage changes, checkpoints, jobs and I/O errors."""
        return self._daemon.events

    @property
    def uris(self) -> list[str]:
        """Where NBD clients reach the exports, with actual ports."""
        return self._daemon.server.uris

    async def start(self) -> None:
        """Start replication, with a first checkpoint; StateError with QEMU's texts."""
        await self._daemon.group.start()

    async def checkpoint(self) -> None:
        """Move the view on to now; what the standby wrote since the last one is dropped."""
        await self._daemon.group.checkpoint()

    async def stop(self) -> None:
        """End replication: each secondary disk is the primary's latest."""
        await self._daemon.group.stop()

    async def failover(
        self,
        *,
        to: Literal["standby", "checkpoint", "latest"] | None = None,
        wait: bool = True,
    ) -> None:
        """Fence the primary and make the view the disk; the view can be used all the while.

        `to`: what becomes the disk, by default "standby": the last checkpoint and the standby's
        own writes. "checkpoint": the last checkpoint alone. "latest": what the primary wrote last.
        With `wait`, returns when all is committed; StateError if a commit failed (call it again
        to try again).
        """
        await self._daemon.set_replication(enable=False, primary=False, failover=True, target=to)
        if wait:
            await self._daemon.standby_group.wait_committed()

    async def reset(self, *, force: bool = False) -> None:
        """Back to stage *none*; StateError if that would lose data, unless `force`."""
        await self._daemon.group.reset(force=force)

    def status(self) -> dict[str, Any]:
        """What `x-replnbd-status` answers: stage, checkpoint, bytes and clients of each disk."""
        return self._daemon.status()

    def node(self, name: str, side: Literal["primary", "standby"] = "standby") -> BlockNode:
        """The disk behind an export of disk `name`: what the primary writes, or the view.

        Its user validates offsets and lengths (see `replnbd.block`). StateError for no such disk.
        """
        for disk in self._daemon.standby_group.disks:
            if disk.name == name:
                return disk.primary if side == "primary" else disk.standby
        raise StateError(f"no disk '{name}'")
