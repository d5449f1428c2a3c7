"""Clients of other projects over TLS: every byte is read and written, over TCP and unix sockets,
with certificates of their own and without."""

from __future__ import annotations

import json
import random
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import MIB, assert_same, fresh_seed, run
from peers import RawClient, ReplnbdDisk, wait_until
from peers import nbd_wire as wire
from tls_support import HOST, NAME, READ, SIZE, TOP, Pki, SecureStandby, read_all, write_all

COST_BYTES_MAX = 16 * MIB
"""What waits for the client, twice: encrypted, and not yet."""

REST_S = 0.05
"""More than the ticks in which processor time is told."""

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.fixture(scope="module", params=[False, True], ids=["anybody", "certificates"])
def standby(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecureStandby]:
    """With and without the demand that clients have certificates."""
    folder = tmp_path_factory.mktemp("tls")
    disk = ReplnbdDisk.create(folder, NAME, TOP, bytes(SIZE))
    with SecureStandby(folder, Pki(folder / "pki"), disk, verify=request.param) as running:
        yield running
        content = running.content()
        running.quit()
        assert_same(disk.content(), content, "the disk after the end")


def who(standby: SecureStandby) -> str:
    """A client that gets in."""
    return "primary" if standby.verify else "none"


@pytest.mark.parametrize("transport", ["tcp", "unix", "tcp on", "unix on"])
@pytest.mark.parametrize("client", READ)
def test_every_byte_is_written_and_read(
    standby: SecureStandby, tmp_path: Path, client: str, transport: str
) -> None:
    place = standby.place(transport, who(standby))
    content = random.Random(fresh_seed()).randbytes(SIZE)
    (tmp_path / "new").write_bytes(content)
    with standby.logging() as logged:
        write_all(client, place, tmp_path / "new")
    assert logged == {("INFO", f"uses export {NAME} (structured replies, TLS)")}
    assert_same(standby.content(), content, "the export")
    assert_same(read_all(client, place, tmp_path / "seen"), content, f"what {client} reads")


@pytest.mark.parametrize("transport", ["tcp on", "unix on"])
@pytest.mark.parametrize("client", READ)
def test_where_tls_is_offered_nobody_needs_it(
    standby: SecureStandby, tmp_path: Path, client: str, transport: str
) -> None:
    content = random.Random(fresh_seed()).randbytes(SIZE)
    (tmp_path / "new").write_bytes(content)
    with standby.logging() as logged:
        write_all(client, standby.place(transport, None), tmp_path / "new")
    assert logged == {("INFO", f"uses export {NAME} (structured replies)")}
    assert_same(read_all(client, standby.place(transport, None), tmp_path / "clear"), content, "")
    secure = standby.place(transport, who(standby))
    assert_same(read_all(client, secure, tmp_path / "secure"), content, "over TLS")


def test_nbdinfo_lists_both_exports_over_tls(standby: SecureStandby) -> None:
    for transport in ("tcp", "unix"):
        uri = standby.place(transport, who(standby), export="").uri
        said = json.loads(run("nbdinfo", "--list", "--json", uri))
        assert said["TLS"] is True
        assert [each["export-name"] for each in said["exports"]] == [NAME, TOP]
        assert {each["export-size"] for each in said["exports"]} == {SIZE}


@pytest.mark.parametrize(("length", "count"), [(4096, 2000), (SIZE, 30)])
def test_a_client_that_does_not_read_costs_little_and_loses_nothing(
    standby: SecureStandby, length: int, count: int
) -> None:
    context = ssl.create_default_context(cafile=str(standby.pki.authority.certificate))
    if standby.verify:
        folder = standby.pki.clients["primary"]
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    with RawClient((HOST, standby.ports[0])) as client:
        client.send(wire.FIXED_NO_ZEROES)
        client.start_tls(context, HOST)
        client.go(NAME, client_flags=b"")
        content = standby.content()
        assert client.ask(wire.READ, 0, SIZE).data == content
        standby.process.reset_peak()
        before = standby.process.resident_bytes
        cookies = {client.begin(wire.READ, 0, length) for _ in range(count)}
        wait_until(lambda: at_rest(standby), "the server to wait for the client")
        assert standby.process.peak_bytes - before < COST_BYTES_MAX
        while cookies:
            answer = client.answer()
            assert answer is not None
            cookies.remove(answer.cookie)
            assert answer.data == content[:length]
        client.finish()


def at_rest(standby: SecureStandby) -> bool:
    """Whether the server uses no processor time for a while."""
    used_s = standby.process.cpu_s
    time.sleep(REST_S)
    return standby.process.cpu_s == used_s
