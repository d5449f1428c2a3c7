"""What colo-heartbeat-daemon does to a primary, said to replnbd: an orchestrator with two QMP
sockets, a guest that never stops writing, and what is known of both disks."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

from interop_support import (
    CHECKPOINT,
    KIB,
    MIB,
    START,
    assert_same,
    fresh_seed,
    mottled,
    random_requests,
)
from peers import (
    Answer,
    CuttingProxy,
    NbdClient,
    QemuDisk,
    QemuSecondary,
    QmpClient,
    ReplnbdDaemon,
    ReplnbdDisk,
    wait_until,
)

SIZE = 8 * MIB + 512
DEVICE, NODE, JOB = "vm0", "nbd0", "resync"
LIVE = "live"


class Guest(threading.Thread):
    """Writes, zeroes and trims at any place until it is stopped; `content` is what must be on the
    disk while it is held."""

    def __init__(self, client: NbdClient, content: bytearray, seed: int) -> None:
        super().__init__(daemon=True)
        self.content = content
        self.turn = threading.Lock()
        """Held by who wants the guest to stand still."""
        self.count = 0
        self.failure: Exception | None = None
        self._client = client
        self._rng = random.Random(seed)
        self._stopping = False

    def run(self) -> None:
        """Until `stop`."""
        try:
            while not self._stopping:
                with self.turn:
                    random_requests(self._rng, self._client, self.content, 4, length_max=100 * KIB)
                    self.count += 4
        except Exception as exc:
            self.failure = exc

    def wrote_more(self, count: int = 40) -> None:
        """Wait for so many requests more."""
        goal = self.count + count
        wait_until(lambda: self.count >= goal or self.failure is not None, "the guest's writes")
        assert self.failure is None, self.failure

    def stop(self) -> None:
        """After the request under way."""
        self._stopping = True
        self.join(30)
        assert not self.is_alive()
        self._client.close()
        assert self.failure is None, self.failure


class Primary:
    """`replnbd serve` of one disk in mode primary, which nobody has told of any standby."""

    def __init__(self, folder: Path, content: bytes | bytearray, **keys: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.disk = folder / "vm0.raw"
        self.disk.write_bytes(content)
        table = {"name": DEVICE, "mode": "primary", "disk": str(self.disk), **keys}
        lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.daemon = ReplnbdDaemon(folder, [], tables=["\n".join(["[[disk]]", *lines])])
        self.qmp = self.daemon.qmp
        self.second = QmpClient(self.daemon.control_socket)
        """As an orchestrator has it, for what must not wait."""

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Those of these names, or all but replnbd's own, that have come so far."""
        self.qmp.execute("query-jobs")  # whatever came before its answer is there now
        return [
            event
            for event in self.qmp.events
            if (event["event"] in names if names else not event["event"].startswith("x-"))
        ]

    def statuses(self) -> list[str]:
        """All that the jobs have been."""
        return [event["data"]["status"] for event in self.events("JOB_STATUS_CHANGE")]

    def wait_for_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The first of that name with such data."""

        def found() -> list[dict[str, Any]]:
            each = [event["data"] for event in self.events(name)]
            return [given for given in each if data.items() <= given.items()]

        wait_until(lambda: bool(found()), f"{name} {data}")
        return found()[0]

    def link(self) -> dict[str, Any]:
        """How it is."""
        link: dict[str, Any] = self.qmp.execute("x-replnbd-status")["disks"][0]["link"]
        return link

    def wait_for_link(self, state: str) -> None:
        """Until it is in that state."""
        wait_until(lambda: self.link()["state"] == state, f"the link: {state}")

    def close(self) -> None:
        """Killed, if it runs."""
        self.second.close()
        self.daemon.__exit__(None, None, None)

    # Section: what the orchestrator says

    def add_node(self, server: dict[str, str], *, name: str = NODE, **options: Any) -> None:
        """blockdev-add."""
        node = {"driver": "nbd", "node-name": name, "export": "colo0", "server": server}
        self.qmp.execute("blockdev-add", {**node, "detect-zeroes": "on", **options})

    def mirror(self, *, target: str = NODE, **options: Any) -> Answer:
        """blockdev-mirror."""
        mirror: dict[str, Any] = {"job-id": JOB, "device": DEVICE, "target": target, "sync": "full"}
        mirror |= {"on-target-error": "report", "on-source-error": "ignore", "auto-dismiss": False}
        return self.qmp.answer("blockdev-mirror", mirror | options)

    def finish_mirror(self) -> None:
        """To cancel a mirror that is ready is its orderly end."""
        self.wait_for_event("JOB_STATUS_CHANGE", id=JOB, status="ready")
        self.qmp.execute("block-job-cancel", {"device": JOB})
        self.wait_for_event("JOB_STATUS_CHANGE", id=JOB, status="concluded")
        self.qmp.execute("block-job-dismiss", {"id": JOB})

    def take_in(self, node: str = NODE) -> Answer:
        """x-blockdev-change."""
        return self.qmp.answer("x-blockdev-change", {"parent": DEVICE, "node": node})

    def take_out(self, child: str = "children.1") -> Answer:
        """The same, the other way."""
        return self.qmp.answer("x-blockdev-change", {"parent": DEVICE, "child": child})

    def yank(self, node: str = NODE) -> None:
        """On the second socket."""
        instance = {"type": "block-node", "node-name": node}
        self.second.execute("yank", {"instances": [instance]})


class ReplnbdStandby(ReplnbdDaemon):
    """One of ours."""

    def __init__(self, folder: Path, content: bytes) -> None:
        super().__init__(folder, [ReplnbdDisk.create(folder, "colo0", "top0", content)])


class QemuStandby(QemuSecondary):
    """QEMU's, with its own filter."""

    def __init__(self, folder: Path, content: bytes) -> None:
        super().__init__(folder, [QemuDisk.create(folder, "colo0", "top0", content)])


