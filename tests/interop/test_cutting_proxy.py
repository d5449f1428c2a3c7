"""The proxy that other tests cut connections with does what it says, and nothing else: with
qemu-nbd behind it on unix sockets, and nbdkit on TCP."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from interop_support import KIB, MIB, assert_same, fresh_seed, random_requests
from peers import (
    CuttingProxy,
    End,
    Fault,
    NbdClient,
    Process,
    Way,
    list_exports,
    random_faults,
    wait_until,
)
from peers.nbd_client import Address, connect

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 4 * MIB
HEADER = 28
"""Bytes of a request without its payload."""
REPLY = 16
"""Bytes of a simple reply."""
EOF_TEXT = "server closed the connection"


class World(NamedTuple):
    """A server of an empty disk, a client of it that no fault concerns, and the proxy."""

    direct: NbdClient
    proxy: CuttingProxy

    def connect(self) -> NbdClient:
        """A new client through the proxy."""
        return NbdClient(self.proxy.address, "")

    def disk(self) -> bytearray:
        """All bytes, as the server has them."""
        return self.direct.pread(0, SIZE)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve(kind: str, folder: Path) -> tuple[list[str], Address, Address]:
    """A server's command line, its address, and one for a proxy before it."""
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)
    if kind == "unix":
        path = folder / "nbd"
        argv = ["qemu-nbd", "-t", "-e", "0", "-f", "raw", "-k", str(path), str(image)]
        return argv, path, folder / "proxy"
    port = free_port()
    argv = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", str(image)]
    return argv, ("127.0.0.1", port), ("127.0.0.1", 0)


@contextlib.contextmanager
def world_of(kind: str, folder: Path) -> Iterator[World]:
    argv, target, listen = serve(kind, folder)
    with Process(argv, log=folder / "log") as process:
        process.reach(lambda: list_exports(target))
        with NbdClient(target, "") as direct, CuttingProxy(listen, target) as proxy:
            yield World(direct, proxy)


@pytest.fixture(params=["unix", "tcp"])
def world(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[World]:
    with world_of(request.param, short_dir) as world:
        yield world


@pytest.fixture
def tcp(short_dir: Path) -> Iterator[World]:
    with world_of("tcp", short_dir) as world:
        yield world


@pytest.fixture
def rng() -> random.Random:
    return random.Random(fresh_seed())


def unanswered(client: NbdClient) -> bool:
    """Whether nothing has come for a client, not even the end of the stream."""
    sock = client._wire.sock
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(30)
    return False


# Section: what it leaves alone


def test_left_alone_it_changes_nothing_and_counts_every_byte(
    world: World, rng: random.Random
) -> None:
    content = bytearray(SIZE)
    with world.connect() as client, world.connect() as other:
        random_requests(rng, client, content, 50, length_max=300 * KIB, trim=False)
        before = world.proxy.passed
        client.pwrite(1, bytes(1000))
        content[1:1001] = bytes(1000)
        assert_same(other.pread(0, SIZE), content, "through the proxy")
        passed = world.proxy.passed
        assert passed.to_server - before.to_server == HEADER + 1000 + HEADER
        assert passed.to_client - before.to_client == REPLY + REPLY + SIZE
        assert world.proxy.connections == 2
    world.proxy.wait_hung_up()
    assert world.proxy.passed == world.proxy.received
    assert world.proxy.cuts == []
    assert_same(world.disk(), content, "the disk")


def test_a_client_is_reset_when_there_is_no_server(short_dir: Path) -> None:
    with (
        CuttingProxy(("127.0.0.1", 0), short_dir / "nobody") as proxy,
        pytest.raises(ConnectionResetError),
        connect(proxy.address) as sock,
    ):
        sock.recv(1)


# Section: ends


def test_drop_is_an_end_of_stream_for_everybody_there_and_nobody_later(world: World) -> None:
    clients = [world.connect(), world.connect()]
    world.proxy.drop()
    assert [number for number, _, _ in world.proxy.cuts] == [0, 1]
    for client in clients:
        with pytest.raises(ConnectionResetError, match=EOF_TEXT):
            client.pread(0, 1)
        client.close()
    with world.connect() as client:
        client.pwrite(0, b"later")
    assert world.direct.pread(0, 5) == b"later"


def test_reset_is_a_rst_over_tcp(tcp: World) -> None:
    client = tcp.connect()
    tcp.proxy.reset()
    sock = client._wire.sock
    wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET,
               "the RST")  # fmt: skip
    client.close()
    with tcp.connect() as client:
        client.flush()


