"""What the COLO daemon says when it brings a standby back, to QEMU and to ours: the same replies
and events, in the same order. (It waits for events only after a reply: one that came before would
be waited for without end.)"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_fakes import RawClient
from peers import Process

from replnbd.daemon import Config, Daemon, DiskConfig, ServerConfig, check_config

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 1 << 20


@pytest.fixture
async def ours(short_dir: Path) -> AsyncIterator[Path]:
    """With the same disk."""
    (short_dir / "ours").write_bytes(os.urandom(SIZE))
    disk = DiskConfig(name="colo-disk0", mode="primary", disk="ours")
    server = ServerConfig(listen=[], control="qmp.sock")
    async with Daemon(check_config(Config(server=server, disk=[disk]), short_dir)):
        yield short_dir / "qmp.sock"


@pytest.fixture
def qemu(short_dir: Path) -> Iterator[Path]:
    """With such a disk, and a standby that is there."""
    for name in ("local", "standby"):
        (short_dir / name).write_bytes(os.urandom(SIZE))
    nbd = ["qemu-nbd", "--persistent", "-f", "raw", "-x", "colo0", "-k", f"{short_dir}/nbd"]
    quorum = (
        "if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,"
        f"children.0.driver=raw,children.0.node-name=local,children.0.file.filename={short_dir}/local"
    )
    argv = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-nodefaults", "-S"]
    argv += ["-drive", quorum, "-qmp", f"unix:{short_dir}/qemu.qmp,server=on,wait=off"]
    standby = Process([*nbd, f"{short_dir}/standby"], log=short_dir / "nbd.log")
    machine = Process(argv, log=short_dir / "qemu.log")
    try:
        machine.reach(lambda: _connected(short_dir / "qemu.qmp"))
        standby.reach(lambda: _connected(short_dir / "nbd"))
        yield short_dir / "qemu.qmp"
    finally:
        machine.kill()
        standby.kill()


def _connected(path: Path) -> bool:
    if not path.exists():
        raise FileNotFoundError(path)
    return True


class Talk:
    """One client, and all that it has heard."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self.heard: list[Any] = []

    async def say(self, command: str, **arguments: Any) -> None:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": given, "id": command}
        await self._client.send(json.dumps(message).encode() + b"\n")
        while (heard := await self._listen()) is None or heard[0] != command:
            pass

    async def wait(self, status: str) -> None:
        """For the event."""
        while (await self._listen())[1].get("status") != status:
            pass

    async def _listen(self) -> Any:
        message = json.loads(await self._client.line())
        while message.get("event", "").startswith("x-replnbd-"):
            message = json.loads(await self._client.line())
        if "event" in message:
            data = message["data"]
            heard = (message["event"], {k: data[k] for k in data if k not in ("len", "offset")})
        else:
            heard = (message["id"], message.get("return", message.get("error")))
        self.heard.append(heard)
        return heard


async def resync(path: Path, server: dict[str, str]) -> list[Any]:
    """Everything that is said back."""
    client = await RawClient.negotiated(path)
    talk = Talk(client)
    await talk.say(
        "blockdev-add", driver="nbd", node_name="nbd0", server=server, export="colo0",
        detect_zeroes="on",
    )  # fmt: skip
    await talk.say(
        "blockdev-mirror", device="colo-disk0", job_id="resync", target="nbd0", sync="full",
        on_target_error="report", on_source_error="ignore", auto_dismiss=False,
    )  # fmt: skip
    if not any(data.get("status") == "ready" for _, data in talk.heard):
        await talk.wait("ready")
    await talk.say("block-job-cancel", device="resync")
    await talk.wait("concluded")
    await talk.say("query-jobs")
    await talk.say("x-blockdev-change", parent="colo-disk0", node="nbd0")
    await talk.say("block-job-dismiss", id="resync")
    await talk.say("query-block-jobs")
    await talk.say("blockdev-del", node_name="nbd0")
    await talk.say("x-blockdev-change", parent="colo-disk0", child="children.1")
    await talk.say("blockdev-del", node_name="nbd0")
    await client.close()
    return talk.heard


async def test_a_standby_is_brought_back_with_the_same_words(qemu: Path, ours: Path) -> None:
    server = {"type": "unix", "path": str(qemu.parent / "nbd")}
    theirs = await resync(qemu, server)
    assert ("resync", "concluded") in [
        (data.get("id"), data.get("status")) for _, data in theirs if isinstance(data, dict)
    ]
    assert await resync(ours, server) == theirs
    assert (qemu.parent / "standby").read_bytes() == (ours.parent / "ours").read_bytes()
