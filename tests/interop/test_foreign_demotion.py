"""A primary becomes a standby where no other replnbd has been: its disk on an NBD server, or its
copy on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign_support import SIZE, Foreign, Server, nbdkit
from interop_support import assert_same
from peers import REPLNBD, NbdClient, Process, QmpClient, list_exports, refusal, run_replnbd

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def test_what_no_replnbd_has_sent_to_takes_what_any_client_writes(short_dir: Path) -> None:
    """Such as QEMU's primary, once its side has taken over."""
    with Foreign(short_dir, nbdkit(short_dir, "memory", str(SIZE))) as world:
        world.begin()
        world.server.close()
        world.primary.wait_link("connecting")
        world.primary.qmp.execute("x-replnbd-demote")
        with world.primary.connect() as client:
            client.pwrite(0, b"from QEMU")
            world.content[:9] = b"from QEMU"
            assert_same(client.pread(0, SIZE), world.content, "the disk")


class Remote:
    """A primary whose disk is nbdkit's, and its history `folder`/NAME.history."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.disk = nbdkit(folder, "memory", str(SIZE), threads=4)
        self.nbd, self.control = folder / "nbd", folder / "qmp"
        server = {"listen": [f"nbd+unix:///?socket={self.nbd}"], "control": str(self.control)}
        disk = {
            "name": "vm0",
            "mode": "primary",
            "disk": f"nbd+unix:///disk?socket={self.disk.socket}",
            "history": str(folder / f"{name}.history"),
        }
        tables: dict[str, dict[str, Any]] = {"[server]": server, "[[disk]]": disk}
        self.config = folder / "replnbd.toml"
        self.config.write_text(
            "".join(
                f"{head}\n" + "".join(f"{key} = {json.dumps(table[key])}\n" for key in table)
                for head, table in tables.items()
            )
        )

    def start(self) -> Process:
        process = Process([*REPLNBD, "serve", str(self.config)], log=self.folder / "log")
        process.reach(lambda: list_exports(self.nbd))
        process.reach(lambda: QmpClient(self.control).close())
        return process

    @property
    def role(self) -> str:
        with QmpClient(self.control) as qmp:
            return str(qmp.execute("x-replnbd-status")["role"])


@pytest.fixture
def server(short_dir: Path) -> Iterator[list[Server]]:
    servers: list[Server] = []
    yield servers
    for each in servers:
        each.close()


def test_a_disk_on_a_server_has_its_overlays_beside_its_history(
    short_dir: Path, server: list[Server]
) -> None:
    remote = Remote(short_dir, "vm0")
    server.append(remote.disk)
    with remote.start() as process:
        with NbdClient(remote.nbd, "vm0") as client:
            client.pwrite(0, b"kept")
        assert run_replnbd("demote", "--control", remote.control).status == 0
        assert process.terminate() == 0
    for layer in ("hidden", "active"):
        assert (short_dir / f"vm0.{layer}.qcow2").exists()
    with remote.start() as process:
        assert remote.role == "secondary"
        with NbdClient(remote.nbd, "vm0") as client:
            assert client.pread(0, 4) == b"kept"
        assert process.terminate() == 0


def test_a_demotion_that_has_no_place_for_its_overlays_changes_nothing(
    short_dir: Path, server: list[Server]
) -> None:
    name = "n" * 245  # and with .hidden.qcow2 it is no name for a file
    remote = Remote(short_dir, name)
    server.append(remote.disk)
    for _ in range(2):
        with remote.start() as process, NbdClient(remote.nbd, "vm0") as client:
            line = refusal(run_replnbd("demote", "--control", remote.control))
            assert "File name too long" in line
            assert remote.role == "primary"
            client.pwrite(0, b"still")
            client.close()
            assert process.terminate() == 0
