"""What the daemon cannot serve it refuses at start: one line on stderr, exit code 1, and every
file is as it was, none is new."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from daemon_support import SIZE, Setup, pattern, tmpfs
from peers import REPLNBD, fingerprints, qemu_img, refusal, run_replnbd

from replnbd.daemon import Daemon, DiskConfig, Standby, load_config
from replnbd.errors import ConfigError, ReplnbdError

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def refused(setup: Setup, *, prefix: Sequence[str] = ()) -> str:
    """The line with which `replnbd serve` refuses, the folder's name written as "."."""
    setup.write()
    before = fingerprints(setup.folder)
    # Warnings and errors only: the log would tell of overlays made (and removed again), too.
    done = run_replnbd("serve", "--log-level", "warning", setup.config, prefix=prefix)
    assert fingerprints(setup.folder) == before
    return refusal(done).removeprefix("replnbd: ").replace(str(setup.folder), ".")


async def refused_in_process(setup: Setup) -> str:
    """The same without a process, for long tables."""
    config = load_config(setup.write())
    before = fingerprints(setup.folder)
    with pytest.raises(ReplnbdError) as caught:
        await Daemon(config).open()
    assert fingerprints(setup.folder) == before
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(setup.folder), ".")


# Section: the files

IN_USE = "is in use by another process (another replnbd, or QEMU): stop that one first"


def without_secondary(setup: Setup) -> None:
    setup.path("secondary").unlink()


def secondary_is_a_directory(setup: Setup) -> None:
    setup.path("secondary").unlink()
    setup.path("secondary").mkdir()


def secondary_is_a_fifo(setup: Setup) -> None:
    setup.path("secondary").unlink()
    os.mkfifo(setup.path("secondary"))


def secondary_is_empty(setup: Setup) -> None:
    setup.path("secondary").write_bytes(b"")


def secondary_ends_within_a_sector(setup: Setup) -> None:
    os.truncate(setup.path("secondary"), SIZE + 511)


def secondary_is_no_qcow2(setup: Setup) -> None:
    setup.table["format"] = "qcow2"


def secondary_has_a_backing_file(setup: Setup) -> None:
    setup.table["format"] = "qcow2"
    (setup.folder / "base").write_bytes(pattern(2))
    qemu_img(
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", setup.path("secondary"), "1M"
    )


def hidden_is_garbage(setup: Setup) -> None:
    setup.path("hidden").write_bytes(pattern(3, 5000))


def active_is_garbage(setup: Setup) -> None:
    setup.path("active").write_bytes(pattern(3, 5000))


def active_is_empty(setup: Setup) -> None:
    setup.path("active").write_bytes(b"")


def active_is_half_a_header(setup: Setup) -> None:
    setup.make_overlays()
    os.truncate(setup.path("active"), 50)


def active_is_a_dangling_link(setup: Setup) -> None:
    setup.path("active").symlink_to("gone")


def hidden_goes_where_nothing_is(setup: Setup) -> None:
    setup.table["hidden"] = "gone/d.hidden"


def active_goes_where_a_file_is(setup: Setup) -> None:
    setup.table["active"] = "d.raw/d.active"


def hidden_is_the_secondary_by_a_link(setup: Setup) -> None:
    setup.path("hidden").hardlink_to(setup.path("secondary"))


def hidden_has_internal_snapshots(setup: Setup) -> None:
    setup.make_overlays()
    qemu_img("snapshot", "-c", "one", setup.path("hidden"))


FILES: dict[Callable[[Setup], None], str] = {
    without_secondary: "cannot open ./d.raw: No such file or directory",
    secondary_is_a_directory: "cannot open ./d.raw: Is a directory",
    secondary_is_a_fifo: "cannot open ./d.raw: neither a regular file nor a block device",
    secondary_is_empty: "./d.raw: its size, 0 bytes, is not a positive multiple of 512",
    secondary_ends_within_a_sector: (
        "./d.raw: its size, 1049087 bytes, is not a positive multiple of 512"
    ),
    secondary_is_no_qcow2: "./d.raw: magic is 0xf5b16522: not a qcow2 image (0x514649fb)",
    secondary_has_a_backing_file: (
        "./d.raw: the image has a backing file ('base'), and none was given"
    ),
    hidden_is_garbage: "./d.hidden: magic is 0xfd3feb3c: not a qcow2 image (0x514649fb)",
    active_is_garbage: "./d.active: magic is 0xfd3feb3c: not a qcow2 image (0x514649fb)",
    active_is_empty: "./d.active: file size is 0: a qcow2 header has 72 bytes",
    active_is_half_a_header: "./d.active: file size is 50: a qcow2 header has 72 bytes",
    active_is_a_dangling_link: "cannot open ./d.active: No such file or directory",
    hidden_goes_where_nothing_is: "cannot create ./gone/d.hidden: No such file or directory",
    active_goes_where_a_file_is: "cannot create ./d.raw/d.active: Not a directory",
    hidden_is_the_secondary_by_a_link: f"./d.hidden {IN_USE}",
    hidden_has_internal_snapshots: (
        "./d.hidden: nb_snapshots is 1: an overlay with internal snapshots cannot be emptied;"
        " remove them with: qemu-img snapshot -d"
    ),
}


