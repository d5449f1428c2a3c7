"""What tests of TLS share: certificates, a daemon that wants them, and clients that have them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from interop_support import TIMEOUT_S, run
from peers import Authority, Credentials, ReplnbdDaemon, ReplnbdDisk, wait_until

NAME, TOP = "colo0", "top0"
SIZE = (1 << 20) + 3 * 512
HOST = "localhost"
KEYS = "keys.psk"
"""As QEMU calls it."""


class Pki:
    """Two authorities: ours, and a stranger. Of all that clients may have, a folder each, as libnbd
    and QEMU want it."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.stranger = Authority(folder / "ours"), Authority(folder / "theirs")
        self.server = self.authority.issue("server", HOST)
        issue = self.authority.issue
        primary = issue("primary", "primary.example", common_name="primary")
        standby = issue("standby", "standby.example")
        old = issue("old", "primary.example", common_name="primary", expired=True)
        forged = self.stranger.issue("forged", "primary.example", common_name="primary")
        give = self.authority.directory
        self.clients = {
            "primary": give("with-primary", client=primary),
            "standby": give("with-standby", client=standby),
            "none": give("with-none"),
            "expired": give("with-expired", client=old),
            "forged": give("with-forged", client=forged),
            "trusts another": self.stranger.directory("with-another", client=primary),
        }


@dataclass(frozen=True)
class GuardedDisk(ReplnbdDisk):
    """With allow-lists."""

    allow: tuple[str, ...] | None = None
    top_allow: tuple[str, ...] | None = None

    def table(self) -> str:
        """The TOML."""
        lines = [super().table()]
        for key, names in (("allow", self.allow), ("top-allow", self.top_allow)):
            if names is not None:
                lines.append(f"{key} = {json.dumps(names)}")
        return "\n".join(lines)


class Place(NamedTuple):
    """An export, and how a client gets there. `credentials`: its folder; None: without TLS.
    `user`: by the key that KEYS in that folder has for it, not by a certificate."""

    export: str
    credentials: Path | None
    port: int = 0
    socket: Path | None = None
    user: str | None = None

    @property
    def uri(self) -> str:
        """As libnbd wants it."""
        queries = {} if self.socket is None else {"socket": self.socket}
        scheme, user = "nbd", ""
        if self.credentials is not None:
            scheme = "nbds"
            if self.user is None:
                queries["tls-certificates"] = self.credentials
            else:
                user, queries["tls-psk-file"] = f"{self.user}@", self.credentials / KEYS
        query = "?" + "&".join(f"{key}={value}" for key, value in queries.items())
        if self.socket is not None:
            return f"{scheme}+unix://{user}/{self.export}{query}"
        return f"{scheme}://{user}{HOST}:{self.port}/{self.export}{query}".rstrip("?")

    @property
    def qemu(self) -> tuple[list[str], str]:
        """Options that QEMU's tools need, and the image that they need them for."""
        options = {"driver": "nbd", "export": self.export}
        if self.socket is not None:
            options |= {"server.type": "unix", "server.path": str(self.socket)}
        else:
            options |= {"server.type": "inet", "server.host": HOST, "server.port": str(self.port)}
        objects = []
        if self.credentials is not None:
            options |= {"tls-creds": "tls0"}
            if self.user is None:
                # Without its sanity check QEMU shows the server what it has, whatever that is.
                options |= {"tls-hostname": HOST}
                kind = "tls-creds-x509,sanity-check=off"
            else:
                kind = f"tls-creds-psk,username={self.user}"
            objects = ["--object", f"{kind},id=tls0,endpoint=client,dir={self.credentials}"]
        return objects, ",".join(f"{key}={value}" for key, value in options.items())

    @property
    def nbdkit(self) -> list[str]:
        """Parameters of nbdkit's plugin."""
        if self.socket is not None:
            parameters = [f"socket={self.socket}"]
        else:
            parameters = [f"hostname={HOST}", f"port={self.port}"]
        parameters.append(f"export={self.export}")
        if self.credentials is not None and self.user is None:
            parameters += ["tls=require", f"tls-certificates={self.credentials}"]
        elif self.credentials is not None:
            keys = self.credentials / KEYS
            parameters += ["tls=require", f"tls-psk={keys}", f"tls-username={self.user}"]
        return parameters


# Section: clients. Each reads a whole export to a file, and writes it from one; qemu-io prints it.

NBDSH = ("/usr/bin/env", "PATH=/usr/bin:/bin", "nbdsh")  # its module belongs to Debian's Python
_NBDSH_CONNECT = """
h.set_uri_allow_local_file(True)
h.connect_uri({uri!r})
"""
_NBDSH_READ = """
size, step = h.get_size(), 1 << 18
with open({path!r}, "wb") as file:
    for at in range(0, size, step):
        file.write(h.pread(min(step, size - at), at))
"""
_NBDSH_WRITE = """
with open({path!r}, "rb") as file:
    for at in range(0, h.get_size(), 1 << 18):
        h.pwrite(file.read(1 << 18), at)
h.flush()
"""

Command = Callable[[Place, Path], list[str]]


def _nbdsh(script: str) -> Command:
    def command(place: Place, path: Path) -> list[str]:
        return [*NBDSH, "-c", (_NBDSH_CONNECT + script).format(uri=place.uri, path=str(path))]

    return command


def _nbdkit(place: Place, *copy: str) -> list[str]:
    command = " ".join(["nbdcopy", *copy])
    return ["nbdkit", "--exit-with-parent", "-U", "-", "nbd", *place.nbdkit, "--run", command]


