"""What a service manager is told (sd_notify): by a real daemon, on a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_support import Running, Setup
from peers import refusal, run_replnbd

from replnbd.daemon.notify import Notifier

pytestmark = [pytest.mark.interop, pytest.mark.slow]


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self.sock.settimeout(30)

    def receive(self) -> dict[str, str]:
        """The next message."""
        lines = self.sock.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def rest(self) -> list[dict[str, str]]:
        """What has come and was not received yet."""
        self.sock.settimeout(0)
        messages = []
        try:
            while True:
                messages.append(self.receive())
        except BlockingIOError:
            return messages

    def overflow(self) -> None:
        """Let no more come in than has come."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            try:
                while True:
                    sender.sendto(b"x=", self.address)
            except BlockingIOError:
                pass


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Manager]:
    """Listening at a path, or at a name without a file."""
    listening = Manager(f"{'@' if request.param == 'abstract' else ''}{short_dir}/notify")
    yield listening
    listening.sock.close()


def environment(manager: Manager, *more: str) -> list[str]:
    """The words before a command, so that it knows of the manager."""
    return ["env", f"NOTIFY_SOCKET={manager.address}", *more]


def end(running: Running) -> None:
    running.process.terminate()
    running.ended_well()


def test_it_is_told_when_clients_are_served_and_when_the_end_begins(
    setup: Setup, manager: Manager
) -> None:
    with setup.serve(prefix=environment(manager)) as running:
        where = f"NBD on nbd+unix:///?socket={setup.folder}/nbd, QMP on {setup.folder}/qmp"
        assert manager.receive() == {"READY": "1", "STATUS": where}
        assert manager.rest() == []
        end(running)
    assert manager.rest() == [{"STOPPING": "1", "STATUS": "draining and flushing"}]


def test_the_watchdog_is_fed_until_the_end(setup: Setup, manager: Manager) -> None:
    with setup.serve(prefix=environment(manager, "WATCHDOG_USEC=100000")) as running:
        assert manager.receive()["READY"] == "1"
        for _ in range(5):
            assert manager.receive() == {"WATCHDOG": "1"}
        end(running)
    assert [message for message in manager.rest() if message != {"WATCHDOG": "1"}] == [
        {"STOPPING": "1", "STATUS": "draining and flushing"}
    ]


def test_the_watchdog_of_another_process_is_not_fed(setup: Setup, manager: Manager) -> None:
    prefix = environment(manager, "WATCHDOG_USEC=1000", "WATCHDOG_PID=1")
    with setup.serve(prefix=prefix) as running:
        end(running)
    assert [next(iter(message)) for message in manager.rest()] == ["READY", "STOPPING"]


def test_a_manager_is_not_told_of_a_start_that_fails(setup: Setup, manager: Manager) -> None:
    setup.path("secondary").unlink()
    setup.write()
    refusal(run_replnbd("serve", setup.config, prefix=environment(manager)))
    assert manager.rest() == []


@pytest.mark.parametrize("ear", ["gone", "full"])
def test_a_manager_that_does_not_listen_is_not_waited_for(setup: Setup, ear: str) -> None:
    manager = Manager(f"{setup.folder}/notify")
    if ear == "gone":
        manager.sock.close()
    else:
        manager.overflow()
    with setup.serve(prefix=environment(manager, "WATCHDOG_USEC=10000000")) as running:
        assert running.disk()["stage"] == "none"
        end(running)
        assert running.log.count("cannot tell the service manager 'READY=1': ") == 1
        assert running.log.count("cannot tell the service manager 'STOPPING=1': ") == 1
    manager.sock.close()


def test_a_watchdog_time_that_is_none_is_refused_in_one_line(setup: Setup) -> None:
    setup.write()
    done = run_replnbd("serve", setup.config, prefix=["env", "WATCHDOG_USEC=soon"])
    assert refusal(done) == "replnbd: WATCHDOG_USEC is no number: 'soon'"


def test_the_variables_are_gone_afterwards() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Notifier.from_environment(environ)
    assert environ == {"PATH": "/bin"}


def test_a_loop_that_hangs_does_not_feed_the_watchdog(manager: Manager) -> None:
    async def serve() -> None:
        notifier = Notifier.from_environment(
            {
                "NOTIFY_SOCKET": manager.address,
                "WATCHDOG_USEC": "2000",
                "WATCHDOG_PID": str(os.getpid()),
            }
        )
        notifier.ready("")
        assert await asyncio.to_thread(manager.receive) == {"READY": "1", "STATUS": ""}
        for _ in range(3):
            assert await asyncio.to_thread(manager.receive) == {"WATCHDOG": "1"}
        manager.rest()
        manager.sock.settimeout(0.05)  # here the loop hangs: 25 times as long as allowed
        with pytest.raises(TimeoutError):
            manager.receive()
        manager.sock.settimeout(30)
        assert await asyncio.to_thread(manager.receive) == {"WATCHDOG": "1"}
        notifier.close()
        manager.rest()
        await asyncio.sleep(0)
        assert manager.rest() == []

    asyncio.run(serve())