def test_reset_ends_a_unix_socket(short_dir: Path) -> None:
    with world_of("unix", short_dir) as world:
        client = world.connect()
        world.proxy.reset()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.pread(0, 1)
        client.close()


@pytest.mark.parametrize("end", End)
def test_a_write_that_is_cut_after_any_byte_has_happened_or_not(world: World, end: End) -> None:
    data = b"12345"
    for count in range(HEADER + len(data) + 1):
        client = world.connect()
        before = world.proxy.passed.to_server
        world.proxy.cut_after(count, Way.TO_SERVER, end)
        with contextlib.suppress(OSError):
            client.pwrite(0, data)
        with pytest.raises(OSError, match=r"."):
            client.flush()
        client.close()
        assert world.proxy.passed.to_server - before == count
        world.proxy.wait_hung_up()
        if end is End.DROP and count == HEADER + len(data):
            wait_until(lambda: world.direct.pread(0, 5) == data, "the whole write")
        if count < HEADER + len(data):
            assert world.direct.pread(0, 5) == bytes(5)


def test_a_reply_that_is_cut_after_any_byte_has_come_so_far(world: World) -> None:
    for count in range(REPLY + 1):
        client = world.connect()
        world.proxy.cut_after(count, Way.TO_CLIENT)
        pending = client.send_writes([(count, b"x")])
        sock = client._wire.sock
        received = b""
        while part := sock.recv(100):
            received += part
        assert len(received) == count
        assert len(pending) == 1
        client.close()
        assert world.direct.pread(count, 1) == (b"x" if count else bytes(1))


# Section: the network


def test_silence_towards_the_client_holds_replies_until_resume(world: World) -> None:
    with world.connect() as client:
        before = world.proxy.received.to_client
        world.proxy.silence(Way.TO_CLIENT)
        pending = client.send_writes([(0, b"a"), (1, b"b")])
        wait_until(lambda: world.proxy.received.to_client == before + 2 * REPLY, "both replies")
        assert world.direct.pread(0, 2) == b"ab"
        assert world.proxy.passed.to_client == before
        assert unanswered(client)
        world.proxy.resume()
        client.finish(pending)


def test_silence_towards_the_server_takes_what_is_sent_and_keeps_it(world: World) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    with world.connect() as client:
        before = world.proxy.received.to_server
        world.proxy.silence(Way.TO_SERVER)
        pending = client.send_writes([(0, data)])
        wait_until(lambda: world.proxy.received.to_server == before + HEADER + len(data), "it all")
        assert world.proxy.passed.to_server == before
        assert world.disk() == bytes(SIZE)
        world.proxy.resume(Way.TO_SERVER)
        client.finish(pending)
        assert world.direct.pread(0, len(data)) == data


def test_silence_keeps_the_end_of_a_connection_and_a_new_one_waits_for_a_greeting(
    world: World,
) -> None:
    client = world.connect()
    world.proxy.silence()
    before = world.proxy.received.to_client
    client.close()
    with connect(world.proxy.address) as late:
        wait_until(lambda: world.proxy.connections == 2, "the second client")
        wait_until(lambda: world.proxy.received.to_client > before, "the greeting")
        assert world.proxy.passed.to_client == before
        world.proxy.resume()
        assert late.recv(8) == b"NBDMAGIC"
    world.proxy.wait_hung_up()


def test_who_is_silent_can_be_dropped_and_what_was_held_is_lost(world: World) -> None:
    client = world.connect()
    world.proxy.silence(Way.TO_SERVER)
    before = world.proxy.received.to_server
    client.send_writes([(0, b"lost")])
    wait_until(lambda: world.proxy.received.to_server == before + HEADER + 4, "the write")
    world.proxy.drop()
    world.proxy.resume()
    with pytest.raises(ConnectionResetError, match=EOF_TEXT):
        client.flush()
    client.close()
    with world.connect() as client:
        client.flush()
    assert world.disk() == bytes(SIZE)


