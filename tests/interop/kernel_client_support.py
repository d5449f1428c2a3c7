"""What the tests with the kernel's NBD client share: the guest's devices, files that the host and
the guest both know, and a standby for one test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interop_support import (
    CHECKPOINT,
    KIB,
    MIB,
    START,
    Standby,
    assert_same,
    fresh_seed,
    run,
)
from peers import Guest, PeerError, ReplnbdDisk, wait_until

SIZE = 24 * MIB
DEVICES = ["nbd0", "nbd1"]
HOST = "10.0.2.2"
"""The host's loopback, as QEMU's user network shows it to the guest."""


def attach(guest: Guest, standby: Standby, export: str, device: str, options: str = "") -> None:
    """Connect a device of the guest (`nbd0`) to an export, over TCP."""
    guest.run(f"nbd-client {options} {HOST} {standby.port} -N {export} /dev/{device}")


def detach(guest: Guest, device: str) -> None:
    """Disconnect it, in an orderly way; it must have been connected."""
    guest.run(f"nbd-client -c /dev/{device}; nbd-client -d /dev/{device}")


def mount(guest: Guest, device: str, options: str = "rw") -> None:
    """Mount a device on a directory of the same name in /mnt."""
    guest.run(f"mkdir -p /mnt/{device}; mount -t ext4 -o {options} /dev/{device} /mnt/{device}")


def umount(guest: Guest, device: str) -> None:
    """Unmount it; whatever the guest had in memory is on the device then."""
    guest.run(f"umount /mnt/{device}")


def start_writing(guest: Guest) -> None:
    """Files named noise.N come and go on nbd0 in the background, without end."""
    copy = "dd if=/dev/vda of=/mnt/nbd0/noise.$i bs=64k count=16 skip=$i conv=fsync status=none"
    step = f"i=$((i % 7 + 1)); {copy} || break; rm -f /mnt/nbd0/noise.$((i % 3 + 1))"
    loop = f"i=0; while [ ! -e /tmp/stop ]; do {step}; done; rm /tmp/writing"
    guest.run(f"rm -f /tmp/stop; touch /tmp/writing; ({loop}) >/dev/null 2>&1 &")


def stop_writing(guest: Guest) -> None:
    """Until nobody writes in the background any more."""
    guest.run("touch /tmp/stop; while [ -e /tmp/writing ]; do usleep 20000; done")


def release(guest: Guest) -> None:
    """Unmount and disconnect whatever a test has left: the guest is others', too."""
    stop_writing(guest)
    for device in DEVICES:
        guest.run(f"umount -l /mnt/{device} || :; nbd-client -d /dev/{device} || :")


def forget(guest: Guest, device: str) -> None:
    """Drop what the guest has read of a device: what is read next comes from the server."""
    guest.run(f"sync; blockdev --flushbufs /dev/{device}; echo 3 >/proc/sys/vm/drop_caches")


def checksum(guest: Guest, path: str) -> str:
    """The SHA-256 of a file or of a whole device, as the guest reads it."""
    return guest.run(f"sha256sum {path}").split()[0]


def expect_bytes(guest: Guest, device: str, expected: bytes | bytearray, what: str) -> None:
    """The guest reads `expected` from the device, all bytes and no others."""
    forget(guest, device)
    found = checksum(guest, f"/dev/{device}")
    assert found == hashlib.sha256(expected).hexdigest(), what


def check_device(guest: Guest, device: str) -> None:
    """The guest's e2fsck finds nothing wrong, and nothing that a journal must repair."""
    guest.run(f"e2fsck -fn /dev/{device}")


