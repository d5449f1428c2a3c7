"""Certificates for tests of TLS: an authority in a folder, and what it signs, as PEM files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme


class Credentials(NamedTuple):
    """Paths of a certificate (with what leads to its authority) and its key."""

    certificate: Path
    key: Path


class Authority:
    """A CA of its own, with its certificate in `folder`/ca-cert.pem."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.certificate = folder / "ca-cert.pem"
        self._ca.cert_pem.write_to_path(str(self.certificate))

    def issue(
        self, file: str, *names: str, common_name: str | None = None, expired: bool = False
    ) -> Credentials:
        """A certificate for `names` (DNS names or IP addresses) in files called `file`."""
        now = datetime.now(UTC)
        issued = self._ca.issue_cert(
            *names,
            common_name=common_name,
            not_before=now - timedelta(days=2),
            not_after=now + timedelta(days=-1 if expired else 2),
        )
        credentials = Credentials(
            self._folder / f"{file}-cert.pem", self._folder / f"{file}-key.pem"
        )
        credentials.key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(str(credentials.key))
        credentials.certificate.write_bytes(
            b"".join(each.bytes() for each in issued.cert_chain_pems)
        )
        return credentials

    def directory(self, name: str, *, client: Credentials | None = None) -> Path:
        """A folder as libnbd, nbdkit and QEMU want it for a client: ca-cert.pem and, with `client`,
        client-cert.pem and client-key.pem."""
        folder = self._folder / name
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        if client is not None:
            (folder / "client-cert.pem").write_bytes(client.certificate.read_bytes())
            (folder / "client-key.pem").write_bytes(client.key.read_bytes())
        return folder
