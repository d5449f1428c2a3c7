"""The sequence by which colo-heartbeat-daemon brings a standby back, with replnbd as the primary:
towards a replnbd and towards QEMU's own secondary, while a guest writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from colo_support import (
    DEVICE,
    JOB,
    LIVE,
    NODE,
    AnyStandby,
    QemuStandby,
    ReplnbdStandby,
    World,
)
from interop_support import KIB
from peers import End, Fault, Way

pytestmark = [pytest.mark.interop, pytest.mark.slow]

FORMS: tuple[type[AnyStandby], ...] = (ReplnbdStandby, QemuStandby)


@pytest.fixture(params=FORMS, ids=["replnbd", "qemu"])
def form(request: pytest.FixtureRequest) -> type[AnyStandby]:
    chosen: type[AnyStandby] = request.param
    return chosen


@pytest.fixture
def world(short_dir: Path, form: type[AnyStandby]) -> Iterator[World]:
    world = World(short_dir, form)
    yield world
    world.close()


def job(status: str) -> tuple[str, str]:
    """An event of the mirror's life."""
    return ("JOB_STATUS_CHANGE", status)


LIFE = [
    *(job(status) for status in ("created", "running", "ready")),
    ("BLOCK_JOB_READY", JOB),
    *(job(status) for status in ("waiting", "pending")),
    ("BLOCK_JOB_COMPLETED", JOB),
    *(job(status) for status in ("concluded", "null")),
]


def told(world: World) -> list[tuple[str, str]]:
    """All events of jobs until the mirror's end, in order: while it is there, no others are."""
    found = []
    for event in world.primary.events():
        data = event["data"]
        if "BLOCK_JOB" in event["event"] or event["event"] == "JOB_STATUS_CHANGE":
            found.append((event["event"], data.get("status") or data["device"]))
            if data.get("id", JOB) != JOB:
                return found[:-1]
    return found


def test_a_standby_is_brought_back_and_kept_while_the_guest_writes(world: World) -> None:
    world.guest.wrote_more()
    world.begin()
    assert told(world) == LIFE
    ready = world.primary.wait_for_event("BLOCK_JOB_READY")
    done = world.primary.wait_for_event("BLOCK_JOB_COMPLETED")
    assert ready["len"] == ready["offset"]
    assert done["len"] == done["offset"] >= ready["offset"]
    assert "error" not in done
    world.guest.wrote_more()
    view = world.checkpoint()
    world.guest.wrote_more()
    world.compare(view)
    view = world.checkpoint()
    world.compare(view)
    assert told(world) == LIFE


def test_what_is_written_between_the_mirror_and_the_child_is_not_lost(world: World) -> None:
    primary = world.primary
    primary.add_node(world.server)
    assert primary.mirror().ok
    primary.finish_mirror()
    world.guest.wrote_more(100)
    assert primary.link()["state"] == "off"
    assert primary.link()["behind-bytes"] > 0
    assert primary.take_in().ok
    primary.wait_for_link(LIVE)
    world.compare()
    copied = primary.link()["copied-bytes"]
    assert primary.take_out().ok
    world.guest.wrote_more()
    assert primary.take_in().ok
    primary.wait_for_link(LIVE)
    world.compare()
    assert copied > 0


def test_commands_of_replication_do_as_without_qemu_s_filter(world: World) -> None:
    world.begin()
    qmp = world.primary.qmp
    for enable in (True, False, True):
        qmp.execute("xen-set-replication", {"enable": enable, "primary": True})
    assert qmp.execute("query-xen-replication-status") == {"error": False}
    assert world.primary.link()["state"] == LIVE
    world.compare(world.checkpoint())


def test_a_standby_that_vanishes_is_reported_and_brought_back(world: World) -> None:
    world.begin()
    primary = world.primary
    world.guest.wrote_more()
    world.vanish()
    bad = primary.wait_for_event("QUORUM_REPORT_BAD")
    assert (bad["node-name"], bad["type"] != "read") == (NODE, True)
    world.guest.wrote_more()
    primary.yank()
    assert primary.link()["reason"] == "the connection was yanked"
    assert primary.take_out().ok
    primary.qmp.execute("blockdev-del", {"node-name": NODE})
    world.guest.wrote_more()
    world.proxy.admit()
    primary.qmp.events.clear()
    primary.add_node(world.server)
    assert primary.mirror().ok
    primary.finish_mirror()
    assert told(world) == LIFE
    assert primary.take_in().ok
    primary.wait_for_link(LIVE)
    world.compare()


