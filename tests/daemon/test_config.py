"""The configuration: every mistake is one line that names file, table and key."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from replnbd.daemon import Config, DiskConfig, ServerConfig, TlsConfig, check_config
from replnbd.daemon.config import DEFAULT_LISTEN, default_control, load_config
from replnbd.errors import ConfigError

DISK = '[[disk]]\nname = "vm0"\nmode = "secondary"\ntop-id = "top0"\nsecondary = "vm0.raw"\n'
OTHER = '[[disk]]\nname = "vm1"\nmode = "secondary"\ntop-id = "top1"\nsecondary = "vm1.raw"\n'
PRIMARY = '[[disk]]\nname = "vm0"\nmode = "primary"\ndisk = "vm0.raw"\n'
IN_DISK = "[[disk]] 1 ('vm0')"
OVERLAYS = 'hidden = "h"\nactive = "a"\n'
TLS = "[tls]\ncertificate = 'x.pem'\nclient-ca = 'ca.pem'\n"
TLS_FILES = ("certificate", "key", "client-ca", "psk")
KNOWN_BY = "certificates or keys, which needs [tls] key 'client-ca' or 'psk'"


def refusal(folder: Path, text: str | bytes) -> str:
    """What `load_config` says of `text`, without the file's name it begins with."""
    path = folder / "replnbd.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = set(folder.iterdir())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert set(folder.iterdir()) == before
    return message.removeprefix(f"{path}: ")


