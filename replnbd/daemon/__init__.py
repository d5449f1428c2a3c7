"""The daemon: a configuration put to work.

    config.py     the TOML file, checked whole before anything is opened
    images.py     from a path and a format to a node, from a [[disk]] table to a disk
    histories.py  where a disk's history is, and how it is opened and made
    daemon.py     Daemon: disks, exports, control; what QMP commands act on
    side.py, primary_side.py, standby_side.py    which side of replication it is; demotion.py
    graph.py      nodes that were added, and whose children they become
    describe.py   what status and queries tell
    standby.py    Standby: the same as a library, inside another program
    run.py        as a process: logging, signals, an orderly end
    activation.py, notify.py    what a service manager gives us, and what it is told

Laws. Nothing is changed on disk before all of the configuration has been found good. What was
opened is closed in the opposite order: clients first, then jobs, then the images, flushed.
"""

from replnbd.daemon.config import (
    Config,
    DiskConfig,
    ServerConfig,
    TlsConfig,
    check_config,
    load_config,
)
from replnbd.daemon.daemon import Daemon
from replnbd.daemon.images import open_image
from replnbd.daemon.run import run, set_up_logging
from replnbd.daemon.standby import Standby

__all__ = [
    "Config",
    "Daemon",
    "DiskConfig",
    "ServerConfig",
    "Standby",
    "TlsConfig",
    "check_config",
    "load_config",
    "open_image",
    "run",
    "set_up_logging",
]
