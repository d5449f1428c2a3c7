"""Who is refused because of TLS, or refuses us: what the client prints, and what our log says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from peers import ReplnbdDisk
from tls_support import (
    HOST,
    LOOK,
    NAME,
    READ,
    SIZE,
    TOP,
    Pki,
    Place,
    SecureStandby,
    read_all,
    refused,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

COMMANDS = {**LOOK, **READ}
QEMU = ["qemu-img info", "qemu-img", "qemu-io"]
REFUSED = "closed, TLS failed: the client's certificate was refused: "


class Case(NamedTuple):
    """A client's credentials, and what libnbd, QEMU and our log say to them."""

    client: str
    libnbd: str
    qemu: str
    log: str


ALERT = "gnutls_record_recv: A TLS fatal alert has been received."
QEMU_ALERT = "Failed to read option reply: Cannot read from TLS channel: Input/output error"
UNVERIFIED = "gnutls_handshake: Error in the certificate verification."
HUNG_UP = "closed, TLS failed: the client hung up; it may not trust our certificate"
LEFT = "left right behind TLS; it may not trust our certificate"
OF_CLIENTS = [
    Case("none", ALERT, QEMU_ALERT, "closed, TLS failed: peer did not return a certificate"),
    Case("expired", ALERT, QEMU_ALERT, f"{REFUSED}certificate has expired"),
    Case("forged", ALERT, QEMU_ALERT, f"{REFUSED}unable to get local issuer certificate"),
]


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureStandby]:
    """One that wants certificates."""
    folder = tmp_path_factory.mktemp("tls")
    disk = ReplnbdDisk.create(folder, NAME, TOP, bytes(SIZE))
    with SecureStandby(folder, Pki(folder / "pki"), disk) as running:
        yield running
        running.quit()


@pytest.fixture(autouse=True)
def goes_on(standby: SecureStandby, tmp_path: Path) -> Iterator[None]:
    """After each test a good client is served, and nothing was wrong with the server."""
    yield
    standby.show(standby.pki.server)
    place = standby.place("tcp", "primary")
    assert read_all("nbdcopy", place, tmp_path / "disk") == bytes(SIZE)
    assert "Traceback" not in standby.process.log.read_text()


def says(standby: SecureStandby, place: Place, client: str, log: str) -> str:
    """What a client prints that fails; `log` is what we log of it, and nothing else."""
    with standby.logging() as logged:
        said = refused(*COMMANDS[client](place, Path("/dev/null")))
    assert logged == {("INFO", log)}
    return said


@pytest.mark.parametrize("case", OF_CLIENTS, ids=lambda case: case.client)
@pytest.mark.parametrize("client", COMMANDS)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_certificate_that_is_no_good_gets_an_alert(
    standby: SecureStandby, transport: str, client: str, case: Case
) -> None:
    said = says(standby, standby.place(transport, case.client), client, case.log)
    assert (case.qemu if client in QEMU else case.libnbd) in said


@pytest.mark.parametrize("client", COMMANDS)
def test_a_client_that_trusts_another_authority_does_not_stay(
    standby: SecureStandby, client: str
) -> None:
    place = standby.place("tcp", "trusts another")
    said = says(standby, place, client, LEFT if client in QEMU else HUNG_UP)
    assert ("The certificate hasn't got a known issuer" if client in QEMU else UNVERIFIED) in said


@pytest.mark.parametrize("client", COMMANDS)
def test_a_certificate_of_another_host_is_not_ours(standby: SecureStandby, client: str) -> None:
    standby.show(standby.pki.authority.issue("other", "other.example"))
    place = standby.place("tcp", "primary")
    said = says(standby, place, client, LEFT if client in QEMU else HUNG_UP)
    assert (
        f"Certificate does not match the hostname {HOST}" if client in QEMU else UNVERIFIED
    ) in said


@pytest.mark.parametrize("client", COMMANDS)
def test_an_expired_certificate_of_ours_is_not_trusted(standby: SecureStandby, client: str) -> None:
    standby.show(standby.pki.authority.issue("expired", HOST, expired=True))
    place = standby.place("tcp", "primary")
    said = says(standby, place, client, LEFT if client in QEMU else HUNG_UP)
    assert ("The certificate is not trusted" if client in QEMU else UNVERIFIED) in said


@pytest.mark.parametrize("client", COMMANDS)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_client_without_tls_is_told_that_it_needs_it(
    standby: SecureStandby, transport: str, client: str
) -> None:
    log = "closed in the handshake: the client aborted, refused: TLS is required here"
    said = says(standby, standby.place(transport, None), client, log)
    if client in QEMU:
        assert "TLS negotiation required before option 7 (go)" in said
        assert "server reported: TLS is required here" in said
    elif client == "nbdinfo":  # of libnbd 1.14; newer ones show what the server said
        assert "server replied with error to opt_go request" in said
    else:
        assert "server requires TLS encryption first" in said


@pytest.mark.parametrize("client", COMMANDS)
def test_a_client_that_wants_tls_is_told_that_there_is_none(
    standby: SecureStandby, client: str
) -> None:
    log = "closed in the handshake: the client aborted, refused: TLS is not offered here"
    place = Place(NAME, standby.pki.clients["primary"], socket=standby.nbd_socket)
    said = says(standby, place, client, log)
    if client in QEMU:
        assert "Denied by server for option 5 (starttls)" in said
        assert "server reported: TLS is not offered here" in said
    elif client == "nbdinfo":
        assert "nbd_connect_uri" in said
    else:
        assert "server refused TLS" in said
