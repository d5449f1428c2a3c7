"""The configuration file: TOML, checked whole before anything is opened.

Every error is one line that names the file, the table and the key.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec

from replnbd.block import is_nbd_uri, parse_nbd_uri
from replnbd.errors import ConfigError
from replnbd.server import WRITE_TIMEOUT_S

DEFAULT_LISTEN = "nbd://127.0.0.1:10809"


def default_control() -> str:
    """Where the QMP socket is unless somebody says so: $REPLNBD_CONTROL, or in /run for root and
    in the user's own run directory for others. The clients' default, too."""
    if path := os.environ.get("REPLNBD_CONTROL"):
        return os.path.abspath(path)
    if os.geteuid() == 0:
        return "/run/replnbd/qmp.sock"
    run_directory = os.environ.get("XDG_RUNTIME_DIR") or os.path.expanduser("~/.cache")
    return os.path.join(run_directory, "replnbd", "qmp.sock")


_NAME_MAX = 4096  # NBD's bound on an export name (proto.md, "Values"); QEMU's, too
IMAGES = ("secondary", "hidden", "active")
"""The keys of a standby's images."""
PATHS = {"primary": ("disk", "history"), "secondary": (*IMAGES, "history")}
"""The keys of a disk's files, by its mode."""


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Table [server]. `listen`: NBD URIs; `control`: path of the QMP socket. In a program that
    drives the standby itself, both may be missing (an empty list, None)."""

    listen: list[str] = msgspec.field(default_factory=lambda: [DEFAULT_LISTEN])
    default_export: str | None = None
    control: str | None = msgspec.field(default_factory=default_control)
    socket_mode: str | None = None
    max_connections: int | None = None
    idle_timeout: float | None = None
    write_timeout: float = WRITE_TIMEOUT_S

    @property
    def socket_mode_bits(self) -> int | None:
        """`socket_mode` as a number; None leaves it to the umask."""
        return None if self.socket_mode is None else int(self.socket_mode, 8)


class TlsConfig(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Table [tls]: paths of PEM files (`psk`: of a file of USER:HEX-KEY lines), absolute after
    `check_config`. Without `client-ca`, clients need no certificate."""

    certificate: str | None = None
    key: str | None = None
    client_ca: str | None = None
    psk: str | None = None


class DiskConfig(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """One [[disk]] table. Paths are absolute after `load_config` and `secondary_disk`; `secondary`
    may be an NBD URI instead."""

    name: str
    mode: str | None = None
    top_id: str | None = None
    secondary: str | None = None
    format: Literal["raw", "qcow2"] | None = None
    hidden: str | None = None
    active: str | None = None
    durability: Literal["process", "power"] = "process"
    allow: list[str] | None = None
    top_allow: list[str] | None = None
    max_connections: int | None = None
    top_max_connections: int | None = None
    history: str | None = None
    disk: str | None = None
    to: str | None = None
    sync: bool | None = None

    @property
    def image(self) -> str:
        """The disk itself."""
        return str(self.disk if self.mode == "primary" else self.secondary)

    @property
    def image_format(self) -> str:
        """ "raw" or "qcow2", by `format` or the file's name; never by its content, because a
        guest can write a qcow2 header into its raw disk (CVE-2008-2004). What another server
        exports is a raw disk, whatever it is called."""
        if self.format is not None:
            return self.format
        return "qcow2" if self.image.endswith(".qcow2") and not is_nbd_uri(self.image) else "raw"


class Config(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """A whole configuration. Several disks are one group."""

    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    tls: TlsConfig | None = None
    disk: list[DiskConfig] = msgspec.field(default_factory=list)

    @property
    def mode(self) -> str:
        """Of all disks: "primary" or "secondary"."""
        return str(self.disk[0].mode)


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file; ConfigError says what is wrong, and where."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 text: {exc.reason} at byte {exc.start}") from exc
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        # TOMLDecodeError, and what Python says to 5,000 digits or 5,000 brackets.
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc
    try:
        config = msgspec.convert(tables, Config)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path}: {_place(str(exc))}") from exc
    try:
        if not config.server.listen:
            raise ConfigError("[server] key 'listen': needs at least one NBD URI")
        return check_config(config, path.resolve().parent)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None


