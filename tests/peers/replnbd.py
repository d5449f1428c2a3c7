"""`replnbd serve` on a configuration that the test writes, driven from outside only."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from peers.daemon import Daemon
from peers.disk import Disk
from peers.nbd_client import NbdClient, list_exports
from peers.process import PeerError, Process, wait_until
from peers.qmp_client import QmpClient


class ReplnbdDisk(Disk):
    """One `[[disk]]` table, mode secondary. The daemon makes missing overlays itself."""

    def table(self) -> str:
        """The TOML."""
        members = {
            "name": self.name,
            "mode": "secondary",
            "top-id": self.top_id,
            "secondary": str(self.secondary),
            "format": self.format,
            "hidden": str(self.hidden),
            "active": str(self.active),
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in members.items()]
        return "\n".join(["[[disk]]", *lines])


class ReplnbdDaemon(Daemon):
    """A running daemon with the disks exported: NAME for the primary, TOP-ID for the standby.

    `listen`: more URIs than that of `nbd_socket`; `tables`: more of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        disks: Sequence[ReplnbdDisk],
        *,
        listen: Sequence[str] = (),
        tables: Sequence[str] = (),
    ) -> None:
        self.disks = disks
        self.nbd_socket = folder / "replnbd.nbd"
        self.control_socket = folder / "replnbd.qmp"
        self.config = folder / "replnbd.toml"
        server = [
            "[server]",
            f"listen = {json.dumps([f'nbd+unix:///?socket={self.nbd_socket}', *listen])}",
            f"control = {json.dumps(str(self.control_socket))}",
        ]
        written = ["\n".join(server), *tables, *(disk.table() for disk in disks)]
        self.config.write_text("\n\n".join(written) + "\n")
        argv = [sys.executable, "-m", "replnbd", "serve", str(self.config)]
        self.process = Process(argv, log=folder / "replnbd.log")
        try:
            self.process.reach(lambda: list_exports(self.nbd_socket))
            self.qmp = self.process.reach(lambda: QmpClient(self.control_socket))
        except BaseException as exc:
            self.process.kill()
            if isinstance(exc, OSError):
                raise PeerError(self.process.failure(str(exc))) from exc
            raise

    def connect(self, export: str) -> NbdClient:
        """A new NBD connection to NAME or TOP-ID."""
        return NbdClient(self.nbd_socket, export)

    @property
    def ports(self) -> list[int]:
        """Of its TCP listeners, in the order of the configuration."""
        found = re.findall(r"listening on nbds?://[^/\s]*:(\d+)", self.process.log.read_text())
        return [int(port) for port in found]

    def stages(self) -> set[str]:
        """The stages of all disks, from x-replnbd-status."""
        return {disk["stage"] for disk in self.qmp.execute("x-replnbd-status")["disks"]}

    def commit_finished(self) -> bool:
        """Whether no disk's failover is under way any more."""
        return "failover" not in self.stages()

    def wait_for_commit(self) -> None:
        """Until every disk's failover is over; PeerError when it does not end."""
        wait_until(self.commit_finished, "replnbd's commit")
