"""Hostile clients that come in numbers, or ask for a lot: what they cost is bounded, what they hold
is let go of, and an end of the daemon is an end whatever they are in the middle of."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hostile_support import BIG, CONTENT, KIB, MIB, SIZE, Victim, replnbd
from peers import NbdClient, RawClient, ReplnbdDaemon, ReplnbdDisk, wait_until
from peers import nbd_wire as wire
from peers.nbd_client import connect
from peers.nbd_wire import (
    ERR_UNKNOWN,
    ERR_UNSUP,
    FIXED,
    GO,
    INFO,
    REQ_ONE,
    STATUS,
    Shape,
    choose,
    option,
    request,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
MAX32 = 2**32 - 1
IDLE_BYTES_MAX = 64 * KIB
"""What a client that says nothing may cost."""


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """With descriptors enough for its crowds, and for ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    try:
        with replnbd(tmp_path_factory.mktemp("v"), big=True) as running:
            yield running
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def patient_connect(victim: Victim) -> socket.socket:
    """A connection, even if more want one than the listener's queue holds."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return connect(victim.address)
        except BlockingIOError:
            assert time.monotonic() < deadline


# Section: in the handshake


def test_every_length_of_an_unknown_name_is_answered(victim: Victim) -> None:
    """CVE-2017-15118: 256 bytes on the stack for a name of up to 4096."""
    lengths = list(range(257, 4097))
    with victim.checked():
        for start in range(0, len(lengths), 31):
            some = lengths[start : start + 31]
            with victim.raw() as client:
                client.send(FIXED + b"".join(choose(INFO, "n" * length) for length in some))
                for _ in some:
                    assert wire.read_option_replies(client, INFO)[-1].kind == ERR_UNKNOWN


def test_unknown_options_of_32_mib_are_dropped_as_they_arrive(victim: Victim) -> None:
    """CVE-2017-15119. One more byte is not waited for."""
    chunk = bytes(MIB)
    with victim.checked(peak_bytes_max=4 * MIB), victim.raw() as client:
        client.send(FIXED)
        for _ in range(8):
            client.send(option(99, length=32 * MIB))
            for _ in range(32):
                client.send(chunk)
            assert wire.read_option_replies(client, 99)[-1].kind == ERR_UNSUP
        client.send(option(99, length=32 * MIB + 1))
        assert client.receive_rest() == b""


def test_claims_of_a_long_option_cost_nothing_while_the_bytes_do_not_come(victim: Victim) -> None:
    with ExitStack() as stack, victim.checked(peak_bytes_max=200 * IDLE_BYTES_MAX):
        for _ in range(200):
            client = stack.enter_context(victim.raw())
            client.send(FIXED + option(GO, length=32 * MIB) + bytes(100))
            client.wait_taken()
        stack.close()


def test_a_thousand_connections_open_nothing_behind_them(victim: Victim) -> None:
    """CVE-2019-14850: the backend was opened before the handshake."""
    with victim.checked(peak_bytes_max=4 * MIB):
        for number in range(1000):
            with victim.raw() as client:
                if number % 2:
                    client.reset()


def test_a_thousand_clients_who_say_nothing_are_sent_away_in_time(victim: Victim) -> None:
    """CVE-2024-7409. Everybody else is served meanwhile."""
    with ExitStack() as stack, victim.checked(peak_bytes_max=1000 * IDLE_BYTES_MAX):
        begin = time.monotonic()
        silent = [stack.enter_context(patient_connect(victim)) for _ in range(1000)]
        wait_until(lambda: victim.process.descriptors > 1000, "all to be taken")
        victim.healthy()
        for sock in silent:
            assert len(sock.recv(100)) == 18
        for sock in silent:
            assert sock.recv(1) == b""
        assert 9 < time.monotonic() - begin < 30


def test_beyond_the_most_clients_a_client_is_refused_and_no_other_harmed(victim: Victim) -> None:
    with ExitStack() as stack, victim.checked(peak_bytes_max=1024 * IDLE_BYTES_MAX):
        steady = stack.enter_context(NbdClient(victim.address, "d"))
        crowd = [stack.enter_context(patient_connect(victim)) for _ in range(1100)]
        refused = sum(sock.recv(18) == b"" for sock in crowd)
        assert refused == 1100 - 1023
        assert steady.pread(0, SIZE) == CONTENT
        stack.close()


# Section: requests that cover a lot


def test_claims_of_a_long_payload_cost_little_while_the_bytes_do_not_come(victim: Victim) -> None:
    """Sixty headers: 2 GiB of payload."""
    with ExitStack() as stack, victim.checked(peak_bytes_max=60 * (MIB + IDLE_BYTES_MAX)):
        for _ in range(60):
            client = stack.enter_context(victim.raw().go("big"))
            client.send(request(wire.WRITE, 0, 32 * MIB) + bytes(100))
            client.wait_taken()
        victim.healthy()
        stack.close()


@pytest.mark.parametrize("shape", [Shape.STRUCTURED, Shape.EXTENDED])
def test_the_status_of_16_tib_of_nothing_is_one_short_answer(victim: Victim, shape: Shape) -> None:
    """CVE-2025-47711: an extent behind the request's end was an internal error."""
    with victim.checked(), victim.raw().go("big", shape, BASE, DEPTH) as client:
        lengths = [1, 2**31, MAX32 - 511, MAX32]
        if shape is Shape.EXTENDED:
            lengths += [2**32, BIG]
        for length in lengths:
            for offset in (0, 513, BIG - length):
                if offset + length > BIG:
                    continue
                for flags in (0, REQ_ONE):
                    answer = client.ask(STATUS, offset, length, flags=flags)
                    assert answer.statuses[client.contexts[BASE]] == [(length, 3)]
                    (depth,) = answer.statuses[client.contexts[DEPTH]]
                    assert depth[0] == length
        client.finish()


