"""Too much of everything: clients, silence, writers on one place, checkpoints. The daemon stays
bounded in memory and descriptors, answers its control socket, and every byte is right."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern, tmpfs
from peers import NbdClient, NbdReplyError, wait_until
from peers.nbd_client import CMD_READ, REQUEST_MAGIC, connect
from writers import Writer

pytestmark = [pytest.mark.interop, pytest.mark.slow]

T = TypeVar("T")

MIB = 1 << 20
QMP_S = 2.0
"""How long a status may take under any of this: no timing, but not starved either."""


def resident(running: Running) -> int:
    """Bytes of memory in use."""
    pages = Path(f"/proc/{running.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak(running: Running) -> int:
    """Bytes of memory that were ever in use at a time."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def descriptors(running: Running) -> int:
    """Open file descriptors."""
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def asked_in_time(running: Running) -> None:
    """The control socket is not starved."""
    begin = time.monotonic()
    running.disk()
    assert time.monotonic() - begin < QMP_S


def patiently(connect_: Callable[[], T]) -> T:
    """Connect; again, while there are more who want to than the listener's queue holds."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return connect_()
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_thousand_clients_of_which_most_say_nothing(setup: Setup) -> None:
    with setup.serve() as running, ExitStack() as stack:
        running.start()
        asked_in_time(running)
        before, memory = descriptors(running), resident(running)
        busy = [Writer(running.connect("d"), n, SIZE, part=n) for n in range(3)]
        standby = Writer(running.connect("d-top"), 9, SIZE)
        for writer in (*busy, standby):
            writer.start()
        # Clients that ask for much and read nothing of it.
        deaf = [patiently(lambda: running.connect("d")) for _ in range(90)]
        for client in deaf:
            for cookie in range(20):
                client._wire.sock.sendall(
                    struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, cookie, 0, 1 << 20)
                )
        # And those that say nothing; in 10 s the handshake's time is over.
        for _ in range(900):
            stack.enter_context(patiently(lambda: connect(running.nbd_socket)))
        wait_until(lambda: descriptors(running) >= before + 990, "all to be taken", timeout_s=9)
        for _ in range(5):
            counts = [writer.count for writer in (*busy, standby)]
            asked_in_time(running)
            running.checkpoint()
            wait_until(
                lambda: all(w.count > c for w, c in zip((*busy, standby), counts, strict=True)),  # noqa: B023
                "every writer to get on",
            )
        assert resident(running) - memory < 4 * MIB * len(deaf)
        stack.close()
        for client in deaf:
            client._wire.sock.close()
        for writer in (*busy, standby):
            writer.stop()
        wait_until(lambda: descriptors(running) <= before, "the descriptors to be closed")
        content = pattern(1)
        for writer in busy:
            content = writer.applied_to(content)
        assert running.connect("d").pread(0, SIZE) == content
        running.process.terminate()
    check_overlays(setup)


def test_clients_that_ask_for_much_and_read_nothing(setup: Setup) -> None:
    """Each makes the daemon hold one reply of the largest size and little more, however much it
    has asked for, and nothing once it is gone."""
    largest = 32 * MIB
    setup.path("secondary").write_bytes(pattern(1) * 32)
    with setup.serve() as running:
        running.start()
        memory = resident(running)
        for side in ("d", "d-top"):
            deaf = [running.connect(side) for _ in range(8)]
            read = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 0, 0, largest)
            for client in deaf:
                client._wire.sock.sendall(read * 100)
            wait_until(
                lambda: resident(running) - memory >= largest * len(deaf),  # noqa: B023
                "a reply to each",
            )
            asked_in_time(running)
            assert running.connect(side).pread(0, SIZE) == pattern(1)
            assert peak(running) - memory < 2 * largest * len(deaf)
            for client in deaf:
                client._wire.sock.close()
            wait_until(lambda: resident(running) - memory < 2 * largest, "the memory to be free")
        running.process.terminate()
    check_overlays(setup)


def test_64_writers_on_one_place(setup: Setup) -> None:
    """On both sides. Every read is of one writer's, whole; a checkpoint gets its turn."""
    place, length = 12345, 8000
    stop = threading.Event()
    torn: list[str] = []

    def write(client: NbdClient, letter: int) -> None:
        while not stop.is_set():
            client.pwrite(place, bytes([letter]) * length)

    def read(client: NbdClient) -> None:
        while not stop.is_set():
            found = client.pread(place, length)
            if found.count(found[0]) != length and found != pattern(1)[place : place + length]:
                torn.append(f"{found[0]:#x} and others")

    with setup.serve() as running:
        running.start()
        threads = []
        for number in range(64):
            client = running.connect("d" if number % 2 else "d-top")
            threads.append(threading.Thread(target=write, args=(client, number + 1), daemon=True))
        threads += [
            threading.Thread(target=read, args=(running.connect(export),), daemon=True)
            for export in ("d", "d-top")
        ]
        for thread in threads:
            thread.start()
        for count in range(2, 12):
            running.checkpoint()
            assert running.disk()["checkpoints"] == count
            asked_in_time(running)
        stop.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert torn == []
        for export in ("d", "d-top"):
            found = running.connect(export).pread(0, SIZE)
            outside = bytearray(pattern(1))
            outside[place : place + length] = found[place : place + length]
            assert found == outside
            assert found[place : place + length] == found[place : place + 1] * length
        running.process.terminate()
    check_overlays(setup)