def check_config(config: Config, directory: Path) -> Config:
    """Check what types cannot say, fill in defaults, make paths absolute from `directory`."""
    server = config.server
    if server.control is not None:
        if not server.control or "\0" in server.control:
            raise ConfigError("[server] key 'control': needs the path of a socket")
        server.control = str(directory / server.control)
    server.listen = [_absolute_paths(uri, directory) for uri in server.listen]
    if config.tls is not None:
        _check_tls(config.tls, directory)
    mode = server.socket_mode
    if mode is not None and not re.fullmatch("0?[0-7]{3}", mode, re.ASCII):
        raise ConfigError(
            f"[server] key 'socket-mode': needs octal digits as in \"0660\", not '{mode}'"
        )
    _check_count("[server] key 'max-connections'", server.max_connections)
    for key, time_s in (("idle", server.idle_timeout), ("write", server.write_timeout)):
        if time_s is not None and not time_s > 0:  # as nan is not
            raise ConfigError(
                f"[server] key '{key}-timeout': needs more than 0 seconds, not {time_s:g}"
            )
    if not config.disk:
        raise ConfigError("no [[disk]] table: nothing to serve")
    taken: dict[str, str] = {}
    files: dict[str, str] = {}
    for number, disk in enumerate(config.disk, 1):
        where = f"[[disk]] {number} ('{disk.name}')"
        try:
            _check_disk(disk, directory)
            _check_allow(disk, config.tls)
        except ConfigError as exc:
            raise ConfigError(f"{where}: {exc}") from None
        for key, name in (("name", disk.name), ("top-id", disk.top_id)):
            if name is not None and name in taken:
                raise ConfigError(f"{where} key '{key}': '{name}' is also {taken[name]}")
            if name is not None:
                taken[name] = f"the {key} of [[disk]] {number}"
        for key in PATHS[str(disk.mode)]:
            file = getattr(disk, key)
            if file is None:
                continue
            if not is_nbd_uri(file):
                file = os.path.normpath(file)
            if file in files:
                raise ConfigError(f"{where} key '{key}': {file} is also {files[file]}")
            files[file] = f"the {key} of [[disk]] {number}"
    if len({disk.mode for disk in config.disk}) > 1:
        raise ConfigError(
            "[[disk]] key 'mode': all disks of a configuration are one group, and so of one mode"
        )
    if server.default_export is not None and server.default_export not in taken:
        raise ConfigError(
            f"[server] key 'default-export': there is no export '{server.default_export}'"
        )
    return config


_PATH_IN_URI = re.compile(r"([?&](?:socket|tls-certificates|tls-psk-file)=)(?!/|%2[Ff]|%00)")


def _absolute_paths(uri: str, directory: Path) -> str:
    """An NBD URI with the paths in it (of its socket, of credentials) made absolute."""
    absolute = f"{quote(str(directory))}/"
    return _PATH_IN_URI.sub(lambda match: match[1] + absolute, uri)


def _check_tls(tls: TlsConfig, directory: Path) -> None:
    if tls.certificate is None and tls.psk is None:
        raise ConfigError("[tls]: needs key 'certificate', or 'psk'")
    if tls.certificate is None:
        for key in ("key", "client_ca"):
            if getattr(tls, key) is not None:
                name = key.replace("_", "-")
                raise ConfigError(f"[tls] key '{name}': without key 'certificate' it means nothing")
    for key in ("certificate", "key", "client_ca", "psk"):
        path = getattr(tls, key)
        if path is not None:
            if not path or "\0" in path:
                raise ConfigError(f"[tls] key '{key.replace('_', '-')}': needs the path of a file")
            setattr(tls, key, str(directory / path))


def _check_allow(disk: DiskConfig, tls: TlsConfig | None) -> None:
    for key in ("allow", "top_allow"):
        if getattr(disk, key) is None:
            continue
        if tls is None or (tls.client_ca is None and tls.psk is None):
            name = key.replace("_", "-")
            raise ConfigError(
                f"key '{name}': clients are known by their certificates or keys, which needs"
                " [tls] key 'client-ca' or 'psk'"
            )


def _check_disk(disk: DiskConfig, directory: Path) -> None:
    if not disk.name:
        raise ConfigError("key 'name': an export needs a name")
    # The four texts are those of QEMU's driver options.
    if disk.mode is None:
        raise ConfigError("key 'mode': Missing the option mode")
    if disk.mode not in ("primary", "secondary"):
        raise ConfigError(
            f"key 'mode': The option mode's value should be primary or secondary, not '{disk.mode}'"
        )
    if disk.mode == "primary":
        _check_primary(disk, directory)
        return
    if not disk.top_id:
        raise ConfigError("key 'top-id': Missing the option top-id")
    _check_export_name("name", disk.name)
    _check_export_name("top-id", disk.top_id)
    for key in ("disk", "to", "sync"):
        if getattr(disk, key) is not None:
            raise ConfigError(f"key '{key}' belongs to mode = \"primary\"")
    if not disk.secondary:
        raise ConfigError("key 'secondary' is missing: the file of the secondary disk")
    if is_nbd_uri(disk.secondary):
        disk.secondary = _check_remote("secondary", disk.secondary, disk.format, directory)
    for key in ("hidden", "active"):
        if not getattr(disk, key) and has_no_place_beside(disk.secondary):
            raise ConfigError(f"key '{key}' is missing: for {disk.secondary} it has no default")
    disk.hidden = disk.hidden or f"{disk.secondary}.hidden.qcow2"
    if has_no_place_beside(disk.secondary):
        disk.history = disk.history or f"{disk.hidden}.history"
    disk.active = disk.active or f"{disk.secondary}.active.qcow2"
    disk.format = disk.image_format  # type: ignore[assignment]
    _check_count("key 'max-connections'", disk.max_connections)
    _check_count("key 'top-max-connections'", disk.top_max_connections)
    _make_absolute(disk, directory)


