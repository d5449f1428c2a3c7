"""Side: one side of replication, as the daemon has it: its disks, their exports, and the group that
commands act on. A daemon is a primary or a standby, with all its disks; `demote` changes that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from replnbd.block import BlockNode
from replnbd.daemon.config import DiskConfig
from replnbd.daemon.graph import QuorumDisk
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import Group, PrimaryGroup
from replnbd.server import Export, NbdServer


@dataclass(frozen=True, slots=True)
class Services:
    """What a side needs of the daemon."""

    server: NbdServer
    events: EventBus
    jobs: JobRegistry


class Side(ABC):
    """`open` it, and `close` it. `group` has the commands."""

    group: Group | PrimaryGroup

    def __init__(self, disks: Sequence[DiskConfig], services: Services) -> None:
        self.configs = disks
        self.services = services

    @abstractmethod
    async def open(self, created: list[str]) -> None:
        """Open the disks, go on where the last process was, and export them. The paths of new
        files go to `created`. ConfigError, ImageError or StateError; what is open then, `close`
        closes."""

    @abstractmethod
    async def close(self) -> None:
        """The exports are gone: flush and close everything. OSError, naming the disk."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What `x-replnbd-status` tells of this side; "disks" among it."""

    @abstractmethod
    def nodes(self) -> list[BlockNode]:
        """What `query-named-block-nodes` lists."""

    @abstractmethod
    def new_export(
        self, name: str, node_name: str, description: str, *, writable: bool = True
    ) -> Export | None:
        """An export of the node of that name; None if it cannot be exported."""

    def quorums(self) -> Sequence[QuorumDisk]:
        """Disks that can be mirrored, and that take nodes for children."""
        return ()

    async def settle(self) -> None:
        """Until what a command has begun to disconnect is gone."""
        return

    def verify(self) -> None:
        """`x-replnbd-verify`; see `control.Backend`."""
        raise StateError("a standby has nothing to compare with: ask its primary")

    async def replicate(self, to: str, device: str | None) -> None:
        """`x-replnbd-replicate`; see `control.Backend`."""
        raise StateError("a primary sends its writes to its key 'to': use 'replnbd start'")
