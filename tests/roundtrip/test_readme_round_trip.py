"""README's round trip, typed as it stands there: two daemons on two addresses of this machine, and
an NBD client in the machine's place."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import NbdClient, Process, list_exports, wait_until

README = Path(__file__).resolve().parents[2] / "README.md"
ADDRESSES = {"alpha": "127.0.0.2", "beta": "127.0.0.3"}
PORT = 10809
SIZE = 64 << 20


def steps() -> list[list[tuple[str, str]]]:
    """The commands of each step of the README, as (host, command)."""
    section = README.read_text().partition("## The whole round trip")[2].partition("\n## ")[0]
    return [
        re.findall(r"^    (alpha|beta)\$ (.*)$", step, re.MULTILINE)
        for step in re.split(r"^\*\*\d\. ", section, flags=re.MULTILINE)[1:]
    ]


class Hosts:
    """Both, each in a directory of its own, and with what it runs in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: dict[str, Process] = {}
        self.commands: dict[str, list[str]] = {}
        for name in ADDRESSES:
            (folder / name).mkdir()

    def type(self, host: str, line: str) -> str:
        """A line that a user types; what it prints. Its exit status is 0."""
        done = self._run(host, line)
        assert (done.returncode, done.stderr) == (0, ""), f"{host}$ {line}\n{done}"
        return done.stdout

    def refused(self, host: str, line: str) -> str:
        """What a line prints as its error, which is one line."""
        done = self._run(host, line)
        assert done.returncode == 1, f"{host}$ {line}\n{done}"
        assert done.stderr.startswith("replnbd: ")
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def _run(self, host: str, line: str) -> subprocess.CompletedProcess[str]:
        for name, address in ADDRESSES.items():
            line = re.sub(rf"(nbd://){name}\b", rf"\g<1>{address}", line)
        words = shlex.split(line)
        if words[0] == "replnbd":
            words[:1] = [sys.executable, "-m", "replnbd"]
        if words[-1] == "&":
            self.commands[host] = words[:-1]
            self.serve(host)
            return subprocess.CompletedProcess(words, 0, "", "")
        return subprocess.run(
            words, cwd=self.folder / host, env=self._env(host),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def serve(self, host: str) -> None:
        """Run the host's daemon, as it was typed."""
        env = shlex.join(f"{name}={value}" for name, value in self._env(host).items())
        words = shlex.join(self.commands[host])
        command = f"cd {self.folder / host} && exec env -i {env} {words}"
        service = Process(["sh", "-c", command], log=self.folder / f"{host}.log")
        self.services[host] = service
        service.reach(lambda: list_exports((ADDRESSES[host], PORT)))

    def machine(self, host: str, export: str) -> NbdClient:
        """The machine's disk."""
        return NbdClient((ADDRESSES[host], PORT), export)

    def status(self, host: str) -> dict[str, Any]:
        """Of its disk."""
        disk: dict[str, Any] = json.loads(self.type(host, "replnbd status --json"))["disks"][0]
        return disk

    def wait_live(self, host: str) -> None:
        """Until its link is."""
        wait_until(lambda: self.status(host)["link"]["state"] == "live", f"{host}'s link")

    def _env(self, host: str) -> dict[str, str]:
        control = str(self.folder / f"{host}.qmp")
        return {**os.environ, "REPLNBD_CONTROL": control}

    def close(self) -> None:
        """End them."""
        for service in self.services.values():
            service.kill()


@pytest.fixture
def hosts(short_dir: Path) -> Iterator[Hosts]:
    both = Hosts(short_dir)
    yield both
    both.close()


def use(client: NbdClient, content: bytearray, rng: random.Random) -> None:
    """The machine writes for a while."""
    with client:
        for _ in range(100):
            offset, length = rng.randrange(SIZE - 70000), rng.randint(1, 70000)
            if rng.random() < 0.2:
                client.trim(offset, length)
                content[offset : offset + length] = bytes(length)
            else:
                data = rng.randbytes(length)
                client.pwrite(offset, data)
                content[offset : offset + length] = data


def content_of(hosts: Hosts, host: str, export: str) -> bytes:
    with hosts.machine(host, export) as client:
        return bytes(client.pread(0, SIZE))


@pytest.mark.slow
@pytest.mark.interop
def test_the_round_trip_of_the_readme_works_as_it_is_typed(hosts: Hosts) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    first, running, lost, failover, back, home = steps()
    content = bytearray(SIZE)
    alpha, beta = (hosts.folder / "alpha" / "vm0.raw", hosts.folder / "beta" / "colo0.raw")

    for host, line in first:
        hosts.type(host, line)
        if "--no-start" in line:
            use(hosts.machine("alpha", "vm0"), content, rng)
    use(hosts.machine("alpha", "vm0"), content, rng)
    for host, line in running:
        hosts.type(host, line)
    assert alpha.read_bytes() == beta.read_bytes() == content
    checkpoint = bytes(content)

    assert lost == []
    hosts.services["beta"].kill()
    use(hosts.machine("alpha", "vm0"), content, rng)
    hosts.serve("beta")
    hosts.wait_live("alpha")
    hosts.type("alpha", "replnbd checkpoint")
    assert alpha.read_bytes() == beta.read_bytes() == content
    assert content_of(hosts, "beta", "top0") == checkpoint

    hosts.services["alpha"].kill()
    for host, line in failover:
        hosts.type(host, line)
    content = bytearray(checkpoint)
    use(hosts.machine("beta", "top0"), content, rng)
    hosts.serve("alpha")
    wait_until(lambda: hosts.status("alpha")["link"]["state"] == "refused", "the refusal")

    with hosts.machine("beta", "top0"):  # the machine does not stop
        for host, line in back:
            hosts.type(host, line)
    use(hosts.machine("beta", "top0"), content, rng)
    assert hosts.type("beta", "replnbd verify") == "colo0: equal\n"
    assert "; peer live (nbd://127.0.0.2/vm0)" in hosts.type("beta", "replnbd status")
    assert "not an NBD URI" in hosts.refused("beta", "replnbd replicate --to alpha/vm0")
    hosts.services["alpha"].kill()
    wait_until(lambda: hosts.status("beta")["link"]["state"] == "connecting", "the loss")
    assert "is not at the standby: 'colo0': connecting" in hosts.refused("beta", home[0][1])
    hosts.serve("alpha")
    hosts.wait_live("beta")
    for host, line in home:
        hosts.type(host, line)
    use(hosts.machine("alpha", "vm0-top"), content, rng)
    hosts.type("alpha", "replnbd checkpoint")
    assert content_of(hosts, "alpha", "vm0-top") == content
    assert alpha.read_bytes() == beta.read_bytes() == content

    hosts.services["alpha"].kill()
    hosts.serve("alpha")
    assert content_of(hosts, "alpha", "vm0-top") == content_of(hosts, "alpha", "vm0") == content
    hosts.wait_live("alpha")
    use(hosts.machine("alpha", "vm0-top"), content, rng)
    hosts.type("alpha", "replnbd checkpoint")
    assert hosts.type("alpha", "replnbd verify") == "vm0: equal\n"
    assert alpha.read_bytes() == beta.read_bytes() == content
