"""Each file of a disk fails, at each kind of call, under a real daemon: the right client is told,
by the right error; nobody else notices; and once the cause is gone all goes on.

What can run out of space on a real file system is in test_full_overlay.py.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern
from peers import NbdClient, NbdReplyError

pytestmark = [pytest.mark.interop, pytest.mark.slow]

FAULTY = Path(__file__).with_name("faulty.py")
STEP = 16384

READS = {"primary read", "standby read"}
NEW = {"primary write new", "primary zero new", "primary trim new"}
STANDBY_NEW = {"standby write new", "standby zero new", "standby trim new"}
ALL_PRIMARY = {*NEW, "primary read", "primary write saved", "primary flush"}
SPACE = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.ENOSPC, "EFBIG": errno.ENOSPC,
         "SHORT": errno.ENOSPC}  # fmt: skip
"""What a client is told."""
FAILS = {
    ("hidden", "pwrite"): NEW,
    ("hidden", "preadv"): {"standby read saved"},
    ("active", "pwrite"): {*STANDBY_NEW, "standby write own"},
    ("active", "preadv"): {"standby read own"},
    ("secondary", "pwrite"): {"primary write new", "primary write saved"},
    ("secondary", "preadv"): {*NEW, *READS},
    ("secondary", "fallocate"): {"primary zero new", "primary trim new"},
    ("secondary", "fdatasync"): {"primary flush"},
    ("active", "fdatasync"): {"standby flush"},
    ("hidden", "fdatasync"): set(),
}
"""By file and call: the requests that cannot be done without it."""
FAILS_POWER = {
    ("hidden", "fdatasync"): NEW,
    ("active", "fdatasync"): {"standby write new", "standby flush"},
}
"""The same, where durability "power" needs a flush."""


@dataclass
class Model:
    """A disk's bytes; where a write failed, `doubtful` ranges may be either."""

    disk: bytearray
    view: bytearray
    next_new: int = 4 * STEP
    doubtful: list[tuple[str, int, int]] = field(default_factory=list)

    def new(self) -> int:
        """A range that nobody has touched."""
        self.next_new += STEP
        assert self.next_new < SIZE
        return self.next_new

    def is_wrong(self, side: str, found: bytes) -> bool:
        """Whether anything but doubtful ranges differs."""
        expected = bytearray(self.disk if side == "primary" else self.view)
        for which, start, end in self.doubtful:
            if which == side:
                expected[start:end] = found[start:end]
        return found != expected