MISTAKES = {
    # Unknown keys, in each table
    "unknown table": (DISK + "[storage]\nx = 1", "unknown key `storage`"),
    "unknown key before the tables": ("listen = []\n" + DISK, "unknown key `listen`"),
    "unknown key in [server]": ("[server]\nport = 10809\n" + DISK, "[server]: unknown key `port`"),
    "unknown key in [[disk]]": (DISK + "cache = 1", "[[disk]] 1: unknown key `cache`"),
    "unknown key in the second [[disk]]": (DISK + OTHER + "x = 1", "[[disk]] 2: unknown key `x`"),
    "underscore for hyphen": (DISK + 'top_id = "t"', "[[disk]] 1: unknown key `top_id`"),
    # Types
    "[server] twice": ("[[server]]\n" + DISK, "[server]: expected table, got array"),
    "server no table": ("server = 1\n" + DISK, "[server]: expected table, got integer"),
    "[disk] for [[disk]]": ('[disk]\nname = "x"', "[disk]: expected array, got table"),
    "disk no table": ("disk = [1]", "[[disk]] 1: expected table, got integer"),
    "listen no array": (
        '[server]\nlisten = "nbd://localhost"\n' + DISK,
        "[server] key 'listen': expected array, got string",
    ),
    "listen of no strings": (
        '[server]\nlisten = ["nbd://localhost", 10809]\n' + DISK,
        "[server] key 'listen[1]': expected string, got integer",
    ),
    "socket-mode no string": (
        "[server]\nsocket-mode = 0o660\n" + DISK,
        "[server] key 'socket-mode': expected string, got integer",
    ),
    **{
        f"socket-mode '{mode}'": (
            f"[server]\nsocket-mode = '{mode}'\n" + DISK,
            f"[server] key 'socket-mode': needs octal digits as in \"0660\", not '{mode}'",
        )
        for mode in ("", "rw-rw----", "0o660", "0668", "4755", "60", "00660", "٠٦٦٠")
    },
    **{
        f"{key} of {where[:-1]} {value}": (
            text + f"{key} = {value}",
            f"{place} key '{key}': needs 1 or more, not {value}",
        )
        for where, text, place, key in (
            ("[server]:", DISK + "[server]\n", "[server]", "max-connections"),
            ("[[disk]]:", DISK, f"{IN_DISK}:", "max-connections"),
            ("[[disk]]:", DISK, f"{IN_DISK}:", "top-max-connections"),
        )
        for value in (0, -1)
    },
    "max-connections of [server] no integer": (
        "[server]\nmax-connections = 1.5\n" + DISK,
        "[server] key 'max-connections': expected integer, got float",
    ),
    "top-max-connections no integer": (
        DISK + "top-max-connections = true",
        "[[disk]] 1 key 'top-max-connections': expected integer, got boolean",
    ),
    **{
        f"{key} {value}": (
            f"[server]\n{key} = {value}\n" + DISK,
            f"[server] key '{key}': needs more than 0 seconds, not {value}",
        )
        for key in ("idle-timeout", "write-timeout")
        for value in ("0", "-0.5", "nan", "-inf")
    },
    "idle-timeout no number": (
        "[server]\nidle-timeout = '5 min'\n" + DISK,
        "[server] key 'idle-timeout': expected float, got string",
    ),
    "control no string": (
        "[server]\ncontrol = true\n" + DISK,
        "[server] key 'control': expected string, got boolean",
    ),
    "name no string": ("[[disk]]\nname = 1", "[[disk]] 1 key 'name': expected string, got integer"),
    **{
        f"{key} no string": (
            f"[[disk]]\nname = 'vm0'\n{key} = 1.5",
            f"[[disk]] 1 key '{key}': expected string, got float",
        )
        for key in ("mode", "top-id", "secondary", "format", "hidden", "active", "disk", "to")
    },
    "sync no boolean": (
        DISK + 'sync = "yes"',
        "[[disk]] 1 key 'sync': expected boolean, got string",
    ),
    "unknown format": (
        DISK + 'format = "vmdk"',
        "[[disk]] 1 key 'format': invalid enum value 'vmdk', expected raw or qcow2",
    ),
    "unknown durability": (
        DISK + 'durability = "none"',
        "[[disk]] 1 key 'durability': invalid enum value 'none', expected process or power",
    ),
    # Missing keys
    "nothing": ("", "no [[disk]] table: nothing to serve"),
    "no disk": ("[server]\n", "no [[disk]] table: nothing to serve"),
    "no name": ('[[disk]]\nmode = "secondary"', "[[disk]] 1: missing key `name`"),
    "no secondary": (
        DISK.replace("secondary = ", "hidden = "),
        f"{IN_DISK}: key 'secondary' is missing: the file of the secondary disk",
    ),
    # The texts of QEMU's driver options
    "no mode": ("[[disk]]\nname = 'vm0'", f"{IN_DISK}: key 'mode': Missing the option mode"),
    "bad mode": (
        DISK.replace('"secondary"', '"tertiary"'),
        f"{IN_DISK}: key 'mode': The option mode's value should be primary or secondary,"
        " not 'tertiary'",
    ),
    "no top-id": (
        DISK.replace("top-id", "to"),
        f"{IN_DISK}: key 'top-id': Missing the option top-id",
    ),
    "top-id of a primary": (
        DISK.replace('"secondary"', '"primary"'),
        f"{IN_DISK}: key 'top-id': The primary side does not support option top-id",
    ),
    # Values
    "empty listen": (
        "[server]\nlisten = []\n" + DISK,
        "[server] key 'listen': needs at least one NBD URI",
    ),
    "empty control": (
        "[server]\ncontrol = ''\n" + DISK,
        "[server] key 'control': needs the path of a socket",
    ),
    "NUL in control": (
        '[server]\ncontrol = "a\\u0000b"\n' + DISK,
        "[server] key 'control': needs the path of a socket",
    ),
    "empty name": (
        DISK.replace("vm0", ""),
        "[[disk]] 1 (''): key 'name': an export needs a name",
    ),
    "long name": (
        DISK.replace('"vm0"', f'"{"é" * 2049}"'),
        f"[[disk]] 1 ('{'é' * 2049}'): key 'name': longer than 4096 bytes, or has a NUL",
    ),
    "NUL in top-id": (
        DISK.replace("top0", "\\u0000"),
        f"{IN_DISK}: key 'top-id': longer than 4096 bytes, or has a NUL",
    ),
    "NUL in a path": (
        DISK + 'hidden = "a\\u0000b"',
        f"{IN_DISK}: key 'hidden': a path cannot have a NUL",
    ),
    "primary without a disk": (
        "[[disk]]\nname = 'vm0'\nmode = 'primary'",
        f"{IN_DISK}: key 'disk' is missing: the file of the local disk",
    ),
    **{
        f"{key} of a primary": (
            PRIMARY + f"{key} = {value}",
            f"{IN_DISK}: key '{key}' belongs to mode = \"secondary\"",
        )
        for key, value in (
            ("secondary", '"x"'),
            ("hidden", '"x"'),
            ("active", '"x"'),
            ("top-allow", '["x"]'),
            ("top-max-connections", "1"),
        )
    },
    "to of no export": (
        PRIMARY + 'to = "nbd://standby"',
        f"{IN_DISK}: key 'to': nbd://standby names no export: that of the standby's disk",
    ),
    "to of nothing": (
        PRIMARY + 'to = "standby"',
        f"{IN_DISK}: key 'to': not an NBD URI that can be used: standby: it must begin with"
        " nbd://, nbds://, nbd+unix:// or nbds+unix://",
    ),
    "both modes": (
        DISK + PRIMARY.replace("vm0", "vm1"),
        "[[disk]] key 'mode': all disks of a configuration are one group, and so of one mode",
    ),
    **{
        f"{key} of a secondary": (
            DISK + f"{key} = {value}",
            f"{IN_DISK}: key '{key}' belongs to mode = \"primary\"",
        )
        for key, value in (("disk", '"x"'), ("to", '"nbd://x"'), ("sync", "false"))
    },
    # Twice the same
    "name twice": (
        DISK + OTHER.replace('"vm1"', '"vm0"'),
        "[[disk]] 2 ('vm0') key 'name': 'vm0' is also the name of [[disk]] 1",
    ),
    "name that is a top-id": (
        DISK + OTHER.replace('"vm1"', '"top0"'),
        "[[disk]] 2 ('top0') key 'name': 'top0' is also the top-id of [[disk]] 1",
    ),
    "top-id that is the name": (
        DISK.replace("top0", "vm0"),
        f"{IN_DISK} key 'top-id': 'vm0' is also the name of [[disk]] 1",
    ),
    # TLS
    "tls no table": ("tls = 1\n" + DISK, "[tls]: expected table, got integer"),
    "unknown key in [tls]": (DISK + "[tls]\nca = 'x'", "[tls]: unknown key `ca`"),
    "[tls] with nothing": (DISK + "[tls]", "[tls]: needs key 'certificate', or 'psk'"),
    "[tls] with an authority alone": (
        DISK + "[tls]\nclient-ca = 'ca.pem'",
        "[tls]: needs key 'certificate', or 'psk'",
    ),
    **{
        f"{key} without a certificate": (
            DISK + f"[tls]\npsk = 'keys.psk'\n{key} = 'x.pem'",
            f"[tls] key '{key}': without key 'certificate' it means nothing",
        )
        for key in ("key", "client-ca")
    },
    **{
        f"{key} no string": (
            DISK + f"[tls]\n{key} = ['x.pem']",
            f"[tls] key '{key}': expected string, got array",
        )
        for key in TLS_FILES
    },
    **{
        f"{key} is {name}": (
            f"{DISK}[tls]\n{key} = {path}\n"
            + "".join(f"{other} = 'x'\n" for other in TLS_FILES if other != key),
            f"[tls] key '{key}': needs the path of a file",
        )
        for key in TLS_FILES
        for name, path in (("empty", "''"), ("a NUL", '"a\\u0000b"'))
    },
    **{
        f"{key} {what}": (
            DISK + f"{key} = ['primary']\n" + tls,
            f"{IN_DISK}: key '{key}': clients are known by their {KNOWN_BY}",
        )
        for key in ("allow", "top-allow")
        for what, tls in (
            ("without [tls]", ""),
            ("where clients need no certificate", "[tls]\ncertificate = 'x.pem'"),
        )
    },
    "allow no array": (
        DISK + "allow = 'primary'\n" + TLS,
        "[[disk]] 1 key 'allow': expected array, got string",
    ),
    "top-allow of no strings": (
        DISK + "top-allow = [1]\n" + TLS,
        "[[disk]] 1 key 'top-allow[0]': expected string, got integer",
    ),
    "default-export no string": (
        "[server]\ndefault-export = 1\n" + DISK,
        "[server] key 'default-export': expected string, got integer",
    ),
    "default-export that is none": (
        "[server]\ndefault-export = 'vm1'\n" + DISK,
        "[server] key 'default-export': there is no export 'vm1'",
    ),
    # A secondary disk on another server
    **{
        f"secondary {uri}": (
            DISK.replace("vm0.raw", uri) + OVERLAYS,
            f"{IN_DISK}: key 'secondary': not an NBD URI that can be used: {uri}: {why}",
        )
        for uri, why in {
            "nbd://host:x/disk": "Port could not be cast to integer value as 'x'",
            "nbd+unix:///disk": "it needs a socket: nbd+unix:///EXPORT?socket=PATH",
            "nbd://host/disk?tls-hostname=x": "a user and parameters of TLS are for nbds:// and"
            " nbds+unix://",
        }.items()
    },
    "qcow2 over NBD": (
        DISK.replace("vm0.raw", "nbd://host/disk") + OVERLAYS + 'format = "qcow2"',
        f"{IN_DISK}: key 'format': over NBD a disk is raw; let its server open the qcow2 image"
        " (qemu-nbd -f qcow2)",
    ),
    "an NBD URI without overlays": (
        DISK.replace("vm0.raw", "nbd://host/disk") + 'hidden = "h"',
        f"{IN_DISK}: key 'active' is missing: for nbd://host/disk it has no default",
    ),
    "a device without overlays": (  # files in /dev are gone after a boot, and the fence with them
        DISK.replace("vm0.raw", "/dev/vg/disk"),
        f"{IN_DISK}: key 'hidden' is missing: for /dev/vg/disk it has no default",
    ),
    "an overlay over NBD": (
        DISK + 'hidden = "nbd://host/hidden"',
        f"{IN_DISK}: key 'hidden': an overlay is a file of this host, not nbd://host/hidden",
    ),
    "an NBD URI twice": (
        DISK.replace("vm0.raw", "nbd://h/d")
        + OVERLAYS
        + OTHER.replace("vm1.raw", "nbd://h/d")
        + 'hidden = "h1"\nactive = "a1"',
        "[[disk]] 2 ('vm1') key 'secondary': nbd://h/d is also the secondary of [[disk]] 1",
    ),
    # Not TOML
    "no TOML": (
        "listen nbd://",
        "not valid TOML: Expected '=' after a key in a key/value pair (at line 1, column 8)",
    ),
    "key twice": (
        DISK + "name = 'vm0'",
        "not valid TOML: Cannot overwrite a value (at end of document)",
    ),
    "not UTF-8": (b"[server]\ncontrol = '\xff'", "not UTF-8 text: invalid start byte at byte 20"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_by_file_table_and_key(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 5_000])
def test_what_only_a_machine_would_write_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).startswith("not valid TOML: ")


