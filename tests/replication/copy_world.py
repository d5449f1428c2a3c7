"""A disk, its copy behind a connection that does what the worst server and network may do, and the
account between them: what is not marked in the file is the same on both sides, at every moment."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from replnbd.block import Buffer, DirtyMap, MemoryNode, NbdConnection, PassThrough, RangeLock
from replnbd.block.digest import GRANULE, digest_of, digest_of_zeroes
from replnbd.events import EventBus
from replnbd.filters import FaultNode, QuorumNode
from replnbd.jobs import MirrorJob, mirror
from replnbd.nbd import constants as c
from replnbd.replication import forwarder as forwarder_module
from replnbd.replication.forwarder import Forwarder
from replnbd.replication.nodes import GateNode

Done = Callable[[OSError | None], None]

STATUS = -1
"""A request for digests."""


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a disk of a few granules reaches."""
    monkeypatch.setattr(mirror, "CHUNK", 2 * GRANULE)
    monkeypatch.setattr(mirror, "CHUNKS_MAX", 3)
    monkeypatch.setattr(forwarder_module, "QUEUE_BYTES_MAX", 3 * GRANULE)
    monkeypatch.setattr(forwarder_module, "UNPROVEN_MAX", 8)
    monkeypatch.setattr(forwarder_module, "CLEARED_MAX", 2)


@dataclass
class Request:
    """What was submitted, and is not answered."""

    command: int
    offset: int
    length: int
    payload: bytes
    done: Done
    landed: bool = False

    def overlaps(self, other: Request) -> bool:
        """Whether a server that keeps order does one after the other."""
        if c.CMD_FLUSH in (self.command, other.command):
            return False
        return self.offset < other.offset + other.length and (
            other.offset < self.offset + self.length
        )