@pytest.mark.parametrize("damage", FILES, ids=lambda damage: damage.__name__)
def test_files_that_are_not_good_are_refused_by_name(
    setup: Setup, damage: Callable[[Setup], None]
) -> None:
    damage(setup)
    assert refused(setup) == FILES[damage]


def test_files_that_may_not_be_opened_are_refused_by_name(setup: Setup) -> None:
    setup.path("secondary").chmod(0o444)
    # Root may open everything, but not without this capability.
    prefix = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    assert refused(setup, prefix=prefix) == "cannot open ./d.raw: Permission denied"


def test_a_bad_second_disk_leaves_nothing_of_the_first(short_dir: Path) -> None:
    setup = Setup(short_dir, "a", "b")
    setup.path("secondary", 1).unlink()
    assert refused(setup) == "cannot open ./b.raw: No such file or directory"


# Section: damaged overlays. Each is one poke into a good one: offset, bytes, what is named.

HEADER_POKES = {
    "magic": (0, b"QFI\xfa", "magic"),
    "version 1": (4, b"\0\0\0\1", "version"),
    "version 4": (4, b"\0\0\0\4", "version"),
    "backing file name of 4 GiB": (16, b"\xff" * 4, "backing"),
    "clusters of 256 bytes": (20, b"\0\0\0\x08", "cluster_bits"),
    "clusters of 4 MiB": (20, b"\0\0\0\x16", "cluster_bits"),
    "clusters of 8 EiB": (20, b"\0\0\0\x3f", "cluster_bits"),
    "size of 8 EiB": (24, b"\x7f" + b"\xff" * 7, "size"),
    "size beyond 8 EiB": (24, b"\xff" * 8, "size"),
    "encryption 2 (LUKS)": (32, b"\0\0\0\2", "crypt_method is 2: encryption is not supported"),
    "encryption 3": (32, b"\0\0\0\3", "crypt"),
    "L1 table of 16 GiB": (36, b"\x7f\xff\xff\xff", "l1_size"),
    "L1 table too small": (36, b"\0\0\0\0", "l1_size"),
    "L1 table within a cluster": (40, struct.pack(">Q", 0x30200), "l1_table_offset"),
    "L1 table at the end of the world": (40, b"\x7f" + b"\xff" * 5 + b"\0\0", "l1_table_offset"),
    "refcount table within a cluster": (48, struct.pack(">Q", 0x10200), "refcount_table_offset"),
    "refcount table of 2**32 clusters": (56, b"\xff" * 4, "refcount_table_clusters"),
    "no refcount table": (56, bytes(4), "refcount_table_clusters"),
    "2**32 snapshots": (60, b"\xff" * 4, "snapshots"),
    "unknown incompatible feature": (72, b"\x80" + bytes(7), "incompatible"),
    "marked corrupt": (72, bytes(7) + b"\2", "corrupt"),
    "external data file": (72, bytes(7) + b"\4", "data file"),
    "refcounts of 128 bits": (96, b"\0\0\0\7", "refcount_order"),
    "header of 4 GiB": (100, b"\xff" * 4, "header_length"),
    "header of 4 bytes": (100, b"\0\0\0\4", "header_length"),
    "extension of 2 GiB": (116, b"\x7f\xff\xff\xff", "extension"),
}


