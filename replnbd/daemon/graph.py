"""Graph: the nodes that were added by `blockdev-add`, and the disks whose children they become.

A node here is another server's export. It is made of nothing but its options: whoever uses it
connects. A disk is a quorum as QEMU's with read-pattern=fifo and vote-threshold=1: `children.0` is
its own, the others are nodes that were added, or that it has by its configuration.

A node has one user at most: a disk, whose child it is, or a job, whose target it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from replnbd.control import MirrorOptions, NbdNodeOptions
from replnbd.daemon.describe import describe_added, describe_remote
from replnbd.errors import ControlError, StateError
from replnbd.jobs import Job, JobRegistry, JobStatus

_ENDED = (JobStatus.CONCLUDED, JobStatus.NULL)


@dataclass
class AddedNode:
    """A node that was added, and the job whose target it is, or was last."""

    options: NbdNodeOptions
    job: Job | None = None

    @property
    def name(self) -> str:
        """The node-name."""
        return self.options.node_name


class QuorumDisk(Protocol):
    """A disk that can be mirrored, and that writes to what is added to it, too."""

    name: str
    """By which commands mean it: QEMU's device and quorum node in one."""
    size: int
    """In bytes."""

    @property
    def standby(self) -> tuple[str, str] | None:
        """(node-name, URI) of the node that it has by its configuration, if it has one. At times
        that is a child, and nobody else's ever."""

    def children(self) -> list[tuple[str, str]]:
        """(child, node-name): "children.0" is the disk's own, and the others follow in the order
        in which they were added."""

    def reaches(self, node_name: str) -> bool:
        """Whether there is a connection to that node, whose size is this disk's then."""

    def yank(self, node_name: str) -> None:
        """Cut the connection to that node now, if there is one: what waits for it fails, and it is
        not tried again. Never waits."""

    def hurry(self) -> None:
        """Whatever waits for a child to be reached, is told that it cannot be."""

    async def add_child(self, node: AddedNode) -> None:
        """Write to `node` from now on, too, as the last child. It has no other user. ConfigError,
        StateError if that cannot be, as nobody can be reached there."""

    async def remove_child(self, child: str) -> None:
        """Write to that child no more; it is one of `children`, and not the only one. When this
        returns, nothing of ours is in flight there. StateError if it has to stay."""

    async def mirror(self, target: AddedNode, options: MirrorOptions) -> Job:
        """The job, which is to be started. ConfigError, StateError if it cannot be. `target` has
        no other user."""


