"""Daemon: a configuration put to work. It owns everything, and is what QMP commands act on."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from replnbd.control import ControlServer
from replnbd.daemon.activation import PassedSockets
from replnbd.daemon.config import Config, TlsConfig
from replnbd.daemon.demotion import begins_as_standby, demoted
from replnbd.daemon.describe import describe_node
from replnbd.daemon.graph import Graph, GraphControl
from replnbd.daemon.job_control import JobControl
from replnbd.daemon.primary_side import PrimarySide
from replnbd.daemon.side import Services, Side
from replnbd.daemon.standby_side import StandbySide
from replnbd.errors import ControlError, StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import FailoverTarget, Group, PrimaryGroup, Stage
from replnbd.server import NbdServer, Tls, TlsFiles, parse_listen_uri
from replnbd.version import __version__

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0
"""How long clients get to take their last replies; what is then left of 5 s flushes the disks."""


class Daemon(JobControl, GraphControl):
    """A running replnbd: `async with Daemon(config) as daemon`, or `open` and `close`.

    Implements `replnbd.control.Backend`; library users drive it by the same methods, or by
    `group`.
    """

    def __init__(self, config: Config, passed: PassedSockets | None = None) -> None:
        """`passed`: sockets to serve on instead of those of the configuration.

        Raises ConfigError if the credentials of its table [tls] cannot be used."""
        self.config = config
        self._passed = passed or PassedSockets()
        self.events = EventBus()
        self.jobs_registry = JobRegistry()
        self.graph = Graph(self.jobs_registry, lambda: self.side.quorums())
        self.server = NbdServer(
            self.events,
            tls=_credentials(config.tls),
            default_export=config.server.default_export or config.disk[0].name,
            listener_connections_max=config.server.max_connections,
            idle_timeout_s=config.server.idle_timeout,
            write_timeout_s=config.server.write_timeout,
        )
        self._services = Services(self.server, self.events, self.jobs_registry)
        self.side: Side = StandbySide(config.disk, self._services)
        """What of replication this daemon is; once it is open, see `demote`."""
        self.quit_requested = asyncio.Event()
        """Set by `quit`: whoever runs the daemon then closes it."""
        self._control: ControlServer | None = None

    async def open(self, *, start: bool = False) -> None:
        """Open the disks and go on where the last process was; then listen; then `start`
        replication if asked, unless it runs. ConfigError, ImageError or StateError says what is
        wrong, and then nothing is open and no file has changed."""
        created: list[str] = []
        try:
            self.side = await self._new_side()
            await self.side.open(created)
            await self._listen()
            if start and any(disk.stage is not Stage.RUNNING for disk in self.group.disks):
                await self.group.start()
        except BaseException:
            try:
                await self.close()
            finally:
                for path in created:
                    os.unlink(path)
            raise

    @property
    def group(self) -> Group | PrimaryGroup:
        """What commands act on."""
        return self.side.group

    @property
    def standby_group(self) -> Group:
        """The same, of a daemon whose disks are in mode secondary."""
        group = self.side.group
        assert isinstance(group, Group)
        return group

    @property
    def control_path(self) -> str | None:
        """Where QMP is spoken."""
        return None if self._control is None else self._control.path

    async def close(self) -> None:
        """An orderly end: clients are let go, jobs stopped, everything is flushed and closed.
        OSError, naming the disk, if one could not be flushed; all is closed even then."""
        if self._control is not None:
            self._control.refuse_changes("replnbd is shutting down")
        await self.server.close(timeout_s=CLOSE_TIMEOUT_S)
        try:
            async with self.graph.at_rest():
                await self.side.close()
        finally:
            if self._control is not None:
                await self._control.close()
                self._control = None

    async def __aenter__(self) -> Daemon:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Section: replication (Backend)

    async def set_replication(
        self, enable: bool, primary: bool, failover: bool, target: str | None = None
    ) -> None:
        """`xen-set-replication`; see `control.Backend`."""
        if enable:
            await self.group.start("primary" if primary else "secondary")
        elif failover:
            await self.group.failover(None if target is None else FailoverTarget(target))
            # When the answer is given, no stale primary is connected any more.
            await self.side.settle()
        else:
            await self.group.stop()

    def replication_error(self) -> str | None:
        """`query-xen-replication-status`; see `control.Backend`."""
        return self.group.error()

    async def checkpoint(self) -> None:
        """`xen-colo-do-checkpoint`; see `control.Backend`."""
        await self.group.checkpoint()

    async def reset(self, force: bool) -> None:
        """`x-replnbd-reset`; see `control.Backend`."""
        await self.group.reset(force=force)

    def status(self) -> dict[str, Any]:
        """`x-replnbd-status`: all that is to be known, per disk."""
        return {
            "version": __version__,
            "listen": list(self.server.uris),
            "role": self.group.mode,
            **self.side.status(),
        }

    async def replicate(self, to: str, device: str | None) -> None:
        """`x-replnbd-replicate`; see `control.Backend`."""
        await self.side.replicate(to, device)

    async def verify(self) -> None:
        """`x-replnbd-verify`; see `control.Backend`."""
        self.side.verify()

    async def demote(self) -> None:
        """`x-replnbd-demote`; see `control.Backend`."""
        side = self.side
        if not isinstance(side, PrimarySide):
            raise StateError("this is a standby already")
        async with self.graph.at_rest():
            await side.demote()
            for name in tuple(self.server.exports):
                await self.server.remove_export(name, "hard")
            await side.close()
            self.side = await self._new_side()
            await self.side.open([])

    # Section: nodes and exports (Backend)

    def block_nodes(self) -> list[dict[str, Any]]:
        """`query-named-block-nodes`; see `control.Backend`."""
        return [describe_node(node) for node in self.side.nodes()] + self.graph.describe()

    def block_exports(self) -> list[dict[str, Any]]:
        """`query-block-exports`; see `control.Backend`."""
        return [
            {
                "id": export.name,
                "type": "nbd",
                "node-name": export.node.name,
                "shutting-down": export.refusal is not None,
            }
            for export in self.server.exports.values()
            if export.listed
        ]

    async def nbd_server_add(
        self, device: str, name: str, description: str | None, writable: bool
    ) -> None:
        """`nbd-server-add`; see `control.Backend`."""
        self._require_listening()
        export = self.side.new_export(name, device, description or "", writable=writable)
        if export is None:
            raise ControlError(f"Cannot find device='{device}' nor node-name='{device}'")
        if name in self.server.exports:
            raise ControlError(f"Block export id '{name}' is already in use")
        self.server.add_export(export)

    async def nbd_server_remove(self, name: str, mode: str) -> None:
        """`nbd-server-remove`; see `control.Backend`."""
        self._require_listening()
        await self.server.remove_export(name, "hard" if mode == "hard" else "safe")

    async def nbd_server_stop(self) -> None:
        """`nbd-server-stop`; see `control.Backend`."""
        self._require_listening()
        await self.server.close(timeout_s=CLOSE_TIMEOUT_S)
        for name in tuple(self.server.exports):
            await self.server.remove_export(name, "hard")

    async def quit(self) -> None:
        """`quit`; see `control.Backend`."""
        self.quit_requested.set()

    # Section: inside

    async def _listen(self) -> None:
        control, passed = self.config.server.control, self._passed
        if passed.control is not None:
            control = os.fsdecode(passed.control.getsockname())
        if control is not None:
            self._control = ControlServer(self, control, passed.control)
            await self._control.start()
        for sock in passed.nbd:
            # With TLS as the first of the addresses that they take the place of.
            tls = parse_listen_uri(self.config.server.listen[0]).tls
            await self.server.listen_on(sock, tls)
        if passed.nbd:
            log.info("[server] key 'listen' is not used: sockets were passed to us")
            return
        for uri in self.config.server.listen:
            await self.server.listen(uri, socket_mode=self.config.server.socket_mode_bits)

    async def _new_side(self) -> Side:
        """A disk that has been demoted stays a standby's, whatever the configuration says."""
        disks = self.config.disk
        if self.config.mode == "secondary":
            return StandbySide(disks, self._services)
        if await begins_as_standby(disks):
            log.warning("the disks were demoted: they are a standby's, until they take over")
            return StandbySide([demoted(disk) for disk in disks], self._services)
        return PrimarySide(disks, self._services)

    def _require_listening(self) -> None:
        if not self.server.uris:
            raise StateError("NBD server not running")


def _credentials(config: TlsConfig | None) -> Tls | None:
    if config is None:
        return None
    return Tls(TlsFiles(config.certificate, config.key, config.client_ca, config.psk))
