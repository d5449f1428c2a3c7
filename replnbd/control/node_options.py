"""What `blockdev-add` and `blockdev-mirror` are told, checked: for the backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InetServer:
    """Where a server listens on TCP. `port` may be the name of a service."""

    host: str
    port: str


@dataclass(frozen=True, slots=True)
class UnixServer:
    """Where a server listens on a unix socket."""

    path: str


@dataclass(frozen=True, slots=True)
class NbdNodeOptions:
    """A node that is another server's export (qapi/block-core.json, BlockdevOptionsNbd)."""

    node_name: str
    server: InetServer | UnixServer
    export: str = ""
    detect_zeroes: str = "off"
    """"off"; "on": writes of zeroes are sent as such; "unmap": they may also give space back."""
    reconnect_delay_s: int = 0
    """How long requests wait for a connection that is lost to come back; 0: they fail."""
    open_timeout_s: int = 0
    """How long to try to connect at first; 0: once."""


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """A job that copies a disk, and keeps the copy up to date until it is told to end."""

    job_id: str
    device: str
    target: str
    sync: str
    """"full": all of it; "none": what is written from now on. ("top" is "full" where the
    device has no backing.)"""
    speed: int = 0
    """Bytes per second; 0: no limit."""
    granularity: int | None = None
    """Bytes of the unit in which it keeps account of what is to be copied; None: its choice."""
    buf_size: int | None = None
    """Bytes in memory on their way; None: its choice."""
    on_source_error: str = "report"
    on_target_error: str = "report"
    """"report": the job fails; "ignore": it tries again later; "stop": it pauses; "enospc": as
    "stop" where the space is used up, else as "report"; "auto": its choice."""
    copy_mode: str = "background"
    """"background", or "write-blocking": a write is answered when the target has it too."""
    auto_finalize: bool = True
    auto_dismiss: bool = True
