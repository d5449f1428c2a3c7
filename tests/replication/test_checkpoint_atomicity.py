"""Commands in the midst of requests in flight: each request is wholly before or after a command.

Clients of both sides write, zero, discard and read without a pause, on files where every operation
suspends. In the middle of it the group gets a command. Then the bytes are asked on which side of
the command each request fell, and that must be a cut in time: what was answered before the command
was given is before, what was sent after it had returned is after, and whoever was sent after
another's answer, on whichever disk and side, is not before it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field

import pytest
from replication_support import Built, Layout, build

from replnbd.block import read_bytes
from replnbd.events import EventBus
from replnbd.jobs import JobRegistry
from replnbd.replication import Durability, Group, Stage

SLOT = 64 << 10
"""Bytes. No two requests that change bytes share one, so that each can be judged by itself."""
SLOTS = 40
SIZE = SLOT * SLOTS + 512

SEEDS = range(12)
DISKS = pytest.mark.parametrize("count", [1, 2])
SEED = pytest.mark.parametrize("seed", SEEDS)


@dataclass
class Sent:
    """A request and its times, by a clock that ticks at every event of this test."""

    disk: int
    side: str
    operation: str
    offset: int
    old: bytes = field(repr=False)
    new: bytes = field(repr=False)
    submitted: int
    answered: int | None = None
    error: int | None = None
    before: bool | None = None
    """The verdict: whether it fell before the command."""
    stored: int = -1
    """For a read: when the primary had been told that the bytes are stored."""


class World:
    """Disks in stage running, with a first checkpoint of random bytes, and their clients."""

    def __init__(self, seed: int, count: int, durability: Durability | None = None) -> None:
        self.rng = random.Random(seed)
        self.durability = durability
        self.count = count
        self.clock = itertools.count()
        self.sent: list[Sent] = []
        self.content = [self.rng.randbytes(SIZE) for _ in range(count)]
        self.built: list[Built] = []

    async def start(self) -> None:
        bus, jobs = EventBus(), JobRegistry()
        for number in range(self.count):
            layout = Layout.draw(self.rng, SIZE)
            layout.suspends = True
            layout.durability = self.durability or layout.durability
            content = self.content[number]
            self.built.append(await build(f"d{number}", layout, bus, jobs, content))
        self.group = Group([built.disk for built in self.built])
        await self.group.start()

    async def run(self, command: Awaitable[None]) -> tuple[int, int]:
        """Let the clients work and give the command amid it; (when given, when returned)."""
        clients = [
            asyncio.ensure_future(client)
            for number in range(self.count)
            for client in self.clients_of(number)
        ]
        enough = self.rng.randrange(self.count * SLOTS * 3 // 4)
        while sum(sent.answered is not None for sent in self.sent) < enough:
            await asyncio.sleep(0)
        given = next(self.clock)
        await command
        returned = next(self.clock)
        await asyncio.gather(*clients)
        return given, returned

    def clients_of(self, number: int) -> Iterator[Awaitable[None]]:
        """Two clients of either side, each with slots of its own; and one that reads."""
        slots = list(range(SLOTS))
        self.rng.shuffle(slots)
        quarter = SLOTS // 4
        for index, side in enumerate(("primary", "primary", "standby", "standby")):
            mine = slots[index * quarter : (index + 1) * quarter]
            yield self.change(number, side, mine, random.Random(self.rng.random()))
        yield self.read(number, random.Random(self.rng.random()))

    async def change(self, disk: int, side: str, slots: list[int], rng: random.Random) -> None:
        node = getattr(self.built[disk].disk, side)
        for slot in slots:
            length = rng.choice([1, 512, 5000, 50000])
            offset = slot * SLOT + rng.randrange(SLOT - length)
            operation = rng.choice(["write", "write", "zero", "trim"])
            new = rng.randbytes(length) if operation == "write" else bytes(length)
            old = self.content[disk][offset : offset + length]
            if old == new:
                continue  # (a single byte) nobody could tell before from after
            sent = Sent(disk, side, operation, offset, old, new, next(self.clock))
            self.sent.append(sent)
            try:
                if operation == "write":
                    await node.pwrite(offset, new)
                elif operation == "zero":
                    await node.write_zeroes(offset, length)
                else:
                    await node.discard(offset, length)
            except OSError as exc:
                sent.error = exc.errno
            sent.answered = next(self.clock)

    async def read(self, disk: int, rng: random.Random) -> None:
        """The standby reads what the primary has been told is stored: old bytes before a
        checkpoint, new ones after it, and never some of both."""
        for _ in range(SLOTS // 2):
            await asyncio.sleep(0)
            known = [
                sent
                for sent in self.sent
                if sent.disk == disk and sent.side == "primary" and sent.answered is not None
            ]
            if not known:
                continue
            target = rng.choice(known)
            read = Sent(disk, "reader", "read", 0, target.old, target.new, next(self.clock))
            found = await read_bytes(self.built[disk].disk.standby, target.offset, len(target.new))
            read.answered = next(self.clock)
            assert found in (target.old, target.new), "a read saw a part of a checkpoint"
            read.before = found == target.old
            assert target.answered is not None
            read.stored = target.answered
            self.sent.append(read)

    async def read_view(self, disk: int) -> bytes:
        return bytes(await read_bytes(self.built[disk].disk.standby, 0, SIZE))

    async def read_secondary(self, disk: int) -> bytes:
        return bytes(await read_bytes(self.built[disk].disk.secondary, 0, SIZE))

    def judge(self, given: int, returned: int) -> None:
        """All verdicts together must be a cut in time."""
        # What was not stored before the command is not in the view, whenever it is read.
        self.sent = [sent for sent in self.sent if sent.stored < given]
        last_before = max((sent.submitted for sent in self.sent if sent.before), default=-1)
        for sent in self.sent:
            assert sent.before is not None
            assert sent.answered is not None
            if sent.answered < given:
                assert sent.before, f"answered before the command, but after it: {sent}"
            if sent.submitted > returned:
                assert not sent.before, f"sent after the command, but before it: {sent}"
            if sent.answered < last_before:
                assert sent.before, f"after the command, its successor before it: {sent}"


def side_of(sent: Sent, found: bytes, visible_if_before: bool) -> bool:
    """Whether a request was before the command, by the bytes that are found in its place."""
    assert found in (sent.old, sent.new), f"half of a request: {sent.operation} {sent.offset}"
    return (found == sent.new) == visible_if_before


def part(content: bytes, sent: Sent) -> bytes:
    return content[sent.offset : sent.offset + len(sent.new)]


def overlaid(content: bytes, requests: list[Sent]) -> bytes:
    """`content` after these requests."""
    result = bytearray(content)
    for sent in requests:
        result[sent.offset : sent.offset + len(sent.new)] = sent.new
    return bytes(result)


def changes(world: World, disk: int, side: str) -> list[Sent]:
    return [sent for sent in world.sent if sent.disk == disk and sent.side == side]


@SEED
@DISKS
async def test_a_checkpoint_cuts_all_requests_of_all_disks_at_one_instant(
    count: int, seed: int
) -> None:
    world = World(seed, count)
    await world.start()
    given, returned = await world.run(world.group.checkpoint())
    for disk in range(count):
        view = await world.read_view(disk)
        primary, standby = changes(world, disk, "primary"), changes(world, disk, "standby")
        for sent in primary:
            sent.before = side_of(sent, part(view, sent), visible_if_before=True)
        for sent in standby:
            sent.before = side_of(sent, part(view, sent), visible_if_before=False)
        shown = [s for s in primary if s.before] + [s for s in standby if not s.before]
        assert view == overlaid(world.content[disk], shown)
        assert await world.read_secondary(disk) == overlaid(world.content[disk], primary)
    world.judge(given, returned)
    assert not any(sent.error for sent in world.sent)
    await world.group.close()


@SEED
@DISKS
async def test_a_failover_lets_each_request_of_the_primary_end_or_refuses_it(
    count: int, seed: int
) -> None:
    world = World(seed, count)
    await world.start()
    given, returned = await world.run(world.group.failover())
    await world.group.wait_committed()
    for sent in world.sent:
        if sent.side == "primary":
            assert sent.error in (None, errno.ESHUTDOWN)
            sent.before = sent.error is None
    world.sent = [sent for sent in world.sent if sent.operation != "read"]
    for disk in range(count):
        assert world.built[disk].disk.stage is Stage.DONE
        standby = changes(world, disk, "standby")
        # Nothing of the primary's since the checkpoint, and all of the standby's, from whenever.
        assert not any(sent.error for sent in standby)
        expected = overlaid(world.content[disk], standby)
        assert await world.read_secondary(disk) == expected
        assert await world.read_view(disk) == expected
    world.sent = [sent for sent in world.sent if sent.side == "primary"]
    world.judge(given, returned)
    await world.group.close()


@SEED
@DISKS
async def test_a_stop_drops_what_the_standby_wrote_before_it_and_keeps_what_comes_after(
    count: int, seed: int
) -> None:
    world = World(seed, count)
    await world.start()
    given, returned = await world.run(world.group.stop())
    world.sent = [sent for sent in world.sent if sent.operation != "read"]
    for disk in range(count):
        assert world.built[disk].disk.stage is Stage.DONE
        primary, standby = changes(world, disk, "primary"), changes(world, disk, "standby")
        assert await world.read_secondary(disk) == overlaid(world.content[disk], primary)
        view = await world.read_view(disk)
        for sent in standby:
            sent.before = side_of(sent, part(view, sent), visible_if_before=False)
    world.sent = [sent for sent in world.sent if sent.side == "standby"]
    world.judge(given, returned)
    assert not any(sent.error for sent in world.sent)
    await world.group.close()


@SEED
async def test_commands_at_the_same_time_run_one_after_the_other(seed: int) -> None:
    """Checkpoints, and at last a failover, all given at once amid requests of two disks."""
    world = World(seed, 2)
    await world.start()

    async def commands() -> None:
        checkpoints = [world.group.checkpoint() for _ in range(3)]
        await asyncio.gather(*checkpoints, world.group.failover())

    await world.run(commands())
    await world.group.wait_committed()
    for disk in range(2):
        assert world.built[disk].disk.checkpoint_count == 4
        final = await world.read_view(disk)
        assert final == await world.read_secondary(disk)
        shown = []
        for sent in changes(world, disk, "primary") + changes(world, disk, "standby"):
            assert part(final, sent) in (sent.old, sent.new)
            if part(final, sent) == sent.new:
                shown.append(sent)
                assert sent.error is None
        assert final == overlaid(world.content[disk], shown)
    await world.group.close()


async def test_requests_that_overlap_across_a_checkpoint_keep_their_order() -> None:
    """One block, written over and over by both sides: the view is the last value before the
    checkpoint, or what the standby wrote after it."""
    for seed in SEEDS:
        rng = random.Random(seed)
        # With the other durability it waits before it is the turn of the checkpoint.
        world = World(seed, 1, Durability.PROCESS)
        await world.start()
        disk = world.built[0].disk
        offset, length = rng.randrange(SIZE - 8192), rng.randrange(1, 8192)
        written = [bytes([value]) * length for value in range(1, 20)]
        before = rng.randrange(len(written))
        flying = [asyncio.ensure_future(disk.primary.pwrite(offset, w)) for w in written[:before]]
        checkpoint = asyncio.ensure_future(world.group.checkpoint())
        await asyncio.sleep(0)
        flying += [asyncio.ensure_future(disk.primary.pwrite(offset, w)) for w in written[before:]]
        await asyncio.gather(checkpoint, *flying)
        old = world.content[0][offset : offset + length]
        expected = written[before - 1] if before else old
        view = await world.read_view(0)
        assert view[offset : offset + length] == expected, f"seed {seed}"
        secondary = await world.read_secondary(0)
        assert secondary[offset : offset + length] == written[-1], f"seed {seed}"
        await world.group.close()