def test_ten_thousand_checkpoints_in_a_row(setup: Setup) -> None:
    rounds, batch = 100, 100
    with setup.serve() as running:
        running.start()
        primary, standby = running.connect("d"), running.connect("d-top")
        memory = used = files = 0
        expected = bytearray(pattern(1))
        rng = random.Random(1)
        for number in range(rounds):
            offset, data = rng.randrange(SIZE - 512), rng.randbytes(512)
            primary.pwrite(offset, data)
            standby.pwrite(rng.randrange(SIZE - 512), data)
            expected[offset : offset + 512] = data
            for answer in running.qmp.answers(*[("xen-colo-do-checkpoint", None)] * batch):
                assert answer.ok, answer
            assert standby.pread(0, SIZE) == expected
            running.qmp.events.clear()
            if number == rounds // 4:
                memory, used = resident(running), descriptors(running)
                files = setup.path("hidden").stat().st_blocks
        assert running.disk()["checkpoints"] == rounds * batch + 1
        assert resident(running) < memory + 8 * MIB
        assert descriptors(running) == used
        assert setup.path("hidden").stat().st_blocks <= files + 1024
        running.process.terminate()
    check_overlays(setup)
    assert setup.path("secondary").read_bytes() == expected


def test_overlays_on_a_disk_smaller_than_the_load(setup: Setup) -> None:
    """Both sides write more than fits, for many checkpoints: what is refused is refused with
    ENOSPC, and nothing else is wrong."""
    with tmpfs(setup.folder, pages=160):
        setup.table["hidden"] = "disk/d.hidden"
        setup.table["active"] = "disk/d.active"
        rng = random.Random(2)
        with setup.serve() as running:
            running.start()
            primary, standby = running.connect("d"), running.connect("d-top")
            disk, refused = bytearray(pattern(1)), 0
            for _ in range(20):
                view = bytearray(disk)
                for _ in range(200):
                    offset = rng.randrange(SIZE // 4096) * 4096
                    data = rng.randbytes(4096)
                    client, shown = rng.choice([(primary, disk), (standby, view)])
                    try:
                        client.pwrite(offset, data)
                    except NbdReplyError as exc:
                        if exc.errno != errno.ENOSPC:
                            raise
                        refused += 1
                    else:
                        shown[offset : offset + 4096] = data
                assert primary.pread(0, SIZE) == disk
                assert standby.pread(0, SIZE) == view
                running.checkpoint()
            assert refused
            assert "Traceback" not in running.log
            running.process.terminate()
        check_overlays(setup)
        assert setup.path("secondary").read_bytes() == disk
