"""One of two hosts: a real daemon on files that outlive it, and the network that leads to it."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import CuttingProxy, NbdClient, PeerError, Process, QmpClient, list_exports
from peers.disk import DiskFormat, make_image

HASTY = (sys.executable, str(Path(__file__).with_name("hasty.py")))

QUEUE_BYTES = 32 << 20
"""What a replnbd that nobody hastens allows."""

BUGS = ("our bug", "Traceback", "never retrieved", "AssertionError")
"""What a log must not have."""


@dataclass(frozen=True)
class HostDisk:
    """A disk's export NAME, its view NAME-top, and its file."""

    name: str
    path: Path
    format: DiskFormat

    @property
    def top(self) -> str:
        """The export of the view."""
        return f"{self.name}-top"


class Host:
    """`letter` names it; `proxy` is the way to it, for the other host's link.

    `mode` is what the configuration says of the disks: "primary" (then `to` has where each is
    sent) or "secondary".
    """

    def __init__(
        self,
        folder: Path,
        letter: str,
        contents: list[bytes],
        format_: DiskFormat,
        *,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.letter = letter
        self.mode = "secondary"
        self.to: list[str] = []
        self.sync = False
        self.folder = folder / letter
        self.folder.mkdir()
        self.disks = []
        for number, content in enumerate(contents):
            path = self.folder / f"{letter}{number}.{format_}"
            make_image(path, format_, content)
            self.disks.append(HostDisk(f"{letter}{number}", path, format_))
        self.nbd = self.folder / "nbd"
        self.control = self.folder / "qmp"
        self.log = self.folder / "log"
        self.proxy = CuttingProxy(("127.0.0.1", 0), self.nbd)
        self.process: Process | None = None
        self._qmp: QmpClient | None = None
        self._argv = (*HASTY, str(queue_bytes))

    # Section: its daemon

    @property
    def alive(self) -> bool:
        """Whether its daemon runs."""
        return self.process is not None

    @property
    def qmp(self) -> QmpClient:
        """The daemon's control socket."""
        assert self._qmp is not None
        return self._qmp

    def start(self, mode: str | None = None) -> None:
        """Start the daemon, by default as it was."""
        self._launch(mode or self.mode)
        assert self.process is not None
        try:
            self.process.reach(lambda: list_exports(self.nbd))
            self._qmp = self.process.reach(lambda: QmpClient(self.control))
        except BaseException:
            self.kill()
            raise

    def start_and_die(self, after_s: float) -> None:
        """Start it as it was, and kill it while it does what comes first."""
        self._launch(self.mode)
        time.sleep(after_s)
        self.kill()

    def _launch(self, mode: str) -> None:
        assert self.process is None
        self.mode = mode
        config = self.folder / "replnbd.toml"
        tables = [self._table(number) for number in range(len(self.disks))]
        lines = ["[server]", *_lines(listen=[f"nbd+unix:///?socket={self.nbd}"])]
        lines += _lines(control=str(self.control))
        config.write_text("\n".join([*lines, *tables]) + "\n")
        self.process = Process([*self._argv, "serve", str(config)], log=self.log)

    def _table(self, number: int) -> str:
        disk = self.disks[number]
        lines = _lines(name=disk.name, mode=self.mode, format=disk.format)
        if self.mode == "primary":
            lines += _lines(disk=str(disk.path), to=self.to[number], sync=self.sync)
        else:
            lines += _lines(secondary=str(disk.path), **{"top-id": disk.top})
        return "\n".join(["[[disk]]", *lines])

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()
            self._gone()

    def quit(self) -> None:
        """SIGTERM, and an orderly end."""
        assert self.process is not None
        status = self.process.terminate()
        if status:
            raise PeerError(self.process.failure(f"ended with {status}"))
        self._gone()

    def _gone(self) -> None:
        self.process = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def close(self) -> None:
        """All ends here."""
        self.kill()
        self.proxy.close()

    def check_log(self) -> None:
        """AssertionError if the daemon has met a bug of its own."""
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        for bug in BUGS:
            assert bug not in log, f"{self.letter}: {bug}\n{log[-6000:]}"

    # Section: what is asked and told

    def status(self, number: int = 0) -> dict[str, Any]:
        """Of a disk."""
        disk: dict[str, Any] = self.qmp.execute("x-replnbd-status")["disks"][number]
        return disk

    def link(self, number: int = 0) -> dict[str, Any]:
        """Of a disk."""
        link: dict[str, Any] | None = self.status(number)["link"]
        return link or {"state": "none", "reason": None, "copied-bytes": 0}

    @property
    def role(self) -> str:
        """What its disks are to the daemon: "primary" or "secondary"."""
        return str(self.qmp.execute("x-replnbd-status")["role"])

    def begin(self) -> None:
        """Start replication, in its role."""
        self.qmp.execute("xen-set-replication", {"enable": True, "primary": self.role == "primary"})

    def failover(self, to: str) -> None:
        """Begin it."""
        arguments = {"enable": False, "primary": False, "failover": True, "x-replnbd-to": to}
        self.qmp.execute("xen-set-replication", arguments)

    def committed(self) -> bool:
        """Whether the failover of all disks has ended; PeerError if one has failed."""
        status = self.qmp.execute("x-replnbd-status")
        stages = {disk["stage"] for disk in status["disks"]}
        if status["role"] == "primary":
            return True  # demoted once, and started after the commit
        if "failover-failed" in stages:
            raise PeerError(f"{self.letter}: the commit has failed")
        return stages == {"done"}

    # Section: clients

    def connect(self, export: str) -> NbdClient:
        """A client."""
        return NbdClient(self.nbd, export)

    def read(self, export: str) -> bytearray:
        """All of it."""
        with self.connect(export) as client:
            return client.pread(0, client.size)

    def user_export(self, number: int) -> str:
        """Where the disk's users are, while this host has the truth."""
        disk = self.disks[number]
        return disk.name if self.role == "primary" else disk.top


def _lines(**members: Any) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in members.items()]


def remove_logs(*hosts: Host) -> None:
    """Of daemons that have ended well."""
    for host in hosts:
        if host.log.exists():
            os.unlink(host.log)
