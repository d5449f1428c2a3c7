"""Bad input while the daemon runs: one clear answer, everybody else is served, no file changes."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern
from peers import NbdClient, NbdReplyError, fingerprints, qemu_img, refusal, run_replnbd, wait_until
from peers.nbd_client import CMD_READ, CMD_WRITE, REQUEST_MAGIC, connect

pytestmark = [pytest.mark.interop, pytest.mark.slow]


# Section: what only a start can refuse, with QEMU's texts


def active_is_short(setup: Setup) -> None:
    setup.make_overlays()
    options = ("-b", "d.hidden", "-F", "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", *options, setup.path("active"), str(SIZE - 512))


def hidden_is_long(setup: Setup) -> None:
    setup.make_overlays()
    options = ("-b", "d.raw", "-F", "raw")
    qemu_img("create", "-q", "-f", "qcow2", *options, setup.path("hidden"), str(SIZE + 512))


def secondary_is_short(setup: Setup) -> None:
    setup.make_overlays()
    os.truncate(setup.path("secondary"), SIZE - 512)


def active_has_no_backing_file(setup: Setup) -> None:
    setup.make_overlays()
    qemu_img("create", "-q", "-f", "qcow2", setup.path("active"), str(SIZE))


def hidden_has_no_backing_file(setup: Setup) -> None:
    setup.make_overlays()
    qemu_img("create", "-q", "-f", "qcow2", setup.path("hidden"), str(SIZE))


LENGTHS = "Active disk, hidden disk, secondary disk's length are not the same"
AT_START: dict[Callable[[Setup], None], str] = {
    active_is_short: LENGTHS,
    hidden_is_long: LENGTHS,
    secondary_is_short: LENGTHS,
    active_has_no_backing_file: "Active disk doesn't have backing file",
    hidden_has_no_backing_file: "Hidden disk doesn't have backing file",
}


@pytest.mark.parametrize("damage", AT_START, ids=lambda damage: damage.__name__)
def test_overlays_that_do_not_fit_are_refused_by_start_with_qemus_text(
    setup: Setup, damage: Callable[[Setup], None]
) -> None:
    damage(setup)
    setup.write()
    before = fingerprints(setup.folder)
    with setup.serve() as running:
        for _ in range(2):
            done = run_replnbd("start", "--control", setup.control)
            assert refusal(done) == f"replnbd: {AT_START[damage]}"
        assert running.disk()["stage"] == "none"
        assert running.qmp.execute("query-jobs") == []
        status = running.qmp.execute("query-xen-replication-status")
        assert status == {"error": True, "desc": "Block replication is not running"}
        with pytest.raises(NbdReplyError) as caught:
            running.connect("d-top").pread(0, 512)
        assert caught.value.errno == errno.EIO
        running.connect("d").pwrite(0, b"initial sync goes on")
        running.connect("d").pwrite(0, pattern(1)[:20])
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log
    assert fingerprints(setup.folder) == before


def test_one_disk_that_does_not_fit_keeps_the_whole_group_from_starting(setup: Setup) -> None:
    group = Setup(setup.folder, "a", "d")
    hidden_is_long(setup)
    with group.serve() as running:
        assert refusal(run_replnbd("start", "--control", group.control)) == f"replnbd: {LENGTHS}"
        assert [running.disk(number)["stage"] for number in range(2)] == ["none", "none"]
        # Made right, it can be tried again, on all of them.
        assert running.process.terminate() == 0
    setup.path("hidden").unlink()
    with group.serve() as running:
        assert run_replnbd("start", "--control", group.control).stdout == "a: running\nd: running\n"


def test_a_secondary_disk_that_another_shortens_fails_no_more_than_its_reads(
    setup: Setup,
) -> None:
    with setup.serve() as running:
        running.start()
        os.truncate(setup.path("secondary"), SIZE // 2)
        assert running.connect("d").pread(0, SIZE) == pattern(1)[: SIZE // 2] + bytes(SIZE // 2)
        running.connect("d").pwrite(SIZE - 1, b"x")
        running.stop()
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log


# Section: a qcow2 secondary disk that is damaged further in


def test_a_bad_cluster_of_one_disk_is_its_readers_error_and_no_other_disk_suffers(
    setup: Setup,
) -> None:
    group = Setup(setup.folder, "a", "d")
    group.table["format"] = "qcow2"
    group.path("secondary").unlink()
    qemu_img(
        "convert", "-f", "raw", "-O", "qcow2", group.path("secondary", 1), group.path("secondary")
    )
    image = bytearray(group.path("secondary").read_bytes())
    (l1,) = struct.unpack_from(">Q", image, 40)
    l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", image, l2 + 3 * 8, 0x80FFFFFFFFFF0000)  # the 4th cluster: 64 PiB on
    group.path("secondary").write_bytes(image)
    with group.serve() as running:
        damaged, good = running.connect("a"), running.connect("d")
        assert damaged.pread(0, 3 << 16) == pattern(1)[: 3 << 16]
        with pytest.raises(NbdReplyError) as caught:
            damaged.pread(3 << 16, 512)
        assert caught.value.errno == errno.EIO
        assert damaged.pread(4 << 16, 1 << 16) == pattern(1)[4 << 16 : 5 << 16]
        good.pwrite(0, b"served")
        assert good.pread(0, SIZE) == b"served" + pattern(1)[6:]
        told = [line for line in running.log.splitlines() if str(group.path("secondary")) in line]
        assert any("80ffffffffff0000" in line.lower() or "offset" in line for line in told), told
        assert running.disk(0)["primary-errors"] == 1
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log


# Section: clients that send garbage, while another is served


def go(export: str) -> bytes:
    """Client flags and NBD_OPT_GO."""
    name = export.encode()
    body = struct.pack(">I", len(name)) + name + bytes(2)
    return struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(body)) + body


def request(command: int, offset: int, length: int, magic: int = REQUEST_MAGIC) -> bytes:
    """A request's header."""
    return struct.pack(">IHHQQI", magic, 0, command, 1, offset, length)


