"""replnbd: QEMU's COLO block replication as an NBD server of its own.

The rooms of this package, top to bottom; imports point down only (`lint-imports` keeps it so):

    cli           doors for people; each command is a thin client of control or daemon
    daemon        puts a configuration to work: nodes, exports, jobs, control, signals, shutdown
    control       QMP: wire, commands, events
    replication   stages, a standby's disks and a primary's, the link between them, the groups
    jobs          backup (copy-before-write), commit, mirror, verify: with status and progress
    server        NBD over asyncio: batches, exports, limits, listeners
    filters       nodes over one other node: copy-before-write, quorum, injected faults and delays
    qcow2         the image engine
    block         the one BlockNode interface; files, memory, other NBD servers; range lock
    nbd           the protocol without I/O
    events, errors

As a library: `Standby` runs a standby inside an asyncio program, `create_image` and `open_image`
work on disk images; see examples/.
"""

from replnbd.block import BlockNode, Extent, each_extent, read_bytes
from replnbd.daemon import DiskConfig, Standby, load_config, open_image
from replnbd.errors import (
    ConfigError,
    ControlError,
    ImageError,
    ImageUnsupportedError,
    ProtocolError,
    ReplnbdError,
    StateError,
)
from replnbd.qcow2 import create_image
from replnbd.version import __version__

__all__ = [
    "BlockNode",
    "ConfigError",
    "ControlError",
    "DiskConfig",
    "Extent",
    "ImageError",
    "ImageUnsupportedError",
    "ProtocolError",
    "ReplnbdError",
    "Standby",
    "StateError",
    "__version__",
    "create_image",
    "each_extent",
    "load_config",
    "open_image",
    "read_bytes",
]