def test_a_connection_that_goes_silent_in_the_middle_of_a_message(world: World) -> None:
    with world.connect() as client, world.connect() as other:
        world.proxy.cut_after(HEADER + 2, Way.TO_SERVER, None)
        pending = client.send_writes([(0, b"half")])
        wait_until(lambda: world.proxy.received.to_server > world.proxy.passed.to_server, "half")
        other.flush()  # it has not come to its own limit
        assert world.direct.pread(0, 4) == bytes(4)
        assert unanswered(client)
        world.proxy.resume()
        client.finish(pending)
    assert world.direct.pread(0, 4) == b"half"


def test_a_delay_holds_for_each_way(world: World) -> None:
    with world.connect() as client:
        world.proxy.delay(0.05, Way.TO_SERVER)
        begin = time.monotonic()
        client.flush()
        assert time.monotonic() - begin >= 0.05
        world.proxy.delay(0.05)
        begin = time.monotonic()
        client.flush()
        assert time.monotonic() - begin >= 0.1
        # It is a distance, and no toll: what is in flight together arrives together.
        begin = time.monotonic()
        client.finish(client.send_writes([(at, b"x") for at in range(64)]))
        assert 0.1 <= time.monotonic() - begin < 64 * 0.05
        world.proxy.delay(0)


def test_a_limit_on_the_rate_holds(world: World) -> None:
    data = random.Random(2).randbytes(100_000)
    with world.connect() as client:
        world.proxy.limit(400_000, Way.TO_SERVER)
        begin = time.monotonic()
        client.pwrite(5, data)
        assert time.monotonic() - begin >= 0.24
        world.proxy.limit(None)
        assert client.pread(5, len(data)) == data


# Section: the listener


def test_refused_clients_are_told_so_and_those_that_are_there_go_on(world: World) -> None:
    address = world.proxy.address
    with world.connect() as client:
        for _ in range(2):
            with world.proxy.refusing(), pytest.raises(ConnectionRefusedError):
                world.connect()
            assert world.proxy.address == address
            client.pwrite(0, b"there")
            world.connect().close()
        assert client.pread(0, 5) == b"there"


# Section: by a seed


def write_all(world: World, data: bytes) -> int:
    """Write every block, on as many connections as that takes, one after another; how many."""
    connections, at = 0, 0
    while at < len(data):
        connections += 1
        with contextlib.suppress(OSError), world.connect() as client:
            while at < len(data):
                client.pwrite(at, data[at : at + 4 * KIB])
                at += 4 * KIB
    return connections


def test_the_same_seed_cuts_in_the_same_places(world: World) -> None:
    seed = fresh_seed()
    data = random.Random(seed).randbytes(256 * KIB)
    begin, rounds = 0, []
    for _ in range(2):
        world.proxy.schedule(random_faults(random.Random(seed), 40 * KIB))
        connections = write_all(world, data)
        world.proxy.wait_hung_up()
        assert_same(world.direct.pread(0, len(data)), data, "the disk")
        # What had passed that way is what was planned; the other way there may be more on its way.
        planned = random_faults(random.Random(seed), 40 * KIB)
        faults = [next(planned) for _ in range(connections)]
        cuts = world.proxy.cuts[begin:]
        rounds.append([number - cuts[0][0] for number, _, _ in cuts])
        for number, *passed in cuts:
            fault = faults[number - cuts[0][0]]
            assert passed[list(Way).index(fault.way)] == fault.after_bytes
        begin = len(world.proxy.cuts)
    assert rounds[0] == rounds[1]


def test_faults_are_for_as_many_clients_as_there_are_faults(world: World) -> None:
    world.proxy.schedule([Fault(0), Fault(10, Way.TO_CLIENT, End.RESET)])
    for _ in range(2):
        with pytest.raises(OSError, match=r"."):
            world.connect()
    with world.connect() as client:
        client.flush()
    assert [number for number, _, _ in world.proxy.cuts] == [0, 1]