def test_a_mirror_whose_target_vanishes_fails_and_the_next_one_does_not(world: World) -> None:
    primary = world.primary
    primary.add_node(world.server)
    assert primary.mirror(speed=4096).ok
    primary.wait_for_event("JOB_STATUS_CHANGE", status="running")
    primary.wait_for_link("syncing")
    world.vanish()
    done = primary.wait_for_event("BLOCK_JOB_COMPLETED", device=JOB)
    assert done["error"]
    primary.wait_for_event("JOB_STATUS_CHANGE", status="concluded")
    assert told(world) == [
        job("created"),
        job("running"),
        ("BLOCK_JOB_ERROR", JOB),
        job("aborting"),
        ("BLOCK_JOB_COMPLETED", JOB),
        job("concluded"),
    ]
    error = primary.wait_for_event("BLOCK_JOB_ERROR")
    assert error == {"device": JOB, "operation": "write", "action": "report"}
    primary.qmp.execute("block-job-dismiss", {"id": JOB})
    world.proxy.admit()
    primary.qmp.events.clear()
    assert primary.mirror().ok
    primary.finish_mirror()
    assert primary.take_in().ok
    primary.wait_for_link(LIVE)
    world.compare()


def test_a_mirror_that_ignores_errors_gets_there_through_any_number_of_cuts(world: World) -> None:
    primary = world.primary
    rng = world.rng
    world.proxy.schedule(
        Fault(rng.randint(0, 200 * KIB), Way.TO_SERVER, rng.choice(list(End))) for _ in range(10)
    )
    primary.add_node(world.server)
    assert primary.mirror(**{"on-target-error": "ignore"}).ok
    primary.wait_for_event("BLOCK_JOB_ERROR", action="ignore")
    primary.finish_mirror()
    world.proxy.schedule(())
    assert primary.take_in().ok
    world.guest.wrote_more()
    primary.wait_for_link(LIVE)
    world.compare()


def test_a_mirror_that_is_paused_does_not_copy_and_one_that_is_cancelled_lets_go(
    world: World,
) -> None:
    primary, qmp = world.primary, world.primary.qmp
    primary.add_node(world.server)
    assert primary.mirror(speed=4096).ok
    primary.wait_for_link("syncing")
    qmp.execute("block-job-pause", {"device": JOB})
    (listed,) = qmp.execute("query-block-jobs")
    assert (listed["device"], listed["type"], listed["status"]) == (JOB, "mirror", "paused")
    assert listed["len"] > listed["offset"]
    assert listed["speed"] == 4096
    qmp.execute("block-job-set-speed", {"device": JOB, "speed": 0})
    before = primary.link()["copied-bytes"]
    world.guest.wrote_more()
    assert primary.link()["copied-bytes"] - before <= 8 << 20
    assert primary.statuses()[-1] == "paused"
    qmp.execute("block-job-resume", {"device": JOB})
    primary.wait_for_event("JOB_STATUS_CHANGE", status="ready")
    answer = qmp.answer("block-job-complete", {"device": JOB})
    assert answer.desc == f"The active block job '{JOB}' cannot be completed"
    qmp.execute("block-job-cancel", {"device": JOB, "force": True})
    primary.wait_for_event("BLOCK_JOB_CANCELLED", device=JOB)
    primary.wait_for_event("JOB_STATUS_CHANGE", status="concluded")
    assert primary.link()["state"] == "off"


def test_one_copy_at_a_time(world: World) -> None:
    primary = world.primary
    primary.add_node(world.server)
    primary.add_node(world.server, name="nbd1")
    taken = f"Node '{DEVICE}' has one copy at a time, and that is '{NODE}' now"
    assert primary.mirror().ok
    assert primary.take_in().desc == f"The node {NODE} already has a parent"
    assert primary.take_in("nbd1").desc == taken
    assert primary.mirror(target="nbd1", **{"job-id": "other"}).desc == taken
    primary.finish_mirror()
    assert primary.mirror(sync="none").desc == "Sync mode 'none' not supported"
    assert primary.take_in().ok
    assert primary.take_in("nbd1").desc == taken
    assert primary.mirror(target="nbd1").desc == taken
    assert primary.mirror().desc == f"Block device {NODE} is in use"
    assert primary.qmp.answer("blockdev-del", {"node-name": NODE}).desc == (
        f"Block device {NODE} is in use"
    )
    assert primary.take_out("children.2").desc == (
        f"Node '{DEVICE}' does not have child 'children.2'"
    )
    sizes = {
        each["node-name"]: each["image"]["virtual-size"]
        for each in primary.qmp.execute("query-named-block-nodes")
    }
    assert sizes[NODE] == sizes[DEVICE]
    assert sizes["nbd1"] == 0
    world.compare()
