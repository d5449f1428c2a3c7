"""The daemon as a service: who may connect, how many at a time, and for how long without a word."""

from __future__ import annotations

import json
import re
import struct
import subprocess

import pytest
from daemon_support import SIZE, Running, Setup, pattern
from peers import NbdReplyError, list_exports, run_replnbd, wait_until
from peers.nbd_client import CMD_READ, REQUEST_MAGIC

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def clients_line(running: Running) -> str:
    """What `replnbd status` says of the clients of the first disk."""
    done = run_replnbd("status", "--control", running.control_socket)
    found = re.search(r"primary clients [^;]*; standby clients [^;\n]*", done.stdout)
    assert found is not None, done
    return found[0]


def test_the_sockets_have_their_modes(setup: Setup) -> None:
    setup.server["socket-mode"] = "0660"
    with setup.serve(prefix=["sh", "-c", 'umask 077; exec "$@"', "sh"]) as running:
        assert running.nbd_socket.stat().st_mode & 0o7777 == 0o660
        assert running.control_socket.stat().st_mode & 0o7777 == 0o600


def test_a_single_primary_is_guarded(setup: Setup) -> None:
    setup.table["max-connections"] = 1
    setup.table["top-max-connections"] = 2
    with setup.serve() as running:
        assert clients_line(running) == "primary clients 0 of 1; standby clients 0 of 2"
        running.start()
        primary = running.connect("d")
        standby = [running.connect("d-top") for _ in range(2)]
        assert clients_line(running) == "primary clients 1 of 1; standby clients 2 of 2"
        for export, said in (("d", "1 of 1"), ("d-top", "2 of 2")):
            with pytest.raises(NbdReplyError, match=f"'{export}' has {said} connections in use"):
                running.connect(export)
        assert [each.name for each in list_exports(running.nbd_socket)] == ["d", "d-top"]
        primary.pwrite(0, b"mine alone")
        primary.close()
        wait_until(lambda: running.disk()["primary-connections"] == 0, "the place to be free")
        assert running.connect("d").pread(0, 10) == b"mine alone"
        standby[0].close()
        wait_until(lambda: running.disk()["standby-connections"] == 1, "the place to be free")
        assert running.connect("d-top").pread(0, SIZE) == pattern(1)


def test_where_one_client_may_come_libnbd_s_tools_open_one_connection(setup: Setup) -> None:
    setup.table["max-connections"] = 1
    source = setup.folder / "source"
    source.write_bytes(pattern(2))
    with setup.serve() as running:
        uri = f"nbd+unix:///{{}}?socket={running.nbd_socket}"
        for export, several in (("d", False), ("d-top", True)):
            done = subprocess.run(
                ["nbdinfo", "--json", uri.format(export)],
                capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            assert json.loads(done.stdout)["exports"][0]["can_multi_conn"] is several
        subprocess.run(["nbdcopy", source, uri.format("d")], check=True, timeout=60)
        assert running.connect("d").pread(0, SIZE) == pattern(2)


def test_what_is_exported_at_run_time_has_no_limit_and_takes_no_place(setup: Setup) -> None:
    setup.table["max-connections"] = 1
    with setup.serve() as running:
        node = running.qmp.execute("query-block-exports")[0]["node-name"]
        running.qmp.execute(
            "nbd-server-add", {"device": node, "name": "also", "writable": True}
        )  # fmt: skip
        first, second = running.connect("also"), running.connect("also")
        primary = running.connect("d")
        for client in (first, second, primary):
            client.pwrite(0, b"x")
        assert clients_line(running) == "primary clients 3; standby clients 0"


def test_a_listener_takes_no_more_clients_than_it_may(setup: Setup) -> None:
    setup.server["max-connections"] = 3
    with setup.serve() as running:
        # Those who have looked whether it listens may not be gone yet.
        reach = running.process.reach
        clients = [reach(lambda: running.connect("d-top")) for _ in range(3)]
        with pytest.raises(ConnectionError):
            running.connect("d-top")
        assert "3 clients connected on nbd+unix://" in running.log
        clients[0].close()
        assert reach(lambda: running.connect("d")).pread(0, SIZE) == pattern(1)


def test_who_says_nothing_for_too_long_is_dropped(setup: Setup) -> None:
    setup.server["idle-timeout"] = 0.3
    with setup.serve() as running:
        idle = running.connect("d")
        with pytest.raises(ConnectionError):
            idle._wire.receive(1)
        assert "(unix): dropped from export d: nothing came from it for 0.3 s" in running.log
        idle.close()
        wait_until(lambda: running.disk()["primary-connections"] == 0, "the place to be free")
        assert running.connect("d").pread(0, SIZE) == pattern(1)


def test_who_takes_none_of_its_replies_for_too_long_is_dropped(setup: Setup) -> None:
    setup.server["write-timeout"] = 0.3
    with setup.serve() as running:
        deaf, other = running.connect("d"), running.connect("d")
        for cookie in range(32):
            deaf._wire.sock.sendall(
                struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, cookie, 0, SIZE)
            )
        wait_until(lambda: running.disk()["primary-connections"] == 1, "it to be dropped")
        assert "dropped from export d: it took none of its replies for 0.3 s" in running.log
        assert other.pread(0, SIZE) == pattern(1)
