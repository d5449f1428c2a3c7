"""What status and queries tell of disks and nodes: plain JSON objects, made on demand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from replnbd.block import BlockNode, FileNode, NbdNode
from replnbd.control import InetServer, NbdNodeOptions
from replnbd.qcow2 import Qcow2Node
from replnbd.replication import History, Link, LinkState, PrimaryDisk, StandbyDisk
from replnbd.server import Export


def standby_status(disk: StandbyDisk, exports: Mapping[str, Export]) -> dict[str, Any]:
    """One member of "disks" in the answer to `x-replnbd-status`; sizes in bytes, time in
    seconds since the epoch."""
    job = disk.job
    return {
        "name": disk.name,
        "top-id": disk.top_id,
        "mode": disk.mode,
        "durability": disk.durability.value,
        "stage": disk.stage.value,
        "fenced": disk.promoted,
        "failover-target": disk.target.value if disk.promoted else None,
        "view-lost": disk.lost,
        "error": disk.error,
        "size": disk.secondary.size,
        "checkpoints": disk.checkpoint_count,
        "checkpoint-time": disk.checkpoint_time,
        "hidden-bytes": disk.hidden.allocated_bytes,
        "active-bytes": disk.active.allocated_bytes,
        "primary-bytes-written": disk.primary.bytes_written,
        "standby-bytes-written": disk.standby.bytes_written,
        "primary-connections": _connections(disk.primary, exports),
        "primary-connections-max": _connections_max(disk.primary, exports),
        "standby-connections": _connections(disk.standby, exports),
        "standby-connections-max": _connections_max(disk.standby, exports),
        "primary-errors": _errors(disk.primary, exports),
        "standby-errors": _errors(disk.standby, exports),
        "job": job.describe() if job is not None else None,
        "syncing": disk.peer.syncing,
        "refused": disk.peer.refused,
        "history": _history(disk.peer.history),
        "link": _link(disk.peer.link) if disk.peer.link is not None else None,
    }


def primary_status(disk: PrimaryDisk, exports: Mapping[str, Export]) -> dict[str, Any]:
    """The same of a disk in mode primary."""
    job = disk.job
    return {
        "name": disk.name,
        "mode": disk.mode,
        "stage": disk.stage.value,
        "error": disk.error,
        "size": disk.disk.size,
        "sync": disk.link.forwarder.sync,
        "connections": _connections(disk.node, exports),
        "connections-max": _connections_max(disk.node, exports),
        "errors": _errors(disk.node, exports),
        "bytes-written": disk.node.bytes_written,
        "job": job.describe() if job is not None else None,
        "refused": disk.refused,
        "history": _history(disk.history),
        "link": _link(disk.link),
    }


def _link(link: Link) -> dict[str, Any]:
    """The way to a disk's copy; sizes in bytes."""
    connection = link.forwarder.connection
    # What has fallen behind while it is LIVE is about to be copied.
    state = LinkState.SYNCING if link.catches_up else link.state
    return {
        "to": link.to,
        "node-name": link.node_name,
        "state": state.value,
        "reason": link.reason or link.silence,
        "behind-bytes": link.history.map.behind_bytes,
        "unproven-bytes": link.history.map.unproven_bytes,
        "queued-bytes": 0 if connection is None else connection.bytes_outstanding,
        "sent-bytes": link.forwarder.bytes_sent,
        "copied-bytes": link.bytes_copied,
        "verified": link.verified,
    }


def primary_nodes(disk: PrimaryDisk) -> list[BlockNode]:
    """The nodes of a disk: what the export holds, and the image."""
    return [disk.node, disk.disk]


def _history(history: History | None) -> dict[str, Any] | None:
    """Whose data a disk has."""
    if history is None:
        return None
    record = history.record
    return {
        "role": record.role.value,
        "generation": None if record.lineage is None else record.lineage.generation,
        "in-step-at": record.common,
        "pair": record.pair,
    }


def standby_nodes(disk: StandbyDisk) -> list[BlockNode]:
    """The nodes of a disk: what the two exports hold, then the three images."""
    return [disk.primary, disk.standby, disk.secondary, disk.hidden, disk.active]


def describe_node(node: BlockNode) -> dict[str, Any]:
    """A member of the answer to `query-named-block-nodes` (qapi/block-core.json,
    BlockDeviceInfo): what is fixed for every node of ours is there because clients demand it."""
    path, actual_size = _file_of(node)
    format_name = "raw" if isinstance(node, FileNode | NbdNode) else node.driver
    description = _block_device_info(node.name, format_name, path, node.size)
    if actual_size is not None:
        description["image"]["actual-size"] = actual_size
    description["backing_file_depth"] = _backing_depth(node)
    if isinstance(node, Qcow2Node) and node.header.backing_file is not None:
        description["backing_file"] = node.header.backing_file
    return description


def describe_remote(node_name: str, uri: str, size: int) -> dict[str, Any]:
    """The same of a node that is another server's export."""
    return _block_device_info(node_name, "nbd", uri, size)


def describe_added(options: NbdNodeOptions, size: int) -> dict[str, Any]:
    """The same of one that was added."""
    server = options.server
    if isinstance(server, InetServer):
        uri = f"nbd://{server.host}:{server.port}/{options.export}"
    else:
        uri = f"nbd+unix:///{options.export}?socket={server.path}"
    description = describe_remote(options.node_name, uri, size)
    return description | {"detect_zeroes": options.detect_zeroes}


def _block_device_info(node_name: str, driver: str, file: str, size: int) -> dict[str, Any]:
    description: dict[str, Any] = {
        "node-name": node_name,
        "drv": driver,
        "file": file,
        "ro": False,
        "encrypted": False,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": {"no-flush": False, "direct": False, "writeback": True},
        "image": {"filename": file, "format": driver, "virtual-size": size},
        "backing_file_depth": 0,
    }
    for limit in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"):
        description[limit] = 0  # no throttling
    return description


def _connections(node: BlockNode, exports: Mapping[str, Export]) -> int:
    return sum(len(export.connections) for export in exports.values() if export.node is node)


def _connections_max(node: BlockNode, exports: Mapping[str, Export]) -> int | None:
    """How many clients all exports of `node` take together; None: as many as come."""
    total = 0
    for export in exports.values():
        if export.node is node:
            if export.connections_max is None:
                return None
            total += export.connections_max
    return total


def _errors(node: BlockNode, exports: Mapping[str, Export]) -> int:
    """Requests that failed since the exports were added."""
    return sum(export.stats.errors for export in exports.values() if export.node is node)


def _file_of(node: BlockNode) -> tuple[str, int | None]:
    file = node.file if isinstance(node, Qcow2Node) else node
    path = getattr(file, "path", "")
    try:
        return path, os.stat(path).st_blocks * 512
    except OSError:
        return path, None


def _backing_depth(node: BlockNode) -> int:
    backing = getattr(node, "backing", None)
    return 0 if backing is None else 1 + _backing_depth(backing)
