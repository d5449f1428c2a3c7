"""SIGTERM, SIGINT and QMP quit: within 5 s, whatever clients do, everything that was acknowledged
is on disk, the images are clean and the sockets gone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern
from peers import QmpClient, qemu_img, wait_until
from peers.nbd_client import CMD_READ, CMD_WRITE, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, connect
from writers import Writer

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def view(setup: Setup) -> bytes:
    """What the standby saw, read by QEMU through the chain on disk."""
    raw = setup.folder.with_name("view.raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", setup.path("active"), raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def by_sigterm(running: Running) -> None:
    running.signal(signal.SIGTERM)


def by_sigint(running: Running) -> None:
    running.signal(signal.SIGINT)


def by_quit(running: Running) -> None:
    running.connect_qmp().execute("quit")


WAYS: dict[Callable[[Running], None], tuple[str, str]] = {
    by_sigterm: ("SIGTERM received", "host-signal"),
    by_sigint: ("SIGINT received", "host-signal"),
    by_quit: ("ending: draining and flushing", "host-qmp-quit"),
}
way = pytest.mark.parametrize("end", WAYS, ids=lambda end: end.__name__)


@way
def test_it_ends_in_time_with_clients_in_every_phase_and_nothing_acknowledged_is_lost(
    setup: Setup, end: Callable[[Running], None]
) -> None:
    with setup.serve() as running:
        running.start()
        primary = Writer(running.connect("d"), 11, SIZE)
        standby = Writer(running.connect("d-top"), 12, SIZE)
        # Idle, in each phase
        running.connect("d")
        running.connect("d-top")
        listener = running.connect_qmp()
        silent = connect(running.nbd_socket)
        half_option = connect(running.nbd_socket)
        half_option.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 100) + b"x")
        # In the middle of a request, and of its payload
        half_request = running.connect("d")._wire.sock
        half_request.sendall(struct.pack(">IHH", REQUEST_MAGIC, 0, CMD_WRITE))
        half_write = running.connect("d")._wire.sock
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, SIZE)
        half_write.sendall(header + b"\xee" * (SIZE // 2))
        for writer in (primary, standby):
            writer.start()
        wait_until(lambda: min(primary.count, standby.count) > 100, "100 writes of each")
        end(running)
        running.ended_well(timeout_s=5)
        for writer in (primary, standby):
            writer.ended()
        for sock in (silent, half_option):
            sock.close()
        line, reason = WAYS[end]
        assert line in running.log
        lines = running.log.splitlines()
        assert lines[-2].endswith("INFO replnbd: ending: draining and flushing")
        assert lines[-1].endswith("INFO replnbd: ended")
        shutdown = [event for event in events_until_eof(listener) if event["event"] == "SHUTDOWN"]
        assert [event["data"] for event in shutdown] == [{"guest": False, "reason": reason}]
    assert primary.is_in(setup.path("secondary").read_bytes(), pattern(1))
    assert standby.is_in(view(setup), pattern(1))
    check_overlays(setup)


def events_until_eof(client: QmpClient) -> list[dict[str, Any]]:
    try:
        while True:
            client.events.append(client._receive())
    except ConnectionResetError:
        return client.events


@way
def test_it_ends_in_time_with_clients_that_do_not_read(
    setup: Setup, end: Callable[[Running], None]
) -> None:
    setup.path("secondary").write_bytes(b"")
    os.truncate(setup.path("secondary"), 64 << 20)
    with setup.serve() as running:
        running.start()
        last = running.connect("d")
        for export in ("d", "d", "d-top", "d-top"):
            sock = running.connect(export)._wire.sock
            for cookie in range(8):
                sock.sendall(
                    struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, cookie, 0, PAYLOAD_BYTES_MAX)
                )
        deaf = running.connect_qmp()._sock
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # until the daemon does not read any more, because we do not
                deaf.send(b'{"execute": "query-commands"}\n' * 1000)
        last.pwrite(12345, b"acknowledged")
        end(running)
        running.ended_well(timeout_s=5)
    with setup.path("secondary").open("rb") as file:
        file.seek(12345)
        assert file.read(12) == b"acknowledged"
    check_overlays(setup)


def test_a_second_signal_changes_nothing(setup: Setup) -> None:
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"acknowledged")
        for _ in range(3):
            running.signal(signal.SIGTERM)
            running.signal(signal.SIGINT)
        running.ended_well()
        assert running.log.count(" received") == 1
    assert setup.path("secondary").read_bytes() == b"acknowledged" + pattern(1)[12:]
    check_overlays(setup)


def test_while_it_ends_commands_are_refused_and_queries_answered(setup: Setup) -> None:
    os.truncate(setup.path("secondary"), 64 << 20)
    with setup.serve() as running:
        sock = running.connect("d")._wire.sock  # does not read: the end takes a while
        sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 0, PAYLOAD_BYTES_MAX))
        running.qmp.execute("quit")
        wait_until(lambda: "ending: " in running.log, "the end to begin")
        answer = running.qmp.answer(
            "xen-set-replication", {"enable": True, "primary": False}
        )  # fmt: skip
        assert answer.desc == "replnbd is shutting down"
        assert running.disk()["stage"] == "none"
        sock.close()
        running.ended_well()


def test_what_it_did_can_be_found_in_its_log(setup: Setup) -> None:
    with setup.serve() as running:
        running.start()
        running.connect("d").close()
        running.stop()
        running.process.terminate(timeout_s=5)
        texts = [line.split(" ", 2)[2] for line in running.log.splitlines()]
    folder = setup.folder
    expected = [
        f"INFO replnbd.daemon.images: created {folder}/d.hidden over d.raw (1048576 bytes)",
        f"INFO replnbd.daemon.images: created {folder}/d.active over d.hidden (1048576 bytes)",
        f"INFO replnbd.control.server: control: listening on {folder}/qmp",
        f"INFO replnbd.server.server: listening on nbd+unix:///?socket={folder}/nbd",
        f"INFO replnbd: ready: NBD on nbd+unix:///?socket={folder}/nbd, QMP on {folder}/qmp",
        "INFO replnbd.replication.disk: disk d: stage none -> running",
        "INFO replnbd.replication.disk: disk d: stage running -> done",
        "INFO replnbd: SIGTERM received",
        "INFO replnbd: ending: draining and flushing",
        "INFO replnbd: ended",
    ]
    assert [text for text in texts if text in expected] == expected
    clients = [text for text in texts if "uses export" in text]
    assert len(clients) == 1
    assert clients[0].endswith(" (unix): uses export d (simple replies)")


@pytest.mark.parametrize(
    ("level", "levels"),
    [
        ("error", set()),
        ("warning", set()),
        ("info", {"INFO"}),
        ("debug", {"INFO", "DEBUG"}),
    ],
)
def test_the_log_level_says_how_much_is_told(setup: Setup, level: str, levels: set[str]) -> None:
    with setup.serve("--log-level", level) as running:
        running.start()
        running.connect("d").close()
        running.signal(signal.SIGTERM)
        running.ended_well()
        assert {line.split()[2] for line in running.log.splitlines()} == levels


def test_after_an_orderly_end_the_next_daemon_serves_the_same_files(setup: Setup) -> None:
    for run in range(3):
        with setup.serve() as running:
            assert running.disk()["stage"] == "none"
            running.connect("d").pwrite(run, b"x")
            running.signal(signal.SIGTERM)
            running.ended_well()
        check_overlays(setup)
    assert setup.path("secondary").read_bytes() == b"xxx" + pattern(1)[3:]


BIG = 96 << 20


def run_failover(running: Running, *, speed: int = 0) -> Writer:
    """96 MiB in the hidden overlay, a standby that writes, and a commit that has begun."""
    running.start()
    primary = running.connect("d")
    for offset in range(0, BIG, 32 << 20):
        primary.pwrite(offset, b"\xaa" * (32 << 20))
    primary.close()
    standby = Writer(running.connect("d-top"), 6, BIG)
    standby.start()
    wait_until(lambda: standby.count > 100, "standby writes")
    running.failover(("block-job-set-speed", {"device": "commit-d", "speed": speed}))
    return standby


def make_big(setup: Setup) -> bytes:
    """Let the secondary disk be of `BIG` bytes: half of it noise, half a hole."""
    before = random.Random(5).randbytes(BIG // 2)
    setup.path("secondary").write_bytes(before)
    os.truncate(setup.path("secondary"), BIG)
    return before + bytes(BIG // 2)


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_an_end_during_a_failover_under_load_keeps_the_view_and_clean_images(
    setup: Setup, share: float
) -> None:
    """With one flush per 64 MiB, at 80 % a part of the disk is committed and dropped, a part
    is in both places, and a part in the overlays alone."""
    before = make_big(setup)
    with setup.serve() as running:
        standby = run_failover(running, speed=128 << 20)
        wait_until(lambda: commit_is_done(running, share), "progress of the commit")
        running.qmp.execute("job-pause", {"id": "commit-d"})
        count = standby.count
        wait_until(lambda: standby.count > count, "a standby write while the commit is paused")
        running.signal(signal.SIGTERM)
        running.ended_well(timeout_s=5)
        assert "failover -> done" not in running.log
        standby.ended()
    check_overlays(setup)
    assert standby.is_in(view(setup), before)


def test_an_end_in_the_middle_of_a_copy_keeps_the_view_and_clean_images(setup: Setup) -> None:
    before = make_big(setup)
    with setup.serve() as running:
        standby = run_failover(running)
        running.signal(signal.SIGTERM)
        running.ended_well(timeout_s=5)
        standby.ended()
    check_overlays(setup)
    assert standby.is_in(view(setup), before)


def commit_is_done(running: Running, share: float) -> bool:
    job = running.disk()["job"]
    return job is None or job["current-progress"] >= share * job["total-progress"]


def test_a_killed_daemon_leaves_a_socket_that_the_next_one_takes_over(setup: Setup) -> None:
    with setup.serve() as running:
        running.connect("d").pwrite(0, b"acknowledged")
        running.process.kill()
        assert running.nbd_socket.exists()
        assert running.control_socket.exists()
    with setup.serve() as running:
        assert running.connect("d").pread(0, 12) == b"acknowledged"
        running.signal(signal.SIGTERM)
        running.ended_well()


def test_images_that_cannot_be_flushed_at_the_end_are_told_and_fail_the_command(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Coverage's own file would not fit below the limit, either.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    setup = Setup(short_dir, "a", "b")
    with setup.serve() as running:
        running.start()
        running.connect("b-top").pwrite(0, bytes(4096))  # so that there are refcounts to write
        running.process.limit_file_size(32768)  # the log has room below, the refcounts have not
        running.signal(signal.SIGTERM)
        assert running.process.wait(timeout_s=5) == 1
        lines = running.log.splitlines()
        assert lines[-1] == "replnbd: disk 'b' could not be flushed at its end: File too large"
        told = lines[-1].removeprefix("replnbd: ")
        assert any(line.endswith(told) for line in lines[:-1])
        assert "Traceback" not in running.log
        assert not running.nbd_socket.exists()
        assert not running.control_socket.exists()
    check_overlays(setup, 0)
    assert setup.path("secondary", 0).read_bytes() == pattern(1)
