"""Socket activation: sockets that a service manager has bound for us (sd_listen_fds(3)).

It passes LISTEN_FDS sockets as the descriptors from 3 on to the process LISTEN_PID; what each is
called is in LISTEN_FDNAMES, with colons between. One called "control" is the QMP socket, all others
are for NBD clients. libnbd and nbdkit's tools start a server in the same way, with one socket.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from replnbd.errors import ConfigError

CONTROL_NAME = "control"
_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@dataclass(frozen=True, slots=True)
class PassedSockets:
    """Listening sockets that are open already, to be used in place of configured ones."""

    nbd: tuple[socket.socket, ...] = ()
    control: socket.socket | None = None


def take_passed_sockets(environ: MutableMapping[str, str] = os.environ) -> PassedSockets:
    """The sockets that were passed to this process. The variables are gone afterwards: they are
    meant for nobody whom we might start.

    Raises ConfigError, in one line, for a descriptor that nobody can listen on.
    """
    values = {name: environ.pop(name, "") for name in _VARIABLES}
    if values["LISTEN_PID"] != str(os.getpid()):
        return PassedSockets()
    if not values["LISTEN_FDS"].isdecimal():
        raise ConfigError(f"LISTEN_FDS is no number: '{values['LISTEN_FDS']}'")
    count = int(values["LISTEN_FDS"])
    names = values["LISTEN_FDNAMES"].split(":")
    nbd: list[socket.socket] = []
    control: socket.socket | None = None
    for index in range(count):
        name = names[index] if index < len(names) else ""
        sock = _listening(_FIRST_DESCRIPTOR + index, name)
        if name != CONTROL_NAME:
            nbd.append(sock)
        elif control is not None:
            raise ConfigError(f"LISTEN_FDNAMES: more than one socket is called '{CONTROL_NAME}'")
        else:
            control = sock
    return PassedSockets(tuple(nbd), control)


def _listening(descriptor: int, name: str) -> socket.socket:
    """The socket that was passed as `descriptor`, after a look at what it is."""
    where = f"LISTEN_FDS: descriptor {descriptor} ('{name}')"
    families = [socket.AF_UNIX]
    if name != CONTROL_NAME:
        families += [socket.AF_INET, socket.AF_INET6]
    try:
        sock = socket.socket(fileno=descriptor)
        if sock.family not in families:
            wanted = "a unix socket" if name == CONTROL_NAME else "a unix or TCP socket"
            raise ConfigError(f"{where} is not {wanted}")
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            raise ConfigError(f"{where} is not a stream socket that listens (Accept=no)")
    except OSError as exc:
        raise ConfigError(f"{where} cannot be used: {exc.strerror}") from exc
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock
