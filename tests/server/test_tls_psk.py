"""TLS by shared keys, where Python has it (3.13); where it has not, that is said in one line."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import pytest
from server_wire import choose, on_both_loops, request
from tls_wire import Pki, TlsClient, leaving_nothing, serving_tls
from tls_wire import pki as pki

from replnbd.block import MemoryNode
from replnbd.errors import ConfigError
from replnbd.server import Export, Tls, TlsFiles
from replnbd.server.tls import PSK_AVAILABLE

MIB = 1 << 20
ERR_POLICY = 0x80000002
ALICE, BOB = bytes(range(32)), bytes(range(7, 71))
VERSIONS = ["TLSv1_2", "TLSv1_3"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file as psktool writes it, with a comment."""
    path = tmp_path / "keys.psk"
    path.write_text(f"# users\n\nalice:{ALICE.hex()}\nbob:{BOB.hex().upper()}\n")
    return path


def with_keys(keys: Path, pki: Pki | None = None, *, verify: bool = False) -> Tls:
    """The server's credentials; with `pki`, it has a certificate, too."""
    if pki is None:
        return Tls(TlsFiles(psk=str(keys)))
    authority = str(pki.authority.certificate) if verify else None
    certificate, key = str(pki.server.certificate), str(pki.server.key)
    return Tls(TlsFiles(certificate, key, authority, str(keys)))


def with_key(
    user: str, key: bytes, versions: list[str] = VERSIONS, ciphers: str = "ALL:PSK"
) -> ssl.SSLContext:
    """A client's; it takes any certificate, too, if the server wants to show one."""
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion[versions[0]]
    context.maximum_version = ssl.TLSVersion[versions[-1]]
    context.set_psk_client_callback(lambda hint: (user, key))
    context.set_ciphers(ciphers)
    assert isinstance(context, ssl.SSLContext)
    return context


async def receive_over(client: TlsClient, context: ssl.SSLContext) -> None:
    """In TLS 1.3 an alert may come after the handshake."""
    await client.handshake(context)
    await client.receive(1)


async def refused(
    folder: Path, tls: Tls, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> str:
    """What the log says of a client that gets an alert."""
    caplog.set_level(logging.INFO)
    async with (
        serving_tls(folder, Export("e", MemoryNode(MIB)), tls=tls) as server,
        leaving_nothing(server, caplog),
    ):
        client = await (await TlsClient.connect(folder)).starttls()
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            await receive_over(client, context)
        client.hang_up()
    (said,) = [each.getMessage() for each in caplog.records if "client 1" in each.getMessage()]
    return said.removeprefix("client 1 (unix): closed, TLS failed: ")


def test_without_psk_in_python_the_configuration_is_refused_or_else_taken(keys: Path) -> None:
    if PSK_AVAILABLE:
        with_keys(keys)
    else:
        with pytest.raises(ConfigError) as caught:
            with_keys(keys)
        said = "[tls] key 'psk': this Python has no TLS-PSK; it needs 3.13 or later"
        assert str(caught.value) == said


if PSK_AVAILABLE:

    @pytest.mark.parametrize("versions", [["TLSv1_2"], ["TLSv1_3"], VERSIONS])
    @pytest.mark.parametrize("certificate", [False, True])
    @on_both_loops
    async def test_a_key_lets_in_and_names_its_user(
        short_dir: Path, pki: Pki, keys: Path, certificate: bool, versions: list[str]
    ) -> None:
        tls = with_keys(keys, pki if certificate else None, verify=certificate)
        node = MemoryNode(MIB)
        exports = Export("a", node, allow=["alice"]), Export("b", node, allow=["bob"])
        context = with_key("alice", ALICE, versions)
        async with serving_tls(short_dir, *exports, tls=tls):
            client = await (await TlsClient.connect(short_dir)).starttls()
            if certificate and versions == ["TLSv1_3"]:  # see _load_keys
                with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                    await client.handshake(context)
                client.hang_up()
                return
            await client.handshake(context, behind=choose("b")[4:])
            assert await client.option_reply() == (7, ERR_POLICY, b"export 'b' is not for 'alice'")
            client.send(choose("a")[4:])
            await client.chosen()
            await client.pwrite(5, b"written by alice")
            assert await client.pread(0, MIB) == bytes(5) + b"written by alice" + bytes(MIB - 21)
            await client.close()

    @pytest.mark.parametrize("version", VERSIONS)
    @on_both_loops
    async def test_another_key_is_refused(
        short_dir: Path, keys: Path, caplog: pytest.LogCaptureFixture, version: str
    ) -> None:
        context = with_key("alice", BOB, [version])
        said = await refused(short_dir, with_keys(keys), context, caplog)
        assert said.startswith("user 'alice' has another key (")

    @pytest.mark.parametrize("version", VERSIONS)
    @on_both_loops
    async def test_an_unknown_user_is_refused(
        short_dir: Path, keys: Path, caplog: pytest.LogCaptureFixture, version: str
    ) -> None:
        context = with_key("carol\n", ALICE, [version])
        said = await refused(short_dir, with_keys(keys), context, caplog)
        assert said == "there is no key of user 'carol\\n'"

    @pytest.mark.parametrize("ciphers", ["PSK-NULL-SHA256", "ECDHE-PSK-NULL-SHA", "kPSK"])
    @on_both_loops
    async def test_suites_without_encryption_or_forward_secrecy_are_not_used(
        short_dir: Path, keys: Path, caplog: pytest.LogCaptureFixture, ciphers: str
    ) -> None:
        context = with_key("alice", ALICE, ["TLSv1_2"], f"{ciphers}:@SECLEVEL=0")
        said = await refused(short_dir, with_keys(keys), context, caplog)
        assert said == "the client offers no key that we could use (no shared cipher)"

    @on_both_loops
    async def test_who_has_no_key_needs_a_certificate_if_clients_do(
        short_dir: Path, pki: Pki, keys: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tls = with_keys(keys, pki, verify=True)
        context = pki.context(version="TLSv1_2")
        said = await refused(short_dir, tls, context, caplog)
        assert said == "peer did not return a certificate"

    @pytest.mark.parametrize("user", ["alice", "mallory"])
    @on_both_loops
    async def test_who_names_a_user_and_then_uses_no_key_is_nobody(
        short_dir: Path, pki: Pki, keys: Path, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In TLS 1.3 OpenSSL asks for the key, and may then go on without it."""
        monkeypatch.setattr("replnbd.server.tls._VERSION_WITH_BOTH", ssl.TLSVersion.TLSv1_3)
        node = MemoryNode(MIB)
        exports = Export("a", node, allow=["alice"]), Export("all", node)
        async with serving_tls(short_dir, *exports, tls=with_keys(keys, pki)):
            client = await (await TlsClient.connect(short_dir)).starttls()
            await client.handshake(with_key(user, b"a guess"), behind=choose("a")[4:])
            assert client.tls is not None
            assert client.tls.version() == "TLSv1.3"
            text = b"export 'a' is not for clients without a certificate"
            assert await client.option_reply() == (7, ERR_POLICY, text)
            client.send(choose("all")[4:])
            await client.chosen()
            client.send(request(0, 0, 10, cookie=3))
            assert await client.reply(10) == (0, 3, bytes(10))
            await client.close()
