"""Backend: what the commands act on. The daemon implements it; control knows nothing else.

Laws for an implementation.
1. Methods run in the loop, and those of different clients run concurrently: a backend that must
   not be in the middle of two changes at once serialises them itself.
2. To refuse, raise a ReplnbdError: its text is the answer (StateError with QEMU's text where QEMU
   has one; ControlError to choose the error class too). An OSError is an answer as well. Anything
   else is a bug.
3. Results are JSON: dict, list, str, int, float, bool, None; finite floats.
4. Names and members are QMP's (`node-name`, `current-progress`).
"""

from __future__ import annotations

from typing import Any, Protocol

from replnbd.control.node_options import MirrorOptions, NbdNodeOptions
from replnbd.events import EventBus

JsonObject = dict[str, Any]


class Backend(Protocol):
    """A running replnbd, as seen from the control socket."""

    @property
    def events(self) -> EventBus:
        """Every event emitted here goes to every client, name and data as they are."""

    # Section: replication

    async def set_replication(
        self, enable: bool, primary: bool, failover: bool, target: str | None = None
    ) -> None:
        """`xen-set-replication`: start (`enable`), stop, or fail over (`failover`).

        `primary` tells which mode the caller believes this side to be in. `failover` is only
        ever true when `enable` is false, and only then there is a `target`: "standby" (what None
        means), "checkpoint" or "latest". Raises StateError with QEMU's texts: "Block replication
        is running or done", "The parameter mode's value is invalid, needs 1, but got 0", ...
        """

    def replication_error(self) -> str | None:
        """`query-xen-replication-status`: None, or why replication is not well:
        "Block replication is not running" or "I/O error occurred"."""

    async def checkpoint(self) -> None:
        """`xen-colo-do-checkpoint`: on all disks or on none. StateError."""

    async def reset(self, force: bool) -> None:
        """`x-replnbd-reset`: back to stage none with empty overlays and no fence.

        Without `force`, StateError that says what would be lost, if anything would.
        """

    def status(self) -> JsonObject:
        """`x-replnbd-status`: the answer, as it is."""

    async def replicate(self, to: str, device: str | None) -> None:
        """`x-replnbd-replicate`: disk `device` (None: the only one), which has taken over, is sent
        to the standby at the NBD URI `to` from now on. ConfigError, StateError."""

    async def demote(self) -> None:
        """`x-replnbd-demote`: a primary's disks become a standby's. StateError if they are."""

    async def verify(self) -> None:
        """`x-replnbd-verify`: begin to compare all disks with their standbys. StateError if there
        is no way to one, or it cannot be asked."""

    # Section: jobs

    def jobs(self) -> list[JsonObject]:
        """`query-jobs`: JobInfo objects: id, type, status, current-progress, total-progress,
        and error if the job failed."""

    def block_jobs(self) -> list[JsonObject]:
        """`query-block-jobs`: BlockJobInfo objects: type, device (the job's id), len, offset,
        busy, paused, speed, io-status, ready, status, auto-finalize, auto-dismiss, error?"""

    async def job_pause(self, job_id: str) -> None:
        """Pause a job that `jobs` lists; StateError "Job is already paused" and the like."""

    async def job_resume(self, job_id: str) -> None:
        """Let a paused job go on; StateError "Can't resume a job that was not paused"."""

    async def job_cancel(self, job_id: str, *, force: bool) -> None:
        """Tell a job that `jobs` lists to end without its work being done, and do not wait for
        that. Without `force`, one that is ready ends well. StateError if its status does not
        allow it, "The block job for device 'x' is currently paused" (without `force`)."""

    async def job_complete(self, job_id: str) -> None:
        """Tell a job that is ready to end well, and do not wait for that. StateError "Job 'x' in
        state 'running' cannot accept command verb 'complete'"; so with the next two."""

    async def job_finalize(self, job_id: str) -> None:
        """Let a job that is pending (it was made so that it waits for this) end."""

    async def job_dismiss(self, job_id: str) -> None:
        """Forget a job that is concluded: `jobs` lists it no longer."""

    async def set_speed(self, job_id: str, speed_bytes: int) -> None:
        """Limit a job that `jobs` lists to bytes per second; 0 is no limit, never negative."""

    # Section: nodes and exports

    def block_nodes(self) -> list[JsonObject]:
        """`query-named-block-nodes`: BlockDeviceInfo objects, of which replnbd has node-name,
        drv, ro, file, and image {filename, format, virtual-size, actual-size?, ...}."""

    def block_exports(self) -> list[JsonObject]:
        """`query-block-exports`: BlockExportInfo objects: id, type ("nbd"), node-name,
        shutting-down."""

    async def nbd_server_add(
        self, device: str, name: str, description: str | None, writable: bool
    ) -> None:
        """Export the node `device`, one that `block_nodes` lists, as `name`; the export's id is
        its name. ControlError "Block export id 'x' is already in use"."""

    async def nbd_server_remove(self, name: str, mode: str) -> None:
        """Remove an export that `block_exports` lists. `mode` is "safe" (ControlError
        "export 'x' still in use" while it has clients) or "hard" (they are cut off)."""

    async def nbd_server_stop(self) -> None:
        """Remove every export and stop listening; StateError "NBD server not running"."""

    # Section: the graph

    async def blockdev_add(self, options: NbdNodeOptions) -> None:
        """Add a node; `block_nodes` lists it from now on. Its name is new. Must not wait for the
        other server: who uses the node is told of what is wrong with it."""

    async def blockdev_del(self, node_name: str) -> None:
        """Remove a node that `block_nodes` lists: StateError "Block device x is in use", "Node x
        is not owned by the monitor" (it was not added)."""

    async def blockdev_mirror(self, options: MirrorOptions) -> None:
        """Start the job; device and target are different nodes that `block_nodes` lists.
        ControlError "Invalid job ID 'x'", "Job ID 'x' already in use", "Parameter 'speed' expects
        a non-negative value"; StateError if these nodes cannot be mirrored, or not now."""

    async def add_child(self, parent: str, node: str) -> None:
        """`x-blockdev-change`: give `parent` the child `node`; `block_nodes` lists both. May wait
        until it is known whether that can be reached: StateError or ConfigError if not.
        StateError "The node x does not support adding a child", "The node x already has a
        parent"."""

    async def remove_child(self, parent: str, child: str) -> None:
        """`x-blockdev-change`: take from `parent`, that `block_nodes` lists, its child of that
        name. StateError "Node 'x' does not have child 'children.7'", "The number of children
        cannot be lower than the vote threshold 1"."""

    def yankable(self) -> list[str]:
        """`query-yank`: names of the nodes that `yank` takes."""

    def yank(self, node_name: str) -> None:
        """Cut the node's connection now, whatever waits for it: that fails. It is not connected to
        again until it is used anew. Never waits."""

    # Section: the end

    async def quit(self) -> None:
        """Begin an orderly end of the daemon, and return: do not wait for the end, because the
        control server is closed on the way there. The SHUTDOWN event has been sent."""
