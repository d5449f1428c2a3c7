"""Disks and configurations that the tests of the daemon share."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from peers import REPLNBD, NbdClient, PeerError, Process, QmpClient, list_exports, qemu_img

SIZE = 1 << 20


def pattern(seed: int, size: int = SIZE) -> bytes:
    """Bytes that are nowhere the same."""
    return random.Random(seed).randbytes(size)


class Setup:
    """A folder with a disk, made but not served: change what is in it, then `write` the
    configuration."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.listen = [f"nbd+unix:///?socket={folder}/nbd"]
        self.control = f"{folder}/qmp"
        self.server: dict[str, Any] = {}
        """More keys of [server]."""
        self.tables: list[dict[str, Any]] = []
        for name in names or ("d",):
            (folder / f"{name}.raw").write_bytes(pattern(1))
            self.tables.append(
                {
                    "name": name,
                    "mode": "secondary",
                    "top-id": f"{name}-top",
                    "secondary": f"{name}.raw",
                    "hidden": f"{name}.hidden",
                    "active": f"{name}.active",
                }
            )

    @property
    def table(self) -> dict[str, Any]:
        """The first disk's."""
        return self.tables[0]

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "replnbd.toml"

    def path(self, key: str, disk: int = 0) -> Path:
        """Of a disk's image."""
        return self.folder / str(self.tables[disk][key])

    def make_overlays(self, *, size: int = SIZE, options: tuple[str, ...] = ()) -> None:
        """Of the first disk, by qemu-img."""
        for key, below, format_ in (("hidden", "secondary", "raw"), ("active", "hidden", "qcow2")):
            backing = ["-b", self.path(below).name, "-F", format_]
            qemu_img(
                "create", "-q", "-f", "qcow2", *options, *backing, self.path(key), str(size)
            )  # fmt: skip

    def write(self) -> Path:
        """Write the configuration."""
        lines = ["[server]"]
        lines += [f"listen = {json.dumps(self.listen)}", f"control = {json.dumps(self.control)}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in self.server.items()]
        for table in self.tables:
            lines.append("[[disk]]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.config.write_text("\n".join(lines) + "\n")
        return self.config

    @contextlib.contextmanager
    def serve(self, *options: str, prefix: Sequence[str] = ()) -> Iterator[Running]:
        """`replnbd serve` until the block ends; killed if it still runs then. `prefix` is a
        command that runs it."""
        self.write()
        argv = [*prefix, *REPLNBD, "serve", *options, str(self.config)]
        with Running(self, argv) as running:
            yield running


class Running:
    """A daemon of a `Setup`, ready."""

    def __init__(self, setup: Setup, argv: list[str]) -> None:
        self.setup = setup
        self.nbd_socket = setup.folder / "nbd"
        self.control_socket = setup.folder / "qmp"
        self._clients: list[NbdClient | QmpClient] = []
        # Beside the folder, so that the folder holds what the daemon leaves there and no more.
        self.log_path = setup.folder.with_name(setup.folder.name + ".log")
        self.process = Process(argv, log=self.log_path)
        try:
            self.process.reach(lambda: list_exports(self.nbd_socket))
            self.qmp = self.process.reach(self.connect_qmp)
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> str:
        """What the daemon has told on stderr."""
        return self.log_path.read_text()

    def connect(self, export: str = "d", *, timeout_s: float = 30.0) -> NbdClient:
        """A new NBD client, closed with the daemon."""
        client = NbdClient(self.nbd_socket, export, timeout_s=timeout_s)
        self._clients.append(client)
        return client

    def connect_qmp(self) -> QmpClient:
        """A new QMP client, closed with the daemon."""
        client = QmpClient(self.control_socket)
        self._clients.append(client)
        return client

    def start(self) -> None:
        """Stage running."""
        self.qmp.execute("xen-set-replication", {"enable": True, "primary": False})

    def checkpoint(self) -> None:
        """A checkpoint."""
        self.qmp.execute("xen-colo-do-checkpoint")

    def stop(self) -> None:
        """A plain stop."""
        self.qmp.execute("xen-set-replication", {"enable": False, "primary": False})

    def failover(self, then: tuple[str, dict[str, Any]] | None = None) -> None:
        """Begin a failover; `then` is a command that follows at once, before much is committed."""
        arguments = {"enable": False, "primary": False, "failover": True}
        commands = [("xen-set-replication", arguments)] + ([then] if then is not None else [])
        for answer in self.qmp.answers(*commands):
            assert answer.ok, answer

    def disk(self, number: int = 0) -> dict[str, Any]:
        """The status of a disk."""
        status: dict[str, Any] = self.qmp.execute("x-replnbd-status")["disks"][number]
        return status

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def ended_well(self, timeout_s: float = 5.0) -> None:
        """Wait for the end: status 0, in time, no traceback, no socket left behind."""
        status = self.process.wait(timeout_s=timeout_s)
        if status or "Traceback" in self.log or "\nERROR" in self.log:
            raise PeerError(self.process.failure("did not end well"))
        assert not self.nbd_socket.exists()
        assert not self.control_socket.exists()

    def close(self) -> None:
        """Kill the daemon, if it runs, and let the clients go."""
        self.process.kill()
        for client in self._clients:
            client.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.log_path.unlink()


def check_overlays(setup: Setup, disk: int = 0) -> None:
    """qemu-img finds neither errors nor leaks (it exits with 3 for those)."""
    for key in ("hidden", "active"):
        qemu_img("check", "-q", "-f", "qcow2", setup.path(key, disk))


@contextlib.contextmanager
def tmpfs(folder: Path, *, pages: int) -> Iterator[Path]:
    """A file system in memory of `pages` times 4 KiB, at `folder`/disk."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    place = folder / "disk"
    place.mkdir()
    options = f"size={pages * 4096},mode=0755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def setup(short_dir: Path) -> Setup:
    """One disk without overlays."""
    folder = short_dir / "x"
    folder.mkdir()
    return Setup(folder)
