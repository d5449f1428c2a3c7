"""The disks of a group are in step together, or none is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host
from peers import CuttingProxy, PeerError, wait_until

pytestmark = pytest.mark.slow

SIZE = 2 << 20


@pytest.fixture
def hosts(short_dir: Path) -> Iterator[tuple[Host, Host, CuttingProxy]]:
    """A primary and a standby of two disks, the second of which has a network of its own."""
    contents = [bytes([number]) * SIZE for number in (1, 2)]
    source = Host(short_dir, "a", contents, "raw")
    target = Host(short_dir, "b", [bytes(SIZE)] * 2, "raw")
    with CuttingProxy(("127.0.0.1", 0), target.nbd) as other:
        source.to = [target.proxy.uri("b0"), other.uri("b1")]
        try:
            target.start("secondary")
            source.start("primary")
            source.begin()
            wait_live(source)
            target.begin()
            yield source, target, other
        finally:
            source.close()
            target.close()


def wait_live(source: Host) -> None:
    """Until both links are."""
    wait_until(
        lambda: all(source.link(number)["state"] == "live" for number in (0, 1)), "both links"
    )


def write(source: Host, number: int, data: bytes) -> None:
    with source.connect(f"a{number}") as client:
        client.pwrite(0, data)


def refused(host: Host, command: str, arguments: dict[str, object] | None = None) -> str:
    """The error of a command."""
    try:
        host.qmp.execute(command, arguments or {})
    except (OSError, PeerError) as exc:
        return str(exc)
    return ""


def test_while_one_link_is_cut_the_standby_makes_no_checkpoint_of_the_other(
    hosts: tuple[Host, Host, CuttingProxy],
) -> None:
    source, target, other = hosts
    with other.refusing():
        other.drop()
        for number in (0, 1):
            write(source, number, b"after the cut")
        wait_until(lambda: target.status(0)["syncing"], "the first disk to be held")
        assert "being synchronised" in refused(target, "xen-colo-do-checkpoint")
        latest = {"enable": False, "primary": False, "failover": True, "x-replnbd-to": "latest"}
        assert "being synchronised" in refused(target, "xen-set-replication", latest)
        assert [bytes(target.read(f"b{number}-top")) for number in (0, 1)] == [
            bytes([number]) * SIZE for number in (1, 2)
        ]
    wait_live(source)
    source.qmp.execute("xen-colo-do-checkpoint")
    target.qmp.execute("xen-colo-do-checkpoint")
    for number in (0, 1):
        found = bytes(target.read(f"b{number}-top"))
        assert found == source.disks[number].path.read_bytes()
        assert found.startswith(b"after the cut")
    source.check_log()
    target.check_log()


def test_a_restart_of_either_side_brings_both_back_in_step(
    hosts: tuple[Host, Host, CuttingProxy],
) -> None:
    source, target, _ = hosts
    for host in (source, target, source):
        host.kill()
        host.start()
        wait_live(source)
        write(source, 1, b"x" * 100)
        source.qmp.execute("xen-colo-do-checkpoint")
        target.qmp.execute("xen-colo-do-checkpoint")
        assert target.disks[1].path.read_bytes() == source.disks[1].path.read_bytes()
