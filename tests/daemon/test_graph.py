"""The graph: nodes that were added, disks that take them for children or mirror to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from daemon_support import Setup

from replnbd.control import InetServer, MirrorOptions, NbdNodeOptions
from replnbd.daemon.graph import AddedNode, Graph
from replnbd.errors import ReplnbdError
from replnbd.events import EventBus
from replnbd.jobs import Job, JobRegistry


class FakeMirror(Job):
    """Is ready at once, and stays so until told to end."""

    type = "mirror"

    async def run(self) -> None:
        await self.become_ready()
        while not await self.told_to_end(idle=True):
            pass

    def on_end(self) -> None:
        return


class FakeDisk:
    """A quorum of nothing."""

    def __init__(self, bus: EventBus) -> None:
        self.name = "vm0"
        self.size = 1 << 20
        self.standby: tuple[str, str] | None = None
        self.bus = bus
        self.done: list[str] = []
        self.added: list[tuple[str, AddedNode]] = []
        self.busy: asyncio.Event | None = None

    def children(self) -> list[tuple[str, str]]:
        own = ("children.0", "vm0-local")
        return [own, *((child, node.name) for child, node in self.added)]

    async def add_child(self, node: AddedNode) -> None:
        if self.busy is not None:
            await self.busy.wait()
        self.added.append((f"children.{len(self.added) + 1}", node))

    async def remove_child(self, child: str) -> None:
        self.added = [each for each in self.added if each[0] != child]

    def reaches(self, node_name: str) -> bool:
        return node_name in dict(self.children()).values()

    def yank(self, node_name: str) -> None:
        self.done.append(f"yank {node_name}")

    def hurry(self) -> None:
        if self.busy is not None:
            self.busy.set()

    async def mirror(self, target: AddedNode, options: MirrorOptions) -> Job:
        return FakeMirror(options.job_id, self.bus, auto_dismiss=options.auto_dismiss)


class World:
    """A graph with one disk, and two nodes that were added."""

    def __init__(self) -> None:
        self.jobs = JobRegistry()
        self.disk = FakeDisk(EventBus())
        self.graph = Graph(self.jobs, lambda: [self.disk])
        for name in ("nbd0", "nbd1"):
            self.graph.add(NbdNodeOptions(name, InetServer("h", "1"), "colo0"))

    async def mirror(self, target: str = "nbd0", device: str = "vm0", **options: Any) -> None:
        job_id = options.pop("job_id", "resync")
        await self.graph.mirror(MirrorOptions(job_id, device, target, "full", **options))

    @property
    def children(self) -> list[str]:
        return [node for _, node in self.disk.children()[1:]]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    async with world.graph.at_rest():
        pass


async def test_a_resync_and_then_a_child(world: World) -> None:
    await world.mirror(auto_dismiss=False)
    job = world.jobs.get("resync")
    while job.status != "ready":
        await asyncio.sleep(0)
    with pytest.raises(ReplnbdError, match=r"^The node nbd0 already has a parent$"):
        await world.graph.add_child("vm0", "nbd0")
    job.cancel(force=False)
    await job.wait()
    await world.graph.add_child("vm0", "nbd0")  # dismissed or not
    job.dismiss()
    assert world.children == ["nbd0"]
    for refused in (world.graph.delete("nbd0"), world.mirror()):
        with pytest.raises(ReplnbdError, match=r"^Block device nbd0 is in use$"):
            await refused
    await world.graph.remove_child("vm0", "children.1")
    await world.graph.delete("nbd0")
    assert world.graph.yankable() == ["nbd1"]


@pytest.mark.parametrize(
    ("parent", "node", "text"),
    [
        ("nbd1", "nbd0", "The node nbd1 does not support adding a child"),
        ("vm0-local", "nbd0", "The node vm0-local does not support adding a child"),
        ("vm0", "vm0-local", "The node vm0-local already has a parent"),
        ("vm0", "nbd0", "The node nbd0 already has a parent"),
    ],
)
async def test_a_child_that_cannot_be_is_refused(
    world: World, parent: str, node: str, text: str
) -> None:
    await world.graph.add_child("vm0", "nbd0")
    with pytest.raises(ReplnbdError, match=f"^{text}$"):
        await world.graph.add_child(parent, node)
    assert world.children == ["nbd0"]


@pytest.mark.parametrize(
    ("parent", "child", "text"),
    [
        ("vm0", "children.7", "Node 'vm0' does not have child 'children.7'"),
        ("nbd0", "children.0", "Node 'nbd0' does not have child 'children.0'"),
        ("vm0", "children.0", "The number of children cannot be lower than the vote threshold 1"),
    ],
)
async def test_a_child_that_is_not_there_or_is_the_only_one_stays(
    world: World, parent: str, child: str, text: str
) -> None:
    with pytest.raises(ReplnbdError, match=f"^{text}$"):
        await world.graph.remove_child(parent, child)


async def test_a_disk_keeps_its_own_child_whatever_others_there_are(world: World) -> None:
    await world.graph.add_child("vm0", "nbd0")
    with pytest.raises(ReplnbdError, match=r"cannot do without its own disk, 'children.0'$"):
        await world.graph.remove_child("vm0", "children.0")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "nbd1"}, "Need a root block node"),
        ({"target": "vm0-local"}, "Node 'vm0-local' was not added by blockdev-add"),
        ({"job_id": ""}, "Invalid job ID ''"),
        ({"job_id": "commit-d"}, "Job ID 'commit-d' already in use"),
        ({"job_id": "taken"}, "Job ID 'taken' already in use"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ],
)
async def test_a_mirror_that_cannot_be_is_refused(
    world: World, options: dict[str, Any], text: str
) -> None:
    await world.mirror("nbd1", job_id="taken")
    with pytest.raises(ReplnbdError, match=f"^{text}$"):
        await world.mirror(**options)
    assert [job.id for job in world.jobs] == ["taken"]


async def test_changes_wait_for_each_other_and_yank_for_none(world: World) -> None:
    world.disk.busy = asyncio.Event()
    adding = asyncio.create_task(world.graph.add_child("vm0", "nbd0"))
    await asyncio.sleep(0)
    deleting = asyncio.create_task(world.graph.delete("nbd0"))
    await asyncio.sleep(0)
    world.graph.yank("nbd0")
    assert world.disk.done == ["yank nbd0"]
    world.disk.busy.set()
    await adding
    with pytest.raises(ReplnbdError, match=r"^Block device nbd0 is in use$"):
        await deleting


async def test_only_what_was_added_can_be_removed(world: World) -> None:
    with pytest.raises(ReplnbdError, match=r"^Node vm0-local is not owned by the monitor$"):
        await world.graph.delete("vm0-local")


async def test_at_rest_mirrors_have_been_cancelled_and_nothing_begins(world: World) -> None:
    await world.mirror()
    job = world.jobs.get("resync")
    world.disk.busy = asyncio.Event()
    async with world.graph.at_rest():
        assert job.status == "null"
        adding = asyncio.create_task(world.graph.add_child("vm0", "nbd0"))
        await asyncio.sleep(0)
        assert world.children == []
    world.disk.busy.set()
    await adding
    assert world.children == ["nbd0"]


async def test_who_waits_for_a_child_does_not_keep_the_end_waiting(world: World) -> None:
    world.disk.busy = asyncio.Event()
    adding = asyncio.create_task(world.graph.add_child("vm0", "nbd0"))
    await asyncio.sleep(0)
    async with world.graph.at_rest():
        await adding


async def test_nodes_of_the_configuration_are_listed_with_those_that_were_added(
    world: World,
) -> None:
    world.disk.standby = ("vm0-remote", "nbd://standby/colo0")
    await world.graph.add_child("vm0", "nbd1")
    sizes = {each["node-name"]: each["image"]["virtual-size"] for each in world.graph.describe()}
    assert sizes == {"vm0-remote": 0, "nbd0": 0, "nbd1": 1 << 20}
    assert world.graph.yankable() == ["vm0-remote", "nbd0", "nbd1"]


@pytest.mark.interop
@pytest.mark.slow
def test_a_daemon_adds_nodes_without_waiting_for_their_servers(setup: Setup) -> None:
    with setup.serve() as running:
        qmp = running.qmp
        server = {"type": "inet", "host": "192.0.2.1", "port": "10809"}  # nobody answers there
        node = {"driver": "nbd", "node-name": "nbd0", "server": server, "export": "colo0"}
        qmp.execute("blockdev-add", {**node, "detect-zeroes": "on"})
        nodes = {each["node-name"]: each for each in qmp.execute("query-named-block-nodes")}
        assert nodes["nbd0"]["drv"] == "nbd"
        assert nodes["nbd0"]["file"] == "nbd://192.0.2.1:10809/colo0"
        assert nodes["nbd0"]["detect_zeroes"] == "on"
        assert nodes["nbd0"].keys() == nodes["d"].keys()
        assert qmp.execute("query-yank") == [{"type": "block-node", "node-name": "nbd0"}]
        qmp.execute("yank", {"instances": [{"type": "block-node", "node-name": "nbd0"}]})
        for command, arguments, desc in (
            ("blockdev-add", node, "Duplicate nodes with node-name='nbd0'"),
            (
                "blockdev-mirror",
                {"device": "d", "target": "nbd0", "sync": "full"},
                "Need a root block node",
            ),
            (
                "x-blockdev-change",
                {"parent": "d", "node": "nbd0"},
                "The node d does not support adding a child",
            ),
            ("blockdev-del", {"node-name": "d"}, "Node d is not owned by the monitor"),
        ):
            answer = qmp.answer(command, arguments)
            assert (answer.error_class, answer.desc) == ("GenericError", desc)
        qmp.execute("blockdev-del", {"node-name": "nbd0"})
        names = [each["node-name"] for each in qmp.execute("query-named-block-nodes")]
        assert "nbd0" not in names
