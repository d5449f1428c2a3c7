"""QEMU with its own replication filter, as a secondary that is set up as QEMU documents it.

The set-up is that of QEMU's docs/block-replication.txt: a drive with the secondary disk, exported
for the primary, and a drive `driver=replication,mode=secondary` over active over hidden over it.
The standby's guest is played by an NBD client of a second export: QEMU 7.2 exports the drive with
the filter itself, as long as it is added before replication starts and blocks the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peers.disk import Disk, DiskFormat, qemu_img
from peers.nbd_client import NbdClient
from peers.process import PeerError, Process, wait_until
from peers.qmp_client import QmpClient

QEMU = "qemu-system-x86_64"


class QemuDisk(Disk):
    """A disk whose overlays qemu-img makes, with its defaults: clusters of 64 KiB."""

    @classmethod
    def create(
        cls, folder: Path, name: str, top_id: str, content: bytes, format_: DiskFormat = "raw"
    ) -> Self:
        """Make the secondary disk with `content`, and empty overlays of its size."""
        disk = super().create(folder, name, top_id, content, format_)
        for overlay in (disk.hidden, disk.active):
            qemu_img("create", "-q", "-f", "qcow2", overlay, str(len(content)))
        return disk

    def drives(self) -> list[str]:
        """The two `-drive` options."""
        secondary = {
            "if": "none",
            "id": self.name,
            "file": self.secondary,
            "format": self.format,
            "discard": "unmap",  # without it QEMU drops every TRIM
        }
        replication = {
            "if": "none",
            "id": self.top_id,
            "driver": "replication",
            "mode": "secondary",
            "top-id": self.top_id,
            "discard": "unmap",
            "file.driver": "qcow2",
            "file.file.filename": self.active,
            "file.backing.driver": "qcow2",
            "file.backing.file.filename": self.hidden,
            "file.backing.backing": self.name,
        }
        options = []
        for drive in (secondary, replication):
            options += ["-drive", ",".join(f"{key}={value}" for key, value in drive.items())]
        return options


class QemuSecondary:
    """A running QEMU with the disks exported: NAME for the primary, TOP-ID for the standby."""

    def __init__(self, folder: Path, disks: Sequence[QemuDisk]) -> None:
        self.disks = disks
        self.nbd_socket = folder / "qemu.nbd"
        qmp_socket = folder / "qemu.qmp"
        argv = [QEMU, "-M", "none", "-display", "none", "-nodefaults", "-S"]
        argv += ["-qmp", f"unix:{qmp_socket},server=on,wait=off"]
        for disk in disks:
            argv += disk.drives()
        self.process = Process(argv, log=folder / "qemu.log")
        try:
            self.qmp = self.process.reach(lambda: QmpClient(qmp_socket))
            unix = {"type": "unix", "data": {"path": str(self.nbd_socket)}}
            self.qmp.execute("nbd-server-start", {"addr": unix})
            for disk in disks:
                for device in (disk.name, disk.top_id):
                    self.qmp.execute("nbd-server-add", {"device": device, "writable": True})
        except BaseException as exc:
            self.process.kill()
            if isinstance(exc, OSError):
                raise PeerError(self.process.failure(str(exc))) from exc
            raise

    def connect(self, export: str) -> NbdClient:
        """A new NBD connection to NAME or TOP-ID."""
        return NbdClient(self.nbd_socket, export)

    def commit_finished(self) -> bool:
        """Whether every failover is over, well or not: the commit job is internal, but its filter
        node is listed from the command's answer on until the job has ended."""
        nodes = self.qmp.execute("query-named-block-nodes")
        return all(node["drv"] != "mirror_top" for node in nodes)

    def wait_for_commit(self) -> None:
        """Until every disk's failover is over; PeerError when it does not end."""
        wait_until(self.commit_finished, "QEMU's active commit")

    def node_file(self, device: str) -> Any:
        """query-block's `file` of a drive (a `json:` description of the graph below a filter)."""
        for block in self.qmp.execute("query-block"):
            if block["device"] == device:
                return block["inserted"]["file"]
        raise PeerError(f"no drive {device}")

    def quit(self) -> None:
        """An orderly end: QMP quit, and exit status 0."""
        self.qmp.execute("quit")
        status = self.process.wait()
        self.qmp.close()
        if status:
            raise PeerError(self.process.failure(f"QEMU ended with {status}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.qmp.close()
        self.process.kill()
