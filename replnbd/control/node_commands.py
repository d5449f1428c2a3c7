"""The commands on the graph: nodes that are other servers' exports, mirrors to them, and who has
them for children. As QEMU's, of which replnbd has what an orchestrator of COLO uses; an argument
that would change nothing here is accepted, and one that could not be obeyed is "unexpected".

What needs the graph to be decided is the backend's to refuse.
"""

from __future__ import annotations

import re
from typing import Any

from replnbd.control.backend import Backend, JsonObject
from replnbd.control.node_options import (
    InetServer,
    MirrorOptions,
    NbdNodeOptions,
    UnixServer,
)
from replnbd.control.registry import Arguments, command, listed, union_command
from replnbd.control.schema import Argument, ListOf, Object, Union, Unsigned
from replnbd.errors import ControlError

# Section: blockdev-add, blockdev-del

_SERVER = Union(
    (Argument("type", str, choices=("inet", "unix", "vsock", "fd")),),
    "type",
    {
        "inet": (Argument("host", str), Argument("port", str)),
        "unix": (Argument("path", str),),
        "vsock": "replnbd connects by inet or unix, not by vsock",
        "fd": "replnbd connects by inet or unix, not by fd",
    },
)
_DRIVERS = (
    *("blkdebug", "blklogwrites", "blkreplay", "blkverify", "bochs", "cloop", "compress"),
    *("copy-before-write", "copy-on-read", "dmg", "file", "snapshot-access", "ftp", "ftps"),
    *("gluster", "host_cdrom", "host_device", "http", "https", "iscsi", "luks", "nbd", "nfs"),
    *("null-aio", "null-co", "nvme", "parallels", "preallocate", "qcow", "qcow2", "qed"),
    *("quorum", "raw", "rbd", "replication", "ssh", "throttle", "vdi", "vhdx", "vmdk", "vpc"),
    "vvfat",
)
"""QEMU's (qapi/block-core.json, BlockdevDriver)."""

_BLOCKDEV_OPTIONS = Union(
    (
        Argument("driver", str, choices=_DRIVERS),
        Argument("node-name", str, optional=True),
        Argument("discard", str, optional=True, choices=("ignore", "unmap")),
        Argument(
            "cache",
            Object(
                (
                    Argument("direct", bool, optional=True),
                    Argument("no-flush", bool, optional=True),
                )
            ),
            optional=True,
        ),
        Argument("read-only", bool, optional=True),
        Argument("auto-read-only", bool, optional=True),
        Argument("force-share", bool, optional=True),
        Argument("detect-zeroes", str, optional=True, choices=("off", "on", "unmap")),
    ),
    "driver",
    {
        **{name: f"replnbd adds nodes of driver nbd, not of {name}" for name in _DRIVERS},
        "nbd": (
            Argument("server", _SERVER),
            Argument("export", str, optional=True),
            Argument("tls-creds", str, optional=True),
            Argument("tls-hostname", str, optional=True),
            Argument("reconnect-delay", Unsigned(32), optional=True),
            Argument("open-timeout", Unsigned(32), optional=True),
        ),
    },
)

_WELL_FORMED = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]*")
_NODE_NAME_MAX = 31
_EXPORT_NAME_BYTES_MAX = 4096


@union_command("blockdev-add", _BLOCKDEV_OPTIONS)
async def blockdev_add(backend: Backend, arguments: Arguments) -> JsonObject:
    """Add a node that is another server's export. Answers at once: unlike QEMU's, it does not
    wait until that server has been reached."""
    name = _new_node_name(backend, arguments.get("node-name"))
    detect_zeroes = arguments.get("detect-zeroes", "off")
    if detect_zeroes == "unmap" and arguments.get("discard") != "unmap":
        raise ControlError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to"
            " unmap"
        )
    if arguments.get("force-share"):
        raise ControlError("force-share=on can only be used with read-only images")
    if arguments.get("read-only"):
        raise ControlError("replnbd adds nodes to write to them, not read-only ones")
    if "tls-creds" in arguments:
        raise ControlError(f"No TLS credentials with id '{arguments['tls-creds']}'")
    export = arguments.get("export", "")
    if len(export.encode()) > _EXPORT_NAME_BYTES_MAX:
        raise ControlError("export name too long to send to server")
    await backend.blockdev_add(
        NbdNodeOptions(
            name,
            _server(arguments["server"]),
            export,
            detect_zeroes=detect_zeroes,
            reconnect_delay_s=arguments.get("reconnect-delay", 0),
            open_timeout_s=arguments.get("open-timeout", 0),
        )
    )
    return {}


def _require_device(backend: Backend, name: str) -> None:
    if not listed(backend.block_nodes(), "node-name", name):
        raise ControlError(f"Cannot find device='{name}' nor node-name='{name}'")


def _new_node_name(backend: Backend, name: str | None) -> str:
    if name is None:
        raise ControlError("'node-name' must be specified for the root node")
    if not _WELL_FORMED.fullmatch(name):
        raise ControlError(f"Invalid node-name: '{name}'")
    if len(name) > _NODE_NAME_MAX:
        raise ControlError("Node name too long")
    if listed(backend.block_nodes(), "node-name", name):
        raise ControlError(f"Duplicate nodes with node-name='{name}'")
    return name


