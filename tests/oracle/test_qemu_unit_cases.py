"""The /replication/secondary/ cases of QEMU's tests/unit/test-replication.c, told again.

QEMU's own run inside its process and compare with `memcmp(...) <= 0`, which half of all wrong
bytes pass. Here they run over NBD and QMP, compare every byte, and run against QEMU's filter too:
that shows that what they demand of replnbd is what QEMU does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import NbdClient, NbdReplyError, QemuDisk, QemuSecondary, ReplnbdDaemon, ReplnbdDisk

pytestmark = [pytest.mark.interop, pytest.mark.slow]

IMAGE_SIZE = 64 << 20
HALF = IMAGE_SIZE // 2
LOCAL_DISK_ID = "secondary-local-disk-id"
TOP_ID = "secondary-id"


class Secondary:
    """The secondary disk, full of 0x11, behind its two exports; the functions of replication.c."""

    def __init__(self, peer: QemuSecondary | ReplnbdDaemon) -> None:
        self.peer = peer
        self.local: NbdClient = peer.connect(LOCAL_DISK_ID)
        self.top: NbdClient = peer.connect(TOP_ID)
        self.local.pwrite(0, filled(0x11, IMAGE_SIZE))

    def start_all(self, *, primary: bool = False) -> None:
        """replication_start_all, which must succeed."""
        self._set(enable=True, primary=primary)

    def stop_all(self, *, failover: bool) -> None:
        """replication_stop_all, which must succeed."""
        self._set(enable=False, primary=False, failover=failover)

    def _set(self, **arguments: bool) -> None:
        assert self.peer.qmp.execute("xen-set-replication", arguments) == {}

    def do_checkpoint_all(self) -> None:
        """replication_do_checkpoint_all, which must succeed."""
        assert self.peer.qmp.execute("xen-colo-do-checkpoint") == {}

    def get_error_all(self) -> Any:
        """replication_get_error_all."""
        return self.peer.qmp.execute("query-xen-replication-status")

    def view(self) -> bytes:
        """All bytes of the top disk."""
        return bytes(self.top.pread(0, IMAGE_SIZE))

    def finish(self) -> bytes:
        """Let a failover end, end the peer in order; all bytes of the local disk."""
        self.peer.wait_for_commit()
        self.top.close()
        self.local.close()
        self.peer.quit()
        return self.peer.disks[0].content()


def filled(pattern: int, length: int) -> bytes:
    """`length` times the byte `pattern`."""
    return bytes([pattern]) * length


@pytest.fixture(params=["qemu", "replnbd"])
def secondary(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Secondary]:
    """start_secondary: the unit test's disks are qcow2, all three."""
    empty = bytes(IMAGE_SIZE)
    peer: QemuSecondary | ReplnbdDaemon
    if request.param == "qemu":
        disk = QemuDisk.create(short_dir, LOCAL_DISK_ID, TOP_ID, empty, "qcow2")
        peer = QemuSecondary(short_dir, [disk])
    else:
        ours = ReplnbdDisk.create(short_dir, LOCAL_DISK_ID, TOP_ID, empty, "qcow2")
        peer = ReplnbdDaemon(short_dir, [ours])
    with peer:
        case = Secondary(peer)
        yield case
        case.top.close()
        case.local.close()


def test_secondary_read(secondary: Secondary) -> None:
    """Before a start a read of the top disk fails."""
    with pytest.raises(NbdReplyError) as caught:
        secondary.view()
    assert caught.value.errno == errno.EIO


def test_secondary_write(secondary: Secondary) -> None:
    """Before a start a write to the top disk fails, and changes nothing."""
    with pytest.raises(NbdReplyError) as caught:
        secondary.top.pwrite(0, bytes(IMAGE_SIZE))
    assert caught.value.errno == errno.EIO
    assert secondary.finish() == filled(0x11, IMAGE_SIZE)


def test_secondary_start(secondary: Secondary) -> None:
    """Once started, each side writes, and neither sees the other's."""
    secondary.start_all()
    assert secondary.view() == filled(0x11, IMAGE_SIZE)
    secondary.local.pwrite(HALF, filled(0x22, HALF))
    assert secondary.view() == filled(0x11, IMAGE_SIZE)
    secondary.top.pwrite(0, filled(0x33, HALF))
    assert secondary.view() == filled(0x33, HALF) + filled(0x11, HALF)
    local = bytes(secondary.local.pread(0, IMAGE_SIZE))
    assert local == filled(0x11, HALF) + filled(0x22, HALF)
    secondary.stop_all(failover=True)


def test_secondary_stop(secondary: Secondary) -> None:
    """A failover commits the standby's writes and the old data: the last checkpoint's state, and
    not, as QEMU's comment has it, the primary's 0x22: `<= 0` lets 0x11 pass for it."""
    secondary.start_all()
    secondary.local.pwrite(HALF, filled(0x22, HALF))
    assert secondary.view() == filled(0x11, IMAGE_SIZE)
    secondary.top.pwrite(0, filled(0x33, HALF))
    secondary.stop_all(failover=True)
    expected = filled(0x33, HALF) + filled(0x11, HALF)
    assert secondary.view() == expected
    assert secondary.finish() == expected


def test_secondary_continuous_replication(secondary: Secondary) -> None:
    """After a failover every command is ignored, and changes nothing."""
    secondary.start_all()
    secondary.local.pwrite(HALF, filled(0x22, HALF))
    assert secondary.view() == filled(0x11, IMAGE_SIZE)
    secondary.top.pwrite(0, filled(0x33, HALF))
    secondary.stop_all(failover=True)
    secondary.start_all(primary=True)
    secondary.do_checkpoint_all()
    secondary.stop_all(failover=True)
    expected = filled(0x33, HALF) + filled(0x11, HALF)
    assert secondary.view() == expected
    assert secondary.finish() == expected


def test_secondary_do_checkpoint(secondary: Secondary) -> None:
    """A checkpoint moves the view to the primary's data."""
    secondary.start_all()
    secondary.local.pwrite(HALF, filled(0x22, HALF))
    assert secondary.view() == filled(0x11, IMAGE_SIZE)
    secondary.do_checkpoint_all()
    expected = filled(0x11, HALF) + filled(0x22, HALF)
    assert secondary.view() == expected
    secondary.stop_all(failover=True)
    assert secondary.finish() == expected


def test_secondary_get_error_all(secondary: Secondary) -> None:
    """While all is well there is no error."""
    secondary.start_all()
    assert secondary.get_error_all() == {"error": False}
    secondary.stop_all(failover=True)
