"""Whom a source must not overwrite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_model import check_equal
from host import Host
from pair import Pair, sparse
from peers import refusal, run_replnbd, wait_until

pytestmark = pytest.mark.slow
SIZE = 2 << 20


@pytest.fixture
def hosts(short_dir: Path) -> Iterator[tuple[Host, Host]]:
    """Two, with data that has nothing in common."""
    a, b = (Host(short_dir, letter, [letter.encode() * SIZE], "raw") for letter in "ab")
    a.to, b.to = [b.proxy.uri("b0")], [a.proxy.uri("a0")]
    try:
        yield a, b
    finally:
        a.close()
        b.close()


def refused(host: Host) -> bool:
    return bool(host.link()["state"] == "refused")


def test_two_primaries_that_are_each_others_target_overwrite_nothing(
    hosts: tuple[Host, Host],
) -> None:
    for host in hosts:
        host.start("primary")
        host.begin()
    wait_until(lambda: all(map(refused, hosts)), "both to be refused")
    for host in hosts:
        assert "is a primary itself" in host.link()["reason"]
        assert host.status()["refused"] == host.link()["reason"]
        check_equal(host.read(f"{host.letter}0"), host.letter.encode() * SIZE, host.letter)


def test_the_standby_of_another_disk_is_refused_until_it_forgets_that(short_dir: Path) -> None:
    with Pair(short_dir, 1, size=SIZE) as pair:
        pair.source.begin()
        pair.compare()
        data = sparse(pair.rng, SIZE)
        stranger = Host(short_dir, "c", [data], "raw")
        stranger.to = [pair.b.proxy.uri("b0")]
        try:
            pair.source.quit()
            stranger.start("primary")
            stranger.begin()
            wait_until(lambda: refused(stranger), "a refusal")
            assert "is a copy of another one" in stranger.link()["reason"]
            assert pair.target.status()["refused"] == stranger.link()["reason"]
            check_equal(pair.target.read("b0"), pair.contents[0].data, "the standby's disk")
            pair.target.qmp.execute("x-replnbd-reset", {"force": True})
            wait_until(lambda: stranger.link()["state"] == "live", "the copy")
            check_equal(pair.target.read("b0"), data, "the standby's disk")
        finally:
            stranger.close()


@pytest.mark.parametrize("stage", ["none", "running", "promoted"])
def test_a_view_is_no_place_for_a_source(hosts: tuple[Host, Host], stage: str) -> None:
    # It is the disk itself after a failover, and no fence keeps anybody from it.
    source, standby = hosts
    standby.start("secondary")
    if stage != "none":
        standby.begin()
    if stage == "promoted":
        standby.failover("standby")
        wait_until(standby.committed, "the commit")
    source.to = [standby.proxy.uri("b0-top")]
    source.start("primary")
    source.begin()
    wait_until(lambda: refused(source), "a refusal")
    assert "is the view of 'b0'" in source.link()["reason"]
    if stage != "none":
        check_equal(standby.read("b0-top"), b"b" * SIZE, "the view")


def test_a_primary_cannot_take_over_from_itself(short_dir: Path) -> None:
    """QEMU's command would stop replication there, on the wrong host."""
    with Pair(short_dir, 2, size=SIZE) as pair:
        pair.source.begin()
        line = refusal(run_replnbd("failover", "--control", pair.source.control))
        assert line.startswith("replnbd: a primary cannot take over")
        assert pair.source.status()["stage"] == "running"
        pair.compare()


def test_a_primary_whose_standby_follows_is_not_demoted(short_dir: Path) -> None:
    """On the wrong host that would leave no primary at all."""
    with Pair(short_dir, 2) as pair:
        pair.source.begin()
        pair.wait_in_step()
        pair.start_guests()
        pair.run_for(5)
        line = refusal(run_replnbd("demote", "--control", pair.source.control))
        assert "the standby of 'a0' has not taken over" in line
        pair.run_for(5)
        pair.compare()
        pair.source.qmp.execute("xen-set-replication", {"enable": False, "primary": True})
        pair.stop_guests()
        pair.source.qmp.execute("x-replnbd-demote")
        assert pair.source.role == "secondary"


def test_what_a_stop_leaves_to_do_is_not_called_done(short_dir: Path) -> None:
    with Pair(short_dir, 2) as pair:
        pair.source.begin()
        pair.wait_in_step()
        control = pair.source.control
        assert run_replnbd("stop", "--control", control).stdout == "a0: done\n"
        done = run_replnbd("checkpoint", "--control", control)
        assert (done.status, done.stdout) == (1, "a0: done, not at the standby (off)\n")
        for command in (("start",), ("start", "--wait")):
            line = refusal(run_replnbd(*command, "--control", control))
            assert line == "replnbd: 'a0' was stopped: 'reset' comes first"
        run_replnbd("reset", "--control", control)
        assert run_replnbd("start", "--wait", "--control", control).stdout == "a0: running\n"
        pair.compare()