def _qemu_img_read(place: Place, path: Path) -> list[str]:
    objects, image = place.qemu
    return ["qemu-img", "convert", *objects, "-O", "raw", "--image-opts", image, str(path)]


def _qemu_img_write(place: Place, path: Path) -> list[str]:
    objects, image = place.qemu
    return ["qemu-img", "convert", *objects, "-n", "-f", "raw", "--target-image-opts",
            str(path), image]  # fmt: skip


def _qemu_io(place: Place, command: str) -> list[str]:
    objects, image = place.qemu
    return ["qemu-io", *objects, "--image-opts", image, "-c", command]


READ: Mapping[str, Command] = {
    "nbdcopy": lambda place, path: ["nbdcopy", place.uri, str(path)],
    "nbdsh": _nbdsh(_NBDSH_READ),
    "nbdkit": lambda place, path: _nbdkit(place, '"$uri"', str(path)),
    "qemu-img": _qemu_img_read,
    "qemu-io": lambda place, path: _qemu_io(place, f"read -v 0 {SIZE}"),
}
WRITE: Mapping[str, Command] = {
    "nbdcopy": lambda place, path: ["nbdcopy", "--flush", str(path), place.uri],
    "nbdsh": _nbdsh(_NBDSH_WRITE),
    "nbdkit": lambda place, path: _nbdkit(place, str(path), '"$uri"'),
    "qemu-img": _qemu_img_write,
    "qemu-io": lambda place, path: _qemu_io(place, f"write -s {path} 0 {SIZE}"),
}
LOOK: Mapping[str, Command] = {
    "nbdinfo": lambda place, path: ["nbdinfo", "--json", place.uri],
    "qemu-img info": lambda place, path: [
        "qemu-img", "info", *place.qemu[0], "--image-opts", place.qemu[1]
    ],
}  # fmt: skip


def read_all(client: str, place: Place, path: Path, *, prefix: Sequence[str] = ()) -> bytes:
    """All bytes of an export, by way of a file at `path`. `prefix`: a command that runs it."""
    said = run(*prefix, *READ[client](place, path))
    if client == "qemu-io":
        dump = re.findall(r"^[0-9a-f]+:  ((?:[0-9a-f]{2} )+)", said, re.M)
        return bytes.fromhex("".join(dump))
    return path.read_bytes()


def write_all(client: str, place: Place, path: Path) -> None:
    """Replace all bytes of an export by those of a file."""
    run(*WRITE[client](place, path))


def refused(*argv: str) -> str:
    """What a program that fails says on stderr."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=TIMEOUT_S)  # fmt: skip
    assert done.returncode, f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}"
    return done.stderr


# Section: the daemon

_LOG_LINE = re.compile(r"^\S+ \S+ (\w+) replnbd\.server\.\w+: client \d+ \([^)]+\): (.*)$", re.M)


class SecureStandby(ReplnbdDaemon):
    """Listens with TLS, on sockets where it is required and on ones where it is offered.

    `verify`: clients need certificates. `keys`: a file of keys; `certified`: it has a certificate.
    """

    def __init__(
        self,
        folder: Path,
        pki: Pki,
        disk: ReplnbdDisk,
        *,
        verify: bool = True,
        keys: Path | None = None,
        certified: bool = True,
    ) -> None:
        self.pki = pki
        self.folder = folder
        self.verify = verify
        self.certified = certified
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        self.show(pki.server)
        listen = [f"nbds+unix:///?socket={folder}/tls", "nbds://127.0.0.1:0"]
        listen += [f"nbd+unix:///?socket={folder}/on&tls=on", "nbd://127.0.0.1:0?tls=on"]
        files = {} if keys is None else {"psk": keys}
        if certified:
            files |= {"certificate": self.certificate, "key": self.key}
        if verify and certified:
            files["client-ca"] = pki.authority.certificate
        table = ["[tls]", *(f"{key} = {json.dumps(str(files[key]))}" for key in files)]
        super().__init__(folder, [disk], listen=listen, tables=["\n".join(table)])

    def show(self, credentials: Credentials) -> None:
        """From the next client on, the server has this certificate."""
        for source, target in zip(credentials, (self.certificate, self.key), strict=True):
            new = target.with_suffix(".new")
            new.write_bytes(source.read_bytes())
            new.rename(target)

    def place(self, transport: str, client: str | None, export: str = NAME) -> Place:
        """Over "tcp" or "unix" where TLS is required, or ("... on") offered. `client`: a name of
        Pki.clients; None: without TLS."""
        credentials = None if client is None else self.pki.clients[client]
        return self.at(transport, Place(export, credentials))

    def at(self, transport: str, place: Place) -> Place:
        """The same export with the same credentials, over a transport as `place` wants it."""
        kind, _, offered = transport.partition(" ")
        if kind == "tcp":
            return place._replace(port=self.ports[1 if offered else 0])
        return place._replace(socket=self.folder / ("on" if offered else "tls"))

    def content(self, export: str = NAME) -> bytearray:
        """All bytes, without TLS."""
        with self.connect(export) as client:
            return client.pread(0, client.size)

    @contextmanager
    def logging(self) -> Iterator[set[tuple[str, str]]]:
        """What the log says of the clients that come and go in this block, once there is something:
        levels and texts, without when and who."""
        begin = len(self.process.log.read_text())
        said: set[tuple[str, str]] = set()
        yield said
        wait_until(lambda: bool(self._said(begin)), "a line in the log")
        said |= self._said(begin)

    def _said(self, begin: int) -> set[tuple[str, str]]:
        text = self.process.log.read_text()[begin:]
        return set(_LOG_LINE.findall(text))
