"""A primary becomes a standby where no other replnbd has been: its disk on an NBD server, or its
copy on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from foreign_support import SIZE, Foreign, nbdkit
from interop_support import assert_same
from peers import REPLNBD, Done, NbdClient, Process, QmpClient, list_exports, refusal, run_replnbd

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
        self.content = bytearray(SIZE)
        self.disk = nbdkit(folder, "memory", str(SIZE))
        self.nbd, self.control, self.log = folder / "nbd", folder / "qmp", folder / "log"
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

    @contextmanager
    def running(self, role: str) -> Iterator[None]:
        """A daemon that begins in that role, with the disk as it was left."""
        with Process([*REPLNBD, "serve", str(self.config)], log=self.log) as process:
            process.reach(lambda: list_exports(self.nbd))
            process.reach(lambda: QmpClient(self.control).close())
            assert self.role == role
            self.compare()
            yield
            assert process.terminate() == 0

    @property
    def role(self) -> str:
        with QmpClient(self.control) as qmp:
            return str(qmp.execute("x-replnbd-status")["role"])

    def write(self, data: bytes) -> None:
        with NbdClient(self.nbd, "vm0") as client:
            client.pwrite(0, data)
        self.content[: len(data)] = data

    def compare(self) -> None:
        """All bytes."""
        with NbdClient(self.nbd, "vm0") as client:
            assert_same(client.pread(0, SIZE), self.content, "the disk")

    def demote(self) -> Done:
        return run_replnbd("demote", "--control", self.control)


@contextmanager
def remote(folder: Path, name: str) -> Iterator[Remote]:
    """One, until the end of the block."""
    made = Remote(folder, name)
    try:
        yield made
    finally:
        made.disk.close()


def test_a_disk_on_a_server_has_its_overlays_beside_its_history(short_dir: Path) -> None:
    with remote(short_dir, "vm0") as primary:
        with primary.running("primary"):
            primary.write(b"kept")
            assert primary.demote().status == 0
        for layer in ("hidden", "active"):
            assert (short_dir / f"vm0.{layer}.qcow2").exists()
        with primary.running("secondary"):
            pass


def test_a_demotion_that_has_no_place_for_its_overlays_changes_nothing(short_dir: Path) -> None:
    name = "n" * 245  # and with .hidden.qcow2 it is no name for a file
    with remote(short_dir, name) as primary:
        for number in range(2):
            with primary.running("primary"):
                assert "File name too long" in refusal(primary.demote())
                assert primary.role == "primary"
                primary.write(b"still %d" % number)
                primary.compare()
        assert not list(short_dir.glob("*.qcow2"))
