"""Allow-lists: exports that are for some, by the names in their certificates."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from interop_support import START, assert_same, run
from peers import NbdReplyError, list_exports
from tls_support import (
    NAME,
    READ,
    SIZE,
    TOP,
    GuardedDisk,
    Pki,
    SecureStandby,
    read_all,
    refused,
    write_all,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

CONTENT = random.Random(3).randbytes(SIZE)
MORE = "more"
BY_NAME = {"primary": "'primary', 'primary.example'", "standby": "'standby.example'"}
"""What a client's certificate says: a common name and a DNS name, or a DNS name alone."""


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureStandby]:
    """NAME is for a common name, TOP for a DNS name; MORE came at run time, and is NAME's."""
    folder = tmp_path_factory.mktemp("tls")
    disk = replace(
        GuardedDisk.create(folder, NAME, TOP, CONTENT),
        allow=("primary",),
        top_allow=("standby.example", "nobody"),
    )
    with SecureStandby(folder, Pki(folder / "pki"), disk) as running:
        running.qmp.execute(*START)
        running.qmp.execute("nbd-server-add", {"device": NAME, "name": MORE, "writable": True})
        yield running
        running.quit()


@pytest.mark.parametrize(
    ("who", "export"), [("primary", NAME), ("standby", TOP), ("primary", MORE)]
)
@pytest.mark.parametrize("client", READ)
@pytest.mark.parametrize("transport", ["tcp", "unix on"])
def test_who_is_on_the_list_reads_and_writes(
    standby: SecureStandby, tmp_path: Path, client: str, who: str, export: str, transport: str
) -> None:
    place = standby.place(transport, who, export)
    (tmp_path / "same").write_bytes(CONTENT)
    write_all(client, place, tmp_path / "same")
    assert_same(read_all(client, place, tmp_path / "seen"), CONTENT, export)


@pytest.mark.parametrize(
    ("who", "export"), [("standby", NAME), ("primary", TOP), ("standby", MORE)]
)
@pytest.mark.parametrize("client", READ)
def test_who_is_not_on_the_list_is_refused_by_policy(
    standby: SecureStandby, client: str, who: str, export: str
) -> None:
    reason = f"export '{export}' is not for {BY_NAME[who]}"
    with standby.logging() as logged:
        said = refused(*READ[client](standby.place("tcp", who, export), Path("/dev/null")))
    assert logged == {("INFO", f"closed in the handshake: the client aborted, refused: {reason}")}
    if client.startswith("qemu"):
        assert f"Denied by server for option 7 (go)\nserver reported: {reason}" in said
    else:
        assert "server policy prevents NBD_OPT_GO" in said


@pytest.mark.parametrize("client", READ)
@pytest.mark.parametrize("export", [NAME, TOP, MORE])
def test_without_tls_it_is_told_to_be_needed_where_it_is_offered(
    standby: SecureStandby, client: str, export: str
) -> None:
    reason = f"export '{export}' needs TLS"
    with standby.logging() as logged:
        said = refused(*READ[client](standby.place("tcp on", None, export), Path("/dev/null")))
    assert logged == {("INFO", f"closed in the handshake: the client aborted, refused: {reason}")}
    if client.startswith("qemu"):
        assert "TLS negotiation required before option 7 (go)" in said
        assert f"server reported: {reason}" in said
    else:
        assert "server requires TLS encryption first" in said


def test_where_tls_is_not_offered_it_is_a_matter_of_policy(standby: SecureStandby) -> None:
    for export in (NAME, TOP, MORE):
        with pytest.raises(NbdReplyError, match=f"error 2: export '{export}' needs TLS"):
            standby.connect(export)


def test_nobody_is_shown_what_is_not_for_him(standby: SecureStandby) -> None:
    assert list_exports(standby.nbd_socket) == []
    assert list_exports(standby.folder / "on") == []
    for who, exports in (("primary", [NAME, MORE]), ("standby", [TOP])):
        said = json.loads(run("nbdinfo", "--list", "--json", standby.place("tcp", who, "").uri))
        assert [each["export-name"] for each in said["exports"]] == exports


def test_the_default_export_is_for_who_may_use_it_by_its_name(
    standby: SecureStandby, tmp_path: Path
) -> None:
    place = standby.place("tcp", "primary", "")
    assert_same(read_all("nbdcopy", place, tmp_path / "seen"), CONTENT, "the default export")
    said = refused(*READ["qemu-img"](standby.place("tcp", "standby", ""), tmp_path / "not"))
    assert f"server reported: export '{NAME}' is not for 'standby.example'" in said
