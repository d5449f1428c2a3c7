"""TLS from the command line and on passed sockets; credentials that keep a daemon from starting."""

from __future__ import annotations

import json
import ssl
import sys
from pathlib import Path

import pytest
from daemon_support import SIZE, Setup, pattern
from peers import (
    REPLNBD,
    Authority,
    Credentials,
    NbdReplyError,
    Process,
    QmpClient,
    RawClient,
    fingerprints,
    list_exports,
    refusal,
    run_replnbd,
)
from peers import nbd_wire as wire

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HOST = "localhost"
ACTIVATE = (sys.executable, str(Path(__file__).with_name("activate.py")))


@pytest.fixture
def authority(short_dir: Path) -> Authority:
    """Of the server and of its clients."""
    return Authority(short_dir / "authority")


def context(authority: Authority, client: Credentials | None = None) -> ssl.SSLContext:
    """A client's."""
    made = ssl.create_default_context(cafile=str(authority.certificate))
    if client is not None:
        made.load_cert_chain(client.certificate, client.key)
    return made


def check(client: RawClient, secrets: ssl.SSLContext) -> None:
    """It gets in over TLS, and reads all bytes."""
    with client:
        client.send(wire.FIXED_NO_ZEROES)
        client.start_tls(secrets, HOST)
        client.go("d", client_flags=b"")
        assert client.ask(wire.READ, 0, SIZE).data == pattern(1)
        client.finish()


def test_a_secondary_takes_its_credentials_from_options(setup: Setup, authority: Authority) -> None:
    server, client = authority.issue("server", HOST), authority.issue("client", "primary.example")
    argv = [*REPLNBD, "secondary", str(setup.path("secondary")), "--control", setup.control]
    argv += ["--tls-certificate", str(server.certificate), "--tls-key", str(server.key)]
    argv += ["--tls-client-ca", str(authority.certificate)]
    argv += ["--listen", f"nbd+unix:///?socket={setup.folder}/nbd&tls=on"]
    with Process(argv, log=setup.folder / "log") as process:
        exports = process.reach(lambda: list_exports(setup.folder / "nbd"))
        assert [each.name for each in exports] == ["d", "d-top"]
        check(RawClient(setup.folder / "nbd"), context(authority, client))
        stranger = RawClient(setup.folder / "nbd")
        with pytest.raises(ssl.SSLError, match="ALERT_CERTIFICATE_REQUIRED"):
            check(stranger, context(authority))
        assert process.terminate() == 0


def with_tls(setup: Setup, **files: Path) -> Path:
    """The configuration, and a table [tls]."""
    path = setup.write()
    lines = [f"{key.replace('_', '-')} = {json.dumps(str(file))}" for key, file in files.items()]
    path.write_text("\n".join([path.read_text(), "[tls]", *lines]))
    return path


def test_passed_sockets_have_tls_as_the_first_of_those_they_replace(
    setup: Setup, authority: Authority
) -> None:
    nbd, server = setup.folder / "nbd", authority.issue("server", HOST)
    setup.listen = ["nbds://127.0.0.1:0", "nbd+unix:///?socket=not-used"]
    config = with_tls(setup, certificate=server.certificate, key=server.key)
    activate = [*ACTIVATE, f"unix:replnbd.socket:{nbd}", "tcp::0", "--"]
    with Process([*activate, *REPLNBD, "serve", str(config)], log=setup.folder / "log") as process:
        qmp = process.reach(lambda: QmpClient(Path(setup.control)))
        uris = qmp.execute("x-replnbd-status")["listen"]
        assert uris[0] == f"nbds+unix:///?socket={nbd}"
        port = int(uris[1].removeprefix("nbds://127.0.0.1:"))
        for address in (nbd, (HOST, port)):
            with pytest.raises(NbdReplyError, match="TLS is required here"):
                list_exports(address)
            check(RawClient(address), context(authority))
        qmp.close()
        assert process.terminate() == 0


def test_bad_credentials_are_one_line_and_nothing_is_left(
    setup: Setup, authority: Authority
) -> None:
    server, other = authority.issue("server", HOST), authority.issue("other", HOST)
    setup.listen = ["nbds://127.0.0.1:0"]
    config = with_tls(setup, certificate=server.certificate, key=other.key)
    before = fingerprints(setup.folder)
    said = refusal(run_replnbd("serve", config))
    files = f"{server.certificate} with key {other.key}"
    assert said == f"replnbd: [tls] cannot use certificate {files}: key values mismatch"
    options = ["--tls-certificate", str(server.certificate), "--tls-key", str(other.key)]
    disk, control = setup.path("secondary"), setup.folder / "q"
    assert refusal(run_replnbd("secondary", disk, "--control", control, *options)) == said
    said = refusal(run_replnbd("secondary", disk, "--control", control, *options[2:]))
    assert said == "replnbd: [tls]: needs key 'certificate', or 'psk'"
    assert fingerprints(setup.folder) == before