def test_one_file_in_two_roles_is_refused_however_it_is_written(tmp_path: Path) -> None:
    text = refusal(tmp_path, DISK + 'hidden = "over"\nactive = "./sub/../over"')
    assert text == f"{IN_DISK} key 'active': {tmp_path}/over is also the hidden of [[disk]] 1"
    text = refusal(tmp_path, DISK + OTHER + 'hidden = "vm0.raw"')
    expected = f"[[disk]] 2 ('vm1') key 'hidden': {tmp_path}/vm0.raw is also the secondary of"
    assert text == f"{expected} [[disk]] 1"


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone", "No such file or directory"), (tmp_path, "Is a dir")):
        with pytest.raises(ConfigError, match=f"^cannot read {path}: {reason}"):
            load_config(path)
    dangling = tmp_path / "loop"
    dangling.symlink_to(dangling)
    with pytest.raises(ConfigError, match=f"^cannot read {dangling}: Too many levels"):
        load_config(dangling)


def test_relative_paths_are_those_of_the_configurations_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "replnbd.toml").write_text(
        '[server]\ncontrol = "run/q"\nlisten = ["nbd+unix:///?socket=run/s", "nbd://[::1]:1",'
        ' "nbd+unix:///?socket=/run/s"]\n' + DISK + 'hidden = "../h"\nactive = "/a"\n' + OTHER
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in (folder / "replnbd.toml", Path("../etc/replnbd.toml")):
        config = load_config(name)
        assert config.server.control == f"{folder}/run/q"
        assert config.server.listen == [
            f"nbd+unix:///?socket={folder}/run/s",
            "nbd://[::1]:1",
            "nbd+unix:///?socket=/run/s",
        ]
        first, second = config.disk
        assert first.secondary == f"{folder}/vm0.raw"
        assert first.hidden == f"{folder}/../h"
        assert first.active == "/a"
        assert second.hidden == f"{folder}/vm1.raw.hidden.qcow2"
        assert second.active == f"{folder}/vm1.raw.active.qcow2"


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("nbd://host/disk", "nbd://host/disk"),
        ("nbd://host/x.qcow2", "nbd://host/x.qcow2"),
        ("nbd+unix:///x?socket=s", "nbd+unix:///x?socket=HERE/s"),
        ("nbd+unix:///x?socket=/s", "nbd+unix:///x?socket=/s"),
        ("nbd+unix:///x?socket=%00s", "nbd+unix:///x?socket=%00s"),
        (
            "nbds+unix:///x?socket=s&tls-certificates=pki",
            "nbds+unix:///x?socket=HERE/s&tls-certificates=HERE/pki",
        ),
        ("nbds://me@h/x?tls-psk-file=keys", "nbds://me@h/x?tls-psk-file=HERE/keys"),
    ],
)
def test_the_secondary_may_be_an_nbd_uri_with_paths_of_the_configurations_directory(
    tmp_path: Path, uri: str, absolute: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(DISK.replace("vm0.raw", uri) + OVERLAYS)
    (disk,) = load_config(path).disk
    assert disk.secondary == absolute.replace("HERE", str(tmp_path))
    assert disk.format == "raw"
    assert disk.hidden == f"{tmp_path}/h"


def test_what_is_not_said_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLNBD_CONTROL", "/x/qmp.sock")
    path = tmp_path / "c.toml"
    path.write_text(DISK + OTHER.replace(".raw", ".qcow2"))
    config = load_config(path)
    assert config.server == ServerConfig(listen=[DEFAULT_LISTEN], control="/x/qmp.sock")
    assert [disk.format for disk in config.disk] == ["raw", "qcow2"]
    assert {disk.durability for disk in config.disk} == {"process"}


def test_the_files_of_tls_are_those_of_the_configurations_directory(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    files = 'certificate = "tls/x.pem"\nkey = "../x.key"\nclient-ca = "/ca.pem"\npsk = "x.psk"\n'
    path.write_text(DISK + f'allow = ["primary"]\ntop-allow = []\n[tls]\n{files}')
    config = load_config(path)
    assert config.tls == TlsConfig(
        certificate=f"{tmp_path}/tls/x.pem",
        key=f"{tmp_path}/../x.key",
        client_ca="/ca.pem",
        psk=f"{tmp_path}/x.psk",
    )
    assert (config.disk[0].allow, config.disk[0].top_allow) == (["primary"], [])


def test_keys_are_enough_to_know_clients_by(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"{DISK}allow = ['alice']\n[tls]\npsk = 'x'")
    assert load_config(path).tls == TlsConfig(psk=f"{tmp_path}/x")


@pytest.mark.parametrize("name", ["vm0", "top0", "top1"])
def test_any_export_can_be_the_default(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[server]\ndefault-export = '{name}'\n{DISK}{OTHER}")
    assert load_config(path).server.default_export == name


@pytest.mark.parametrize(("mode", "bits"), [("0660", 0o660), ("777", 0o777), ("0000", 0)])
def test_the_mode_of_the_sockets_is_octal(tmp_path: Path, mode: str, bits: int) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'[server]\nsocket-mode = "{mode}"\n{DISK}')
    assert load_config(path).server.socket_mode_bits == bits


@pytest.mark.parametrize(("value", "time_s"), [("5", 5.0), ("0.25", 0.25), ("inf", float("inf"))])
def test_a_time_is_a_number_of_seconds(tmp_path: Path, value: str, time_s: float) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[server]\nidle-timeout = {value}\nwrite-timeout = {value}\n{DISK}")
    server = load_config(path).server
    assert (server.idle_timeout, server.write_timeout) == (time_s, time_s)


def test_the_format_is_never_guessed_from_the_content(tmp_path: Path) -> None:
    """A guest can write a qcow2 header into its raw disk (CVE-2008-2004)."""
    (tmp_path / "vm0.raw").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(504))
    path = tmp_path / "c.toml"
    path.write_text(DISK)
    assert load_config(path).disk[0].format == "raw"
    path.write_text(DISK + 'format = "qcow2"')
    assert load_config(path).disk[0].format == "qcow2"


def test_the_control_socket_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPLNBD_CONTROL", "run/q")
    assert default_control() == f"{tmp_path}/run/q"  # of the working directory, for all
    monkeypatch.delenv("REPLNBD_CONTROL")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_control() == "/run/replnbd/qmp.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_control() == "/run/user/1000/replnbd/qmp.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("HOME", "/users/x")
    assert default_control() == "/users/x/.cache/replnbd/qmp.sock"


def test_a_name_that_is_no_utf8_is_refused_by_its_key(tmp_path: Path) -> None:
    disk = DiskConfig(name=os.fsdecode(b"d\xff"), mode="secondary", top_id="top", secondary="d.raw")
    with pytest.raises(ConfigError, match=r"key 'name': not UTF-8$"):
        check_config(Config(disk=[disk]), tmp_path)


def test_the_configuration_of_the_design_is_taken_as_it_is(tmp_path: Path) -> None:
    text = (
        '[server]\nlisten = ["nbd://127.0.0.1:10809", "nbd+unix:///?socket=/run/nbd.sock"]\n'
        'control = "/run/qmp.sock"\n[[disk]]\nname = "colo0"\nmode = "secondary"\n'
        'top-id = "top0"\nsecondary = "colo0.raw"\nformat = "raw"\n'
        'hidden = "colo0.hidden.qcow2"\nactive = "colo0.active.qcow2"\ndurability = "process"\n'
    )
    path = tmp_path / "c.toml"
    path.write_text(text)
    config = load_config(path)
    assert config.server.listen == tomllib.loads(text)["server"]["listen"]
    assert config.disk == [
        DiskConfig(
            name="colo0",
            mode="secondary",
            top_id="top0",
            secondary=f"{tmp_path}/colo0.raw",
            format="raw",
            hidden=f"{tmp_path}/colo0.hidden.qcow2",
            active=f"{tmp_path}/colo0.active.qcow2",
        )
    ]