AnyStandby = ReplnbdStandby | QemuStandby


class World:
    """A primary with a guest, a standby of another disk's bytes, and a proxy in between."""

    def __init__(self, folder: Path, form: type[AnyStandby], **keys: Any) -> None:
        self.rng = random.Random(fresh_seed())
        self.content = bytearray(mottled(self.rng, SIZE))
        place = folder / "s"
        place.mkdir()
        self.standby = form(place, self.rng.randbytes(SIZE))
        self.proxy = CuttingProxy(folder / "proxy", self.standby.nbd_socket)
        to = keys.pop("to", None)
        if to is not None:
            keys["to"] = to.format(proxy=folder / "proxy")
        self.primary = Primary(folder / "p", self.content, **keys)
        self.guest = Guest(
            self.primary.daemon.connect(DEVICE), self.content, self.rng.randrange(1 << 32)
        )
        self.guest.start()
        self.server = {"type": "unix", "path": str(folder / "proxy")}

    def begin(self) -> None:
        """The whole sequence, with the guest stopped for a moment as the orchestrator stops it."""
        primary = self.primary
        primary.add_node(self.server)
        assert primary.mirror().ok
        primary.wait_for_event("JOB_STATUS_CHANGE", id=JOB, status="ready")
        with self.guest.turn:
            primary.finish_mirror()
            self.start_standby()
            assert primary.take_in().ok

    def start_standby(self) -> None:
        """Replication there, whose view is what the primary is at this moment."""
        self.standby.qmp.execute(*START)

    def vanish(self) -> None:
        """The standby is not there any more, until the proxy admits us again."""
        self.proxy.refuse()
        self.proxy.reset()

    def checkpoint(self) -> bytes:
        """Both sides, with the guest held: what the view is from then on."""
        with self.guest.turn:
            self.primary.qmp.execute(*CHECKPOINT)
            self.standby.qmp.execute(*CHECKPOINT)
            return bytes(self.content)

    def read(self, export: str) -> bytearray:
        """All bytes of a standby's export."""
        with self.standby.connect(export) as client:
            return client.pread(0, SIZE)

    def compare(self, view: bytes | None = None) -> None:
        """All bytes: the primary's disk, the standby's, and its view if it has one."""
        with self.guest.turn:
            self.primary.qmp.execute(*CHECKPOINT)
            assert_same(self.read("colo0"), self.content, "the standby's disk")
            with self.primary.daemon.connect(DEVICE) as client:
                assert_same(client.pread(0, SIZE), self.content, "the primary's disk")
        if view is not None:
            assert_same(self.read("top0"), view, "the standby's view")

    def close(self) -> None:
        """Whatever still runs is killed."""
        try:
            self.guest.stop()
        finally:
            self.primary.close()
            self.proxy.close()
            self.standby.__exit__(None, None, None)
