"""Two hosts, each in a network namespace of its own, and a cable between them that can be cut."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

CLONE_NEWNET = 0x40000000
SERVER, CLIENT = "192.0.2.1", "192.0.2.2"  # TEST-NET-1 (RFC 5737)

_libc = ctypes.CDLL(None, use_errno=True)


class TwoHosts:
    """`socket_on` gives sockets of either host to this process; nothing else on the machine sees
    the two. Needs root."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root, to make network namespaces")
        # Each lasts as long as its first process, which ends when we do.
        self._first = {
            address: subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
            for address in (SERVER, CLIENT)
        }

    def __enter__(self) -> Self:
        server, client = (str(process.pid) for process in self._first.values())
        for address in self._first:
            self._wait_for_namespace(address)
        _ip("link", "add", "cable", "netns", server,
            "type", "veth", "peer", "name", "cable", "netns", client)  # fmt: skip
        for address in self._first:
            self._ip_on(address, "address", "add", f"{address}/24", "dev", "cable")
            self._ip_on(address, "link", "set", "cable", "up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._first.values():
            process.communicate()

    def vanish(self) -> None:
        """From now on the client's host gets what is sent to it, and never says anything more."""
        self._ip_on(CLIENT, "route", "add", "blackhole", SERVER)

    def listen(self) -> socket.socket:
        """A listening socket on the server's host."""
        with self._on(SERVER):
            return socket.create_server((SERVER, 0))

    def connect(self, port: int) -> socket.socket:
        """A connection to it from the client's host."""
        with self._on(CLIENT):
            return socket.create_connection((SERVER, port), timeout=30)

    @contextmanager
    def _on(self, address: str) -> Iterator[None]:
        """Sockets that are made within the block belong to that host."""
        with open("/proc/thread-self/ns/net") as ours, open(self._namespace(address)) as theirs:
            _enter(theirs.fileno())
            try:
                yield
            finally:
                _enter(ours.fileno())

    def _namespace(self, address: str) -> Path:
        return Path(f"/proc/{self._first[address].pid}/ns/net")

    def _wait_for_namespace(self, address: str) -> None:
        ours, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 30
        while os.readlink(self._namespace(address)) == ours:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _ip_on(self, address: str, *words: str) -> None:
        prefix = ["nsenter", f"--net={self._namespace(address)}", "ip"]
        subprocess.run([*prefix, *words], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
