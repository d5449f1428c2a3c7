"""NBD URIs to listen on: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from server_wire import on_both_loops

from replnbd.errors import ConfigError, StateError
from replnbd.events import EventBus
from replnbd.nbd import TlsMode
from replnbd.server import NbdServer, parse_listen_uri
from replnbd.server.listener import BACKLOG, TcpAddress, UnixAddress


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://127.0.0.1", TcpAddress("127.0.0.1", 10809)),
        ("nbd://127.0.0.1/", TcpAddress("127.0.0.1", 10809)),
        ("nbd://standby:10810", TcpAddress("standby", 10810)),
        ("nbd://[::1]:0", TcpAddress("::1", 0)),
        ("nbd://0.0.0.0", TcpAddress("0.0.0.0", 10809)),
        ("nbd://", TcpAddress("localhost", 10809)),
        ("nbd+unix:///?socket=/run/a%20b.sock", UnixAddress("/run/a b.sock")),
        ("nbd+unix:///?socket=relative.sock", UnixAddress("relative.sock")),
        ("nbds://standby", TcpAddress("standby", 10809, TlsMode.REQUIRE)),
        ("nbd://standby?tls=on", TcpAddress("standby", 10809, TlsMode.ON)),
        ("nbd://standby/?tls=require", TcpAddress("standby", 10809, TlsMode.REQUIRE)),
        ("nbds+unix:///?socket=/x", UnixAddress("/x", TlsMode.REQUIRE)),
        ("nbd+unix:///?tls=on&socket=/x", UnixAddress("/x", TlsMode.ON)),
    ],
)
def test_uri(uri: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_listen_uri(uri) == address


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbds://host?tls=on", "nbds demands TLS"),
        ("nbds+unix:///?socket=/x&tls=off", "nbds demands TLS"),
        ("nbd://host?tls=maybe", "tls must be off, on or require"),
        ("nbd://host?tls=on&tls=on", "tls must be off, on or require"),
        ("nbds+vsock://2", "not an NBD URI"),
        ("http://host", "not an NBD URI"),
        ("127.0.0.1:10809", "not an NBD URI"),
        ("", "not an NBD URI"),
        ("nbd://host:99999", "out of range"),
        ("nbd://host:port", "could not be cast"),
        ("nbd://[::1", "Invalid IPv6 URL"),
        ("nbd://host/export", "an export name does not belong here"),
        ("nbd+unix:///export?socket=/x", "an export name does not belong here"),
        ("nbd://host?socket=/x", "unknown parameter 'socket'"),
        ("nbd+unix:///", "must read nbd+unix:///?socket=PATH"),
        ("nbd+unix://host/?socket=/x", "must read nbd+unix:///?socket=PATH"),
        ("nbd+unix:///?socket=/x&socket=/y", "must read nbd+unix:///?socket=PATH"),
        ("nbd+unix:///?sockt=/x", "must read nbd+unix:///?socket=PATH"),
        ("nbd+unix:///?socket=/" + "x" * 107, "longer than 107 bytes"),
        ("nbd://user@host", "user name or fragment"),
    ],
)
def test_bad_uri_is_refused_by_name(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_listen_uri(uri)
    assert f"cannot listen on {uri}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


async def greeted(address: tuple[str, int] | str) -> bool:
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        reader, writer = await asyncio.open_connection(*address)
    greeting = await reader.readexactly(18)
    writer.close()
    await writer.wait_closed()
    return greeting == b"NBDMAGICIHAVEOPT\x00\x03"


@on_both_loops
async def test_listens_on_ipv4_ipv6_and_unix_at_once(short_dir: Path) -> None:
    server = NbdServer(EventBus())
    (v4,) = await server.listen("nbd://127.0.0.1:0")
    (v6,) = await server.listen("nbd://[::1]:0")
    (unix,) = await server.listen(f"nbd+unix:///?socket={short_dir}/s")
    assert server.uris == [v4, v6, unix]
    assert v4.startswith("nbd://127.0.0.1:")
    assert v6.startswith("nbd://[::1]:")
    assert await greeted(("127.0.0.1", int(v4.rpartition(":")[2])))
    assert await greeted(("::1", int(v6.rpartition(":")[2])))
    assert await greeted(f"{short_dir}/s")
    await server.close()
    assert not list(short_dir.iterdir())


@on_both_loops
async def test_a_host_name_gives_a_listener_per_address_on_one_port() -> None:
    server = NbdServer(EventBus())
    uris = await server.listen("nbd://localhost:0")
    assert uris
    assert len({uri.rpartition(":")[2] for uri in uris}) == 1
    await server.close()


@on_both_loops
async def test_a_port_in_use_is_one_line_that_names_the_uri() -> None:
    server = NbdServer(EventBus())
    (uri,) = await server.listen("nbd://127.0.0.1:0")
    with pytest.raises(ConfigError) as caught:
        await server.listen(uri)
    assert str(caught.value) == f"cannot listen on {uri}: the address is in use by another process"
    assert await greeted(("127.0.0.1", int(uri.rpartition(":")[2])))
    await server.close()


@pytest.mark.parametrize("uri", ["nbd://no-such-host.invalid", "nbd://192.0.2.1:10809"])
@on_both_loops
async def test_a_host_that_is_not_ours_is_refused(uri: str) -> None:
    server = NbdServer(EventBus())
    with pytest.raises(ConfigError, match=f"cannot listen on {uri}: "):
        await server.listen(uri)
    await server.close()


@on_both_loops
async def test_as_many_clients_as_a_cluster_has_may_come_while_the_loop_is_busy(
    short_dir: Path,
) -> None:
    """The loops listen again, with a queue of 100 unless told."""
    server = NbdServer(EventBus())
    await server.listen(f"nbd+unix:///?socket={short_dir}/s")
    somaxconn = int(Path("/proc/sys/net/core/somaxconn").read_text())
    try:
        with ExitStack() as stack:
            for _ in range(min(BACKLOG, somaxconn)):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(f"{short_dir}/s")
    finally:
        await server.close()


@on_both_loops
async def test_a_stale_socket_is_replaced(short_dir: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(f"{short_dir}/s")
    dead.close()
    server = NbdServer(EventBus())
    await server.listen(f"nbd+unix:///?socket={short_dir}/s")
    assert await greeted(f"{short_dir}/s")
    await server.close()


@on_both_loops
async def test_a_socket_in_use_is_refused_and_left_alone(short_dir: Path) -> None:
    uri = f"nbd+unix:///?socket={short_dir}/s"
    first, second = NbdServer(EventBus()), NbdServer(EventBus())
    await first.listen(uri)
    with pytest.raises(ConfigError, match="another process listens on"):
        await second.listen(uri)
    await second.close()
    assert await greeted(f"{short_dir}/s")
    await first.close()


@on_both_loops
async def test_a_file_in_the_place_of_the_socket_is_refused_and_kept(short_dir: Path) -> None:
    (short_dir / "s").write_text("precious")
    server = NbdServer(EventBus())
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        await server.listen(f"nbd+unix:///?socket={short_dir}/s")
    await server.close()
    assert (short_dir / "s").read_text() == "precious"


@on_both_loops
async def test_a_missing_directory_is_refused(short_dir: Path) -> None:
    server = NbdServer(EventBus())
    with pytest.raises(ConfigError, match="No such file or directory"):
        await server.listen(f"nbd+unix:///?socket={short_dir}/missing/s")
    await server.close()


@on_both_loops
async def test_close_does_not_remove_a_socket_that_is_not_ours_any_more(short_dir: Path) -> None:
    path = short_dir / "s"
    first, second = NbdServer(EventBus()), NbdServer(EventBus())
    await first.listen(f"nbd+unix:///?socket={path}")
    os.unlink(path)
    await second.listen(f"nbd+unix:///?socket={path}")
    await first.close()
    assert await greeted(str(path))
    await second.close()
    assert not path.exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@on_both_loops
async def test_a_unix_socket_has_the_mode_it_was_given_whatever_the_umask(
    short_dir: Path, umask: int
) -> None:
    server = NbdServer(EventBus())
    before = os.umask(umask)
    try:
        await server.listen(f"nbd+unix:///?socket={short_dir}/s", socket_mode=0o620)
        await server.listen(f"nbd+unix:///?socket={short_dir}/as-the-umask-has-it")
    finally:
        os.umask(before)
    assert (short_dir / "s").stat().st_mode & 0o7777 == 0o620
    assert (short_dir / "as-the-umask-has-it").stat().st_mode & 0o7777 == 0o777 & ~umask
    await server.close()


async def test_nobody_can_connect_before_the_mode_is_right(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chmod(path: str, mode: int) -> None:
        tried.append(mode)
        with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
            early.connect(path)

    tried: list[int] = []
    monkeypatch.setattr(os, "chmod", chmod)
    server = NbdServer(EventBus())
    await server.listen(f"nbd+unix:///?socket={short_dir}/s", socket_mode=0o600)
    assert tried == [0o600]
    await server.close()


@on_both_loops
async def test_sockets_that_others_have_bound_are_served_and_their_files_stay(
    short_dir: Path,
) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(f"{short_dir}/s")
    unix.listen()
    tcp = socket.create_server(("127.0.0.1", 0))
    tcp6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
    port, port6 = tcp.getsockname()[1], tcp6.getsockname()[1]
    server = NbdServer(EventBus())
    for sock in (unix, tcp, tcp6):
        sock.setblocking(False)
        await server.listen_on(sock)
    assert server.uris == [
        f"nbd+unix:///?socket={short_dir}/s",
        f"nbd://127.0.0.1:{port}",
        f"nbd://[::1]:{port6}",
    ]
    assert await greeted(f"{short_dir}/s")
    assert await greeted(("127.0.0.1", port))
    assert await greeted(("::1", port6))
    await server.close()
    assert (short_dir / "s").is_socket()
    with pytest.raises(ConnectionRefusedError):
        await greeted(f"{short_dir}/s")
    with pytest.raises(StateError, match="NBD server not running"):
        await server.listen_on(unix)


@on_both_loops
async def test_a_socket_without_a_file_is_served(short_dir: Path) -> None:
    name = f"\0{short_dir}"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(name)
    sock.listen()
    sock.setblocking(False)
    server = NbdServer(EventBus())
    assert await server.listen_on(sock) == f"nbd+unix:///?socket=%00{short_dir}"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(name)
        client.setblocking(False)
        greeting = await asyncio.get_running_loop().sock_recv(client, 18)
    assert greeting == b"NBDMAGICIHAVEOPT\x00\x03"
    await server.close()