GIB4 = 0xFFFFFFFF
GARBAGE = {
    "nothing": b"",
    "noise for flags": b"\xff" * 4,
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "QMP": b'{"execute": "qmp_capabilities"}\n',
    "half of the flags": b"\0\0",
    "noise for an option": struct.pack(">I", 3) + pattern(9, 5000),
    "an option of 4 GiB": struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 6, GIB4),
    "half an option": go("d")[:-3],
    "no such export": go("nosuch"),
    "noise for a request": go("d") + pattern(10, 5000),
    "a request of a wrong magic": go("d") + request(CMD_READ, 0, 512, 0x25609514),
    "half a request": go("d") + request(CMD_READ, 0, 512)[:-1],
    "a read of 4 GiB": go("d") + request(CMD_READ, 0, GIB4),
    "a read far beyond": go("d") + request(CMD_READ, 2**64 - 512, 512),
    "a write of 4 GiB": go("d") + request(CMD_WRITE, 0, GIB4) + b"\xee" * 100_000,
    "a write beyond": go("d") + request(CMD_WRITE, SIZE - 1, 512) + b"\xee" * 512,
    "half a write": go("d") + request(CMD_WRITE, 0, 65536) + b"\xee" * 65535,
    "half a write to the view": go("d-top") + request(CMD_WRITE, 0, 65536) + b"\xee" * 65535,
    "a command that is none": go("d-top") + request(99, 0, 512),
}


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_clients_that_send_garbage_at_any_point_disturb_nobody_and_change_nothing(
    setup: Setup, transport: str
) -> None:
    setup.listen.append("nbd://127.0.0.1:0")
    with setup.serve() as running:
        running.start()
        address: tuple[str, int] | str = str(running.nbd_socket)
        if transport == "tcp":
            uri = running.qmp.execute("x-replnbd-status")["listen"][1]
            address = ("127.0.0.1", int(uri.rpartition(":")[2]))
        primary, view = running.connect("d"), running.connect("d-top")
        secondary, standby = bytearray(pattern(1)), bytearray(pattern(1))
        for number, (what, garbage) in enumerate(GARBAGE.items()):
            with connect(address, timeout_s=10) as bad:
                send_all_of(bad, garbage)
                offset, data = number * 512, f"served beside {what}".encode()
                primary.pwrite(offset, data)
                secondary[offset : offset + len(data)] = data
                view.pwrite(SIZE // 2 + offset, data)
                standby[SIZE // 2 + offset : SIZE // 2 + offset + len(data)] = data
                hang_up(bad)
            assert primary.pread(0, SIZE) == secondary, what
            assert view.pread(0, SIZE) == standby, what
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log
        assert " ERROR " not in running.log
    assert setup.path("secondary").read_bytes() == secondary
    check_overlays(setup)


def send_all_of(sock: socket.socket, data: bytes) -> None:
    """Send, even if the server has enough of it before the end."""
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError, OSError):
        pass


def hang_up(sock: socket.socket) -> None:
    """Read what the server says until it closes, as it must without any more from us."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass


QMP_GARBAGE = {
    "nothing": (b"", None),
    "noise": (pattern(11, 5000), b"GenericError"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", b"GenericError"),
    "NBD": (go("d"), b"GenericError"),
    "half an object": (b'{"execute": "qmp_ca', None),
    "no object": (b"[1, 2]\n", b"QMP input must be a JSON object"),
    "brackets": (b"[" * 100_000, b"GenericError"),
    "a command before negotiation": (b'{"execute": "quit"}\n', b"qmp_capabilities"),
    "a command that is none": (
        b'{"execute": "qmp_capabilities"}\n{"execute": "nope"}\n',
        b"The command nope has not been found",
    ),
    "wrong arguments": (
        b'{"execute": "qmp_capabilities"}\n'
        b'{"execute": "xen-set-replication", "arguments": {"enable": 1, "primary": false}}\n',
        b"Invalid parameter type for 'enable', expected: boolean",
    ),
}


def test_garbage_on_the_control_socket_gets_an_error_and_other_sessions_go_on(
    setup: Setup,
) -> None:
    with setup.serve() as running:
        running.start()
        for what, (garbage, answer) in QMP_GARBAGE.items():
            with connect(setup.control, timeout_s=10) as bad:
                send_all_of(bad, garbage)
                assert running.disk()["stage"] == "running", what
                received = b""
                while data := bad.recv(65536):
                    received += data
                assert received.startswith(b'{"QMP"'), what
                assert answer is None or answer in received, what
        running.checkpoint()
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log


def test_more_silent_clients_than_there_may_be_leave_the_others_and_the_control_alone(
    setup: Setup,
) -> None:
    """CVE-2024-7409; with the 1024 files that systemd gives, and the 4096 it lets us take."""
    with setup.serve(prefix=["prlimit", "--nofile=1024:4096"]) as running:
        primary = running.connect("d")
        silent = [connect_soon(running) for _ in range(1100)]
        primary.pwrite(0, b"served")
        refused = "1024 clients connected, the most allowed: refused 1 so far"
        wait_until(lambda: refused in running.log, "the first refusal")
        assert running.connect_qmp().execute("x-replnbd-status")["disks"][0]["stage"] == "none"
        primary.pwrite(0, b"SERVED")
        for sock in silent:
            sock.close()
        assert running.process.reach(lambda: connect_again(running)).pread(0, 6) == b"SERVED"
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log


def connect_soon(running: Running) -> socket.socket:
    """A connection that sends nothing; waits while the daemon has others to accept."""
    sock = socket.socket(socket.AF_UNIX)
    while sock.connect_ex(str(running.nbd_socket)):
        os.sched_yield()
    return sock


def connect_again(running: Running) -> NbdClient:
    try:
        return running.connect("d")
    except ConnectionResetError as exc:  # one too many, still
        raise ConnectionRefusedError from exc
