"""A QEMU without a guest: tests use its drives and block nodes as guest and management would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.daemon import Daemon
from peers.nbd_client import NbdClient
from peers.process import PeerError, Process, wait_until
from peers.qmp_client import QmpClient

QEMU = "qemu-system-x86_64"


class Machine(Daemon):
    """A QEMU without a guest: its drives are used through its monitor (`io`), or through an NBD
    server of its own (`connect`), which goes through the drive as a guest would."""

    def __init__(self, folder: Path, name: str, drives: Sequence[str]) -> None:
        self.nbd_socket = folder / f"{name}.nbd"
        qmp_socket = folder / f"{name}.qmp"
        argv = [QEMU, "-M", "none", "-display", "none", "-nodefaults", "-S"]
        argv += ["-qmp", f"unix:{qmp_socket},server=on,wait=off"]
        argv += [word for drive in drives for word in ("-drive", drive)]
        self.process = Process(argv, log=folder / f"{name}.log")
        try:
            self.qmp = self.process.reach(lambda: QmpClient(qmp_socket))
        except BaseException:
            self.process.kill()
            raise

    def io(self, drive: str, *steps: str) -> None:
        """qemu-io commands on a drive; PeerError when one fails."""
        for step in steps:
            said = self.qmp.human(f'qemu-io {drive} "{step}"')
            if "fail" in said.lower() or "error" in said.lower():
                raise PeerError(f"{step}: {said}")

    def export(self, drive: str) -> None:
        """Begin to serve a drive to `connect`."""
        unix = {"type": "unix", "data": {"path": str(self.nbd_socket)}}
        self.qmp.execute("nbd-server-start", {"addr": unix})
        self.qmp.execute("nbd-server-add", {"device": drive, "writable": True})

    def connect(self, drive: str) -> NbdClient:
        """A new connection to a drive that is exported."""
        return NbdClient(self.nbd_socket, drive)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The data of every event of that name that has come so far."""
        self.qmp.execute("query-status")  # whatever came before its answer is there now
        return [event["data"] for event in self.qmp.events if event["event"] == name]

    def wait_for_job(self, job: str, status: str) -> None:
        """Until a job is in a status."""

        def there() -> bool:
            listed = {each["id"]: each for each in self.qmp.execute("query-jobs")}
            assert "error" not in listed[job], listed[job]
            return bool(listed[job]["status"] == status)

        wait_until(there, f"job {job} {status}")

    def quit(self) -> None:
        """An orderly end: QMP quit, and exit status 0."""
        self.qmp.execute("quit")
        status = self.process.wait()
        if status:
            raise PeerError(self.process.failure(f"QEMU ended with {status}"))
