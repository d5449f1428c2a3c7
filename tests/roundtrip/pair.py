"""Two hosts with the same disks: one has the truth and its users, the other one follows it, and
they may change sides. What must be on each, byte for byte, is known here all the time."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guest_model import Content, Guest, check_equal
from host import QUEUE_BYTES, Host
from peers import wait_until
from peers.disk import DiskFormat

GRANULE = 64 << 10
PATIENCE_S = 40.0


class Pair:
    """`source` has the truth: `contents`. `target` follows; once it has `started`, its view is
    `views`, and its last checkpoint `checkpoints`. AssertionError where something is not so."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        disks: int = 1,
        size: int = 8 << 20,
        format_: DiskFormat = "raw",
        sync: bool = False,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.trace: list[str] = []
        truths = [sparse(rng, size) for _ in range(disks)]
        stale = [sparse(rng, size) if rng.random() < 0.5 else bytes(size) for _ in range(disks)]
        other: DiskFormat = format_ if rng.random() < 0.7 else "raw"
        self.a = Host(folder, "a", truths, format_, queue_bytes=queue_bytes)
        self.b = Host(folder, "b", stale, other, queue_bytes=queue_bytes)
        self.source, self.target = self.a, self.b
        self.a.sync = sync
        self.a.to = [self.b.proxy.uri(disk.name) for disk in self.b.disks]
        self.contents = [Content(truth) for truth in truths]
        self.views: list[Content] = []
        self.checkpoints: list[bytes] = []
        self.guests: list[Guest] = []
        self._refusing: set[str] = set()
        try:
            self.b.start("secondary")
            self.a.start("primary")
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Disks."""
        return len(self.contents)

    @property
    def started(self) -> bool:
        """Whether the target has a view."""
        return bool(self.views)

    @property
    def network(self) -> Any:
        """The source's way to the target."""
        return self.target.proxy

    def note(self, what: str) -> None:
        """For whoever has to find out what went wrong."""
        self.trace.append(what)

    # Section: users

    def start_guests(self) -> None:
        """A guest on each of the source's disks, if there is none."""
        if self.guests:
            return
        for number, content in enumerate(self.contents):
            export = self.source.user_export(number)
            guest = Guest(
                lambda export=export: self.source.connect(export),  # type: ignore[misc]
                content,
                self.rng.randrange(1 << 30),
            )
            self.guests.append(guest)
            guest.start()

    def stop_guests(self) -> None:
        """After the requests under way."""
        for guest in self.guests:
            guest.stop()
        self.guests = []

    def guests_ended(self) -> None:
        """Their server is gone, and so are they."""
        for guest in self.guests:
            guest.ended()
        self.guests = []

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """No request of a guest within the block."""
        with contextlib.ExitStack() as stack:
            for guest in self.guests:
                stack.enter_context(guest.turn)
            yield
        self.check_guests()

    def check_guests(self) -> None:
        """AssertionError if one has seen what no client may see."""
        for guest in self.guests:
            assert guest.failure is None, f"a client was told {guest.failure!r}"

    def run_for(self, requests: int) -> None:
        """Let the guests do so much."""
        self.start_guests()
        wanted = [guest.count + requests for guest in self.guests]
        wait_until(
            lambda: all(
                guest.count >= want or not guest.is_alive()
                for guest, want in zip(self.guests, wanted, strict=True)
            ),
            "the guests' requests",
            timeout_s=PATIENCE_S,
        )
        self.check_guests()

    # Section: deaths

    def kill_source(self) -> None:
        """kill -9, and what was acknowledged is there afterwards."""
        self.source.kill()
        self.guests_ended()
        self.start_source()

    def kill_target(self) -> None:
        """kill -9, and its view is there afterwards."""
        self.target.kill()
        self.target.start()
        self.check_views()

    def restart_source(self) -> None:
        """In order, under its users' feet."""
        for guest in self.guests:
            guest.expects_shutdown = True
        self.source.quit()
        self.guests_ended()
        self.start_source()

    def restart_links(self) -> None:
        """Of a source that has taken over: send to the target anew."""
        for disk, theirs in zip(self.source.disks, self.target.disks, strict=True):
            to = self.target.proxy.uri(theirs.name)
            self.source.qmp.execute("x-replnbd-replicate", {"to": to, "device": disk.name})

    def restart_target(self) -> None:
        """In order."""
        self.target.quit()
        self.target.start()
        self.check_views()

    def start_source(self) -> None:
        """It goes on as it was; but a demoted one that has taken over is a primary again."""
        self.source.start()
        if self.source.role == "primary" and self.source.status()["stage"] == "none":
            self.source.begin()
        self.settle_source()

    def settle_source(self) -> None:
        """What the source's users find. Nobody writes."""
        for number, content in enumerate(self.contents):
            export = self.source.user_export(number)
            content.settle(self.source.read(export), f"the source's {export}")

    # Section: the network

    def refuse(self, host: Host) -> None:
        """Nobody reaches a host, and who was there is cut off."""
        if host.letter not in self._refusing:
            self._refusing.add(host.letter)
            host.proxy.refuse()
        host.proxy.drop()

    def heal(self, *hosts: Host) -> None:
        """All that was wrong with the way to these (by default: both) is so no more."""
        for host in hosts or (self.a, self.b):
            host.proxy.limit(None)
            host.proxy.delay(0)
            host.proxy.resume()
            if host.letter in self._refusing:
                self._refusing.remove(host.letter)
                host.proxy.admit()

    # Section: in step

    def links(self) -> list[dict[str, Any]]:
        """The source's."""
        return [self.source.link(number) for number in range(self.count)]

    def wait_links(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Until it is so of all links."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            links = self.links()
            if all(map(wanted, links)):
                return
            self.check_guests()
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {PATIENCE_S:g} s: {links}")
            time.sleep(0.005)

    def in_step(self) -> bool:
        """Whether the target has everything, while no guest writes."""
        for number in range(self.count):
            link = self.source.link(number)
            if link["state"] != "live" or link["behind-bytes"] or link["queued-bytes"]:
                return False
        return not any(self.target.status(number)["syncing"] for number in range(self.count))

    def wait_in_step(self) -> None:
        """Until then."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.in_step():
            if time.monotonic() > deadline:
                status = [self.target.status(number) for number in range(self.count)]
                raise AssertionError(f"never in step: {self.links()}, {status}")
            time.sleep(0.01)

    def compare(self) -> None:
        """All bytes of all disks, and what both sides say of them; the network must be well."""
        with self.quiet():
            self.wait_in_step()
            if self.source.role == "primary":
                self.source.qmp.execute("xen-colo-do-checkpoint")
            for number, content in enumerate(self.contents):
                export = self.source.user_export(number)
                content.settle(self.source.read(export), f"the source's {export}")
                name = self.target.disks[number].name
                check_equal(self.target.read(name), content.data, f"the target's {name}")
                mine = self.source.status(number)["history"]
                theirs = self.target.status(number)["history"]
                for key in ("generation", "pair"):
                    assert mine[key] == theirs[key], (key, mine, theirs)
                assert mine["in-step-at"] == mine["generation"], mine
                assert (mine["role"], theirs["role"]) == ("primary", "standby")
            self.check_views()

    def check_views(self) -> None:
        """The view is the last checkpoint, and what the standby has written since."""
        for disk, view in zip(self.target.disks, self.views, strict=False):
            check_equal(self.target.read(disk.top), view.data, f"the view {disk.top}")

    # Section: commands

    def begin(self) -> None:
        """The target starts, with a first checkpoint: of what is in step."""
        with self.quiet():
            self.wait_in_step()
            self.target.begin()
            self._checkpointed([bytes(content.data) for content in self.contents])

    def checkpoint(self) -> None:
        """On the source first, then on the target, while the guests are paused."""
        with self.quiet():
            self.wait_in_step()
            if self.source.role == "primary":
                self.source.qmp.execute("xen-colo-do-checkpoint")
            self.target.qmp.execute("xen-colo-do-checkpoint")
            self._checkpointed([bytes(content.data) for content in self.contents])

    def checkpoint_under_load(self) -> bool:
        """The same while they write: whatever it is, it stands still. False: refused, because the
        target is being synchronised."""
        if self.source.role == "primary":
            self.source.qmp.execute("xen-colo-do-checkpoint")
        answer = self.target.qmp.answer("xen-colo-do-checkpoint")
        if not answer.ok:
            assert "is being synchronised" in str(answer.desc), answer
            self.check_views()
            return False
        self._checkpointed([bytes(self.target.read(disk.top)) for disk in self.target.disks])
        return True

    def _checkpointed(self, contents: list[bytes]) -> None:
        self.checkpoints = contents
        self.views = [Content(content) for content in contents]
        self.check_views()

    def write_views(self) -> None:
        """The standby's own writes."""
        for disk, view in zip(self.target.disks, self.views, strict=True):
            with self.target.connect(disk.top) as client:
                for _ in range(self.rng.randint(1, 8)):
                    length = self.rng.randint(1, 70_000)
                    offset = self.rng.randrange(view.size - length)
                    data = self.rng.choice([bytes(length), self.rng.randbytes(length)])
                    client.pwrite(offset, data)
                    view.apply((offset, data))

    # Section: the end

    def check_logs(self) -> None:
        """AssertionError if a daemon has met a bug of its own."""
        for host in (self.a, self.b):
            host.check_log()

    def close(self) -> None:
        """Kill all that is left."""
        for host in (self.a, self.b):
            host.kill()
        for guest in self.guests:
            guest.join(30)
        for host in (self.a, self.b):
            host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def sparse(rng: random.Random, size: int) -> bytes:
    """Data and holes."""
    parts = []
    left = size
    while left:
        length = min(left, rng.choice([4096, 65536, 1 << 20, rng.randint(1, 300_000)]))
        parts.append(rng.randbytes(length) if rng.random() < 0.5 else bytes(length))
        left -= length
    return b"".join(parts)
