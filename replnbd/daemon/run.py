"""Running a daemon as a process: logging, signals, the end."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import signal
import sys

import uvloop

from replnbd.daemon.activation import take_passed_sockets
from replnbd.daemon.config import Config, default_control
from replnbd.daemon.daemon import Daemon
from replnbd.daemon.notify import Notifier

log = logging.getLogger("replnbd")

_M_MMAP_THRESHOLD = -3  # malloc.h
_MMAP_THRESHOLD_BYTES = 128 << 10  # what glibc begins with


def set_up_logging(level: str) -> None:
    """One line per event on stderr: time, level, the room it came from, and the text."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def run(config: Config, *, start: bool = False) -> None:
    """Serve until SIGTERM, SIGINT or QMP `quit`; `start` replication at once if asked. Sockets
    that a service manager has passed are used, and it is told how we are.

    Raises ConfigError, ImageError or StateError if it cannot begin.
    """
    passed, notifier = take_passed_sockets(), Notifier.from_environment()
    control = config.server.control if passed.control is None else None
    if control is not None and control == default_control():
        # Nobody else makes the default's directory; one that was asked for must be there.
        os.makedirs(os.path.dirname(control), mode=0o700, exist_ok=True)
    _raise_descriptor_limit()
    _return_freed_memory()
    uvloop.run(_serve(Daemon(config, passed), start, notifier))


def _raise_descriptor_limit() -> None:
    """Clients are capped by the soft limit (1024 by tradition); the hard one is what is meant."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _return_freed_memory() -> None:
    """Let large buffers be the system's again once they are freed, whatever was freed before. glibc
    would raise their least size by and by, to 32 MiB, and its heap has holes then: clients with
    large requests left 70 MiB behind."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


async def _serve(daemon: Daemon, start: bool, notifier: Notifier) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _asked_to_end, daemon, number)
    await daemon.open(start=start)
    # What is there now stays: the collector need not walk it, 8 ms at a time, while clients wait.
    gc.collect()
    gc.freeze()
    try:
        status = f"NBD on {', '.join(daemon.server.uris)}, QMP on {daemon.control_path}"
        log.info("ready: %s", status)
        notifier.ready(status)
        await daemon.quit_requested.wait()
        log.info("ending: draining and flushing")
        notifier.stopping("draining and flushing")
    finally:
        await daemon.close()
        notifier.close()
    log.info("ended")


def _asked_to_end(daemon: Daemon, number: signal.Signals) -> None:
    if daemon.quit_requested.is_set():
        return
    log.info("%s received", number.name)
    daemon.events.emit("SHUTDOWN", guest=False, reason="host-signal")
    daemon.quit_requested.set()
