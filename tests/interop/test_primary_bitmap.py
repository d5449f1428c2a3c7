"""What a primary's standby lacks, as other programs read it: qemu:dirty-bitmap:resync."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import run
from peers import REPLNBD, NbdClient, Process, list_exports

SIZE = 8 << 20
GRANULE = 64 << 10


@pytest.fixture
def socket(short_dir: Path) -> Iterator[Path]:
    """A primary whose standby is not there yet."""
    (short_dir / "vm0.raw").write_bytes(bytes(SIZE))
    path = short_dir / "nbd"
    argv = [*REPLNBD, "primary", str(short_dir / "vm0.raw"), "--control", str(short_dir / "qmp")]
    argv += ["--listen", f"nbd+unix:///?socket={path}"]
    argv += ["--to", f"nbd+unix:///colo0?socket={short_dir}/nobody"]
    process = Process(argv, log=short_dir / "log")
    try:
        process.reach(lambda: list_exports(path))
        yield path
    finally:
        process.kill()


def dirty_by_nbdinfo(socket: Path) -> list[tuple[int, int]]:
    uri = f"nbd+unix:///vm0?socket={socket}"
    found = run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:resync", uri)
    return [(one["offset"], one["length"]) for one in json.loads(found) if one["type"] == 1]


@pytest.mark.interop
@pytest.mark.slow
def test_what_was_written_is_dirty_by_granules_for_libnbd_and_qemu(socket: Path) -> None:
    assert dirty_by_nbdinfo(socket) == []
    with NbdClient(socket, "vm0") as client:
        client.pwrite(3 * GRANULE + 5, b"x")
        client.pwrite(5 * GRANULE - 1, b"xy")
        client.trim(SIZE - 1, 1)
    dirty = [(3 * GRANULE, 3 * GRANULE), (SIZE - GRANULE, GRANULE)]
    assert dirty_by_nbdinfo(socket) == dirty
    image = (
        "driver=nbd,export=vm0,server.type=unix,x-dirty-bitmap=qemu:dirty-bitmap:resync,"
        f"server.path={socket}"
    )
    found = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", image))
    # QEMU shows what is dirty there as what has no data (docs/interop/bitmaps of libvirt do so).
    assert [(one["start"], one["length"]) for one in found if not one["data"]] == dirty
