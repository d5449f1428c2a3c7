"""TLS by shared keys with real clients, where Python has it (3.13 and later); where it has not, the
daemon says so."""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from interop_support import START, assert_same, fresh_seed, run
from peers import refusal, run_replnbd
from tls_support import (
    KEYS,
    NAME,
    READ,
    SIZE,
    TOP,
    WRITE,
    GuardedDisk,
    Pki,
    Place,
    SecureStandby,
    read_all,
    refused,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")
USERS = {"alice": random.Random(1).randbytes(32), "bob": random.Random(2).randbytes(64)}
NO_TLS_1_3 = "[overrides]\ndisabled-version = tls1.3\n"
"""For GnuTLS."""

VERSIONS = ["TLS 1.2", "TLS 1.3"]
ALERT = "A TLS fatal alert has been received."


def write_keys(folder: Path, users: dict[str, bytes]) -> Path:
    """A folder with a file of keys, as psktool writes it."""
    folder.mkdir()
    lines = [f"{user}:{key.hex()}\n" for user, key in users.items()]
    (folder / KEYS).write_text("".join(lines))
    return folder


if not PSK:

    def test_a_file_of_keys_is_refused_in_one_line(tmp_path: Path) -> None:
        keys = write_keys(tmp_path / "keys", USERS) / KEYS
        disk = tmp_path / "disk.raw"
        disk.write_bytes(bytes(SIZE))
        said = refusal(
            run_replnbd("secondary", disk, "--tls-psk", keys, "--listen", "nbds://127.0.0.1:0")
        )
        assert said == (
            "replnbd: [tls] key 'psk': this Python has no TLS-PSK; it needs 3.13 or later"
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw", "keys"]


if PSK:

    @pytest.fixture(scope="module", params=[False, True], ids=["keys alone", "certificate, too"])
    def standby(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[SecureStandby]:
        """NAME is for alice, TOP for bob. With a certificate, clients need one, or a key."""
        folder = tmp_path_factory.mktemp("psk")
        disk = GuardedDisk.create(folder, NAME, TOP, bytes(SIZE))
        guarded = replace(disk, allow=("alice", "primary"), top_allow=("bob",))
        keys = write_keys(folder / "keys", USERS) / KEYS
        pki = Pki(folder / "pki")
        with SecureStandby(folder, pki, guarded, keys=keys, certified=request.param) as running:
            running.qmp.execute(*START)
            yield running
            running.quit()

    def by_key(
        standby: SecureStandby, transport: str, user: str, export: str, folder: Path | None = None
    ) -> Place:
        """How a user gets to an export; `folder`: of other keys than the server's."""
        keys = standby.folder / "keys" if folder is None else folder
        return standby.at(transport, Place(export, keys, user=user))

    @pytest.fixture(params=VERSIONS)
    def version(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
        """What makes a client speak that version, or an older one."""
        path = tmp_path / f"gnutls-{request.param.removeprefix('TLS ')}.conf"
        path.write_text(NO_TLS_1_3 if request.param == "TLS 1.2" else "")
        return ["env", f"GNUTLS_SYSTEM_PRIORITY_FILE={path}"]

    @pytest.mark.parametrize("client", READ)
    @pytest.mark.parametrize("transport", ["tcp", "unix on"])
    @pytest.mark.parametrize(("user", "export"), [("alice", NAME), ("bob", TOP)])
    def test_a_key_is_all_that_a_client_needs(
        standby: SecureStandby,
        tmp_path: Path,
        version: list[str],
        client: str,
        transport: str,
        user: str,
        export: str,
    ) -> None:
        content = random.Random(fresh_seed()).randbytes(SIZE)
        (tmp_path / "new").write_bytes(content)
        place = by_key(standby, transport, user, export)
        with standby.logging() as logged:
            run(*version, *WRITE[client](place, tmp_path / "new"))
        assert logged == {("INFO", f"uses export {export} (structured replies, TLS)")}
        seen = read_all(client, place, tmp_path / "seen", prefix=version)
        assert_same(seen, content, f"what {client} reads")

    @pytest.mark.parametrize("client", READ)
    def test_a_user_gets_no_further_than_its_exports(standby: SecureStandby, client: str) -> None:
        with standby.logging() as logged:
            refused(*READ[client](by_key(standby, "tcp", "bob", NAME), Path("/dev/null")))
        reason = f"refused: export '{NAME}' is not for 'bob'"
        assert logged == {("INFO", f"closed in the handshake: the client aborted, {reason}")}

    @pytest.mark.parametrize("client", READ)
    def test_another_key_or_an_unknown_user_gets_an_alert(
        standby: SecureStandby, tmp_path: Path, version: list[str], client: str
    ) -> None:
        others = write_keys(tmp_path / "others", {"alice": bytes(32), "carol": USERS["alice"]})
        for user, reason in (
            ("alice", r"user 'alice' has another key \(.*\)"),
            ("carol", r"there is no key of user 'carol'"),
        ):
            place = by_key(standby, "tcp", user, NAME, others)
            with standby.logging() as logged:
                said = refused(*version, *READ[client](place, tmp_path / "not"))
            assert ALERT in said
            ((level, text),) = logged
            assert level == "INFO"
            assert re.fullmatch(f"closed, TLS failed: {reason}", text)

    @pytest.mark.parametrize("client", READ)
    def test_a_certificate_is_as_good_as_a_key_if_the_server_has_one_itself(
        standby: SecureStandby, tmp_path: Path, version: list[str], client: str
    ) -> None:
        place = standby.place("tcp", "primary")
        command = READ[client](place, tmp_path / "seen")
        if standby.certified:
            run(*version, *command)
            with standby.logging() as logged:
                refused(*version, *READ[client](standby.place("tcp", "none"), tmp_path / "not"))
            reason = "peer did not return a certificate"
        else:
            with standby.logging() as logged:
                assert ALERT in refused(*version, *command)
            why = "no shared cipher" if "1.2" in version[1] else "no suitable signature algorithm"
            reason = f"the client offers no key that we could use ({why})"
        assert logged == {("INFO", f"closed, TLS failed: {reason}")}
