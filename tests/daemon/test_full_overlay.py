"""A hidden or active overlay without space: the write fails, and nothing else is lost."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern, tmpfs
from peers import NbdReplyError, fingerprints, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

STEP = 4096


@pytest.fixture
def small(setup: Setup) -> Iterator[Setup]:
    """A disk whose overlays are on a file system of 512 KiB."""
    with tmpfs(setup.folder, pages=160):
        setup.table["hidden"] = "disk/d.hidden"
        setup.table["active"] = "disk/d.active"
        yield setup


def write_until_full(client_of: str, running: Running, fill: int) -> tuple[int, bytes]:
    """Write 4 KiB pieces from the start on; the first offset that failed, and what was written."""
    client = running.connect(client_of)
    for offset in range(0, SIZE, STEP):
        try:
            client.pwrite(offset, bytes([fill]) * STEP)
        except NbdReplyError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            return offset, bytes([fill]) * offset
    pytest.fail("the overlay has room for all of the disk")


def test_a_full_hidden_overlay_fails_the_primarys_write_and_keeps_disk_and_view(
    small: Setup,
) -> None:
    with small.serve() as running:
        running.start()
        view = running.connect("d-top")
        end, written = write_until_full("d", running, 0xAA)
        assert end > 0
        assert view.pread(0, SIZE) == pattern(1)
        assert small.path("secondary").read_bytes() == written + pattern(1)[end:]
        primary = running.connect("d")
        primary.pwrite(0, b"B" * end)  # saved already: this needs no space
        for offset in (end, SIZE - STEP):
            with pytest.raises(NbdReplyError) as caught:
                primary.pwrite(offset, bytes(STEP))
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(NbdReplyError) as caught:
                primary.write_zeroes(offset, STEP)
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(NbdReplyError) as caught:
                primary.trim(offset, STEP)
            assert caught.value.errno == errno.ENOSPC
        disk = running.disk()
        assert (disk["stage"], disk["error"]) == ("running", None)
        assert disk["primary-errors"] == 7
        assert disk["standby-errors"] == 0
        errors = [e["data"] for e in running.qmp.events if e["event"] == "BLOCK_IO_ERROR"]
        assert errors[0] == {
            "device": "d",
            "node-name": "d",
            "operation": "write",
            "action": "report",
            "nospace": True,
            "reason": "No space left on device",
        }
        assert "export d: WRITE failed: [Errno 28] No space left on device" in running.log
        assert view.pread(0, SIZE) == pattern(1)
        now = b"B" * end + pattern(1)[end:]
        assert small.path("secondary").read_bytes() == now

        running.checkpoint()
        assert view.pread(0, SIZE) == now
        primary.pwrite(SIZE - STEP, b"C" * STEP)
        assert view.pread(0, SIZE) == now
        running.process.terminate()
    check_overlays(small)
    assert small.path("secondary").read_bytes() == now[:-STEP] + b"C" * STEP


def test_a_full_active_overlay_fails_the_standbys_write_and_the_primary_goes_on(
    small: Setup,
) -> None:
    with small.serve() as running:
        running.start()
        end, written = write_until_full("d-top", running, 0xAA)
        assert end > 0
        view = running.connect("d-top")
        assert view.pread(0, SIZE) == written + pattern(1)[end:]
        assert small.path("secondary").read_bytes() == pattern(1)
        view.pwrite(0, b"B" * end)
        expected = b"B" * end + pattern(1)[end:]
        assert view.pread(0, SIZE) == expected
        assert running.disk()["standby-errors"] == 1
        # A failover needs no space: it makes some.
        running.failover()
        wait_until(lambda: running.disk()["stage"] == "done", "the end of the commit")
        view.pwrite(SIZE - STEP, b"C" * STEP)
        assert view.pread(0, SIZE) == expected[:-STEP] + b"C" * STEP
        running.process.terminate()
    check_overlays(small)
    assert small.path("secondary").read_bytes() == expected[:-STEP] + b"C" * STEP


def test_after_a_full_overlay_an_orderly_end_and_a_new_start_are_clean(small: Setup) -> None:
    with small.serve() as running:
        running.start()
        end, written = write_until_full("d", running, 0xAA)
        running.stop()
        running.process.terminate()
    check_overlays(small)
    before = images(small)
    with small.serve() as running:
        running.qmp.execute("x-replnbd-reset")
        running.start()
        assert running.connect("d-top").pread(0, SIZE) == written + pattern(1)[end:]
        running.stop()
        running.process.terminate()
    assert images(small) == before


def images(setup: Setup) -> dict[str, str]:
    """All files but the journal, which counts what was done."""
    found = fingerprints(setup.folder)
    return {path: found[path] for path in found if not path.endswith(".journal")}
