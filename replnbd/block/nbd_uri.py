"""NBD URIs, as a client reads them: where a server is, and which of its exports is meant.

    nbd://HOST[:PORT]/EXPORT            TCP; PORT is 10809 if not given, HOST this host
    nbd+unix:///EXPORT?socket=PATH      a unix socket; %00 in front: an abstract one
    nbds://... nbds+unix://...          the same with TLS, or not at all

EXPORT is what follows the first "/", percent-encoded; nothing is the default export. Parameters of
TLS, as libnbd has them:

    tls-certificates=DIR    ca-cert.pem, which signs the server's certificate, and, if there,
                            client-cert.pem and client-key.pem; without DIR: the system's CAs
    tls-psk-file=FILE       lines USER:HEX-KEY; USER is the URI's (nbds://USER@HOST), or the login
    tls-hostname=NAME       what the server's certificate must be for, if not HOST. A server on a
                            unix socket has no name but this one
    tls-verify-peer=0       any certificate will do, and any attacker
    tls-type=x509|psk       says again which of the two it is

The source is doc/uri.md of the NBD project. nbd:// is clear text: to begin with TLS only if the
server has it would protect from nobody who can change what it says.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from replnbd.errors import ConfigError
from replnbd.nbd.constants import DEFAULT_PORT, NAME_BYTES_MAX

_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_UNIX_PATH_BYTES_MAX = 107  # sun_path, less the final zero byte
_BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True, slots=True)
class NbdTarget:
    """An export of a server. Either `path` is set, or `host`."""

    uri: str
    export: str = ""
    host: str | None = None
    port: int = DEFAULT_PORT
    path: str | None = None
    """Of a unix socket; one that begins with NUL is abstract."""
    tls: bool = False
    certificates: str | None = None
    """A directory."""
    psk_file: str | None = None
    user: str | None = None
    tls_hostname: str | None = None
    verify_peer: bool = True

    @property
    def peer_name(self) -> str | None:
        """What the server's certificate must be for; None if the server has no name."""
        return self.tls_hostname or self.host

    def __str__(self) -> str:
        return self.uri


def is_nbd_uri(text: str) -> bool:
    """Whether `text` is to be read as an NBD URI, and not as the path of a file."""
    return re.match(r"nbds?(\+unix)?://", text, re.IGNORECASE) is not None


def parse_nbd_uri(uri: str) -> NbdTarget:
    """Raises ConfigError, in one line that names the URI, for what we cannot connect to."""
    try:
        return _parse(uri)
    except (ValueError, ConfigError) as exc:
        raise ConfigError(f"not an NBD URI that can be used: {_shown(uri)}: {exc}") from None


def _parse(uri: str) -> NbdTarget:
    if not uri.isprintable() or " " in uri:  # urlsplit would leave some of that out
        raise ConfigError("spaces and control characters must be percent-encoded")
    parts = urlsplit(uri)
    if parts.scheme not in _SCHEMES:
        raise ConfigError("it must begin with nbd://, nbds://, nbd+unix:// or nbds+unix://")
    if not uri[len(parts.scheme) :].startswith("://"):
        raise ConfigError(f"behind '{parts.scheme}:' there must be two slashes")
    if parts.fragment or uri.endswith("#"):
        raise ConfigError("a fragment (#) means nothing; in a name it is %23")
    tls = parts.scheme.startswith("nbds")
    parameters = _parameters(parts.query)
    paths = parameters.pop("socket", None)
    host, port, path = None, DEFAULT_PORT, None
    if parts.scheme.endswith("+unix"):
        path = _socket_path(parts, paths)
    elif paths is not None:
        raise ConfigError("parameter 'socket' is for nbd+unix:// and nbds+unix://")
    else:
        host = parts.hostname or "localhost"
        port = DEFAULT_PORT if parts.port is None else parts.port
    if parts.password is not None:
        raise ConfigError("a password does not belong here")
    fields = _tls_fields(tls, parameters, unquote(parts.username or "") or None)
    return NbdTarget(uri, _export(parts.path), host, port, path, tls, **fields)  # type: ignore[arg-type]


def _export(path: str) -> str:
    name = _decoded(path[1:])
    if "\0" in name or len(name.encode()) > NAME_BYTES_MAX:
        raise ConfigError(f"an export's name has no NUL, and at most {NAME_BYTES_MAX} bytes")
    return name


def _socket_path(parts: SplitResult, path: str | None) -> str:
    if not path:
        raise ConfigError("it needs a socket: nbd+unix:///EXPORT?socket=PATH")
    if parts.hostname or ":" in parts.netloc:
        raise ConfigError("a unix socket has no host: nbd+unix:///EXPORT?socket=PATH")
    if "\0" in path[1:] or len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
        raise ConfigError(f"the socket's path is longer than {_UNIX_PATH_BYTES_MAX} bytes")
    return path


def _parameters(query: str) -> dict[str, str]:
    """Not by parse_qs, for which "+" is a space."""
    found: dict[str, str] = {}
    for item in query.split("&") if query else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"parameter {key!r} has no value")
        if key in found:
            raise ConfigError(f"parameter {key!r} is there twice")
        found[key] = _decoded(value)
    return found


def _tls_fields(tls: bool, parameters: dict[str, str], user: str | None) -> dict[str, object]:
    certificates = parameters.pop("tls-certificates", None)
    psk_file = parameters.pop("tls-psk-file", None)
    hostname = parameters.pop("tls-hostname", None)
    verify = parameters.pop("tls-verify-peer", None)
    kind = parameters.pop("tls-type", None)
    if parameters:
        raise ConfigError(f"unknown parameter {next(iter(parameters))!r}")
    given = (certificates, psk_file, hostname, verify, kind, user)
    if not tls and any(value is not None for value in given):
        raise ConfigError("a user and parameters of TLS are for nbds:// and nbds+unix://")
    if any(value is not None and (not value or "\0" in value) for value in given):
        raise ConfigError("a parameter of TLS is empty, or has a NUL")
    if certificates is not None and psk_file is not None:
        raise ConfigError("tls-certificates and tls-psk-file exclude each other")
    if kind is not None and kind != ("x509" if psk_file is None else "psk"):
        raise ConfigError("tls-type must be x509, or psk with tls-psk-file")
    if verify is not None and verify not in _BOOLEANS:
        raise ConfigError("tls-verify-peer must be 0 or 1")
    return {
        "certificates": certificates,
        "psk_file": psk_file,
        "user": user,
        "tls_hostname": hostname,
        "verify_peer": True if verify is None else _BOOLEANS[verify],
    }


def _decoded(text: str) -> str:
    return unquote(text, errors="strict")


def _shown(uri: str) -> str:
    return uri if uri.isprintable() else repr(uri)