@pytest.mark.parametrize("key", ["hidden", "active"])
async def test_every_poke_into_an_overlays_header_is_refused_by_file_and_field(
    setup: Setup, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.make_overlays()
    monkeypatch.chdir(setup.folder)
    good = setup.path(key).read_bytes()
    members = {key.replace("-", "_"): value for key, value in setup.table.items()}
    for what, (offset, poke, field) in HEADER_POKES.items():
        setup.path(key).write_bytes(good[:offset] + poke + good[offset + len(poke) :])
        before = fingerprints(setup.folder)
        standby = Standby([DiskConfig(**members)])
        with pytest.raises(ReplnbdError) as caught:
            await standby.__aenter__()
        message = str(caught.value)
        print(f"{what}: {message}")
        assert "\n" not in message
        assert message.startswith(f"{setup.path(key)}: "), what
        assert field.lower() in message.lower(), what
        assert fingerprints(setup.folder) == before, what


@pytest.mark.parametrize("key", ["hidden", "active"])
def test_a_damaged_overlay_is_refused_by_the_command_in_one_line(setup: Setup, key: str) -> None:
    setup.make_overlays()
    with setup.path(key).open("r+b") as file:
        file.seek(HEADER_POKES["L1 table within a cluster"][0])
        file.write(HEADER_POKES["L1 table within a cluster"][1])
    line = refused(setup)
    assert line.startswith(f"./d.{key}: ")
    assert "l1_table_offset" in line


# Section: sockets and names


def test_a_tcp_port_in_use_is_refused_by_its_uri(setup: Setup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        setup.listen.append(f"nbd://127.0.0.1:{port}")
        assert refused(setup) == (
            f"cannot listen on nbd://127.0.0.1:{port}: the address is in use by another process"
        )


def test_a_unix_socket_in_use_is_refused_and_left_to_its_owner(setup: Setup) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{setup.folder}/nbd")
        other.listen()
        assert refused(setup) == (
            "cannot listen on nbd+unix:///?socket=./nbd: another process listens on ./nbd"
        )


def test_a_control_socket_in_use_is_refused_and_left_to_its_owner(setup: Setup) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(setup.control)
        other.listen()
        assert refused(setup) == (
            "control socket ./qmp: in use by another process, stop that one first"
        )


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ("d.raw", "the file exists and is no socket"),
        ("gone/qmp", "No such file or directory"),
        ("d.raw/qmp", "Not a directory"),
        ("x" * 120, "AF_UNIX path too long"),
    ],
)
async def test_a_control_socket_that_cannot_be_is_refused(
    setup: Setup, control: str, reason: str
) -> None:
    setup.control = control
    assert await refused_in_process(setup) == f"control socket ./{control}: {reason}"


URIS = {
    "http://localhost": "not an NBD URI (nbd://HOST:PORT or nbd+unix:///?socket=PATH)",
    "/run/nbd.sock": "not an NBD URI (nbd://HOST:PORT or nbd+unix:///?socket=PATH)",
    "nbds://localhost": "TLS needs credentials, a table [tls]",
    "nbd://localhost:99999": "Port out of range 0-65535",
    "nbd://localhost:port": "Port could not be cast to integer value as 'port'",
    "nbd://[::1": "Invalid IPv6 URL",
    "nbd://localhost/d": "an export name does not belong here",
    "nbd://localhost?a=b": "unknown parameter 'a'",
    "nbd+unix:///": "it must read nbd+unix:///?socket=PATH",
    "nbd+unix:///d?socket=/x": "an export name does not belong here",
    "nbd+unix:///?socket=gone/nbd": "No such file or directory",
    "nbd+unix:///?socket=d.raw": "./d.raw exists and is not a socket",
}


@pytest.mark.parametrize("uri", URIS)
async def test_a_bad_nbd_uri_is_refused(setup: Setup, uri: str) -> None:
    setup.listen.append(uri)
    shown = uri.replace("socket=gone", "socket=./gone").replace("socket=d.raw", "socket=./d.raw")
    assert await refused_in_process(setup) == f"cannot listen on {shown}: {URIS[uri]}"


def test_a_bad_nbd_uri_is_refused_by_the_command_in_one_line(setup: Setup) -> None:
    setup.listen.append("nbd://localhost:99999")
    assert refused(setup).startswith("cannot listen on nbd://localhost:99999: ")


# Section: who has the files already


@pytest.mark.parametrize("shared", ["secondary", "hidden", "active"])
def test_a_second_daemon_on_one_of_the_files_is_refused_and_the_first_goes_on(
    short_dir: Path, shared: str
) -> None:
    (short_dir / "1").mkdir()
    (short_dir / "2").mkdir()
    first, second = Setup(short_dir / "1"), Setup(short_dir / "2")
    with first.serve() as running:
        running.start()
        second.table[shared] = str(first.path(shared))
        view = running.connect("d-top")
        running.connect("d").pwrite(0, b"after the checkpoint")
        assert refused(second).replace(str(first.folder), ".") == f"./d.{IN_USES[shared]}"
        assert view.pread(0, SIZE) == pattern(1)
        running.connect("d").pwrite(SIZE - 3, b"end")
        assert view.pread(0, SIZE) == pattern(1)