class Clients:
    """One of each side of a disk, and the requests that they can make."""

    def __init__(self, running: Running, name: str) -> None:
        self.primary = running.connect(name)
        self.standby = running.connect(f"{name}-top")
        self.model = Model(bytearray(pattern(1)), bytearray(pattern(1)))
        self.done = 0

    def prepare(self) -> None:
        """Something saved, something of the standby's own, tables and all."""
        self.write("primary", 0)
        self.write("standby", STEP)

    def read(self, side: str, offset: int) -> None:
        """Read 4 KiB and compare them."""
        client = self.primary if side == "primary" else self.standby
        where = self.model.disk if side == "primary" else self.model.view
        found = client.pread(offset, 4096)
        doubtful = any((side, offset) == each[:2] for each in self.model.doubtful)
        assert doubtful or found == where[offset : offset + 4096]

    def write(self, side: str, offset: int) -> None:
        """4 KiB that are no others' bytes."""
        self.done += 1
        data = pattern(100 + self.done, 4096)
        self.change(side, offset, data, lambda client: client.pwrite(offset, data))

    def change(
        self, side: str, offset: int, data: bytes, call: Callable[[NbdClient], None]
    ) -> None:
        """A request that changes bytes."""
        where = self.model.disk if side == "primary" else self.model.view
        end = offset + len(data)
        try:
            call(self.primary if side == "primary" else self.standby)
        except NbdReplyError:
            self.model.doubtful.append((side, offset, end))
            raise
        where[offset:end] = data

    def zero(self, side: str, offset: int, *, trim: bool) -> None:
        """4 KiB of zeroes, by WRITE_ZEROES or by TRIM."""
        request = NbdClient.trim if trim else NbdClient.write_zeroes
        self.change(side, offset, bytes(4096), lambda client: request(client, offset, 4096))

    def requests(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every kind of request, once: (what it is, a call of it)."""
        for side, old, place in (("primary", "saved", 0), ("standby", "own", STEP)):
            yield f"{side} read", partial(self.read, side, 3 * STEP)
            if side == "standby":
                yield "standby read saved", partial(self.read, side, 0)
                yield "standby read own", partial(self.read, side, STEP)
            yield f"{side} write {old}", partial(self.write, side, place)
            yield f"{side} write new", partial(self.write, side, self.model.new())
            yield f"{side} zero new", partial(self.zero, side, self.model.new(), trim=False)
            yield f"{side} trim new", partial(self.zero, side, self.model.new(), trim=True)
            yield f"{side} flush", (self.primary if side == "primary" else self.standby).flush

    def failing(self) -> dict[str, int | None]:
        """Make every kind of request; which of them failed, and with which errno."""
        failed: dict[str, int | None] = {}
        for name, request in self.requests():
            try:
                request()
            except NbdReplyError as exc:
                failed[name] = exc.errno
        return failed

    def check(self) -> None:
        """All bytes of both sides."""
        for side, client in (("primary", self.primary), ("standby", self.standby)):
            assert not self.model.is_wrong(side, bytes(client.pread(0, SIZE))), side


@contextmanager
def faulty(folder: Path, durability: str) -> Iterator[tuple[Running, Path]]:
    """A daemon with the disks "a" and "b", in stage running, and where its faults go."""
    setup = Setup(folder, "a", "b")
    faults = folder.with_name("faults")
    faults.mkdir()
    for table in setup.tables:
        table["durability"] = durability
    with setup.serve(prefix=[sys.executable, str(FAULTY), str(faults)]) as running:
        running.start()
        yield running, faults


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize(("key", "call"), FAILS, ids="-".join)
def test_a_file_that_fails_costs_what_needs_it_and_no_more(
    short_dir: Path, key: str, call: str, durability: str
) -> None:
    causes = SPACE if call == "pwrite" else {"EIO": errno.EIO}
    if call == "pwrite" and key == "secondary":
        causes = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "SHORT": errno.ENOSPC}
    for number, (cause, told) in enumerate(causes.items()):
        folder = short_dir / f"d{number}" / "x"
        folder.mkdir(parents=True)
        one_fault(folder, (key, call), cause, told, durability)


def one_fault(folder: Path, place: tuple[str, str], cause: str, told: int, durability: str) -> None:
    key, call = place
    power = durability == "power"
    fails = FAILS_POWER.get(place, FAILS[place]) if power else FAILS[place]
    expected = dict.fromkeys(fails, told)
    with faulty(folder, durability) as (running, faults):
        a, b = Clients(running, "a"), Clients(running, "b")
        for clients in (a, b):
            clients.prepare()
            assert clients.failing() == {}
        before = running.disk()
        image = running.setup.path(key).name
        fault = faults / f"{image}.{call}"
        fault.write_text(cause)
        assert a.failing() == expected
        assert b.failing() == {}
        fault.unlink()
        status = running.disk()
        assert (status["stage"], status["view-lost"]) == ("running", None)
        errors = {
            side: sum(name.startswith(side) for name in expected) for side in ("primary", "standby")
        }
        for side, count in errors.items():
            assert status[f"{side}-errors"] == before[f"{side}-errors"] + count
        events = [e["data"] for e in running.qmp.events if e["event"] == "BLOCK_IO_ERROR"]
        sides = {"a": errors["primary"], "a-top": errors["standby"]}
        assert {event["device"] for event in events} == {n for n, count in sides.items() if count}
        assert all(event["nospace"] == (told == errno.ENOSPC) for event in events)
        # The cause is gone:
        # What a flush has lost is not found again: it fails ever after.
        lost = call == "fdatasync" and bool(expected)
        assert a.failing() == (expected if lost else {})
        for clients in (a, b):
            clients.check()
        if not (lost and power):
            running.checkpoint()
            for clients in (a, b):
                model = clients.model
                found = bytes(clients.standby.pread(0, SIZE))
                assert found == clients.primary.pread(0, SIZE)
                assert not model.is_wrong("primary", found)
        running.process.terminate()
        ended = running.process.wait()
        assert (ended == 0) == (not lost), running.log
    for disk in (0, 1):
        if lost and disk == 0:
            # It is not forgotten.
            with running.setup.serve() as again:
                assert "'a' could not be flushed at its end" in again.disk()["error"]
                assert again.disk(1)["error"] is None
                again.checkpoint()
                assert again.disk()["error"] is None
        else:
            check_overlays(running.setup, disk)
    for disk, clients in enumerate((a, b)):
        found = running.setup.path("secondary", disk).read_bytes()
        assert not clients.model.is_wrong("primary", found)
