"""What the tests with QEMU as the primary share: it, its guest, its standby, and what is known of
their disks."""

from __future__ import annotations

import random
from pathlib import Path

from interop_support import (
    KIB,
    MIB,
    SECTOR,
    START,
    Standby,
    Twin,
    assert_same,
    fresh_seed,
    mottled,
    random_requests,
)
from peers import CuttingProxy, DiskFormat, FilterPrimary, QemuPrimary, ReplnbdDisk

SIZE = 6 * MIB + 512
LENGTH_MAX = 200 * KIB
HEALTHY = {"error": False}


class World:
    """A standby of an empty disk in stage none, a primary with a full one, a proxy in between that
    does nothing yet, and the model of what the guest and the standby have written."""

    def __init__(self, folder: Path, form: type[QemuPrimary], format_: DiskFormat = "raw") -> None:
        self.folder = folder
        self.rng = random.Random(fresh_seed())
        content = mottled(self.rng, SIZE)
        self.twin = Twin(content)
        (folder / "vm0.raw").write_bytes(content)
        disk = ReplnbdDisk.create(folder, "colo0", "top0", bytes(SIZE), format_)
        self.standby = Standby(folder, disk)
        self.proxy = CuttingProxy(("127.0.0.1", 0), self.standby.nbd_socket)
        self.primary = form(folder, folder / "vm0.raw")
        self.guest = self.primary.connect()

    @property
    def address(self) -> tuple[str, int]:
        """Of the proxy before the standby."""
        assert isinstance(self.proxy.address, tuple)
        return self.proxy.address

    def begin(self) -> None:
        """Synchronise while the guest writes, and replicate."""
        self.primary.synchronise(self.address, "colo0", meanwhile=self.write)
        assert_same(self.standby.content("colo0"), self.twin.primary, "the disk after the mirror")
        self.twin.checkpoint()
        self.standby.qmp.execute(*START)
        self.primary.start()
        assert self.primary.status() == HEALTHY

    def write(self, count: int = 40) -> None:
        """The guest writes and zeroes, and sees no error; the filter wants whole sectors."""
        alignment = SECTOR if isinstance(self.primary, FilterPrimary) else 1
        random_requests(
            self.rng, self.guest, self.twin.primary, count,
            length_max=LENGTH_MAX, trim=False, alignment=alignment,
        )  # fmt: skip

    def trim(self, count: int = 10) -> None:
        """A quorum has no discard: QEMU acknowledges a TRIM, and nothing changes on either side."""
        for _ in range(count):
            offset = self.rng.randrange(0, SIZE - LENGTH_MAX, SECTOR)
            self.guest.trim(offset, self.rng.randrange(SECTOR, LENGTH_MAX, SECTOR))

    def write_sector(self, offset: int) -> bool:
        """The guest writes a sector; whether the standby has it then."""
        data = self.rng.randbytes(SECTOR)
        self.guest.pwrite(offset, data)
        self.twin.primary[offset : offset + SECTOR] = data
        with self.standby.connect("colo0") as client:
            return client.pread(offset, SECTOR) == data

    def write_view(self, count: int = 40) -> None:
        """The standby's guest writes, zeroes and trims."""
        with self.standby.connect("top0") as view:
            random_requests(self.rng, view, self.twin.view, count, length_max=LENGTH_MAX)

    def compare(self) -> None:
        """Both exports, all bytes."""
        assert_same(self.standby.content("colo0"), self.twin.primary, "colo0")
        assert_same(self.standby.content("top0"), self.twin.view, "top0")

    def compare_guest(self) -> None:
        """What the primary's guest reads, all bytes."""
        assert_same(self.guest.pread(0, SIZE), self.twin.primary, "the primary's disk")

    def close(self) -> None:
        """Whatever still runs is killed."""
        self.guest.close()
        self.primary.__exit__(None, None, None)
        self.proxy.close()
        self.standby.__exit__(None, None, None)
