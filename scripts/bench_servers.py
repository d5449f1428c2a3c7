"""The servers that scripts/bench compares, behind one small interface.

Two keep a standby, over QMP by the same commands: a raw secondary disk, two qcow2 overlays, exports
`disk` (what the primary writes) and `view` (what the standby works on). Before start() they are
plain servers of `disk`, as nbdkit and qemu-nbd are.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from replnbd.control import ControlClient
from replnbd.errors import ReplnbdError

READY_S = 20.0
POLL_S = 0.002
IDLE_S = 0.05
GREETING = b"NBDMAGIC"

T = TypeVar("T")


class Server:
    """A server process on files of its own in `directory`; a context manager that ends it.

    Missing files are made: a sparse disk of `size` bytes, empty overlays. Existing ones are used.
    """

    name: str

    def __init__(self, directory: Path, size: int, *, tcp: bool = False) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.size = size
        self.disk = directory / "disk.raw"
        if not self.disk.exists():
            self.make_files()
        # Not in `directory`: the path of a unix socket must be short.
        self.sockets = Path(tempfile.mkdtemp(prefix="replnbd-", dir="/tmp"))
        self.socket = self.sockets / "nbd.sock"
        self.port = free_port() if tcp else None
        command = self.command()
        begin = time.monotonic()
        with open(directory / "log", "w") as log:
            self.process = subprocess.Popen(command, cwd=directory, stderr=log)
        try:
            self.prepare()
            self.wait(self.greeted)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - begin
        """From exec until a client was accepted and greeted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_files(self) -> None:
        """Make what the server needs to exist."""
        with open(self.disk, "wb") as disk:
            disk.truncate(self.size)

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What is left to do until clients can connect, once the process runs."""

    def uri(self, export: str) -> str:
        """The NBD URI of "disk" or "view"."""
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{export}"
        return f"nbd+unix:///{export}?socket={self.socket}"

    def greeted(self) -> bool:
        """Whether the server accepts a client and greets it."""
        family = socket.AF_INET if self.port else socket.AF_UNIX
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(READY_S)
            try:
                client.connect(("127.0.0.1", self.port) if self.port else str(self.socket))
            except OSError:
                return False
            return client.recv(len(GREETING)) == GREETING

    def resident_mib(self) -> tuple[float, float]:
        """Resident memory of the process: now, and at its highest."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak

    def cpu_s(self) -> float:
        """Processor time that all threads of the process have used so far, to the nanosecond."""
        # What clock_getcpuclockid(3) returns; /proc/PID/stat counts in steps of 10 ms.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def settle(self) -> None:
        """Wait until the process is idle: what it does in the background is not to be measured."""
        used = -1.0
        while (now := self.cpu_s()) - used > IDLE_S / 10:
            used = now
            time.sleep(IDLE_S)

    def wait(
        self, condition: Callable[[], T], timeout_s: float = READY_S, pause_s: float = POLL_S
    ) -> T:
        """Poll until `condition()` is true, and return it; the bench ends if that takes longer."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "log").read_text()
                raise SystemExit(f"{self.name} ended, or takes too long\n{log}")
            time.sleep(pause_s)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)


class Nbdkit(Server):
    """nbdkit with its file plugin: what a server in C does at best, without overlays."""

    name = "nbdkit"

    def command(self) -> list[str]:
        place = [f"--port={self.port}"] if self.port else [f"--unix={self.socket}"]
        return ["nbdkit", "--foreground", *place, "file", str(self.disk)]


class QemuNbd(Server):
    """qemu-nbd on the raw disk, page cache used as by the others."""

    name = "qemu-nbd"

    def command(self) -> list[str]:
        place = [f"--port={self.port}"] if self.port else [f"--socket={self.socket}"]
        options = ["--persistent", "--cache=writeback", "--format=raw", "--shared=0"]
        return ["qemu-nbd", *place, *options, "--export-name=disk", str(self.disk)]


class Wire(Server):
    """No server at all, see bench_wire.py: what the client and the sockets do at best."""

    name = "wire"

    def make_files(self) -> None:
        pass

    def command(self) -> list[str]:
        script = Path(__file__).with_name("bench_wire.py")
        return [sys.executable, str(script), str(self.port or self.socket), str(self.size)]


class Standby(Server):
    """A server with overlays, and a control socket that speaks QMP."""

    @property
    def control(self) -> Path:
        """The control socket."""
        return self.sockets / "qmp.sock"

    @cached_property
    def client(self) -> ControlClient:
        """The connection to it, made when first needed."""
        client = self.wait(self._connect)
        assert client
        return client

    def start(self) -> None:
        """Start replication: the first checkpoint holds."""
        self.client.execute("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        """Empty both overlays: nothing is touched any more."""
        self.client.execute("xen-colo-do-checkpoint")

    def failover(self) -> None:
        """The view becomes the disk; the commit runs on after the reply."""
        self.client.execute("xen-set-replication", enable=False, primary=False, failover=True)

    def committed(self) -> bool:
        """Whether the commit of a failover has ended."""
        raise NotImplementedError

    def close(self) -> None:
        if "client" in vars(self):
            self.client.close()
        super().close()

    def _connect(self) -> ControlClient | None:
        try:
            return ControlClient(self.control)
        except ReplnbdError:
            return None  # not there yet, or QEMU dropped a client that came too early


class Replnbd(Standby):
    """`replnbd serve`; `disks` more than one are small, and idle."""

    name = "replnbd"
    durability = "process"

    def __init__(self, directory: Path, size: int, *, tcp: bool = False, disks: int = 1) -> None:
        self.disks = disks
        super().__init__(directory, size, tcp=tcp)

    def make_files(self) -> None:
        super().make_files()
        for number in range(1, self.disks):
            path = self.directory / f"disk{number}.raw"
            path.touch()
            os.truncate(path, 64 << 20)

    def command(self) -> list[str]:
        listen = self.uri("") if self.port else f"nbd+unix:///?socket={self.socket}"
        text = f'[server]\nlisten = ["{listen}"]\ncontrol = "{self.control}"\n'
        for number in range(self.disks):
            suffix = str(number or "")
            text += f"""
            [[disk]]
            name = "disk{suffix}"
            mode = "secondary"
            top-id = "view{suffix}"
            secondary = "disk{suffix}.raw"
            hidden = "hidden{suffix}.qcow2"
            active = "active{suffix}.qcow2"
            durability = "{self.durability}"
            """
        config = self.directory / "replnbd.toml"
        config.write_text(text)
        return [str(Path(sys.executable).with_name("replnbd")), "serve", str(config)]

    def committed(self) -> bool:
        disks = self.client.execute("x-replnbd-status")["disks"]
        return all(disk["stage"] == "done" for disk in disks)


class ReplnbdPower(Replnbd):
    """The same, with a view that survives a power failure."""

    name = "replnbd-power"
    durability = "power"


class Qemu(Standby):
    """QEMU's filter as docs/block-replication.txt sets it up, without a machine around it.

    Overlays as `qemu-img create` makes them; discard=unmap so that a checkpoint gives space back.
    """

    name = "qemu"

    def make_files(self) -> None:
        super().make_files()
        for overlay in ("hidden", "active"):
            image = str(self.directory / f"{overlay}.qcow2")
            command = ["qemu-img", "create", "-q", "-f", "qcow2", image, str(self.size)]
            subprocess.run(command, check=True)

    def command(self) -> list[str]:
        standby = (
            "if=none,id=view,driver=replication,mode=secondary,top-id=view,discard=unmap,"
            f"file.driver=qcow2,file.file.driver=file,file.file.filename={self.directory}/active.qcow2,"
            "file.backing.driver=qcow2,file.backing.file.driver=file,"
            f"file.backing.file.filename={self.directory}/hidden.qcow2,"
            "file.backing.backing=disk"
        )
        secondary = f"if=none,id=disk,format=raw,discard=unmap,file={self.disk}"
        bare = ["-M", "none", "-nodefaults", "-display", "none", "-S"]
        qmp = ["-qmp", f"unix:{self.control},server=on,wait=off"]
        return ["qemu-system-x86_64", *bare, *qmp, "-drive", secondary, "-drive", standby]

    def prepare(self) -> None:
        address: dict[str, Any] = {"type": "unix", "data": {"path": str(self.socket)}}
        if self.port:
            address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(self.port)}}
        self.client.execute("nbd-server-start", addr=address)
        for name in ("disk", "view"):
            self.client.execute("nbd-server-add", device=name, writable=True)

    def committed(self) -> bool:
        # The job is internal, and the status says "I/O error occurred" while all is well; but the
        # commit's filter node is listed from the failover's reply until the job has ended.
        nodes = self.client.execute("query-named-block-nodes")
        return all(node["drv"] != "mirror_top" for node in nodes)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
