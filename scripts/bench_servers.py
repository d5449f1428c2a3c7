"""The two servers that scripts/bench compares, behind one small interface.

Both keep the same standby: a raw secondary disk, two qcow2 overlays, exports `disk` (what the
primary writes) and `view` (what the standby works on) on a unix socket, driven over QMP by the
same commands.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from replnbd.control import ControlClient
from replnbd.errors import ReplnbdError

READY_S = 20.0


class Server:
    """A server process on files of its own in `directory`."""

    name: str

    def __init__(self, directory: Path, secondary: Path) -> None:
        self.directory = directory
        self.secondary = secondary
        # Not in `directory`: the path of a unix socket must be short.
        self._sockets = Path(tempfile.mkdtemp(prefix="replnbd-", dir="/tmp"))
        self.socket = self._sockets / "nbd.sock"
        self.control = self._sockets / "qmp.sock"
        with open(directory / "log", "w") as log:
            self.process = subprocess.Popen(self.command(), cwd=directory, stderr=log)
        self.client = self._connect()

    def command(self) -> list[str]:
        """Prepare the files and return the command line."""
        raise NotImplementedError

    def export(self) -> None:
        """Export both nodes, where the command line has not done so."""

    def start(self) -> None:
        """Start replication: the first checkpoint holds."""
        self.client.execute("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        """Empty both overlays: nothing is touched any more."""
        self.client.execute("xen-colo-do-checkpoint")

    def uri(self, export: str) -> str:
        """The NBD URI of "disk" or "view"."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def resident_mib(self) -> tuple[float, float]:
        """Resident memory of the process: now, and at its highest."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak

    def cpu_s(self) -> float:
        """Processor time the process has used so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._sockets)

    def _connect(self) -> ControlClient:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                return ControlClient(self.control)
            except ReplnbdError as exc:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    shutil.rmtree(self._sockets)
                    log = (self.directory / "log").read_text()
                    raise SystemExit(f"{self.name} does not serve: {exc}\n{log}") from exc
            time.sleep(0.05)


class Replnbd(Server):
    """`replnbd serve`, overlays made by itself."""

    name = "replnbd"

    def command(self) -> list[str]:
        config = self.directory / "replnbd.toml"
        config.write_text(
            f"""
            [server]
            listen = ["nbd+unix:///?socket={self.socket}"]
            control = "{self.control}"
            [[disk]]
            name = "disk"
            mode = "secondary"
            top-id = "view"
            secondary = "{self.secondary}"
            format = "raw"
            hidden = "hidden.qcow2"
            active = "active.qcow2"
            """
        )
        return [str(Path(sys.executable).with_name("replnbd")), "serve", str(config)]


class Qemu(Server):
    """QEMU's filter as docs/block-replication.txt sets it up, without a machine around it.

    Overlays as `qemu-img create` makes them; discard=unmap so that a checkpoint gives space back.
    """

    name = "qemu"

    def command(self) -> list[str]:
        size = str(self.secondary.stat().st_size)
        for overlay in ("hidden", "active"):
            image = str(self.directory / f"{overlay}.qcow2")
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, size], check=True)
        standby = (
            "if=none,id=view,driver=replication,mode=secondary,top-id=view,discard=unmap,"
            f"file.driver=qcow2,file.file.driver=file,file.file.filename={self.directory}/active.qcow2,"
            "file.backing.driver=qcow2,file.backing.file.driver=file,"
            f"file.backing.file.filename={self.directory}/hidden.qcow2,"
            "file.backing.backing=disk"
        )
        secondary = f"if=none,id=disk,format=raw,discard=unmap,file={self.secondary}"
        bare = ["-M", "none", "-nodefaults", "-display", "none", "-S"]
        qmp = ["-qmp", f"unix:{self.control},server=on,wait=off"]
        return ["qemu-system-x86_64", *bare, *qmp, "-drive", secondary, "-drive", standby]

    def export(self) -> None:
        address = {"type": "unix", "data": {"path": str(self.socket)}}
        self.client.execute("nbd-server-start", addr=address)
        for name in ("disk", "view"):
            self.client.execute("nbd-server-add", device=name, writable=True)
