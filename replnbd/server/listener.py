"""Where the server listens: NBD URIs, and the sockets bound to them.

    nbd://HOST[:PORT][/]            TCP; PORT is 10809 if not given, 0 for any free one
    nbd+unix:///?socket=PATH        a unix socket
    nbds://... nbds+unix://...      the same, and clients must use TLS
    nbd://HOST?tls=on               clients may use TLS; also "off" (the default) and "require"

The scheme follows the NBD project's doc/uri.md; an export name in it makes no sense for a
listener, because all exports are on all listeners. A socket that somebody else has bound and
listens on (a service manager) is as good as one of ours.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from replnbd.errors import ConfigError
from replnbd.nbd import TlsMode
from replnbd.nbd.constants import DEFAULT_PORT

BACKLOG = 512
_UNIX_PATH_BYTES_MAX = 107  # sun_path, less the final zero byte


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and port to listen on; a host name may stand for several addresses."""

    host: str
    port: int
    tls: TlsMode = TlsMode.OFF


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a unix socket."""

    path: str
    tls: TlsMode = TlsMode.OFF


@dataclass(slots=True)
class BoundSocket:
    """A listening socket, the URI that leads to it, what its clients get of TLS, and what it left
    in the file system."""

    sock: socket.socket
    uri: str
    tls: TlsMode = TlsMode.OFF
    path: str | None = None
    inode: tuple[int, int] | None = None

    def unlink(self) -> None:
        """Remove the unix socket's file, if it is still ours."""
        if self.path is None:
            return
        try:
            if _inode(self.path) == self.inode:
                os.unlink(self.path)
        except OSError:
            pass  # somebody else removed it: as good


def parse_listen_uri(uri: str) -> TcpAddress | UnixAddress:
    """Raises ConfigError, naming the URI, for everything we cannot listen on."""
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"cannot listen on {uri}: {exc}") from exc
    if parts.scheme not in ("nbd", "nbd+unix", "nbds", "nbds+unix"):
        raise ConfigError(
            f"cannot listen on {uri}: not an NBD URI (nbd://HOST:PORT or nbd+unix:///?socket=PATH)"
        )
    if parts.path not in ("", "/"):
        raise ConfigError(f"cannot listen on {uri}: an export name does not belong here")
    if parts.username is not None or parts.fragment:
        raise ConfigError(f"cannot listen on {uri}: user name or fragment do not belong here")
    try:
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError as exc:
        raise ConfigError(f"cannot listen on {uri}: {exc}") from exc
    tls = _tls_mode(uri, parts.scheme, query.pop("tls", []))
    if parts.scheme in ("nbd", "nbds"):
        if query:
            raise ConfigError(f"cannot listen on {uri}: unknown parameter {next(iter(query))!r}")
        port = DEFAULT_PORT if port is None else port
        return TcpAddress(parts.hostname or "localhost", port, tls)
    return _unix_address(uri, parts.netloc, query, tls)


def _tls_mode(uri: str, scheme: str, values: list[str]) -> TlsMode:
    if scheme.startswith("nbds"):
        if values not in ([], ["require"]):
            raise ConfigError(f"cannot listen on {uri}: nbds demands TLS")
        return TlsMode.REQUIRE
    try:
        (value,) = values or ["off"]
        return TlsMode(value)
    except ValueError:
        raise ConfigError(f"cannot listen on {uri}: tls must be off, on or require") from None


def _unix_address(uri: str, netloc: str, query: dict[str, list[str]], tls: TlsMode) -> UnixAddress:
    paths = query.pop("socket", [])
    if netloc or len(paths) != 1 or query:
        raise ConfigError(f"cannot listen on {uri}: it must read nbd+unix:///?socket=PATH")
    path = paths[0]
    if "\0" in path or len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            f"cannot listen on {uri}: the path is longer than {_UNIX_PATH_BYTES_MAX} bytes"
        )
    return UnixAddress(path, tls)


async def bind_uri(uri: str, *, socket_mode: int | None = None) -> list[BoundSocket]:
    """Bind and listen; a host name gives a socket for each of its addresses. `socket_mode`: of a
    unix socket's file; None leaves it to the umask.

    Raises ConfigError, naming the URI: bad URI, port or path in use, no permission, no such host.
    """
    address = parse_listen_uri(uri)
    try:
        if isinstance(address, UnixAddress):
            return [_bind_unix(uri, address, socket_mode)]
        return await _bind_tcp(address)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {uri}: {_reason(exc)}") from exc


def adopt(sock: socket.socket, tls: TlsMode = TlsMode.OFF) -> BoundSocket:
    """A socket that listens already; the file of a unix socket stays its owner's."""
    scheme = "nbds" if tls is TlsMode.REQUIRE else "nbd"
    if sock.family == socket.AF_UNIX:
        path = os.fsdecode(sock.getsockname())
        uri = f"{scheme}+unix:///?socket={quote(path, safe='/')}"
        return BoundSocket(sock, f"{uri}&tls=on" if tls is TlsMode.ON else uri, tls)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if sock.family == socket.AF_INET6 else host
    uri = f"{scheme}://{shown}:{port}"
    return BoundSocket(sock, f"{uri}?tls=on" if tls is TlsMode.ON else uri, tls)


async def _bind_tcp(address: TcpAddress) -> list[BoundSocket]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound: list[BoundSocket] = []
    port = address.port
    unusable: OSError | None = None
    try:
        for family, kind, protocol, _, sockaddr in dict.fromkeys(found):
            try:
                sock = _listening_socket(family, kind, protocol, (sockaddr[0], port, *sockaddr[2:]))
            except OSError as exc:
                # "localhost" is ::1 too, on hosts that have no IPv6: the others will do.
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                unusable = exc
                continue
            port = sock.getsockname()[1]  # port 0: the same free port on every address
            bound.append(adopt(sock, address.tls))
        if not bound:
            raise unusable or OSError(errno.EADDRNOTAVAIL, "the host has no address")
    except BaseException:
        for listener in bound:
            listener.sock.close()
        raise
    return bound


def _listening_socket(
    family: int, kind: int, protocol: int, sockaddr: tuple[object, ...]
) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(uri: str, address: UnixAddress, mode: int | None) -> BoundSocket:
    path = address.path
    _remove_stale(uri, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        if mode is not None:
            os.chmod(path, mode)  # nobody can connect before listen()
        sock.listen(BACKLOG)
        sock.setblocking(False)
        bound = adopt(sock, address.tls)
        bound.path, bound.inode = os.path.abspath(path), _inode(path)
        return bound
    except BaseException:
        sock.close()
        raise


def _remove_stale(uri: str, path: str) -> None:
    """Unlink a socket that a dead process left; never one in use, never another file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot listen on {uri}: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener whose backlog is full must not stop us here
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass
    raise ConfigError(f"cannot listen on {uri}: another process listens on {path}")


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _reason(exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "the address is in use by another process"
    return exc.strerror or str(exc)
