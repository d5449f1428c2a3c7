"""Socket activation: sockets that are passed take the place of those in the configuration."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_support import SIZE, Setup, pattern
from peers import REPLNBD, NbdClient, list_exports, refusal, run_replnbd

from replnbd.daemon.activation import PassedSockets, take_passed_sockets
from replnbd.errors import ConfigError

pytestmark = [pytest.mark.interop, pytest.mark.slow]

ACTIVATE = (sys.executable, str(Path(__file__).with_name("activate.py")))
O_CLOEXEC = 0o2000000


def activating(*words: str) -> list[str]:
    """The words before a command, so that it gets these sockets."""
    return [*ACTIVATE, *words, "--"]


def test_passed_sockets_take_the_place_of_the_configured_ones(setup: Setup) -> None:
    nbd, control = setup.folder / "nbd", setup.folder / "qmp"
    setup.listen = [f"nbd+unix:///?socket={setup.folder}/not-used"]
    setup.control = f"{setup.folder}/not-used.qmp"
    prefix = activating(f"unix:replnbd.socket:{nbd}", f"unix:control:{control}", "tcp::0")
    with setup.serve(prefix=prefix) as running:
        assert [export.name for export in list_exports(nbd)] == ["d", "d-top"]
        running.start()
        unix, *tcp = running.qmp.execute("x-replnbd-status")["listen"]
        assert unix == f"nbd+unix:///?socket={nbd}"
        port = int(tcp[0].removeprefix("nbd://127.0.0.1:"))
        client = NbdClient(("127.0.0.1", port), "d-top")
        assert client.pread(0, SIZE) == pattern(1)
        client.close()
        for descriptor in (3, 4, 5):
            fdinfo = Path(f"/proc/{running.process.pid}/fdinfo/{descriptor}").read_text()
            found = re.search(r"^flags:\s+(\d+)$", fdinfo, re.MULTILINE)
            assert found is not None
            assert int(found[1], 8) & O_CLOEXEC
            assert int(found[1], 8) & os.O_NONBLOCK
        assert "key 'listen' is not used: sockets were passed to us" in running.log
        assert running.process.terminate() == 0
        assert "Traceback" not in running.log
    names = {path.name for path in setup.folder.iterdir() if path.is_socket()}
    assert names == {"nbd", "qmp"}  # theirs to remove who made them


def test_a_passed_control_socket_leaves_the_configured_listeners_alone(setup: Setup) -> None:
    prefix = activating(f"unix:control:{setup.folder}/qmp")
    setup.control = f"{setup.folder}/not-used.qmp"
    with setup.serve(prefix=prefix) as running:
        assert running.connect("d").pread(0, SIZE) == pattern(1)
        assert running.process.terminate() == 0
    assert not (setup.folder / "nbd").exists()
    assert (setup.folder / "qmp").is_socket()


def test_sockets_for_another_process_are_left_alone(setup: Setup) -> None:
    """As when a shell that was activated runs us without passing them on."""
    with setup.serve(prefix=["env", "LISTEN_PID=1", "LISTEN_FDS=1"]) as running:
        assert running.connect("d").pread(0, SIZE) == pattern(1)
        running.process.terminate()
        running.ended_well()


REFUSED = {
    "nothing": (["nothing::"], "descriptor 3 ('') cannot be used: Bad file descriptor"),
    "a file": (["file:x:file"], "descriptor 3 ('x') cannot be used: Socket operation on non"),
    "a datagram socket": (
        ["unix:x:s", "datagram:y:d"],
        "descriptor 4 ('y') is not a stream socket that listens (Accept=no)",
    ),
    "a socket that does not listen": (
        ["stream:x:"],
        "descriptor 3 ('x') is not a stream socket that listens (Accept=no)",
    ),
    "QMP for everyone": (["tcp:control:0"], "descriptor 3 ('control') is not a unix socket"),
    "control twice": (
        ["unix:control:a", "unix:control:b"],
        "LISTEN_FDNAMES: more than one socket is called 'control'",
    ),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_nobody_can_listen_on_is_refused_in_one_line(
    setup: Setup, words: list[str], said: str
) -> None:
    setup.write()
    done = run_replnbd("serve", setup.config, cwd=setup.folder, prefix=activating(*words))
    assert refusal(done).removeprefix("replnbd: ").removeprefix("LISTEN_FDS: ").startswith(said)
    assert not setup.path("hidden").exists()


def test_a_family_that_carries_no_nbd_is_refused() -> None:
    """Netlink, as systemd can pass it."""
    script = (
        "import os, socket\n"
        "sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\n"
        "os.dup2(sock.fileno(), 3)\n"
        "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}\n"
        "from replnbd.daemon.activation import take_passed_sockets\n"
        "try:\n"
        "    take_passed_sockets()\n"
        "except Exception as exc:\n"
        "    print(repr(exc), [name for name in os.environ if name.startswith('LISTEN_')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    said = "LISTEN_FDS: descriptor 3 ('') is not a unix or TCP socket"
    assert done.stdout == f'ConfigError("{said}") []\n'


@pytest.mark.parametrize("count", ["", "x", "-1", "1.0"])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
    with pytest.raises(ConfigError, match=f"^LISTEN_FDS is no number: '{count}'$"):
        take_passed_sockets(environ)


def test_the_variables_are_gone_afterwards() -> None:
    """Also when they are not for us: nobody whom we start shall take them for theirs."""
    for process in (str(os.getpid()), "1", ""):
        environ = {"LISTEN_PID": process, "LISTEN_FDS": "0", "LISTEN_FDNAMES": "", "PATH": "/bin"}
        assert take_passed_sockets(environ) == PassedSockets()
        assert environ == {"PATH": "/bin"}


# Section: the programs that do it

NBDSH = ["/usr/bin/env", "PATH=/usr/bin:/bin", "nbdsh"]  # its module belongs to Debian's Python


def secondary(setup: Setup) -> list[str]:
    """The command line of one disk."""
    words = ["secondary", str(setup.path("secondary")), "--control", setup.control, "--start"]
    return [*REPLNBD, *words]


def test_libnbd_starts_a_secondary_and_works_on_its_disk(setup: Setup) -> None:
    script = f"""
h.set_export_name("d")
h.connect_systemd_socket_activation({secondary(setup)!r})
h.pwrite(b"by libnbd", 3)
print(h.pread(16, 0))
h.shutdown()
"""
    done = subprocess.run(
        [*NBDSH, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    expected = bytearray(pattern(1))
    expected[3:12] = b"by libnbd"
    assert done.stdout.strip() == repr(expected[:16])
    assert "a socket that was passed to us" in done.stderr


def test_nbdinfo_lists_a_secondary_that_it_has_started(setup: Setup) -> None:
    done = subprocess.run(
        ["nbdinfo", "--list", "--", "[", *secondary(setup), "]"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert re.findall(r'^export="(.*)":$', done.stdout, re.MULTILINE) == ["d", "d-top"]


def test_systemd_starts_it_for_its_first_client(setup: Setup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    prefix = ["systemd-socket-activate", f"--listen={setup.folder}/nbd", f"--listen={port}"]
    prefix += [f"--listen={setup.folder}/qmp", "--fdname=nbd:nbd:control"]
    with setup.serve(prefix=prefix) as running:
        assert running.connect("d").pread(0, SIZE) == pattern(1)
        client = NbdClient(("127.0.0.1", port), "d")
        client.pwrite(0, b"over TCP")
        client.close()
        assert running.disk()["primary-bytes-written"] == 8
        assert running.process.terminate() == 0