def _check_primary(disk: DiskConfig, directory: Path) -> None:
    if disk.top_id is not None:
        raise ConfigError("key 'top-id': The primary side does not support option top-id")
    _check_export_name("name", disk.name)
    for key in ("secondary", "hidden", "active", "top_allow", "top_max_connections"):
        if getattr(disk, key) is not None:
            name = key.replace("_", "-")
            raise ConfigError(f"key '{name}' belongs to mode = \"secondary\"")
    if not disk.disk:
        raise ConfigError("key 'disk' is missing: the file of the local disk")
    if is_nbd_uri(disk.disk):
        disk.disk = _check_remote("disk", disk.disk, disk.format, directory)
    if disk.history is None and has_no_place_beside(disk.disk):
        raise ConfigError(f"key 'history' is missing: for {disk.disk} it has no default")
    if disk.to is not None:
        disk.to = _check_remote("to", disk.to, None, directory)
        if not parse_nbd_uri(disk.to).export:
            raise ConfigError(f"key 'to': {disk.to} names no export: that of the standby's disk")
    disk.format = disk.image_format  # type: ignore[assignment]
    _check_count("key 'max-connections'", disk.max_connections)
    _make_absolute(disk, directory)


def has_no_place_beside(disk: str) -> bool:
    """Of a device, for a file in /dev is gone after the next boot; of what an NBD server has."""
    return is_nbd_uri(disk) or disk.startswith("/dev/")


def _make_absolute(disk: DiskConfig, directory: Path) -> None:
    for key in PATHS[str(disk.mode)]:
        path = getattr(disk, key)
        if path is None:
            continue
        if "\0" in path:
            raise ConfigError(f"key '{key}': a path cannot have a NUL")
        if is_nbd_uri(path):
            if key not in ("disk", "secondary"):
                what = "a history" if key == "history" else "an overlay"
                raise ConfigError(f"key '{key}': {what} is a file of this host, not {path}")
            continue
        setattr(disk, key, str(directory / path))


def _check_remote(key: str, uri: str, image_format: str | None, directory: Path) -> str:
    """The URI of a disk that another NBD server has, with absolute paths."""
    uri = _absolute_paths(uri, directory)
    try:
        parse_nbd_uri(uri)
    except ConfigError as exc:
        raise ConfigError(f"key '{key}': {exc}") from None
    if image_format == "qcow2":
        raise ConfigError(
            "key 'format': over NBD a disk is raw; let its server open the qcow2 image"
            " (qemu-nbd -f qcow2)"
        )
    return uri


def _check_count(where: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise ConfigError(f"{where}: needs 1 or more, not {count}")


def _check_export_name(key: str, name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # taken from the name of a file, whose bytes may be anything
        raise ConfigError(f"key '{key}': not UTF-8") from None
    if length > _NAME_MAX or "\0" in name:
        raise ConfigError(f"key '{key}': longer than {_NAME_MAX} bytes, or has a NUL")


_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_CHOICES = {"format": "raw or qcow2", "durability": "process or power"}
_TOML_TYPES = {
    "str": "string",
    "int": "integer",
    "bool": "boolean",
    "null": "nothing",
    "object": "table",
}


def _place(text: str) -> str:
    """msgspec's "Expected `str`, got `int` - at `$.disk[0].name`" in the words of TOML."""
    match = _PLACE.match(text)
    assert match is not None
    what = re.sub(
        r"(Expected|got) `(\w+)( \| null)?`",
        lambda m: f"{m[1]} {_TOML_TYPES.get(m[2], m[2])}",
        match["what"],
    )
    what = what.replace("Object contains unknown field", "unknown key")
    what = what.replace("Object missing required field", "missing key")
    what = what.replace("Expected", "expected", 1).replace("Invalid", "invalid", 1)
    path = match["path"] or ""
    table, _, key = path.partition(".")
    if what.startswith("invalid enum value"):
        what += f", expected {_CHOICES[key]}"
    table = re.sub(r"^disk\[(\d+)\]$", lambda m: f"[[disk]] {int(m[1]) + 1}", table)
    if table and not table.startswith("["):
        table = f"[{table}]"
    parts = [table, f"key '{key}'" if key else ""]
    place = " ".join(part for part in parts if part)
    return f"{place}: {what}" if place else what
