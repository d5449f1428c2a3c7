"""PrimaryQuorum: a disk in mode primary as the graph sees it: a quorum of two at most, the local
disk and one copy. The copy is a node that was added, while the disk's link is lent for it; or the
standby of the key `to`, which replication starts and stops."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import quote

from replnbd.block import parse_nbd_uri
from replnbd.control import InetServer, MirrorOptions, NbdNodeOptions
from replnbd.daemon.graph import AddedNode, QuorumDisk
from replnbd.errors import ConfigError, StateError
from replnbd.events import EventBus
from replnbd.jobs import Job
from replnbd.replication import LinkMirror, LinkState, MirrorTerms, PrimaryDisk, PrimaryGroup

REACH_S = 10.0
"""How long a new child may take to answer, and then to be in step, before the answer is given: that
it cannot be reached, or, well, that what it lacks is being copied."""

_LOCAL, _COPY = "children.0", "children.1"


class PrimaryQuorum(QuorumDisk):
    """Of `disk`, one of `group`."""

    def __init__(self, disk: PrimaryDisk, group: PrimaryGroup, bus: EventBus) -> None:
        self.name = disk.name
        self.size = disk.disk.size
        self._disk = disk
        self._link = disk.link
        self._group = group
        self._bus = bus
        self._reaching = False

    @property
    def standby(self) -> tuple[str, str] | None:
        """See `QuorumDisk`."""
        return None if self._disk.to is None else (self._link.own_node_name, self._disk.to)

    def children(self) -> list[tuple[str, str]]:
        """See `QuorumDisk`."""
        children = [(_LOCAL, self._disk.disk.name)]
        if self._link.state is not LinkState.OFF and self._link.mirror is None:
            children.append((_COPY, self._link.node_name))
        return children

    def reaches(self, node_name: str) -> bool:
        """See `QuorumDisk`."""
        up = self._link.state in (LinkState.SYNCING, LinkState.LIVE)
        return up and self._link.node_name == node_name

    def yank(self, node_name: str) -> None:
        """See `QuorumDisk`."""
        if self._link.node_name == node_name:
            self._link.yank()

    def hurry(self) -> None:
        """See `QuorumDisk`."""
        if self._reaching:
            self._link.yank()

    async def add_child(self, node: AddedNode) -> None:
        """See `QuorumDisk`. Returns when the child is in step, or what it lacks is being copied."""
        to = uri_of(node.options)
        async with self._group.between_commands():
            self._disk.lend()
        self._link.start_for(node.name, to)
        self._reaching = True
        try:
            await self._reach(node.options.open_timeout_s)
        except BaseException as exc:
            await self._end()
            if isinstance(exc, OSError):
                why = exc.strerror or str(exc)
                raise StateError(f"Node '{node.name}' cannot become a child: {why}") from exc
            raise
        finally:
            self._reaching = False

    async def remove_child(self, child: str) -> None:
        """See `QuorumDisk`."""
        assert child == _COPY
        if not self._disk.lent:
            raise StateError(
                f"Child '{child}' of node '{self.name}' is its standby, by the key 'to': it is"
                " xen-set-replication that stops it"
            )
        await self._end()

    async def mirror(self, target: AddedNode, options: MirrorOptions) -> Job:
        """See `QuorumDisk`."""
        if options.sync == "none":
            raise StateError("Sync mode 'none' not supported")
        to = uri_of(target.options)
        async with self._group.between_commands():
            self._disk.lend()
        terms = MirrorTerms(
            options.on_source_error,
            options.on_target_error,
            sync=options.copy_mode == "write-blocking",
            open_timeout_s=target.options.open_timeout_s,
            reconnect_delay_s=target.options.reconnect_delay_s,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        return LinkMirror(
            options.job_id, self._bus, self._link, target.name, to, terms, self._disk.take_back
        )

    # Section: inside

    async def _reach(self, open_timeout_s: float) -> None:
        """Until the child is in step, or is getting there. OSError: it cannot be reached."""
        link = self._link
        loop = asyncio.get_running_loop()
        patient_until = loop.time() + open_timeout_s
        try:
            async with asyncio.timeout(REACH_S + open_timeout_s):
                while link.state is not LinkState.LIVE:
                    await link.wait_changed()
                    tried = link.state is LinkState.CONNECTING and link.reason is not None
                    if link.state is LinkState.REFUSED or link.state is LinkState.OFF:
                        raise OSError(0, link.reason or "replication is at its end")
                    if tried and loop.time() >= patient_until:
                        raise OSError(0, link.reason)
        except TimeoutError:
            if link.state is not LinkState.SYNCING:
                raise OSError(0, link.reason or "the server does not answer") from None

    async def _end(self) -> None:
        await self._link.stop()
        self._disk.take_back()


def uri_of(options: NbdNodeOptions) -> str:
    """Where the node is. ConfigError if it cannot be anywhere."""
    server, export = options.server, quote(options.export, safe="")
    if not isinstance(server, InetServer):
        uri = f"nbd+unix:///{export}?socket={quote(server.path, safe='/')}"
    else:
        host = f"[{server.host}]" if ":" in server.host else server.host
        uri = f"nbd://{host}:{_port(server)}/{export}"
    parse_nbd_uri(uri)
    return uri


def _port(server: InetServer) -> int:
    if server.port.isdecimal():
        return int(server.port)
    try:
        return socket.getservbyname(server.port, "tcp")
    except (OSError, ValueError):
        raise ConfigError(
            f"address resolution failed for {server.host}:{server.port}:"
            " Servname not supported for ai_socktype"
        ) from None