IN_USES = {
    "secondary": f"raw {IN_USE}",
    "hidden": f"hidden.journal {IN_USE}",  # which stands beside it
    "active": f"active {IN_USE}",
}


@pytest.mark.parametrize("key", ["secondary", "hidden", "active"])
def test_a_file_that_qemu_has_open_is_refused(setup: Setup, key: str) -> None:
    setup.make_overlays()
    format_ = "raw" if key == "secondary" else "qcow2"
    # Its backing files stay closed: each file is to be refused for itself.
    options = [] if key == "secondary" else ["backing="]
    image = ",".join([f"driver={format_},file.filename={setup.path(key)}", *options])
    command = ["qemu-io", "--image-opts", image]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as qemu_io:
        assert qemu_io.stdin is not None
        assert qemu_io.stdout is not None
        qemu_io.stdin.write(b"length\n")
        qemu_io.stdin.flush()
        while b"1 MiB" not in (line := qemu_io.stdout.readline()):
            assert line, "qemu-io has ended"
        line_of_ours = refused(setup)
        qemu_io.stdin.close()
        assert qemu_io.wait() == 0
    assert line_of_ours == f"./{setup.path(key).name} {IN_USE}"


def test_qemu_is_refused_the_files_of_a_daemon(setup: Setup) -> None:
    with setup.serve():
        for key, format_ in (("secondary", "raw"), ("hidden", "qcow2"), ("active", "qcow2")):
            command = ["qemu-io", "-f", format_, "-c", "write 0 512", str(setup.path(key))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert "lock" in done.stderr


# Section: file systems


def test_overlays_on_a_read_only_file_system_are_refused(setup: Setup) -> None:
    with tmpfs(setup.folder, pages=1024) as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        setup.table["hidden"] = "disk/d.hidden"
        assert refused(setup) == "cannot create ./disk/d.hidden: Read-only file system"


def test_a_secondary_disk_on_a_read_only_file_system_is_refused(setup: Setup) -> None:
    with tmpfs(setup.folder, pages=1024) as place:
        (place / "d.raw").write_bytes(pattern(1))
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        setup.table["secondary"] = "disk/d.raw"
        assert refused(setup) == "cannot open ./disk/d.raw: Read-only file system"


def test_without_space_for_an_overlay_no_new_file_is_left(setup: Setup) -> None:
    with tmpfs(setup.folder, pages=2) as place:
        setup.table["active"] = "disk/d.active"
        assert refused(setup) == "cannot create ./disk/d.active: No space left on device"
        assert not list(place.iterdir())


async def test_space_that_ends_at_any_page_while_overlays_are_made_leaves_no_new_file(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tmpfs(setup.folder, pages=32) as place:
        monkeypatch.chdir(place)
        disk = DiskConfig(
            name="d", mode="secondary", top_id="top", secondary=str(setup.path("secondary")),
            hidden="d.hidden", active="d.active",
        )  # fmt: skip
        messages = []
        for pages in range(32):
            (place / "filler").write_bytes(bytes((31 - pages) * 4096))
            before = fingerprints(place)
            standby = Standby([disk])
            try:
                await standby.__aenter__()
            except ConfigError as exc:
                messages.append(str(exc))
                assert fingerprints(place) == before
            else:
                await standby.__aexit__()
                break
        assert len(messages) == pages > 2
        assert {message.partition(": ")[2] for message in messages} == {"No space left on device"}


# Section: signals while it starts


def test_an_interrupt_before_it_is_ready_ends_it_in_order(setup: Setup) -> None:
    setup.write()
    command = [*REPLNBD, "serve", str(setup.config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.terminate()
        rest = process.stderr.read()
        assert process.wait(5) == 0, first + rest
    assert "Traceback" not in rest
    assert rest.endswith("INFO replnbd: ended\n")


async def test_a_refused_standby_can_be_tried_again(setup: Setup) -> None:
    setup.path("hidden").write_bytes(b"garbage")
    disk = DiskConfig(
        name="d", mode="secondary", top_id="top",
        secondary=str(setup.path("secondary")),
        hidden=str(setup.path("hidden")), active=str(setup.path("active")),
    )  # fmt: skip
    for _ in range(3):
        with pytest.raises(ReplnbdError):
            async with Standby([disk]):
                pass
    setup.path("hidden").unlink()
    async with Standby([disk]) as standby:
        await standby.start()
