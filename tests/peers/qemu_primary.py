"""QEMU as the primary, in the two ways in which QEMU's people set it up.

    primary = PlainPrimary(folder, local)
    primary.synchronise(("127.0.0.1", port), "colo0")   # ... now start replication on the standby
    primary.start()
    guest = primary.connect()

The disk is a quorum whose first child is a local file; the standby becomes its second child, which
gets every write, too. The guest is played by an NBD client of an export of that quorum.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.machine import Machine
from peers.nbd_client import NbdClient
from peers.process import PeerError, wait_until

DEVICE = "colo-disk0"
JOB = "resync"

TcpAddress = tuple[str, int]


class QemuPrimary(Machine, abc.ABC):
    """A running QEMU with `local` as the quorum's only child. `node`: the second child's name."""

    node: str

    def __init__(self, folder: Path, local: Path, *, name: str = "primary") -> None:
        self.local = local
        options = ["if=none", f"id={DEVICE}", "driver=quorum", "read-pattern=fifo"]
        options += ["vote-threshold=1", "children.0.driver=raw", "children.0.file.driver=file"]
        options += [f"children.0.file.filename={local}"]
        super().__init__(folder, name, [",".join(options)])
        self.export(DEVICE)

    def connect(self, drive: str = DEVICE) -> NbdClient:
        """A guest: a new connection to the disk."""
        return super().connect(drive)

    def synchronise(
        self, address: TcpAddress, export: str, *, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Copy all, stop the guest, and take the standby into the quorum. Then it is time to start
        replication there, and `start`. `meanwhile`: what the guest does while all is copied."""
        self._begin_mirror(address, export)
        if meanwhile is not None:
            meanwhile()
        self._finish_mirror()
        self._attach(address, export)

    @abc.abstractmethod
    def _begin_mirror(self, address: TcpAddress, export: str) -> None: ...

    @abc.abstractmethod
    def _attach(self, address: TcpAddress, export: str) -> None: ...

    def start(self) -> None:
        """The guest goes on."""
        self.qmp.execute("cont")

    @abc.abstractmethod
    def detach(self) -> None:
        """Take the standby out of the quorum, and forget it."""

    def status(self) -> dict[str, Any]:
        """Of QEMU's replication nodes, if there are any."""
        found: dict[str, Any] = self.qmp.execute("query-xen-replication-status")
        return found

    def bad_children(self) -> set[tuple[str, str]]:
        """(node, what it failed to do) of every report of the quorum so far."""
        return {
            (data.get("node-name", ""), data["type"]) for data in self.events("QUORUM_REPORT_BAD")
        }

    def wait_bad(self, what: str) -> None:
        """Until the quorum has reported that the standby has failed to do that. Such reports come
        once a second."""
        wait_until(
            lambda: (self.node, what) in self.bad_children(), f"QUORUM_REPORT_BAD for a {what}"
        )

    def yank(self) -> None:
        """Give up the connection to the standby, whoever waits for it."""
        instance = {"type": "block-node", "node-name": "nbd0"}
        self.qmp.execute("yank", {"instances": [instance]})

    # Section: steps

    def _take_in(self) -> None:
        self.qmp.execute("x-blockdev-change", {"parent": DEVICE, "node": self.node})

    def _take_out(self) -> None:
        self.qmp.execute("x-blockdev-change", {"parent": DEVICE, "child": "children.1"})

    def _finish_mirror(self) -> None:
        """To cancel a mirror that is ready is its orderly end."""
        self.wait_for_job(JOB, "ready")
        self.qmp.execute("stop")
        self.qmp.execute("block-job-cancel", {"device": JOB})
        self.wait_for_job(JOB, "concluded")
        self.qmp.execute("block-job-dismiss", {"id": JOB})


class PlainPrimary(QemuPrimary):
    """Without QEMU's filter: an NBD node, as colo-heartbeat-daemon has it: blockdev-add,
    blockdev-mirror to it, x-blockdev-change. `options`: more of blockdev-add."""

    node = "nbd0"

    def __init__(self, folder: Path, local: Path, *, name: str = "primary", **options: Any) -> None:
        self.options = options
        super().__init__(folder, local, name=name)

    def _begin_mirror(self, address: TcpAddress, export: str) -> None:
        host, port = address
        server = {"type": "inet", "host": host, "port": str(port)}
        node = {"driver": "nbd", "node-name": self.node, "export": export, "server": server}
        self.qmp.execute("blockdev-add", {**node, "detect-zeroes": "on", **self.options})
        mirror = {"job-id": JOB, "device": DEVICE, "target": self.node, "sync": "full"}
        mirror |= {"on-target-error": "report", "on-source-error": "ignore"}
        self.qmp.execute("blockdev-mirror", {**mirror, "auto-dismiss": False})

    def _attach(self, address: TcpAddress, export: str) -> None:
        self._take_in()

    def detach(self) -> None:
        self._take_out()
        self.qmp.execute("blockdev-del", {"node-name": self.node})


class FilterPrimary(QemuPrimary):
    """With QEMU's filter in mode primary, as QEMU 7.2's docs/COLO-FT.txt has it: drive-mirror,
    drive_add, x-blockdev-change, and xen-set-replication.

    The filter takes whole sectors: of a smaller write it would have to read the rest, which it
    refuses, and QEMU sends whatever is in its buffer then.
    """

    node = "replication0"

    def _begin_mirror(self, address: TcpAddress, export: str) -> None:
        host, port = address
        mirror = {"job-id": JOB, "device": DEVICE, "target": f"nbd://{host}:{port}/{export}"}
        mirror |= {"mode": "existing", "format": "raw", "sync": "full"}
        self.qmp.execute("drive-mirror", {**mirror, "auto-dismiss": False})

    def _attach(self, address: TcpAddress, export: str) -> None:
        host, port = address
        options = ["driver=replication", "mode=primary", f"node-name={self.node}"]
        options += ["file.driver=nbd", "file.node-name=nbd0", f"file.export={export}"]
        options += [f"file.host={host}", f"file.port={port}"]
        said = self.qmp.human(f"drive_add -n buddy {','.join(options)}")
        if said:
            raise PeerError(f"drive_add: {said}")
        self._take_in()

    def start(self) -> None:
        """Start the filter, too: until then it takes no write."""
        self.qmp.execute("xen-set-replication", {"enable": True, "primary": True})
        super().start()

    def detach(self) -> None:
        self._take_out()
        said = self.qmp.human(f"drive_del {self.node}")
        if said:
            raise PeerError(f"drive_del: {said}")
