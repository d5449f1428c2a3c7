"""Graph: the nodes that were added by `blockdev-add`, and the disks whose children they become.

A node here is another server's export. It is made of nothing but its options until somebody
connects to it: that is `connect`'s business, in the background, because a server that is silent
must not keep the monitor waiting. A disk is a quorum as QEMU's with read-pattern=fifo and
vote-threshold=1: `children.0` is its own, the others are nodes that were added.

A node has one user at most: a disk, whose child it is, or a job, whose target it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from replnbd.control import MirrorOptions, NbdNodeOptions
from replnbd.daemon.describe import describe_remote
from replnbd.errors import ControlError, StateError
from replnbd.jobs import Job, JobRegistry, JobStatus

_ENDED = (JobStatus.CONCLUDED, JobStatus.NULL)


class RemoteNode(Protocol):
    """A client of the other server's export, that connects by itself."""

    size: int
    """In bytes; 0 until the other server has told it."""

    def yank(self) -> None:
        """Cut the connection now: what waits for it fails. Never waits."""

    async def close(self) -> None:
        """Hang up. Nobody uses the node any more."""


@dataclass
class AddedNode:
    """A node that was added, and the job whose target it is, or was last."""

    options: NbdNodeOptions
    remote: RemoteNode
    job: Job | None = None

    @property
    def name(self) -> str:
        """The node-name."""
        return self.options.node_name


class QuorumDisk(Protocol):
    """A disk that can be mirrored, and that writes to what is added to it, too."""

    name: str
    """By which commands mean it: QEMU's device and quorum node in one."""

    def children(self) -> list[tuple[str, str]]:
        """(child, node-name): "children.0" is the disk's own, and the others follow in the order
        in which they were added."""

    async def add_child(self, node: AddedNode) -> None:
        """Write to `node` from now on, too, as the last child. It has no other user."""

    async def remove_child(self, child: str) -> None:
        """Write to that child no more; it is one of `children`, and not the only one. When this
        returns, nothing of ours is in flight there."""

    def mirror(self, target: AddedNode, options: MirrorOptions) -> Job:
        """The job, not started. StateError if it cannot be. `target` has no other user."""


class Graph:
    """All of a daemon's."""

    def __init__(self, jobs: JobRegistry, connect: Callable[[NbdNodeOptions], RemoteNode]) -> None:
        """`connect` makes a node that connects by itself; it must not wait."""
        self._jobs = jobs
        self._connect = connect
        self._disks: dict[str, QuorumDisk] = {}
        self._added: dict[str, AddedNode] = {}
        self._changing = asyncio.Lock()

    def add_disk(self, disk: QuorumDisk) -> None:
        """Make a disk known. `query-named-block-nodes` has to list its name."""
        assert disk.name not in self._disks
        self._disks[disk.name] = disk

    def describe(self) -> list[dict[str, Any]]:
        """Members of the answer to `query-named-block-nodes`, for the nodes that were added."""
        return [describe_remote(node.options, node.remote.size) for node in self._added.values()]

    # Section: nodes

    def add(self, options: NbdNodeOptions) -> None:
        """`blockdev-add`; see `control.Backend`."""
        assert options.node_name not in self._added
        self._added[options.node_name] = AddedNode(options, self._connect(options))

    async def delete(self, node_name: str) -> None:
        """`blockdev-del`; see `control.Backend`."""
        async with self._changing:
            node = self._added.get(node_name)
            if node is None:
                raise StateError(f"Node {node_name} is not owned by the monitor")
            if self._in_use(node):
                raise StateError(f"Block device {node_name} is in use")
            del self._added[node_name]
        await node.remote.close()

    async def end_jobs(self) -> None:
        """For an orderly end: the mirrors stop where they are."""
        for node in self._added.values():
            job = node.job
            if job is not None and job.status not in _ENDED:
                job.cancel()
                await job.wait()

    async def close(self) -> None:
        """Let all nodes go. The jobs have ended, and the disks are closed."""
        while self._added:
            _, node = self._added.popitem()
            await node.remote.close()

    def _in_use(self, node: AddedNode) -> bool:
        if node.job is not None and node.job.status not in _ENDED:
            return True
        return any(
            name == node.name for disk in self._disks.values() for _, name in disk.children()
        )

    def yankable(self) -> list[str]:
        """`query-yank`; see `control.Backend`."""
        return list(self._added)

    def yank(self, node_name: str) -> None:
        """`yank`; see `control.Backend`."""
        self._added[node_name].remote.yank()

    # Section: what disks do with them

    async def mirror(self, options: MirrorOptions) -> None:
        """`blockdev-mirror`; see `control.Backend`."""
        async with self._changing:
            disk, target = self._disks.get(options.device), self._added.get(options.target)
            if disk is None:
                raise StateError("Need a root block node")
            if target is None:
                raise StateError(f"Node '{options.target}' was not added by blockdev-add")
            if self._in_use(target):
                raise StateError(f"Block device {target.name} is in use")
            self._jobs.check_new(options.job_id)
            if options.speed < 0:
                raise ControlError("Parameter 'speed' expects a non-negative value")
            job = disk.mirror(target, options)
            job.set_speed(options.speed)
            target.job = job
            self._jobs.add(job)
            job.start()

    async def add_child(self, parent: str, node_name: str) -> None:
        """`x-blockdev-change` with `node`; see `control.Backend`."""
        async with self._changing:
            disk, node = self._disks.get(parent), self._added.get(node_name)
            if disk is None:
                raise StateError(f"The node {parent} does not support adding a child")
            if node is None or self._in_use(node):
                # What was not added belongs to a disk.
                raise StateError(f"The node {node_name} already has a parent")
            await disk.add_child(node)

    async def remove_child(self, parent: str, child: str) -> None:
        """`x-blockdev-change` with `child`; see `control.Backend`."""
        async with self._changing:
            disk = self._disks.get(parent)
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


class NotConnected:
    """A node that nobody has a client for yet."""

    def __init__(self, options: NbdNodeOptions) -> None:
        self.options = options
        self.size = 0

    def yank(self) -> None:
        """Nothing to cut."""

    async def close(self) -> None:
        """Nothing to close."""
