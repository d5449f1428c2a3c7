"""Targets that refuse, fail, are full, or go away: the primary's client is told nothing of it, its
manager is, in one line, and when the target is well again both disks are equal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_support import (
    FAILED,
    GRANULE,
    HEALTHY,
    IMPATIENT,
    REFUSED_SOON,
    SIZE,
    Foreign,
    Server,
    nbdkit,
    qemu_nbd,
)
from interop_support import KIB, MIB
from peers import Authority, CuttingProxy, Way, run_replnbd, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

# Section: targets that cannot be

NO_NBD = """
import socket
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("SOCKET")
    listener.listen()
    while True:
        listener.accept()[0].sendall(b"220 mail.example ESMTP\\r\\n")
"""

WRONG: dict[str, tuple[Callable[[Path], Server], str, str]] = {
    "read-only": (lambda folder: nbdkit(folder, "-r", "memory", str(SIZE)),
                  "refused", "it can only be read"),
    "too-small": (lambda folder: nbdkit(folder, "memory", str(SIZE - 512)),
                  "refused", f"it has {SIZE - 512} bytes, and this disk {SIZE}"),
    "too-large": (lambda folder: nbdkit(folder, "memory", str(SIZE + 512)),
                  "refused", f"it has {SIZE + 512} bytes, and this disk {SIZE}"),
    "another-name": (lambda folder: qemu_nbd(folder, "raw", bytes(SIZE), "--export-name=other"),
                     "connecting", "export 'colo0' not present"),
    "no-nbd": (lambda folder: Listener(folder, sys.executable, "-c", NO_NBD),
               "connecting", "NBD"),
}  # fmt: skip


class Listener(Server):
    """A server of something else."""

    def _reach(self) -> None:
        wait_until(self.socket.exists, "the socket")


def said(world: Foreign) -> str:
    """What `replnbd status` prints of the disk."""
    done = run_replnbd("status", "--control", world.primary.control_socket)
    (line,) = (each for each in done.stdout.splitlines() if each.startswith("vm0"))
    return line


@pytest.mark.parametrize("kind", WRONG)
def test_a_target_that_cannot_be_is_told_in_one_line(short_dir: Path, kind: str) -> None:
    make, state, reason = WRONG[kind]
    with Foreign(short_dir, make(short_dir), program=REFUSED_SOON) as world:
        world.primary.start()
        wait_until(lambda: world.primary.link()["reason"] is not None, "a reason")
        link = world.primary.link()
        assert (link["state"], reason in link["reason"]) == (state, True), link
        assert "\n" not in link["reason"]
        assert link["reason"] in said(world)
        world.write()
        world.compare_local()
        world.server.close()
        world.server = nbdkit(short_dir, "memory", str(SIZE))
        world.compare()
        assert world.primary.link()["reason"] is None
        world.primary.quit()


def test_nobody_there_is_told_in_one_line(short_dir: Path) -> None:
    with Foreign(short_dir, nbdkit(short_dir, "memory", str(SIZE))) as world:
        with world.proxy.refusing():
            world.primary.start()
            wait_until(lambda: world.primary.link()["reason"] is not None, "a reason")
            assert "Connection refused" in world.primary.link()["reason"]
            world.write()
            world.compare_local()
        world.compare()


# Section: targets that fail


def failing(folder: Path, error: str, rate: str) -> tuple[Server, Path]:
    """nbdkit, and the file during whose existence writes fail."""
    trigger = folder / "fail"
    words = ["--filter=error", "memory", str(SIZE), f"error={error}", f"error-file={trigger}"]
    words += [f"error-pwrite-rate={rate}", f"error-zero-rate={rate}"]
    return nbdkit(folder, *words), trigger


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("rate", ["100%", "10%"])
def test_writes_that_the_target_fails_are_copied_later(
    short_dir: Path, error: str, rate: str
) -> None:
    server, trigger = failing(short_dir, error, rate)
    with Foreign(short_dir, server) as world:
        world.begin()
        assert world.primary.replication() == HEALTHY
        load = world.load()
        load.wait_batches(2)
        trigger.touch()
        load.wait_batches(4)
        wait_until(lambda: bool(world.primary.events("QUORUM_REPORT_BAD")), "the report")
        (report, *_) = world.primary.events("QUORUM_REPORT_BAD")
        assert (report["type"], report["node-name"]) == ("write", "vm0-remote"), report
        if rate == "100%":
            assert world.primary.replication() == FAILED
        trigger.unlink()
        load.wait_batches(2)
        load.stop()
        world.compare()
        assert world.primary.replication() == HEALTHY
        world.primary.quit()


def test_a_first_copy_to_a_target_that_fails_now_and_then_comes_to_its_end(
    short_dir: Path,
) -> None:
    server, trigger = failing(short_dir, "EIO", "20%")
    trigger.touch()
    with Foreign(short_dir, server) as world:
        world.begin()


def test_an_image_that_cannot_grow_is_followed_again_once_it_can(short_dir: Path) -> None:
    with Foreign(short_dir, lambda folder: qemu_nbd(folder, "qcow2", bytes(SIZE))) as world:
        server = world.server.process
        server.limit_file_size(2 * MIB)
        world.primary.start()
        wait_until(lambda: world.primary.link()["reason"] is not None, "a reason")
        world.write()
        world.compare_local()
        assert world.primary.link()["state"] == "syncing"
        server.limit_file_size(None)
        world.compare()
        assert world.primary.replication() == HEALTHY


# Section: targets that go away


@pytest.mark.parametrize("way", [(), (Way.TO_SERVER,), (Way.TO_CLIENT,)])
def test_a_silent_target_is_given_up_and_found_again(short_dir: Path, way: tuple[Way, ...]) -> None:
    server = nbdkit(short_dir, "memory", str(SIZE))
    with Foreign(short_dir, server, program=IMPATIENT) as world:
        world.begin()
        load = world.load()
        load.wait_batches(3)
        world.proxy.silence(*way)
        load.wait_batches(3)
        world.primary.wait_link("connecting")
        assert world.primary.replication() == FAILED
        load.wait_batches(3)
        world.proxy.resume()
        load.wait_batches(3)
        load.stop()
        world.compare_for_good()
        assert world.primary.replication() == HEALTHY


def test_a_primary_that_dies_finds_what_its_target_lacks(short_dir: Path) -> None:
    server = nbdkit(short_dir, "memory", str(SIZE))
    with Foreign(short_dir, server) as world:
        world.begin()
        world.wait_proven()
        touched = world.write(1)
        before = world.proxy.passed.to_server
        world.client.close()
        world.primary.process.kill()
        world.primary.qmp.close()
        world.primary.run()
        world.client = world.primary.connect()
        world.compare()
        sent = world.proxy.passed.to_server - before
        assert sent <= 1.1 * len(touched) * GRANULE + 64 * KIB


def test_a_server_that_is_started_again_is_found_again(short_dir: Path) -> None:
    with Foreign(short_dir, lambda folder: qemu_nbd(folder, "qcow2", bytes(SIZE))) as world:
        world.begin()
        load = world.load()
        for _ in range(3):
            load.wait_batches(3)
            world.server.close()
            load.wait_batches(3)
            world.server.run()
        load.stop()
        world.compare()


# Section: over TLS


def test_a_target_over_tls_is_followed_and_found_again(short_dir: Path) -> None:
    authority = Authority(short_dir / "pki")
    server_of = authority.issue("server", "127.0.0.1")
    folder = short_dir / "server"
    folder.mkdir()
    for name, path in (
        ("ca-cert.pem", authority.certificate),
        ("server-cert.pem", server_of.certificate),
        ("server-key.pem", server_of.key),
    ):
        (folder / name).write_bytes(path.read_bytes())
    clients = authority.directory("client", client=authority.issue("primary", "primary.example"))
    disk = short_dir / "target.raw"
    disk.write_bytes(bytes(SIZE))

    class TlsServer(Server):
        """Its disk is read from its file."""

        def _reach(self) -> None:
            wait_until(self.socket.exists, "the socket")

        def content(self) -> bytes:
            return disk.read_bytes()

    words = ["--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer", "file"]
    server = TlsServer(short_dir, "nbdkit", "-f", "-U", "SOCKET", *words, disk)

    def uri(proxy: CuttingProxy) -> str:
        return f"{proxy.uri('colo0').replace('nbd:', 'nbds:')}?tls-certificates={clients}"

    with Foreign(short_dir, server, uri=uri, program=IMPATIENT) as world:
        world.begin()
        load = world.load()
        for cut in (world.proxy.drop, world.proxy.reset, world.proxy.silence):
            load.wait_batches(3)
            cut()
            world.primary.wait_link("connecting")
            load.wait_batches(3)
            world.proxy.resume()
            world.primary.wait_link("live", "syncing")
        load.stop()
        world.compare_for_good()
        assert world.primary.replication() == HEALTHY
