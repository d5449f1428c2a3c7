"""TLS with real servers: who is let in, and whom we let in; and servers that are not what they
should be."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import ssl
from pathlib import Path

import pytest
from nbd_support import nbdkit, on_both_loops, qemu_nbd, reachable_port, session
from peers import Authority, Process

from replnbd.block import MemoryNode, connect_nbd, parse_nbd_uri
from replnbd.block.client_tls import PSK_AVAILABLE
from replnbd.errors import ConfigError
from replnbd.events import EventBus
from replnbd.server import Export, NbdServer
from replnbd.server.tls import Tls, TlsFiles

SIZE = 1 << 20
GREETING = b"NBDMAGICIHAVEOPT\0\3"


class World:
    """An authority and a stranger, a server's certificates, and what clients may have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours, theirs = Authority(folder / "ours"), Authority(folder / "theirs")
        self.server = _server(folder / "server", ours, "localhost", "127.0.0.1")
        self.elsewhere = _server(folder / "elsewhere", ours, "elsewhere.example")
        self.forged = _server(folder / "forged", theirs, "localhost", "127.0.0.1")
        self.client = ours.directory("client", client=ours.issue("client", "primary.example"))
        self.bare = ours.directory("bare")
        self.stranger = theirs.directory("stranger", client=theirs.issue("stranger", "x.example"))
        self.stranger.joinpath("ca-cert.pem").write_bytes(ours.certificate.read_bytes())