class Graph:
    """All of a daemon's."""

    def __init__(self, jobs: JobRegistry, disks: Callable[[], Iterable[QuorumDisk]]) -> None:
        """`disks()` are those of now; `query-named-block-nodes` has to list their names."""
        self._jobs = jobs
        self._disks = disks
        self._added: dict[str, AddedNode] = {}
        self._changing = asyncio.Lock()

    def describe(self) -> list[dict[str, Any]]:
        """Members of the answer to `query-named-block-nodes`, for nodes that are elsewhere."""
        standbys = [disk.standby for disk in self._disks()]
        return [
            describe_remote(*standby, self._size_of(standby[0])) for standby in standbys if standby
        ] + [
            describe_added(node.options, self._size_of(node.name)) for node in self._added.values()
        ]

    def _size_of(self, node_name: str) -> int:
        """0: nobody knows yet."""
        return max((disk.size for disk in self._disks() if disk.reaches(node_name)), default=0)

    def _disk(self, name: str) -> QuorumDisk | None:
        return next((disk for disk in self._disks() if disk.name == name), None)

    # Section: nodes

    def add(self, options: NbdNodeOptions) -> None:
        """`blockdev-add`; see `control.Backend`."""
        assert options.node_name not in self._added
        self._added[options.node_name] = AddedNode(options)

    async def delete(self, node_name: str) -> None:
        """`blockdev-del`; see `control.Backend`."""
        async with self._changing:
            node = self._added.get(node_name)
            if node is None:
                raise StateError(f"Node {node_name} is not owned by the monitor")
            if self._in_use(node):
                raise StateError(f"Block device {node_name} is in use")
            del self._added[node_name]

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """The disks are to be closed: the mirrors stop where they are, and while this is held
        nothing is begun. The nodes that were added stay."""
        for disk in self._disks():
            disk.hurry()
        async with self._changing:
            for node in self._added.values():
                job = node.job
                if job is not None and job.status not in _ENDED:
                    job.give_up()
                    await job.wait()
            yield

    def _in_use(self, node: AddedNode) -> bool:
        if node.job is not None and node.job.status not in _ENDED:
            return True
        return any(name == node.name for disk in self._disks() for _, name in disk.children())

    def yankable(self) -> list[str]:
        """`query-yank`; see `control.Backend`."""
        return [disk.standby[0] for disk in self._disks() if disk.standby] + list(self._added)

    def yank(self, node_name: str) -> None:
        """`yank`; see `control.Backend`."""
        for disk in self._disks():
            disk.yank(node_name)

    # Section: what disks do with them

    async def mirror(self, options: MirrorOptions) -> None:
        """`blockdev-mirror`; see `control.Backend`."""
        async with self._changing:
            disk, target = self._disk(options.device), self._added.get(options.target)
            if disk is None:
                raise StateError("Need a root block node")
            if target is None:
                raise StateError(f"Node '{options.target}' was not added by blockdev-add")
            if self._in_use(target):
                raise StateError(f"Block device {target.name} is in use")
            self._jobs.check_new(options.job_id)
            if options.speed < 0:
                raise ControlError("Parameter 'speed' expects a non-negative value")
            job = await disk.mirror(target, options)
            job.set_speed(options.speed)
            target.job = job
            self._jobs.add(job)
            job.start()

    async def add_child(self, parent: str, node_name: str) -> None:
        """`x-blockdev-change` with `node`; see `control.Backend`."""
        async with self._changing:
            disk, node = self._disk(parent), self._added.get(node_name)
            if disk is None:
                raise StateError(f"The node {parent} does not support adding a child")
            if node is None or self._in_use(node):
                # What was not added belongs to a disk.
                raise StateError(f"The node {node_name} already has a parent")
            await disk.add_child(node)

    async def remove_child(self, parent: str, child: str) -> None:
        """`x-blockdev-change` with `child`; see `control.Backend`."""
        async with self._changing:
            disk = self._disk(parent)
            children = [] if disk is None else [name for name, _ in disk.children()]
            if disk is None or child not in children:
                raise StateError(f"Node '{parent}' does not have child '{child}'")
            if len(children) == 1:
                raise StateError("The number of children cannot be lower than the vote threshold 1")
            if child == children[0]:
                raise StateError(f"Node '{parent}' cannot do without its own disk, '{child}'")
            await disk.remove_child(child)


class GraphControl:
    """The graph's part of `control.Backend`."""

    graph: Graph

    async def blockdev_add(self, options: NbdNodeOptions) -> None:
        """`blockdev-add`; see `control.Backend`."""
        self.graph.add(options)

    async def blockdev_del(self, node_name: str) -> None:
        """`blockdev-del`; see `control.Backend`."""
        await self.graph.delete(node_name)

    async def blockdev_mirror(self, options: MirrorOptions) -> None:
        """`blockdev-mirror`; see `control.Backend`."""
        await self.graph.mirror(options)

    async def add_child(self, parent: str, node: str) -> None:
        """`x-blockdev-change`; see `control.Backend`."""
        await self.graph.add_child(parent, node)

    async def remove_child(self, parent: str, child: str) -> None:
        """`x-blockdev-change`; see `control.Backend`."""
        await self.graph.remove_child(parent, child)

    def yankable(self) -> list[str]:
        """`query-yank`; see `control.Backend`."""
        return self.graph.yankable()

    def yank(self, node_name: str) -> None:
        """`yank`; see `control.Backend`."""
        self.graph.yank(node_name)