@pytest.mark.parametrize("flags", [0, wire.FUA])
@pytest.mark.parametrize("command", [wire.TRIM, wire.ZEROES, wire.CACHE])
def test_lengths_near_4_gib_are_served(victim: Victim, command: int, flags: int) -> None:
    """CVE-2025-47712: rounding near 2^32."""
    with victim.checked(), victim.raw().go("big") as client:
        for length in (2**31 - 1, 2**31, MAX32 - 511, MAX32):
            for offset in (0, 1, BIG - length):
                assert client.ask(command, offset, length, flags=flags).error == 0
        assert client.ask(wire.READ, MAX32 - 1, 2).data == bytes(2)
        client.finish()


def test_a_request_for_16_tib_keeps_nobody_waiting(short_dir: Path) -> None:
    """It takes a minute: meanwhile others are served, its client may leave, the daemon can end."""
    with replnbd(short_dir, big=True) as victim:
        client = victim.raw().go("big", Shape.EXTENDED)
        client.begin(wire.TRIM, 0, BIG)
        client.wait_taken()
        client.reset()
        begin = time.monotonic()
        for _ in range(20):
            with NbdClient(victim.address, "big") as other:
                assert other.pread(BIG - MIB, MIB) == bytes(MIB)
        victim.healthy()
        assert time.monotonic() - begin < 20


def test_the_longest_status_is_bounded(short_dir: Path) -> None:
    """A file of one block of data, one of nothing, and so on: the most extents there can be."""
    path = short_dir / "d.raw"
    blocks = 1 << 15
    with path.open("wb") as file:
        for number in range(blocks):
            os.pwrite(file.fileno(), b"x", number * 2 * 4096)
        file.truncate(blocks * 2 * 4096)
    overlays = short_dir / "hidden", short_dir / "active"
    disk = ReplnbdDisk("d", "d-top", path, *overlays, "raw")
    with ReplnbdDaemon(short_dir, [disk]) as daemon:
        daemon.qmp.execute("xen-set-replication", {"enable": True, "primary": False})
        for export in ("d", "d-top"):
            for shape in (Shape.STRUCTURED, Shape.EXTENDED):
                with RawClient(daemon.nbd_socket).go(export, shape, BASE, DEPTH) as client:
                    answer = client.ask(STATUS, 0, blocks * 2 * 4096)
                    extents = len(answer.statuses[client.contexts[BASE]])
                    print(f"{export}, {shape.value}: {extents} extents, {answer.wire_bytes} bytes")
                    assert 1000 < extents < 4100
                    assert answer.wire_bytes < 256 * KIB
                    client.finish()
        daemon.quit()


# Section: the end


PHASES = {
    "nothing sent": b"",
    "half of the client flags": FIXED[:2],
    "between options": FIXED,
    "in an option's header": FIXED + option(GO)[:9],
    "in an option's data": FIXED + option(GO, length=300) + bytes(100),
    "in data that nobody wants": FIXED + option(99, length=32 * MIB) + bytes(100_000),
    "idle": FIXED + choose(GO, "d"),
    "in a request's header": FIXED + choose(GO, "d") + request(wire.READ, 0, 512)[:27],
    "in a short payload": FIXED + choose(GO, "d") + wire.write(0, bytes(4096))[:1000],
    "in a long payload": FIXED + choose(GO, "d") + request(wire.WRITE, 0, 128 * KIB) + bytes(999),
    "in a payload that nobody wants": FIXED + choose(GO, "d") + request(wire.WRITE, 0, MIB)
    + bytes(999),
    "not reading its replies": FIXED + choose(GO, "d") + request(wire.READ, 0, SIZE) * 100,
}  # fmt: skip


def test_the_daemon_ends_in_time_with_clients_in_every_phase(short_dir: Path) -> None:
    with ExitStack() as stack:
        disk = ReplnbdDisk.create(short_dir, "d", "d-top", CONTENT)
        daemon = stack.enter_context(ReplnbdDaemon(short_dir, [disk]))
        for sent in PHASES.values():
            for _ in range(10):
                client = stack.enter_context(RawClient(daemon.nbd_socket))
                client.send(sent)
        sock = stack.enter_context(RawClient(daemon.nbd_socket).go("d"))
        sock.hang_up()
        wait_until(lambda: daemon.process.descriptors > 100, "the clients to be taken")
        begin = time.monotonic()
        daemon.quit()
        assert time.monotonic() - begin < 8
        log = daemon.process.log.read_text()
        assert "Traceback" not in log
        assert " ERROR " not in log
        assert disk.content() == CONTENT


def test_a_half_of_each_message_never_reaches_the_disk(victim: Victim) -> None:
    """Close in the middle of everything: what is incomplete has not happened."""
    with victim.checked():
        for sent in PHASES.values():
            for reset in (False, True):
                with victim.raw() as client:
                    client.send(sent)
                    if reset:
                        client.reset()
                    else:
                        client.hang_up()
                        client.receive_rest()
