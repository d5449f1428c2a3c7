"""replnbd as the primary of one disk, driven from outside only.

with ReplnbdPrimary(folder, folder / "vm0.raw", "nbd://127.0.0.1:10809/colo0") as primary:
    primary.start()
    primary.wait_in_step()
    client = primary.connect()
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.command import REPLNBD
from peers.daemon import Daemon
from peers.disk import DiskFormat
from peers.nbd_client import NbdClient, list_exports
from peers.process import PeerError, Process, wait_until
from peers.qmp_client import QmpClient


class ReplnbdPrimary(Daemon):
    """A running daemon with the disk `local` as its export vm0, to be sent to the URI `to`.

    `program`: what is run instead of `replnbd`. After its end, `run` starts it again.
    """

    name = "vm0"

    def __init__(
        self,
        folder: Path,
        local: Path,
        to: str,
        *,
        format_: DiskFormat = "raw",
        sync: bool = False,
        program: Sequence[str] = REPLNBD,
    ) -> None:
        self.local = local
        self.format = format_
        self.nbd_socket = folder / "vm0.nbd"
        self.control_socket = folder / "vm0.qmp"
        self.log = folder / "vm0.log"
        disk = {"name": self.name, "mode": "primary", "disk": str(local), "format": format_}
        listen = [f"nbd+unix:///?socket={self.nbd_socket}"]
        lines = ["[server]", f"listen = {json.dumps(listen)}"]
        lines += [f"control = {json.dumps(str(self.control_socket))}", "[[disk]]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in {**disk, "to": to}.items()]
        config = folder / "vm0.toml"
        config.write_text("\n".join([*lines, f"sync = {json.dumps(sync)}"]) + "\n")
        self._argv = [*program, "serve", str(config)]
        self.run()

    def run(self) -> None:
        """Run the daemon: it goes on in the stage that it ended in."""
        self.process = Process(self._argv, log=self.log)
        try:
            self.process.reach(lambda: list_exports(self.nbd_socket))
            self.qmp = self.process.reach(lambda: QmpClient(self.control_socket))
        except BaseException as exc:
            self.process.kill()
            if isinstance(exc, OSError):
                raise PeerError(self.process.failure(str(exc))) from exc
            raise

    def connect(self) -> NbdClient:
        """A guest: a new connection to the disk."""
        return NbdClient(self.nbd_socket, self.name)

    # Section: commands

    def start(self) -> None:
        """Begin to send."""
        self.qmp.execute("xen-set-replication", {"enable": True, "primary": True})

    def checkpoint(self) -> None:
        """Until all has arrived."""
        self.qmp.execute("xen-colo-do-checkpoint")

    # Section: what it says

    def status(self) -> dict[str, Any]:
        """Of the disk."""
        disk: dict[str, Any] = self.qmp.execute("x-replnbd-status")["disks"][0]
        return disk

    def link(self) -> dict[str, Any]:
        """Of the way to the target."""
        link: dict[str, Any] = self.status()["link"]
        return link

    def replication(self) -> dict[str, Any]:
        """What a COLO manager is told."""
        told: dict[str, Any] = self.qmp.execute("query-xen-replication-status")
        return told

    def events(self, name: str) -> list[dict[str, Any]]:
        """The data of every event of that name that has come so far."""
        self.qmp.execute("query-version")  # whatever came before its answer is there now
        return [event["data"] for event in self.qmp.events if event["event"] == name]

    def wait_link(self, *states: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Until the link is in one of these states; it then."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [self.link()]
            return found[0]["state"] in states

        wait_until(there, f"the link {' or '.join(states)}", timeout_s=timeout_s)
        return found[0]

    def in_step(self) -> bool:
        """Whether the target has all that was written."""
        link = self.link()
        return bool(
            link["state"] == "live" and not link["behind-bytes"] and not link["queued-bytes"]
        )

    def wait_in_step(self, *, timeout_s: float = 60.0) -> None:
        """Until then; nobody may write."""
        try:
            wait_until(self.in_step, "in step", timeout_s=timeout_s)
        except PeerError as exc:
            raise PeerError(self.process.failure(f"{exc}: {self.link()}")) from exc
