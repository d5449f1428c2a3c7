"""The commands: name -> arguments and handler. Names, arguments and texts are QEMU's (qapi/),
but for those that begin with x-replnbd.

A handler gets the backend and the checked arguments, and returns the JSON value of `return`.
What a client may be refused for whatever the backend, is refused here: a job, node or export
that is not there.
"""

from __future__ import annotations

import re

from replnbd.control import job_commands as job_commands
from replnbd.control import node_commands as node_commands
from replnbd.control.backend import Backend, JsonObject
from replnbd.control.registry import COMMANDS, Arguments, command, listed
from replnbd.control.schema import Argument, ListOf
from replnbd.errors import ControlError
from replnbd.version import __version__

# Section: about this server


def version() -> JsonObject:
    """VersionInfo, for the greeting and `query-version`.

    The member `qemu` is the shape clients know; its numbers are replnbd's own, and `package`
    says so. A client that asks for a QEMU of some age finds one too old, rather than features
    that are not there.
    """
    numbers = [int(digits) for digits in re.findall(r"\d+", __version__)]
    major, minor, micro = (*numbers, 0, 0, 0)[:3]
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"replnbd {__version__}",
    }


@command("query-version")
async def query_version(backend: Backend, arguments: Arguments) -> JsonObject:
    """VersionInfo: replnbd's version in the shape of QEMU's; see `version`."""
    return version()


@command("query-commands")
async def query_commands(backend: Backend, arguments: Arguments) -> list[JsonObject]:
    """The names of all commands."""
    return [{"name": name} for name in COMMANDS]


@command("qmp_capabilities", Argument("enable", ListOf(str), optional=True, choices=("oob",)))
async def qmp_capabilities(backend: Backend, arguments: Arguments) -> JsonObject:
    """A second negotiation, which is refused: the session itself answers the first."""
    raise ControlError(
        "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
    )


@command("quit")
async def quit_(backend: Backend, arguments: Arguments) -> JsonObject:
    """Begin the orderly end of the daemon. The event comes before the reply, as from QEMU."""
    backend.events.emit("SHUTDOWN", guest=False, reason="host-qmp-quit")
    await backend.quit()
    return {}


# Section: replication


@command(
    "xen-set-replication",
    Argument("enable", bool),
    Argument("primary", bool),
    Argument("failover", bool, optional=True),
    Argument("x-replnbd-to", str, optional=True, choices=("standby", "checkpoint", "latest")),
)
async def xen_set_replication(backend: Backend, arguments: Arguments) -> JsonObject:
    """Start replication, stop it, or (`failover`) make the standby's view the disk; or, with
    `x-replnbd-to`, the last checkpoint alone, or what the primary wrote last."""
    enable, failover = arguments["enable"], arguments.get("failover", False)
    if enable and "failover" in arguments:
        raise ControlError("Parameter 'failover' is only for stopping replication")
    target = arguments.get("x-replnbd-to")
    if target is not None and not failover:
        raise ControlError("Parameter 'x-replnbd-to' is only for a failover")
    await backend.set_replication(enable, arguments["primary"], failover, target)
    return {}


@command("query-xen-replication-status")
async def query_xen_replication_status(backend: Backend, arguments: Arguments) -> JsonObject:
    """Whether replication has an error, and which."""
    error = backend.replication_error()
    return {"error": False} if error is None else {"error": True, "desc": error}


@command("xen-colo-do-checkpoint")
async def xen_colo_do_checkpoint(backend: Backend, arguments: Arguments) -> JsonObject:
    """Move the standby's view on to now, on all disks."""
    await backend.checkpoint()
    return {}


@command("x-replnbd-reset", Argument("force", bool, optional=True))
async def x_replnbd_reset(backend: Backend, arguments: Arguments) -> JsonObject:
    """Make stopped or failed-over disks ready for replication; `force`: whatever is lost."""
    await backend.reset(arguments.get("force", False))
    return {}


@command("x-replnbd-replicate", Argument("to", str), Argument("device", str, optional=True))
async def x_replnbd_replicate(backend: Backend, arguments: Arguments) -> JsonObject:
    """After a failover: send the disk, and what is written to it, to a standby at the NBD URI `to`,
    for good. `device`: which disk, if there are several."""
    await backend.replicate(arguments["to"], arguments.get("device"))
    return {}


@command("x-replnbd-demote")
async def x_replnbd_demote(backend: Backend, arguments: Arguments) -> JsonObject:
    """Make a primary's disks those of a standby, for good: for the peer that has taken over."""
    await backend.demote()
    return {}


@command("x-replnbd-verify")
async def x_replnbd_verify(backend: Backend, arguments: Arguments) -> JsonObject:
    """Compare all disks with their standbys, by digests, in a job verify-NAME each."""
    await backend.verify()
    return {}


@command("x-replnbd-status")
async def x_replnbd_status(backend: Backend, arguments: Arguments) -> JsonObject:
    """All that is known of every disk."""
    return backend.status()


# Section: nodes and exports


@command("query-named-block-nodes", Argument("flat", bool, optional=True))
async def query_named_block_nodes(backend: Backend, arguments: Arguments) -> list[JsonObject]:
    """BlockDeviceInfo of every node.

    `flat` would leave out what is said of backing chains; there is nothing of that here.
    """
    return backend.block_nodes()


@command("query-block-exports")
async def query_block_exports(backend: Backend, arguments: Arguments) -> list[JsonObject]:
    """BlockExportInfo of every export."""
    return backend.block_exports()


@command(
    "nbd-server-add",
    Argument("name", str, optional=True),
    Argument("description", str, optional=True),
    Argument("device", str),
    Argument("writable", bool, optional=True),
    Argument("bitmap", str, optional=True),
)
async def nbd_server_add(backend: Backend, arguments: Arguments) -> JsonObject:
    """Export a node under `name`, or else its own name; read-only unless `writable`.

    No node here has bitmaps, so each is "not found".
    """
    device: str = arguments["device"]
    if not listed(backend.block_nodes(), "node-name", device):
        raise ControlError(f"Cannot find device='{device}' nor node-name='{device}'")
    if "bitmap" in arguments:
        raise ControlError(f"Bitmap '{arguments['bitmap']}' is not found")
    await backend.nbd_server_add(
        device,
        arguments.get("name", device),
        arguments.get("description"),
        arguments.get("writable", False),
    )
    return {}


@command(
    "nbd-server-remove",
    Argument("name", str),
    Argument("mode", str, optional=True, choices=("safe", "hard")),
)
async def nbd_server_remove(backend: Backend, arguments: Arguments) -> JsonObject:
    """Remove an export: "safe" fails while it has clients, "hard" cuts them off."""
    name = arguments["name"]
    if not listed(backend.block_exports(), "id", name):
        raise ControlError(f"Export '{name}' is not found")
    await backend.nbd_server_remove(name, arguments.get("mode", "safe"))
    return {}


@command("nbd-server-stop")
async def nbd_server_stop(backend: Backend, arguments: Arguments) -> JsonObject:
    """Remove every export and stop listening for NBD clients."""
    await backend.nbd_server_stop()
    return {}


QUERIES = frozenset(name for name in COMMANDS if name.startswith("query-")) | {"x-replnbd-status"}
"""Commands that change nothing: polled, so not worth a line in the log."""