class Remote:
    """The copy: what is read there, and what a power failure leaves."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.durable = bytearray(size)
        self.late: list[Request] = []
        """Of connections that have ended: what may land yet."""

    def land(self, request: Request) -> None:
        """Do it, and do not answer yet."""
        request.landed = True
        if request.command == c.CMD_FLUSH:
            self.durable[:] = self.data
        elif request.command == c.CMD_WRITE:
            self.data[request.offset : request.offset + request.length] = request.payload
        elif request.command != STATUS:
            end = request.offset + request.length
            self.data[request.offset : end] = bytes(request.length)


class FakeConnection:
    """A connection to `remote`. What is submitted lands and is answered when `step` says so: `ours`
    in order where requests overlap, as of a replnbd."""

    def __init__(
        self, remote: Remote, rng: random.Random, *, ours: bool, payload_max: int = 1 << 20
    ) -> None:
        self.remote = remote
        self.rng = rng
        self.ours = ours
        self.payload_bytes_max = payload_max
        self.block_size_min = 1 if ours else 512
        self.can_flush = self.can_trim = True
        self.can_zero = ours or rng.random() < 0.7
        self.digests_known = ours or rng.random() < 0.7
        self.closed = False
        self.pending: list[Request] = []
        self.refusals = 0.0
        """How probable one is."""
        self.silent = False
        self.bytes_outstanding = 0
        self.bytes_outstanding_max = 0
        self._loop = asyncio.get_running_loop()

    def submit(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        *,
        payload: Buffer | None = None,
        done: Done,
    ) -> int:
        if self.closed:
            self._loop.call_soon(done, OSError(errno.ESHUTDOWN, "closed"))
            return 0
        assert (offset | length) % self.block_size_min == 0
        assert payload is None or len(payload) == length <= self.payload_bytes_max
        assert command != c.CMD_WRITE_ZEROES or self.can_zero
        self.pending.append(Request(command, offset, length, bytes(payload or b""), done))
        self.bytes_outstanding += 32 + len(payload or b"")
        self.bytes_outstanding_max = max(self.bytes_outstanding_max, self.bytes_outstanding)
        return len(self.pending)

    @property
    def requests_outstanding(self) -> int:
        return len(self.pending)

    async def request(self, command: int, offset: int, length: int) -> bytes:
        """Wait for the answer; what is there then."""
        ended: asyncio.Future[bytes] = self._loop.create_future()

        def done(failure: OSError | None) -> None:
            if ended.done():
                return
            if failure is None:
                ended.set_result(bytes(self.remote.data[offset : offset + length]))
            else:
                ended.set_exception(failure)

        self.submit(command, 0, offset, length, done=done)
        return await ended

    async def flush(self) -> None:
        await self.request(c.CMD_FLUSH, 0, 0)

    # Section: what the test does with it

    def step(self) -> bool:
        """Let something land, or be answered. False: nothing can."""
        if self.silent or not self.pending:
            return False
        ready = [
            request
            for at, request in enumerate(self.pending)
            if not self.ours or not any(request.overlaps(before) for before in self.pending[:at])
        ]
        request = self.rng.choice(ready)
        if request.landed or (request.command == STATUS):
            self.answer(request, None)
        elif self.rng.random() < self.refusals and (
            request.command != c.CMD_FLUSH or not self.ours
        ):
            if request.command == c.CMD_FLUSH:  # what was not durable is lost, and told this once
                self.remote.data[:] = self.remote.durable
            elif self.rng.random() < 0.3:  # a part of it is done
                self._land_in_part(request)
            self.answer(request, OSError(errno.ENOSPC, "refused"))
        else:
            self.remote.land(request)
        return True

    def abort(self, reason: OSError) -> None:
        """The session ends: of what is pending, anything may land."""
        if self.closed:
            return
        self.closed = True
        pending, self.pending = self.pending, []
        for at, request in enumerate(pending):
            before = pending[:at]
            in_order = not self.ours or not any(
                request.overlaps(each) and not each.landed for each in before
            )
            if not request.landed and not self.ours and self.rng.random() < 0.4:
                self.remote.late.append(request)
            elif not request.landed and in_order and self.rng.random() < 0.5:
                if self.rng.random() < 0.2:
                    self._land_in_part(request)
                else:
                    self.remote.land(request)
        for request in pending:
            request.done(reason)

    def _land_in_part(self, request: Request) -> None:
        half = request.length // 2
        part = Request(request.command, request.offset, half, request.payload[:half], request.done)
        self.remote.land(part)

    def answer(self, request: Request, failure: OSError | None) -> None:
        self.pending.remove(request)
        self.bytes_outstanding -= 32 + len(request.payload)
        request.done(failure)


class SlowNode(PassThrough):
    """A disk or a file of which any operation may have to wait, before and after it is done."""

    def __init__(self, name: str, file: MemoryNode | FaultNode, rng: random.Random) -> None:
        super().__init__(name, file)
        self.rng = rng
        self.slowness = 0.4

    async def _wait(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    def pwrite_nowait(self, offset: int, data: Buffer) -> bool:
        return self.rng.random() > self.slowness and self.file.pwrite_nowait(offset, data)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._wait()
        try:
            await self.file.pwrite(offset, data)
        except OSError:
            if isinstance(self.file, FaultNode):  # a part of it is done all the same
                await self.file.file.pwrite(offset, bytes(data)[: len(data) // 2])
            raise
        await self._wait()

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self._wait()
        await self.file.pread(offset, buffer)
        await self._wait()

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await self._wait()
        await self.file.write_zeroes(offset, length)
        await self._wait()

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)


@dataclass
class World:
    """Both sides, and what goes on between them. `check` is the law."""

    seed: int
    ours: bool
    sync: bool = False
    granules: int = 12
    tail: int = 1024
    """Bytes of the last granule."""
    slowness: float = 0.4
    """How probably a store has to wait."""
    tasks: dict[asyncio.Task[None], None] = field(default_factory=dict)
    stepped: int = 0
    """How often the disk went on alone."""
    fell_behind: int = 0
    bad: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.size = (self.granules - 1) * GRANULE + self.tail
        self.local = MemoryNode(self.size)
        self.fault = FaultNode("fault", self.local)
        self.disk = SlowNode("disk", self.fault, self.rng)
        self.file = MemoryNode(self.granules)
        self.slow_file = SlowNode("map", self.file, self.rng)
        self.disk.slowness = self.slow_file.slowness = self.slowness
        self.dirty = DirtyMap(self.size, self.slow_file, 0)
        self.forwarder = Forwarder(
            self.dirty, sync=self.sync, before_alone=self._step_lineage,
            on_behind=self._on_behind, on_bad=lambda what, *_: self.bad.append(what),
        )  # fmt: skip
        self.ranges = RangeLock()
        quorum = QuorumNode("quorum", self.disk, self.forwarder)
        self.gate = GateNode("disk", self.size, quorum, self.ranges)
        self.remote = Remote(self.size)
        self.connection: FakeConnection | None = None
        self.job: MirrorJob | None = None

    async def _step_lineage(self) -> None:
        await asyncio.sleep(0)
        self.stepped += 1
        self.forwarder.alone = False

    def _on_behind(self) -> None:
        self.fell_behind += 1

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it beside; its failure is the test's, unless it is an OSError."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks[task] = None
        return task

    # Section: the way

    def land_late(self, *, all_of_it: bool = False) -> None:
        """Something that an earlier connection has sent; or all, and it is known that it is."""
        late = self.remote.late
        while late:
            self.remote.land(late.pop(self.rng.randrange(len(late))))
            if not all_of_it:
                return
        if all_of_it:
            self.forwarder.copy_late()

    def connect(self, **kwargs: int) -> FakeConnection:
        self.connection = connection = FakeConnection(
            self.remote, self.rng, ours=self.ours, **kwargs
        )
        self.forwarder.connect(cast(NbdConnection, connection), ours=self.ours)
        return connection

    def lose(self, *, power: bool = False) -> bool:
        """The session ends; `power`: and the copy's host has lost what was not flushed. What
        `disconnect` says."""
        connection = self.connection
        assert connection is not None
        connection.abort(OSError(errno.ECONNRESET, "lost"))
        if power and not self.ours:
            self.remote.data[:] = self.remote.durable
        lossy = self.forwarder.disconnect()
        self.forwarder.alone = True
        self.connection = None
        if self.job is not None:
            self.job.give_up()
        return lossy

    def mirror(self) -> MirrorJob:
        """Begin to copy what is BEHIND."""
        self.job = MirrorJob("mirror", EventBus(), self.disk, self.ranges, self.dirty, self)
        self.job.start()
        return self.job

    # Section: MirrorTarget

    def digest_key(self) -> bytes:
        """Nobody needs one here."""
        return b""

    async def digests(self, offset: int, length: int) -> list[tuple[int, int | None]] | None:
        connection = self.connection
        if connection is None:
            raise OSError(errno.ENOTCONN, "lost")
        if not connection.digests_known:
            return None
        length = min(length, GRANULE * self.rng.choice([1, 3, 100]))
        data = await connection.request(STATUS, offset, length)
        values: list[tuple[int, int | None]] = []
        for at in range(0, length, GRANULE):
            piece = data[at : at + GRANULE]
            value = digest_of(piece) if self.ours or not any(piece) else None
            if not self.ours and not any(piece):
                value = digest_of_zeroes(GRANULE)
            values.append((len(piece), value))
        return values

    async def wait_answered(self, offset: int, length: int) -> None:
        await self.forwarder.wait_answered(offset, length)

    def copy(self, offset: int, data: memoryview) -> Awaitable[object]:
        return self.forwarder.copy(offset, data)

    def copy_zeroes(self, offset: int, length: int) -> Awaitable[object]:
        return self.forwarder.copy_zeroes(offset, length)

    def nudge(self) -> None:
        self._on_behind()

    # Section: the law

    def check(self) -> None:
        """What is not marked in the file is durable there as it is here; memory agrees."""
        states = self.dirty.states[:]
        for granule in range(self.granules):
            start, end = granule * GRANULE, min((granule + 1) * GRANULE, self.size)
            if not self.file.data[granule]:
                assert states[granule] == 0, f"granule {granule} is {states[granule]}, not marked"
                here = self.local.data[start:end]
                # After a power failure, a replnbd has everything compared.
                there = self.remote.data if self.ours else self.remote.durable
                assert here == there[start:end], f"granule {granule} is not marked"
                assert here == self.remote.data[start:end], f"granule {granule} is not marked"

    def reap(self) -> None:
        """Forget tasks that have ended; those that failed with anything but an OSError raise."""
        for task in [task for task in self.tasks if task.done()]:
            del self.tasks[task]
            if not task.cancelled() and not isinstance(task.exception(), OSError):
                task.result()

    async def settle(self) -> None:
        """Let everything end that has begun; the connection answers all."""
        for _ in range(100_000):
            busy = self.connection is not None and self.connection.step()
            await asyncio.sleep(0)
            self.check()
            self.reap()
            job = self.job
            if job is not None and job.status.value in ("null", "concluded"):
                self.job = job = None
            if not busy and not self.tasks and job is None and not self.ranges.held:
                return
        raise AssertionError(f"seed {self.seed}: does not settle: {self.tasks}, {self.job}")
