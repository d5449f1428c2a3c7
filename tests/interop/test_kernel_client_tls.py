"""The kernel's NBD client behind nbd-client's TLS: certificates on both sides, and what becomes of
clients that have the wrong ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import KIB, Standby
from kernel_client_support import HOST, Work, attach, check_device, detach, mount, umount
from peers import REPLNBD, Authority, Credentials, Guest, ReplnbdDisk

pytestmark = [pytest.mark.interop, pytest.mark.slow]


class SecureStandby(Standby):
    """TLS is required on the port, and clients must have a certificate of the authority."""

    def __init__(self, folder: Path, disk: ReplnbdDisk) -> None:
        self.authority = Authority(folder / "authority")
        self.client = self.authority.issue("client", "primary.example")
        super().__init__(folder, disk)

    def _command(self, folder: Path) -> list[str]:
        server = self.authority.issue("server", "standby.example", HOST)
        listen = [f"nbd+unix:///?socket={self.nbd_socket}", "nbds://127.0.0.1:0"]
        tables: dict[str, dict[str, object]] = {
            "server": {"listen": listen, "control": str(self.control_socket)},
            "tls": {
                "certificate": str(server.certificate),
                "key": str(server.key),
                "client-ca": str(self.authority.certificate),
            },
        }
        lines = []
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(table[key])}" for key in table)]
        config = folder / "replnbd.toml"
        config.write_text("\n".join([*lines, self.disk.table()]) + "\n")
        return [*REPLNBD, "serve", str(config)]


class SecureWork(Work):
    """Work over TLS: `trust` and `identity` are options of nbd-client, by whose they are."""

    standby: SecureStandby

    def __init__(self, folder: Path, guest: Guest, source: bytes) -> None:
        super().__init__(folder, guest, source, SecureStandby)
        stranger = Authority(folder / "stranger")
        authority = self.standby.authority
        self.trust = {
            "authority": self._bring("-cacertfile", authority.certificate, "ca"),
            "stranger": self._bring("-cacertfile", stranger.certificate, "other-ca"),
        }
        self.identity = {
            "authority": self._identity(self.standby.client, "client"),
            "stranger": self._identity(stranger.issue("client", "primary.example"), "stranger"),
            "nobody": "-enable-tls",
        }
        self.options = f"{self.trust['authority']} {self.identity['authority']}"

    def _identity(self, who: Credentials, name: str) -> str:
        certificate = self._bring("-certfile", who.certificate, f"{name}-cert")
        return f"{certificate} {self._bring('-keyfile', who.key, f'{name}-key')}"

    def _bring(self, option: str, path: Path, name: str) -> str:
        """An option of nbd-client with a file that is in the guest then."""
        self.guest.write_file(f"/tmp/{name}.pem", path.read_bytes())
        return f"{option} /tmp/{name}.pem"

    def expect_refusal(self, options: str) -> None:
        """nbd-client does not get a device with these options."""
        server = f"{HOST} {self.standby.port}"
        self.guest.run(f"nbd-client {options} {server} -N colo0 /dev/nbd0", status=1)
        self.guest.run("nbd-client -c /dev/nbd0", status=1)


@pytest.fixture
def secure(short_dir: Path, guest: Guest, source: bytes) -> Iterator[SecureWork]:
    """A standby that wants certificates; the guest has some, and is left as it was."""
    work = SecureWork(short_dir, guest, source)
    with work.standby:
        yield work
        work.finish()


@pytest.mark.parametrize("connections", [1, 4])
def test_file_systems_on_both_exports_are_whole_over_tls(
    secure: SecureWork, connections: int
) -> None:
    guest, files = secure.guest, secure.files
    options = f"{secure.options} -C {connections}"
    secure.make_file_system(options)
    assert secure.status("primary-connections") == connections
    files.write(guest, "nbd0", "a", "b", "c")
    secure.start()
    seen = files.copy()
    attach(guest, secure.standby, "top0", "nbd1", f"{options} -tlshostname standby.example")
    mount(guest, "nbd1")
    files.remove(guest, "nbd0", "a")
    files.write(guest, "nbd0", "b", "d", length_max=300 * KIB)
    seen.write(guest, "nbd1", "a", "e", length_max=300 * KIB)
    files.check_mounted(guest, "nbd0")
    seen.check_mounted(guest, "nbd1")
    for device in ("nbd0", "nbd1"):
        umount(guest, device)
        check_device(guest, device)
        detach(guest, device)
    secure.wait_for_connections(0)
    secure.check_view(seen)
    secure.check_disk()


@pytest.mark.parametrize(
    ("trust", "identity"),
    [("authority", "stranger"), ("authority", "nobody"), ("stranger", "authority")],
)
def test_who_does_not_trust_the_other_side_does_not_connect(
    secure: SecureWork, trust: str, identity: str
) -> None:
    secure.expect_refusal(f"{secure.trust[trust]} {secure.identity[identity]}")
    secure.make_file_system(secure.options)
    secure.files.write(secure.guest, "nbd0", "a")
    umount(secure.guest, "nbd0")
    detach(secure.guest, "nbd0")
    secure.check_disk()


def test_who_speaks_no_tls_or_expects_another_host_does_not_connect(secure: SecureWork) -> None:
    secure.expect_refusal("")
    secure.expect_refusal(f"{secure.options} -tlshostname other.example")
    secure.make_file_system(secure.options)
    umount(secure.guest, "nbd0")
    detach(secure.guest, "nbd0")
    secure.check_disk()
