"""A daemon to command, and a terminal to look at."""

from __future__ import annotations

import codecs
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from fcntl import ioctl
from pathlib import Path
from typing import Any, Self

import pytest
from peers import (
    REPLNBD,
    Done,
    NbdClient,
    PeerError,
    ReplnbdDaemon,
    ReplnbdDisk,
    refusal,
    run_replnbd,
)

SIZE = 1 << 20


def content(seed: int) -> bytes:
    """What a disk holds at first."""
    return random.Random(seed).randbytes(SIZE)


class Cli:
    """The command line, with the control socket of one daemon."""

    def __init__(self, daemon: ReplnbdDaemon) -> None:
        self.daemon = daemon
        self.clients: list[NbdClient] = []
        self.env = {"REPLNBD_CONTROL": str(daemon.control_socket)}

    def connect(self, export: str) -> NbdClient:
        """A new NBD client, closed at the end."""
        self.clients.append(self.daemon.connect(export))
        return self.clients[-1]

    def run(self, *arguments: str) -> Done:
        """Run a command."""
        return run_replnbd(*arguments, env=self.env)

    def says(self, *arguments: str) -> str:
        """What a command that must succeed prints; nothing on stderr."""
        done = self.run(*arguments)
        if done.status or done.stderr:
            raise PeerError(f"replnbd {arguments}: {done}")
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """The value that a command prints with --json."""
        return json.loads(self.says(*arguments, "--json"))

    def refused(self, *arguments: str) -> str:
        """The line with which a command fails."""
        return refusal(self.run(*arguments)).removeprefix("replnbd: ")


@pytest.fixture
def cli(short_dir: Path) -> Iterator[Cli]:
    """A daemon of two disks."""
    disks = [ReplnbdDisk.create(short_dir, name, f"{name}-top", content(1)) for name in ("a", "b")]
    with ReplnbdDaemon(short_dir, disks) as daemon:
        cli = Cli(daemon)
        yield cli
        for client in cli.clients:
            client.close()


class Terminal:
    """A command on a terminal of 150 by 40; `text` is all that it has written there."""

    def __init__(self, *arguments: str, env: Mapping[str, str]) -> None:
        self._terminal, their_end = pty.openpty()
        ioctl(their_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color"} | dict(env)
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [*REPLNBD, *arguments], stdin=their_end, stdout=their_end, stderr=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
        os.close(their_end)
        os.set_blocking(self._terminal, False)
        # An interrupt may cut a character in two, as it cuts everything that is being written.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.text = ""

    def wait_for(self, condition: Callable[[str], bool], timeout_s: float = 30.0) -> None:
        """Until `condition` of the text holds."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.text):
            if time.monotonic() > deadline or not self._receive():
                raise PeerError(f"{self.process.args!r}: {self.text!r}")

    def finish(self) -> tuple[int, str]:
        """The exit status, and what it wrote to stderr; `text` is complete then."""
        assert self.process.stderr is not None
        while self._receive():
            pass
        said = self.process.stderr.read().decode()
        return self.process.wait(10), said

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    @property
    def plain(self) -> str:
        """The text without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)

    def _receive(self) -> bool:
        """Take what there is; False at the end."""
        try:
            data = os.read(self._terminal, 65536)
        except BlockingIOError:
            time.sleep(0.005)
            return True
        except OSError:  # EIO: nobody has the other side open any more
            return False
        self.text += self._decode(data)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._terminal)