def _server(given: dict[str, Any]) -> InetServer | UnixServer:
    if given["type"] == "inet":
        return InetServer(given["host"], given["port"])
    return UnixServer(given["path"])


@command("blockdev-del", Argument("node-name", str))
async def blockdev_del(backend: Backend, arguments: Arguments) -> JsonObject:
    """Remove a node that was added, and that nobody uses."""
    name = arguments["node-name"]
    if not listed(backend.block_nodes(), "node-name", name):
        raise ControlError(f"Failed to find node with node-name='{name}'")
    await backend.blockdev_del(name)
    return {}


# Section: blockdev-mirror

_ON_ERROR = ("report", "ignore", "enospc", "stop", "auto")
_GRANULARITY_MIN, _GRANULARITY_MAX = 512, 64 << 20


@command(
    "blockdev-mirror",
    Argument("job-id", str, optional=True),
    Argument("device", str),
    Argument("target", str),
    Argument("sync", str, choices=("top", "full", "none", "incremental", "bitmap")),
    Argument("speed", int, optional=True),
    Argument("granularity", Unsigned(32), optional=True),
    Argument("buf-size", int, optional=True),
    Argument("on-source-error", str, optional=True, choices=_ON_ERROR),
    Argument("on-target-error", str, optional=True, choices=_ON_ERROR),
    Argument("filter-node-name", str, optional=True),
    Argument("copy-mode", str, optional=True, choices=("background", "write-blocking")),
    Argument("auto-finalize", bool, optional=True),
    Argument("auto-dismiss", bool, optional=True),
)
async def blockdev_mirror(backend: Backend, arguments: Arguments) -> JsonObject:
    """Begin to copy a disk to a node that was added. The job's id is `job-id`, or else the
    device's name."""
    device, target, sync = arguments["device"], arguments["target"], arguments["sync"]
    for name in (device, target):
        _require_device(backend, name)
    granularity = arguments.get("granularity", 0)
    if granularity and not _GRANULARITY_MIN <= granularity <= _GRANULARITY_MAX:
        raise ControlError("Parameter 'granularity' expects a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise ControlError("Parameter 'granularity' expects a power of 2")
    if sync in ("incremental", "bitmap"):
        raise ControlError(f"Sync mode '{sync}' not supported")
    if arguments.get("buf-size", 0) < 0:
        raise ControlError("Invalid parameter 'buf-size'")
    if device == target:
        raise ControlError("Can't mirror node into itself")
    await backend.blockdev_mirror(
        MirrorOptions(
            str(arguments.get("job-id", device)),
            device,
            target,
            "full" if sync == "top" else sync,
            speed=arguments.get("speed", 0),
            granularity=granularity or None,
            buf_size=arguments.get("buf-size") or None,
            on_source_error=arguments.get("on-source-error", "report"),
            on_target_error=arguments.get("on-target-error", "report"),
            copy_mode=arguments.get("copy-mode", "background"),
            auto_finalize=arguments.get("auto-finalize", True),
            auto_dismiss=arguments.get("auto-dismiss", True),
        )
    )
    return {}


# Section: children


@command(
    "x-blockdev-change",
    Argument("parent", str),
    Argument("child", str, optional=True),
    Argument("node", str, optional=True),
)
async def x_blockdev_change(backend: Backend, arguments: Arguments) -> JsonObject:
    """Give a quorum another child (`node`), or take one away (`child`)."""
    parent, child, node = arguments["parent"], arguments.get("child"), arguments.get("node")
    _require_device(backend, parent)
    if child is not None and node is not None:
        raise ControlError("The parameters child and node are in conflict")
    if child is not None:
        await backend.remove_child(parent, child)
    elif node is None:
        raise ControlError("Either child or node must be specified")
    elif not listed(backend.block_nodes(), "node-name", node):
        raise ControlError(f"Node '{node}' not found")
    else:
        await backend.add_child(parent, node)
    return {}


# Section: yank

_INSTANCE = Union(
    (Argument("type", str, choices=("block-node", "chardev", "migration")),),
    "type",
    {
        "block-node": (Argument("node-name", str),),
        "chardev": (Argument("id", str),),
        "migration": (),
    },
)


@command("query-yank", oob=True)
async def query_yank(backend: Backend, arguments: Arguments) -> list[JsonObject]:
    """What can be yanked: nodes with a connection."""
    return [{"type": "block-node", "node-name": name} for name in backend.yankable()]


@command("yank", Argument("instances", ListOf(_INSTANCE)), oob=True)
async def yank(backend: Backend, arguments: Arguments) -> JsonObject:
    """Cut connections whose other end does not answer, all of them or none."""
    names = []
    known = backend.yankable()
    for instance in arguments["instances"]:
        name = instance.get("node-name")
        if name not in known:
            raise ControlError("Instance not found", "DeviceNotFound")
        names.append(name)
    for name in names:
        backend.yank(name)
    return {}