class Files:
    """Files in the root of a file system: slices of the guest's /dev/vda."""

    def __init__(self, rng: random.Random, source: bytes) -> None:
        self.rng = rng
        self.source = source
        self.content: dict[str, bytes] = {}

    def copy(self) -> Files:
        """Another file system with the same files."""
        other = Files(self.rng, self.source)
        other.content = dict(self.content)
        return other

    def write(self, guest: Guest, device: str, *names: str, length_max: int = 700 * KIB) -> None:
        """New files, or new content of old ones; on the disk (fsync) when this returns."""
        for name in names:
            length = self.rng.randint(1, length_max)
            skip = self.rng.randrange(len(self.source) - length)
            copy = f"dd if=/dev/vda of=/mnt/{device}/{name} bs=64k conv=fsync status=none"
            guest.run(f"{copy} iflag=skip_bytes,count_bytes,fullblock skip={skip} count={length}")
            self.content[name] = self.source[skip : skip + length]

    def remove(self, guest: Guest, device: str, *names: str) -> None:
        """Delete files."""
        for name in names:
            guest.run(f"rm /mnt/{device}/{name}")
            del self.content[name]

    def check_mounted(self, guest: Guest, device: str) -> None:
        """The guest reads these files with these bytes from the server, and no others."""
        forget(guest, device)
        listed = guest.run(f"cd /mnt/{device}; ls").split()
        assert sorted(set(listed) - {"lost+found"}) == sorted(self.content)
        for name, content in self.content.items():
            found = checksum(guest, f"/mnt/{device}/{name}")
            assert found == hashlib.sha256(content).hexdigest(), f"{name} on {device}"

    def check_image(self, image: Path, folder: Path) -> None:
        """On the host, the file system in `image` is whole and holds these files and no others."""
        run("e2fsck", "-fn", image)
        folder.mkdir()
        run("debugfs", "-R", f"rdump / {folder}", image)
        found = {path.name: path for path in folder.iterdir() if path.is_file()}
        assert sorted(found) == sorted(self.content)
        for name, content in self.content.items():
            assert_same(found[name].read_bytes(), content, f"{name} in {image.name}")


class Work:
    """A standby of an empty disk, the guest, and the files that are to be on the disk."""

    def __init__(
        self,
        folder: Path,
        guest: Guest,
        source: bytes,
        serve: Callable[[Path, ReplnbdDisk], Standby] = Standby,
    ) -> None:
        self.folder = folder
        self.guest = guest
        self.source = source
        self.rng = random.Random(fresh_seed())
        self.disk = ReplnbdDisk.create(folder, "colo0", "top0", bytes(SIZE))
        self.standby = serve(folder, self.disk)
        self.files = Files(self.rng, source)

    def make_file_system(self, options: str = "") -> None:
        """A new file system on NAME, mounted."""
        attach(self.guest, self.standby, "colo0", "nbd0", options)
        self.guest.run("mkfs.ext4 -q /dev/nbd0")
        mount(self.guest, "nbd0")

    def start(self) -> bytearray:
        """Start replication as `checkpoint` does; what TOP-ID shows from now on."""
        return self._while_frozen(*START)

    def checkpoint(self) -> bytearray:
        """Checkpoint while the primary's file system stands still, as a manager would; what TOP-ID
        shows from now on."""
        return self._while_frozen(*CHECKPOINT)

    def _while_frozen(self, command: str, arguments: dict[str, Any] | None = None) -> bytearray:
        self.guest.run("sync; fsfreeze --freeze /mnt/nbd0")
        self.standby.qmp.execute(command, arguments)
        content = self.standby.content("colo0")
        self.guest.run("fsfreeze --unfreeze /mnt/nbd0")
        return content

    def status(self, member: str) -> int:
        """A number of x-replnbd-status."""
        return int(self.standby.qmp.execute("x-replnbd-status")["disks"][0][member])

    def wait_for_writes(self, count: int) -> None:
        """Until the primary has written so many bytes more."""
        written = self.status("primary-bytes-written")
        wait_until(
            lambda: self.status("primary-bytes-written") >= written + count, "the primary's writes"
        )

    def wait_for_connections(self, count: int) -> None:
        """Until so many clients use NAME."""
        wait_until(
            lambda: self.status("primary-connections") == count, f"{count} connections to NAME"
        )

    def check_disk(self) -> None:
        """The export and the secondary disk have the same bytes, before and after the server's
        end, and on it is a whole file system with the files."""
        exported = self.standby.content("colo0")
        assert_same(self.disk.content(), exported, "the secondary disk")
        self.standby.quit()
        assert_same(self.disk.content(), exported, "the secondary disk after the end")
        self.files.check_image(self.disk.secondary, self.folder / "files")

    def check_view(self, files: Files) -> None:
        """On TOP-ID is a whole file system with `files`."""
        path = self.folder / "view"
        path.write_bytes(self.standby.content("top0"))
        files.check_image(path, self.folder / "seen")

    def finish(self) -> None:
        """Leave the guest as it was; the server's log must have nothing worse than INFO."""
        # For a test that failed on the host; pytest shows it then, and only then.
        print(self.guest.process.failure("The guest:"))
        release(self.guest)
        server = self.standby.process
        print(server.failure("The server:"))
        if any(" INFO " not in line for line in server.log.read_text().splitlines()):
            raise PeerError(server.failure("the server complains"))
