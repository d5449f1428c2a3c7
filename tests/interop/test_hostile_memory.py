"""What clients with large requests make the daemon hold, whatever others have left behind them."""

from __future__ import annotations

import random
import select
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hostile_support import MIB, Victim, replnbd
from peers import Authority, PeerError, RawClient
from peers.nbd_wire import DISC, FIXED, READ, WRITE, request

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HELD_BYTES_MAX = 64 * MIB
"""By one client, with what is kept for the next."""

SIZES = [65_537, 300_000, MIB, MIB + 1, 2 * MIB, 5 * MIB, 8 * MIB, 12 * MIB, 16 * MIB - 1, 20 * MIB,
         32 * MIB - 1, 32 * MIB]  # fmt: skip
SESSIONS = 25
SESSION_BYTES_MAX = 160 * MIB
STALLED_S = 0.3


@pytest.fixture
def victim(short_dir: Path) -> Iterator[Victim]:
    with replnbd(short_dir, big=True) as running:
        yield running


Asked = tuple[int, int]
"""Command and length."""


def some_requests(rng: random.Random) -> list[Asked]:
    sizes = rng.sample(SIZES, rng.choice([1, 2, 3, 6]))
    commands = rng.choice([[READ], [WRITE], [READ, WRITE]])
    asked, left = list[Asked](), SESSION_BYTES_MAX
    while len(asked) < 40 and (length := rng.choice(sizes)) <= left:
        asked.append((rng.choice(commands), length))
        left -= length
    return asked


def converse(client: RawClient, asked: Sequence[Asked], *, deaf: bool) -> None:
    """All of it; a deaf client reads nothing, and leaves when it is not read from any more."""
    parts, expected = list[bytes](), 0
    for command, length in asked:
        parts.append(request(command, 0, length))
        parts.append(bytes(length) if command == WRITE else b"")
        expected += 16 + (length if command == READ else 0)
    unsent, buffer = memoryview(b"".join(parts)), bytearray(MIB)
    client.sock.setblocking(False)
    stirred = time.monotonic()
    while expected and time.monotonic() - stirred < (STALLED_S if deaf else 30):
        readers = [] if deaf else [client.sock]
        writers = [client.sock] if unsent else []
        readable, writable, _ = select.select(readers, writers, [], STALLED_S)
        if readable:
            expected -= client.sock.recv_into(buffer)
        if writable:
            unsent = unsent[client.sock.send(unsent[:MIB]) :]
        if readable or writable:
            stirred = time.monotonic()
    if expected and not deaf:
        raise PeerError(f"{expected} bytes of replies have not come")


def test_large_requests_after_others_of_other_sizes(victim: Victim) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng, process = random.Random(seed), victim.process
    before, peaks = process.resident_bytes, list[float]()
    for _ in range(SESSIONS):
        process.reset_peak()
        with victim.raw().go("big") as client:
            converse(client, some_requests(rng), deaf=rng.random() < 0.4)
        victim.settle()
        peaks.append(round((process.peak_bytes - before) / MIB, 1))
    print(f"MiB: {peaks}")
    victim.healthy()
    assert max(peaks) * MIB < HELD_BYTES_MAX


def test_over_tls_replies_that_nobody_reads_wait_unencrypted(short_dir: Path) -> None:
    """The loop's TLS keeps what it has encrypted beside what it was given, twice. What waits comes
    in full once it is read."""
    authority = Authority(short_dir / "ca")
    server = authority.issue("server", "localhost")
    table = f'[tls]\ncertificate = "{server.certificate}"\nkey = "{server.key}"'
    context = ssl.create_default_context(cafile=str(authority.certificate))
    with replnbd(short_dir, big=True, listen=["nbds://127.0.0.1:0"], tables=[table]) as victim:
        process, before = victim.process, victim.process.resident_bytes
        for lengths in ([32 * MIB] * 3, [MIB] * 15 + [32 * MIB] * 2, [5 * MIB, 32 * MIB] * 2):
            process.reset_peak()
            with RawClient(("127.0.0.1", victim.ports[0])) as client:
                client.send(FIXED)
                client.start_tls(context, "localhost")
                client.go("big", client_flags=b"")
                for length in lengths:
                    client.send(request(READ, 0, length))
                wait_until_idle(victim)
                peak = process.peak_bytes - before
                assert peak < HELD_BYTES_MAX, f"{peak / MIB:.1f} MiB"
                client.send(request(DISC))
                for length in lengths:
                    assert client.receive(16 + length)[16:] == bytes(length)
                client.receive_rest()
            victim.settle()
            assert process.peak_bytes - before < HELD_BYTES_MAX
            print(f"at most {(process.peak_bytes - before) / MIB:.1f} MiB")


def wait_until_idle(victim: Victim) -> None:
    """Until it has used no processor time for a while."""
    used = -1.0
    while used != (used := victim.process.cpu_s):
        time.sleep(STALLED_S)