def _server(folder: Path, authority: Authority, *names: str) -> Path:
    folder.mkdir()
    issued = authority.issue(f"server-{folder.name}", *names)
    (folder / "ca-cert.pem").write_bytes(authority.certificate.read_bytes())
    (folder / "server-cert.pem").write_bytes(issued.certificate.read_bytes())
    (folder / "server-key.pem").write_bytes(issued.key.read_bytes())
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Keys take a second to make: once is enough."""
    return World(tmp_path_factory.mktemp("pki"))


def serve(folder: Path, certificates: Path, *, verify: bool = False) -> tuple[Process, int]:
    """nbdkit that demands TLS, and its TCP port."""
    port = random.randrange(20000, 60000)
    options = ["--tls=require", f"--tls-certificates={certificates}"]
    options += ["--tls-verify-peer"] if verify else []
    argv = ["nbdkit", "-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", str(port)]
    process = Process([*argv, *options, "memory", str(SIZE)], log=folder / "nbdkit.log")
    process.reach(lambda: reachable_port(port))
    return process, port


async def round_trip(address: str) -> None:
    content = random.Random(3).randbytes(SIZE)
    async with session(address) as connection:
        await connection.pwrite(0, content)
        got = bytearray(SIZE)
        await connection.pread(0, memoryview(got))
        assert got == content


async def refused(address: str) -> OSError:
    with pytest.raises(OSError, match="cannot connect to nbds") as caught:
        await round_trip(address)
    return caught.value


@on_both_loops
async def test_certificates_are_verified_both_ways(short_dir: Path, world: World) -> None:
    process, port = serve(short_dir, world.server, verify=True)
    with process:
        for host in ("localhost", "127.0.0.1"):
            await round_trip(f"nbds://{host}:{port}/?tls-certificates={world.client}")
        await refused(f"nbds://localhost:{port}/?tls-certificates={world.bare}")
        await refused(f"nbds://localhost:{port}/?tls-certificates={world.stranger}")


@on_both_loops
async def test_a_certificate_of_a_stranger_is_refused(short_dir: Path, world: World) -> None:
    process, port = serve(short_dir, world.forged)
    with process:
        address = f"nbds://localhost:{port}/?tls-certificates={world.bare}"
        failure = await refused(address)
        assert failure.errno == errno.EACCES
        assert "the server's certificate was refused" in str(failure)
        await refused(f"nbds://localhost:{port}/")  # the system does not know it either
        await round_trip(f"{address}&tls-verify-peer=0")


@on_both_loops
async def test_a_certificate_of_another_host_is_refused(short_dir: Path, world: World) -> None:
    process, port = serve(short_dir, world.elsewhere)
    with process:
        address = f"nbds://localhost:{port}/?tls-certificates={world.bare}"
        assert (await refused(address)).errno == errno.EACCES
        await round_trip(f"{address}&tls-hostname=elsewhere.example")
        assert (await refused(f"{address}&tls-hostname=localhost")).errno == errno.EACCES


@on_both_loops
async def test_a_unix_socket_has_the_name_it_is_given(short_dir: Path, world: World) -> None:
    options = ["--tls=require", f"--tls-certificates={world.elsewhere}"]
    with nbdkit(short_dir, *options, "memory", str(SIZE)):
        address = f"nbds+unix:///?socket={short_dir}/s&tls-certificates={world.bare}"
        await round_trip(address)
        await round_trip(f"{address}&tls-hostname=elsewhere.example")
        await refused(f"{address}&tls-hostname=localhost")


@on_both_loops
async def test_qemu_nbd_with_tls(short_dir: Path, world: World) -> None:
    disk = short_dir / "disk"
    disk.write_bytes(bytes(SIZE))
    tls = f"tls-creds-x509,id=tls0,endpoint=server,dir={world.server},verify-peer=yes"
    with qemu_nbd(short_dir, "--object", tls, "--tls-creds", "tls0", "-f", "raw", disk):
        address = f"nbds+unix:///?socket={short_dir}/s&tls-certificates="
        await round_trip(f"{address}{world.client}")
        await refused(f"{address}{world.stranger}")
        with pytest.raises(OSError, match="wants TLS") as caught:
            await connect_nbd(parse_nbd_uri(f"nbd+unix:///?socket={short_dir}/s"))
        assert caught.value.errno == errno.EACCES


@on_both_loops
async def test_replnbd_itself_with_tls_and_extended_headers(world: World) -> None:
    files = TlsFiles(
        str(world.server / "server-cert.pem"),
        str(world.server / "server-key.pem"),
        str(world.server / "ca-cert.pem"),
    )
    server = NbdServer(EventBus(), tls=Tls(files))
    server.add_export(Export("disk", MemoryNode(SIZE)))
    await server.listen("nbds://127.0.0.1:0")
    try:
        (address,) = server.uris
        address = f"{address}/disk?tls-certificates="
        await round_trip(f"{address}{world.client}")
        await refused(f"{address}{world.bare}")
        await refused(f"{address}{world.stranger}")
        with pytest.raises(OSError, match="wants TLS"):
            await connect_nbd(parse_nbd_uri(server.uris[0].replace("nbds", "nbd") + "/disk"))
    finally:
        await server.close()


@on_both_loops
async def test_a_server_that_refuses_tls_gets_nothing_in_clear_text(short_dir: Path) -> None:
    with nbdkit(short_dir, "--tls=off", "memory", str(SIZE)):
        failure = await refused(f"nbds+unix:///?socket={short_dir}/s")
        assert "STARTTLS" in str(failure)


@pytest.mark.slow
@pytest.mark.parametrize("behind", [b"", b"\x16\x03\x03", bytes(5000)])
@pytest.mark.parametrize("ending", ["close", "silence"])
@on_both_loops
async def test_a_server_that_only_says_it_has_tls(
    short_dir: Path, behind: bytes, ending: str
) -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(20)
        writer.write(b"\0\3\xe8\x89\4Ue\xa9" + b"\0\0\0\5\0\0\0\1\0\0\0\0" + behind)
        heard.set_result(await reader.read(1000))
        if ending == "silence":
            await over.wait()
        writer.close()

    server = await asyncio.start_unix_server(serve, short_dir / "s")
    async with server:
        target = parse_nbd_uri(f"nbds+unix:///?socket={short_dir}/s")
        with pytest.raises(OSError, match="cannot connect"):
            await connect_nbd(target, timeout_s=2.0 if ending == "silence" else 20.0)
        assert (await heard)[:1] == b"\x16"  # a ClientHello, and nothing else
        over.set()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("ending", ["shutdown", "silence"])
@pytest.mark.parametrize("moment", ["option", "request"])
@on_both_loops
async def test_tls_that_ends_without_a_word_ends_the_session(
    short_dir: Path, world: World, moment: str, ending: str
) -> None:
    over = asyncio.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(world.server / "server-cert.pem", world.server / "server-key.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(20)
        writer.write(b"\0\3\xe8\x89\4Ue\xa9" + b"\0\0\0\5\0\0\0\1\0\0\0\0")
        await writer.drain()
        await writer.start_tls(context)
        await reader.readexactly(16)
        if moment == "request":
            head = b"\0\3\xe8\x89\4Ue\xa9\0\0\0"
            writer.write(head + b"\x0b\0\0\0\1\0\0\0\0")
            await reader.readexactly(16 + 4 + 2 + 6)
            writer.write(
                head + b"\7\0\0\0\3\0\0\0\x0c" + bytes(2) + (512).to_bytes(8, "big") + b"\0\1"
            )
            writer.write(head + b"\7\0\0\0\1\0\0\0\0")
            await reader.readexactly(32)
        if ending == "silence":
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await over.wait()
        descriptor = os.dup(writer.get_extra_info("socket").fileno())
        with socket.socket(fileno=descriptor) as sock:
            sock.shutdown(socket.SHUT_RDWR)  # TLS knows nothing of it
        writer.transport.abort()

    server = await asyncio.start_unix_server(serve, short_dir / "s")
    async with server:
        address = f"nbds+unix:///?socket={short_dir}/s&tls-certificates={world.bare}"
        started = asyncio.get_running_loop().time()
        limits = {"timeout_s": 0.5, "response_timeout_s": 0.5}
        with pytest.raises(OSError, match=r"closed|TLS|reset|EOF|answer"):
            async with session(address, contexts=(), **limits) as connection:
                await connection.pread(0, memoryview(bytearray(512)))
        assert asyncio.get_running_loop().time() - started < 5
        over.set()
        await asyncio.sleep(0.02)


@on_both_loops
async def test_keys_where_python_has_them(short_dir: Path) -> None:
    keys = {
        "keys": "you:11\nme:00112233445566778899aabbccddeeff\n",
        "other": "me:ff112233445566778899aabbccddeeff\n",
        "not-mine": "you:00112233445566778899aabbccddeeff\n",
        "broken": "me:xyz\n",
    }
    for name, text in keys.items():
        (short_dir / name).write_text(text)
    with nbdkit(short_dir, "--tls=require", f"--tls-psk={short_dir}/keys", "memory", str(SIZE)):
        address = f"nbds+unix://me@/?socket={short_dir}/s&tls-psk-file={short_dir}"
        if not PSK_AVAILABLE:
            with pytest.raises(ConfigError, match=r"this Python has no TLS-PSK; it needs 3\.13"):
                await round_trip(f"{address}/keys")
            return
        await round_trip(f"{address}/keys")
        await refused(f"{address}/other")
        for name in ("not-mine", "broken", "none"):
            with pytest.raises(ConfigError, match=name):
                await round_trip(f"{address}/{name}")


@on_both_loops
async def test_with_a_key_a_certificate_does_not_do(short_dir: Path, world: World) -> None:
    """OpenSSL would go on with it, and without the key."""
    (short_dir / "keys").write_text("me:00112233445566778899aabbccddeeff\n")
    options = ["--tls=require", f"--tls-certificates={world.server}"]
    with nbdkit(short_dir, *options, "memory", str(SIZE)):
        address = f"nbds+unix://me@/?socket={short_dir}/s&tls-psk-file={short_dir}/keys"
        with pytest.raises((OSError, ConfigError), match=r"prove|3\.13"):
            await round_trip(address)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ((), "ca-cert.pem"),
        (("ca-cert.pem",), "not valid|no certificate|cannot use"),
        (("ca-cert.pem", "client-key.pem"), "client-cert.pem"),
    ],
)
async def test_credentials_that_cannot_be_used(
    short_dir: Path, world: World, files: tuple[str, ...], text: str
) -> None:
    certificates = short_dir / "certificates"
    certificates.mkdir()
    for name in files:
        good = len(files) > 1
        (certificates / name).write_bytes((world.client / name).read_bytes() if good else b"?")
    target = parse_nbd_uri(f"nbds+unix:///?socket=/none&tls-certificates={certificates}")
    with pytest.raises(ConfigError, match=text):
        await connect_nbd(target)
