"""Daemon: a configuration put to work. It owns everything, and is what QMP commands act on."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from functools import partial
from typing import Any

from replnbd.block import BlockNode
from replnbd.control import ControlServer
from replnbd.daemon.activation import PassedSockets
from replnbd.daemon.config import Config, DiskConfig, TlsConfig
from replnbd.daemon.describe import describe_node, disk_nodes, disk_status
from replnbd.daemon.images import open_disk
from replnbd.daemon.recovery import (
    Past,
    check_size,
    open_past,
    set_aside_lost,
    stamp_files,
    sync_names,
)
from replnbd.errors import ConfigError, ControlError, StateError
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import (
    FailoverTarget,
    Group,
    Stage,
    StandbyDisk,
    primary_changes,
    standby_changes,
)
from replnbd.server import Export, NbdServer, Tls, TlsFiles, parse_listen_uri
from replnbd.version import __version__

log = logging.getLogger(__name__)

CHECKPOINT_BITMAP = "checkpoint"
"""Clients ask for it as the metadata context qemu:dirty-bitmap:checkpoint."""

CLOSE_TIMEOUT_S = 3.0
"""How long clients get to take their last replies; what is then left of 5 s flushes the disks."""


class Daemon:
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
        self.server = NbdServer(
            self.events,
            tls=_credentials(config.tls),
            default_export=config.server.default_export or config.disk[0].name,
            listener_connections_max=config.server.max_connections,
            idle_timeout_s=config.server.idle_timeout,
            write_timeout_s=config.server.write_timeout,
        )
        self.group = Group(())
        self._past: Past | None = None
        self.quit_requested = asyncio.Event()
        """Set by `quit`: whoever runs the daemon then closes it."""
        self._control: ControlServer | None = None
        self._opened = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, *, start: bool = False) -> None:
        """Open the disks and go on where the last process was; then listen; then `start`
        replication if asked, unless it runs. ConfigError, ImageError or StateError says what is
        wrong, and then nothing is open and no file has changed."""
        created: list[str] = []
        try:
            self._past = await open_past(self.config.disk)
            self.group = Group((), self._past.journal)  # which closes the journal, come what may
            await sync_names(self._past, self.config.disk)
            await set_aside_lost(self._past, self.config.disk)
            try:
                await self._past.begin()
            except OSError as exc:
                raise ConfigError(f"cannot write {self._past.path}: {exc.strerror}") from exc
            await self._open_disks(self._past, created)
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
    def control_path(self) -> str | None:
        """Where QMP is spoken."""
        return None if self._control is None else self._control.path

    async def close(self) -> None:
        """An orderly end: clients are let go, jobs stopped, everything is flushed and closed.
        OSError, naming the disk, if one could not be flushed; all is closed even then."""
        if self._control is not None:
            self._control.refuse_changes("replnbd is shutting down")
        await self.server.close(timeout_s=CLOSE_TIMEOUT_S)
        for task in tuple(self._tasks):
            await asyncio.wait([task])
        try:
            await self._close_disks()
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
            await self._settle()
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
            "generation": self.group.generation,
            "recovered-from": self._past.end if self._past is not None else None,
            "suspended": self.group.keeper.suspended,
            "disks": [disk_status(disk, self.server.exports) for disk in self.group.disks],
        }

    # Section: jobs (Backend)

    def jobs(self) -> list[dict[str, Any]]:
        """`query-jobs`; see `control.Backend`."""
        return [job.describe() for job in self.jobs_registry]

    def block_jobs(self) -> list[dict[str, Any]]:
        """`query-block-jobs`; see `control.Backend`."""
        return [job.describe_block_job() for job in self.jobs_registry]

    async def job_pause(self, job_id: str) -> None:
        """`job-pause`; see `control.Backend`."""
        self.jobs_registry.get(job_id).pause()

    async def job_resume(self, job_id: str) -> None:
        """`job-resume`; see `control.Backend`."""
        self.jobs_registry.get(job_id).resume()

    async def job_cancel(self, job_id: str) -> None:
        """`job-cancel`; see `control.Backend`."""
        self.jobs_registry.get(job_id).cancel()

    async def set_speed(self, job_id: str, speed_bytes: int) -> None:
        """`block-job-set-speed`; see `control.Backend`."""
        self.jobs_registry.get(job_id).set_speed(speed_bytes)

    # Section: nodes and exports (Backend)

    def block_nodes(self) -> list[dict[str, Any]]:
        """`query-named-block-nodes`; see `control.Backend`."""
        return [describe_node(node) for disk in self.group.disks for node in disk_nodes(disk)]

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
        ]

    async def nbd_server_add(
        self, device: str, name: str, description: str | None, writable: bool
    ) -> None:
        """`nbd-server-add`; see `control.Backend`."""
        self._require_listening()
        # The images below the gates belong to their disk: written from outside they would break
        # the view, and read from outside they would not be coherent.
        nodes = {n.name: n for disk in self.group.disks for n in (disk.primary, disk.standby)}
        node = nodes.get(device)
        if node is None:
            raise ControlError(f"Cannot find device='{device}' nor node-name='{device}'")
        if name in self.server.exports:
            raise ControlError(f"Block export id '{name}' is already in use")
        self.server.add_export(self._new_export(name, node, description or "", writable=writable))
        for disk in self.group.disks:
            if disk.promoted and node is disk.primary:
                await self.server.fence(name, disk.fence_reason)

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

    async def _open_disks(self, past: Past, created: list[str]) -> None:
        disks: list[StandbyDisk] = []
        try:
            for config in self.config.disk:
                disk = await open_disk(
                    config,
                    self.events,
                    self.jobs_registry,
                    created,
                    past.end,
                )
                disks.append(disk)
                check_size(past, config, disk.secondary.size)
        finally:
            self.group = Group(disks, past.journal, boot=past.boot, make_journal=past.make_journal)
        for config, disk in zip(self.config.disk, disks, strict=True):
            self._export_disk(config, disk)
        try:
            await self.group.open(past.record)
        except OSError as exc:
            raise StateError(f"cannot go on where the last process was: {exc.strerror}") from exc
        await self._settle()
        self._opened = True
        if past.record is not None:
            stages = ", ".join(f"'{disk.name}' {disk.stage.value}" for disk in disks)
            log.info("recovered from %s: %s", past.end, stages)

    async def _close_disks(self) -> None:
        """With what the next process needs to know that all is in order."""
        try:
            in_order = False
            try:
                await self.group.close()
                in_order = True
            finally:
                await self._record_end(in_order=in_order)
        finally:
            await self.group.keeper.close()

    async def _record_end(self, *, in_order: bool) -> None:
        try:
            if self._opened:
                await self.group.keeper.end(
                    await stamp_files(self.config.disk) if in_order else None
                )
            elif in_order and self._past is not None:
                await self._past.give_up(self.config.disk)
        except OSError as exc:
            # The next process then looks at it as if this one had died.
            log.warning("cannot record the orderly end: %s", exc.strerror)

    def _export_disk(self, config: DiskConfig, disk: StandbyDisk) -> None:
        disk.on_fence = self._fence
        disk.on_unfence = self._unfence
        for name, node, description, most in (
            (
                disk.name,
                disk.primary,
                f"secondary disk of {disk.name}: the primary writes here",
                config.max_connections,
            ),
            (
                disk.top_id,
                disk.standby,
                f"the standby's view of {disk.name}",
                config.top_max_connections,
            ),
        ):
            self.server.add_export(self._new_export(name, node, description, connections_max=most))

    def _new_export(
        self,
        name: str,
        node: BlockNode,
        description: str,
        *,
        writable: bool = True,
        connections_max: int | None = None,
    ) -> Export:
        """An export of a gate, whatever it is called: with the bitmap and the allow-list of it."""
        for disk, config in zip(self.group.disks, self.config.disk, strict=True):
            if node is disk.primary:
                changes, allow = partial(primary_changes, disk), config.allow
            elif node is disk.standby:
                changes, allow = partial(standby_changes, disk), config.top_allow
            else:
                continue
            return Export(
                name,
                node,
                description,
                writable,
                bitmaps={CHECKPOINT_BITMAP: changes},
                with_digests=node is disk.primary,
                allow=allow,
                connections_max=connections_max,
            )
        raise AssertionError(f"{node.name} is not a node to export")

    def _fence(self, disk: StandbyDisk) -> None:
        # Called while the disk is drained; closing the connections waits for their requests,
        # which wait for the drain: so it goes on beside, and `_settle` waits for it.
        for name in self._exports_of(disk.primary):
            self._spawn(self.server.fence(name, disk.fence_reason))

    def _unfence(self, disk: StandbyDisk) -> None:
        for name in self._exports_of(disk.primary):
            self.server.unfence(name)

    def _exports_of(self, node: BlockNode) -> list[str]:
        return [name for name, export in self.server.exports.items() if export.node is node]

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self) -> None:
        for task in tuple(self._tasks):
            await task

    def _require_listening(self) -> None:
        if not self.server.uris:
            raise StateError("NBD server not running")


def _credentials(config: TlsConfig | None) -> Tls | None:
    if config is None:
        return None
    return Tls(TlsFiles(config.certificate, config.key, config.client_ca, config.psk))
