"""A certificate that is renewed while the daemon runs, well and badly."""

from __future__ import annotations

import random
import shutil
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interop_support import assert_same
from peers import RawClient, ReplnbdDisk
from peers import nbd_wire as wire
from tls_support import HOST, NAME, READ, SIZE, TOP, Pki, SecureStandby, read_all, refused

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.fixture
def standby(short_dir: Path) -> Iterator[SecureStandby]:
    """One that wants certificates."""
    disk = ReplnbdDisk.create(short_dir, NAME, TOP, bytes(SIZE))
    with SecureStandby(short_dir, Pki(short_dir / "pki"), disk) as running:
        yield running
        running.quit()


def connect(standby: SecureStandby) -> RawClient:
    """A client with the primary's certificate."""
    folder = standby.pki.clients["primary"]
    context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    client = RawClient((HOST, standby.ports[0]))
    client.send(wire.FIXED_NO_ZEROES)
    client.start_tls(context, HOST)
    return client.go(NAME, client_flags=b"")


def shown(client: RawClient) -> object:
    """The serial number of the certificate that the server has shown."""
    assert isinstance(client.sock, ssl.SSLSocket)
    certificate = client.sock.getpeercert()
    assert certificate is not None
    return certificate["serialNumber"]


def check(client: RawClient, standby: SecureStandby) -> None:
    """All bytes are written, and read."""
    data = random.randbytes(SIZE)
    assert client.ask(wire.WRITE, 0, data=data).error == 0
    assert_same(client.ask(wire.READ, 0, SIZE).data, data, "what is read")
    assert_same(standby.content(), data, "the export")


def test_a_new_certificate_is_shown_to_the_next_client(standby: SecureStandby) -> None:
    with connect(standby) as old:
        standby.show(standby.pki.authority.issue("renewed", HOST))
        with connect(standby) as new:
            assert shown(new) != shown(old)
            check(old, standby)
            check(new, standby)
            new.finish()
        old.finish()


def test_a_new_authority_of_clients_counts_for_the_next_one(standby: SecureStandby) -> None:
    with connect(standby) as old:
        check(old, standby)
        ours, theirs = standby.pki.authority.certificate, standby.pki.stranger.certificate
        kept = ours.read_bytes()
        shutil.copy(theirs, ours)
        with standby.logging() as logged:
            refused(*READ["nbdcopy"](standby.place("tcp", "primary"), Path("/dev/null")))
        reason = "the client's certificate was refused: unable to get local issuer certificate"
        assert logged == {("INFO", f"closed, TLS failed: {reason}")}
        check(old, standby)
        ours.write_bytes(kept)
        with connect(standby) as new:
            check(new, standby)
        old.finish()


def half_a_certificate(standby: SecureStandby) -> str:
    """What is wrong with half a file; the other half is still to be written."""
    whole = standby.certificate.read_bytes()
    standby.certificate.write_bytes(whole[: len(whole) // 2])
    return f"cannot use certificate {standby.certificate} with key {standby.key}: not valid PEM"


def an_empty_key(standby: SecureStandby) -> str:
    """It is truncated, and nothing is written yet."""
    standby.key.write_bytes(b"")
    return f"key 'key': {standby.key} has no private key in PEM"


def no_key(standby: SecureStandby) -> str:
    """It is gone, and the new one is not there yet."""
    standby.key.unlink()
    return f"key 'key': cannot read {standby.key}: No such file or directory"


def the_certificate_before_its_key(standby: SecureStandby) -> str:
    """One is new, the other is old."""
    new = standby.pki.authority.issue("renewed", HOST)
    standby.certificate.write_bytes(new.certificate.read_bytes())
    files = f"{standby.certificate} with key {standby.key}"
    return f"cannot use certificate {files}: key values mismatch"


@pytest.mark.parametrize(
    "breakage", [half_a_certificate, an_empty_key, no_key, the_certificate_before_its_key]
)
def test_a_broken_renewal_refuses_new_clients_and_keeps_old_ones(
    standby: SecureStandby, tmp_path: Path, breakage: Callable[[SecureStandby], str]
) -> None:
    place = standby.place("tcp", "primary")
    with connect(standby) as old:
        check(old, standby)
        reason = breakage(standby)
        for client in ("nbdcopy", "qemu-img"):
            with standby.logging() as logged:
                said = refused(*READ[client](place, tmp_path / "not"))
            assert logged == {("WARNING", f"closed, TLS failed: [tls] {reason}")}
            assert ("TLS handshake failed" if client == "qemu-img" else "TLS fatal alert") in said
        check(old, standby)
        standby.show(standby.pki.server)
        with connect(standby) as new:
            check(new, standby)
        content = standby.content()
        assert_same(
            read_all("nbdcopy", place, tmp_path / "seen"), content, "what a new client sees"
        )
        old.finish()
