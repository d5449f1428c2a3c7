"""The laws of a Forwarder and a MirrorJob, one at a time, between a disk and a copy that does its
worst (copy_world)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

import pytest
from copy_world import FakeConnection, Request, World, shrink

from replnbd.block.digest import GRANULE
from replnbd.jobs import mirror
from replnbd.nbd import constants as c
from replnbd.replication import forwarder as forwarder_module


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


async def answer_all_but(kept: Request, world: World) -> None:
    """For a while, and one after the other."""
    connection = world.connection
    assert connection is not None
    for _ in range(50):
        await asyncio.sleep(0)
        for request in tuple(connection.pending):
            if request is not kept:
                world.remote.land(request)
                connection.answer(request, None)
        world.check()


async def test_a_write_is_not_proven_by_the_epoch_that_ended_before_it_was_sent() -> None:
    """It was marked in that epoch; of what is in flight, a flush says nothing."""
    world = World(1, ours=True, slowness=0.0)
    connection = world.connect()
    entered = await world.forwarder.enter(0, 4096)
    proving = world.spawn(world.forwarder.prove())
    await asyncio.sleep(0)
    world.local.pwrite_nowait(0, b"x" * 4096)
    await world.forwarder.write(0, b"x" * 4096, entered)
    (write,) = connection.pending
    await answer_all_but(write, world)
    assert not proving.done()
    await world.settle()
    assert world.dirty.dirty == 0


async def test_a_proof_that_is_cancelled_leaves_what_it_waited_for_to_the_next() -> None:
    world = World(1, ours=False, slowness=0.0)
    connection = world.connect()
    await world.gate.pwrite(0, b"x" * 4096)
    (write,) = connection.pending
    first = world.spawn(world.forwarder.prove())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    second = world.spawn(world.forwarder.prove())
    for _ in range(10):
        await asyncio.sleep(0)
        assert connection.pending == [write], "nothing may be flushed before it is answered"
    await world.settle()
    second.result()
    assert world.dirty.dirty == 0


@pytest.mark.parametrize("ours", [True, False])
async def test_what_is_outstanding_is_bounded_whatever_the_client_writes(ours: bool) -> None:
    world = World(1, ours=ours, granules=100, slowness=0.0)
    connection = world.connect()
    connection.silent = True
    for number in range(2000):
        await world.gate.pwrite(number * 4096 % (90 * GRANULE), bytes([number % 255]) * 4096)
    assert connection.bytes_outstanding <= forwarder_module.QUEUE_BYTES_MAX + 4096 + 32
    assert world.dirty.behind > 0
    assert world.fell_behind > 0
    connection.silent = False
    world.mirror()
    await world.settle()
    assert world.dirty.behind == 0


async def test_what_a_foreign_copy_has_not_done_yet_is_waited_for_before_it_is_compared() -> None:
    """It shows a hole where a write is about to land, and here is a hole again."""
    world = World(5, ours=False, slowness=0.0)
    connection = world.connect()
    connection.can_zero = connection.digests_known = True
    await world.gate.pwrite(0, b"x" * 4096)
    (write,) = connection.pending
    await world.gate.pwrite(8192, b"y")  # less than a block: it is to be copied
    await world.gate.write_zeroes(0, GRANULE)
    assert world.dirty.behind == 1
    world.mirror()
    await answer_all_but(write, world)
    await world.settle()
    assert world.dirty.behind == 0
    assert not any(world.remote.data)


@pytest.mark.parametrize("sync", [False, True])
async def test_a_block_that_is_written_again_and_again_does_not_fall_behind(sync: bool) -> None:
    """A foreign copy gets one after the other, the last one last."""
    world = World(5, ours=False, sync=sync, slowness=0.0)
    connection = world.connect()
    connection.can_zero = True
    rng = world.rng
    writes = [
        world.spawn(world.gate.pwrite(512 * rng.randrange(24), bytes([n + 1]) * 512 * 8))
        for n in range(40)  # as much as may wait
    ]
    writes.append(world.spawn(world.gate.write_zeroes(4096, 512)))
    for _ in range(1000):
        await asyncio.sleep(0)
        pending = [request for request in connection.pending if request.command != c.CMD_FLUSH]
        for at, request in enumerate(pending):
            assert not any(request.overlaps(before) for before in pending[:at])
        if rng.random() < 0.5:
            connection.step()
        assert world.dirty.behind == 0
    await world.settle()
    assert all(write.done() for write in writes)
    assert world.local.data == world.remote.data
    assert world.fell_behind == 0


async def test_what_waits_for_a_foreign_copy_is_bounded_too() -> None:
    world = World(5, ours=False, slowness=0.0)
    connection = world.connect()
    connection.silent = True
    for number in range(100):
        await world.gate.pwrite(0, bytes([number]) * 4096)
        held = world.forwarder._in_flight.bytes_held
        assert connection.bytes_outstanding + held <= forwarder_module.QUEUE_BYTES_MAX + 4096 + 32
    assert len(connection.pending) == 1
    assert held > 2 * GRANULE
    assert world.dirty.behind == 1
    connection.silent = False
    world.mirror()
    await world.settle()
    assert world.local.data == world.remote.data
    assert world.forwarder._in_flight.bytes_held == 0
    assert world.forwarder._in_flight.requests_held == 0


async def test_what_waits_for_a_foreign_copy_is_over_when_the_way_is_lost() -> None:
    world = World(5, ours=False, slowness=0.0)
    world.connect().silent = True
    for number in range(10):
        await world.gate.pwrite(512 * number, bytes([number]) * 4096)
    world.lose()
    world.connect()
    world.mirror()
    await world.settle()
    world.land_late(all_of_it=True)
    world.mirror()
    await world.settle()
    assert world.local.data == world.remote.data
    await asyncio.gather(world.forwarder.prove(), world.settle())
    assert world.dirty.dirty == 0


async def test_a_flush_that_fails_while_another_is_under_way_is_no_proof_of_either() -> None:
    """A disk tells one of two, which were about the same writes."""
    world = World(5, ours=False, slowness=0.0)
    connection = world.connect()
    await world.gate.pwrite(0, b"x" * 4096)
    (write,) = connection.pending
    world.remote.land(write)
    connection.answer(write, None)
    await world.forwarder.flush()
    await asyncio.sleep(0)
    (flush,) = connection.pending
    proving = world.spawn(world.forwarder.prove())
    await answer_all_but(flush, world)
    assert not proving.done()
    world.remote.data[:] = world.remote.durable
    connection.answer(flush, OSError(errno.EIO, "the disk has lost it"))
    await world.settle()
    assert world.dirty.behind == 1
    assert world.bad == ["flush"]


async def test_what_a_foreign_copy_loses_in_a_copys_flush_is_copied_again() -> None:
    world = World(5, ours=False, slowness=0.0)
    connection = world.connect()
    connection.can_zero = connection.digests_known = True
    await world.gate.pwrite(0, b"x" * 4096)
    (write,) = connection.pending
    world.remote.land(write)
    connection.answer(write, None)
    await world.gate.pwrite(3 * GRANULE, b"y")  # less than a block: it is to be copied
    connection.refusals = 1.0
    world.mirror()
    await world.settle()
    connection.refusals = 0.0
    assert world.dirty.behind == 2
    world.mirror()
    await world.settle()
    await asyncio.gather(world.forwarder.prove(), world.settle())
    assert world.dirty.dirty == 0
    assert world.remote.durable == world.local.data


async def test_a_copy_that_fails_behind_its_job_is_a_gap() -> None:
    """One part of a chunk is refused, which ends the job, and then another."""
    world = World(5, ours=True, slowness=0.0)
    connection = world.connect()
    world.local.data[:GRANULE] = b"A" * GRANULE
    world.remote.data[GRANULE : 2 * GRANULE] = b"B" * GRANULE
    await world.dirty.mark_behind(0, 2 * GRANULE)
    job = world.mirror()
    slow: list[Request] = []

    async def answer(refusing: bool) -> None:
        for _ in range(100):
            await asyncio.sleep(0)
            for request in tuple(connection.pending):
                if request.command == c.CMD_WRITE_ZEROES:
                    slow[:] = [request]
                elif request.command == c.CMD_WRITE and refusing:
                    connection.answer(request, OSError(errno.ENOSPC, "full"))
                else:
                    world.remote.land(request)
                    connection.answer(request, None)

    await answer(refusing=True)
    assert job.error is not None
    world.mirror()
    await answer(refusing=False)
    assert world.dirty.behind == 0
    world.forwarder.keep_in_step()
    proving = world.spawn(world.forwarder.prove())
    await asyncio.sleep(0)
    connection.answer(slow[0], OSError(errno.EIO, "gave up"))
    await world.settle()
    assert proving.done()
    assert world.forwarder.refused
    await world.gate.pwrite(5 * GRANULE, b"n" * 4096)
    assert connection.pending == [], "it lacks something: nothing may be sent"


async def test_with_sync_a_write_behind_a_gap_is_the_first_of_a_disk_that_goes_on_alone() -> None:
    world = World(5, ours=True, sync=True, slowness=0.0)
    connection = world.connect()
    world.forwarder.keep_in_step()
    world.fault.fail("pwrite", errno.EIO, offset=0, length=4096, times=1)
    with pytest.raises(OSError, match="injected"):
        await world.gate.pwrite(0, b"a" * 4096)
    assert world.stepped == 0
    await world.gate.pwrite(4 * GRANULE, b"b" * 4096)
    assert world.stepped == 1
    assert connection.pending == []


async def test_long_requests_to_a_foreign_copy_are_bounded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarder_module, "QUEUE_BLOCKS_MAX", 40)
    world = World(5, ours=False, slowness=0.0)
    connection = world.connect()
    connection.can_zero = connection.silent = True
    for granule in range(10):
        await world.gate.write_zeroes(granule * GRANULE, GRANULE)
    assert len(connection.pending) == 3
    assert world.dirty.behind == 7
    connection.silent = False
    world.mirror()
    await world.settle()
    assert world.dirty.behind == 0


async def test_what_a_foreign_copy_may_lose_is_flushed_before_it_is_found_equal() -> None:
    world = World(5, ours=False, slowness=0.0)
    world.remote.durable[:4096] = b"x" * 4096  # what it has is zeroes, and nobody has flushed those
    connection = world.connect()
    connection.digests_known = True
    await world.dirty.mark_behind(0, GRANULE)
    world.mirror()
    await world.settle()
    assert world.dirty.states[0] == 0
    assert not any(world.remote.durable)


@pytest.mark.parametrize("held", [0, 11])
async def test_no_granule_is_begun_to_be_copied_twice_at_a_time(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time would go by digests of before the first. One granule is held for long; the
    last one is a short one."""
    copying: list[int] = []
    twice: list[int] = []
    original = mirror.MirrorJob._copy

    async def copy(
        job: mirror.MirrorJob, offset: int, length: int, theirs: Sequence[int | None]
    ) -> None:
        granules = list(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
        twice.extend(granule for granule in granules if granule in copying)
        copying.extend(granules)
        await original(job, offset, length, theirs)
        for granule in granules:
            copying.remove(granule)

    monkeypatch.setattr(mirror.MirrorJob, "_copy", copy)
    world = World(1, ours=True, tail=512)
    connection = world.connect()
    world.local.data[:] = world.rng.randbytes(world.size)
    await world.dirty.mark_everything()
    key = await world.ranges.acquire(held * GRANULE, 512, True)
    world.mirror()
    for _ in range(300):
        connection.step()
        await asyncio.sleep(0)
    assert world.dirty.behind in (1, 2), "all but a chunk has been copied"
    world.ranges.release(key)
    await world.settle()
    assert not twice
    assert world.dirty.behind == 0
    assert world.local.data == world.remote.data


async def test_nothing_is_sent_past_a_gap_until_the_copy_knows_of_it() -> None:
    """In step, it has at every moment what the disk was at some moment."""
    world = World(3, ours=True, granules=40)
    connection = world.connect()
    world.forwarder.keep_in_step()
    connection.silent = True
    moments = [bytes(world.remote.data)]
    for number in range(120):
        offset, data = number % 30 * GRANULE, bytes([1 + number]) * 4096
        await world.gate.pwrite(offset, data)
        moments.append(bytes(world.local.data))
    assert world.dirty.behind > 0
    connection.silent = False
    world.remote.land(connection.pending[0])
    await world.settle()
    assert bytes(world.remote.data) in moments
    sent = world.forwarder.bytes_sent
    await world.gate.pwrite(35 * GRANULE, b"later")
    assert world.forwarder.bytes_sent == sent
    world.forwarder.go_on()
    await world.gate.pwrite(36 * GRANULE, b"later")
    assert world.forwarder.bytes_sent == sent + 5
    world.mirror()
    await world.settle()
    assert world.local.data == world.remote.data


@pytest.mark.parametrize("refused", [False, True])
async def test_sync_tells_the_client_once_the_copy_has_answered(refused: bool) -> None:
    world = World(1, ours=True, sync=True)
    connection = world.connect()
    connection.silent = True
    writing = world.spawn(world.gate.pwrite(0, b"x" * 4096))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not writing.done()
    (write,) = connection.pending
    world.remote.land(write)
    await asyncio.sleep(0)
    assert not writing.done()
    connection.answer(write, OSError(errno.EIO, "no") if refused else None)
    await writing
    assert world.dirty.behind == refused
    assert bool(world.bad) is refused


async def test_sync_tells_the_client_when_the_way_is_lost_and_that_is_known() -> None:
    world = World(1, ours=True, sync=True)
    connection = world.connect()
    connection.silent = True
    writing = world.spawn(world.gate.pwrite(0, b"x" * 4096))
    for _ in range(20):
        await asyncio.sleep(0)
    connection.abort(OSError(errno.ECONNRESET, "lost"))
    await writing
    assert world.stepped == 1
    assert world.dirty.behind == 1


async def test_a_way_that_is_lost_with_something_on_it_is_lossy() -> None:
    world = World(1, ours=True, slowness=0.0)
    world.connect().silent = True
    await world.gate.pwrite(0, b"x" * 4096)
    assert world.lose()
    world.connect()
    world.forwarder.go_on()
    world.mirror()
    await world.settle()
    assert not world.lose(), "all has been answered"


async def test_a_disk_without_a_way_steps_before_its_first_write_and_once() -> None:
    world = World(1, ours=True, slowness=0.0)
    world.forwarder.alone = True
    assert not world.gate.pwrite_nowait(0, b"x")
    await asyncio.gather(*(world.gate.pwrite(4096 * i, b"x") for i in range(3)))
    assert world.stepped >= 1
    stepped = world.stepped
    await world.gate.pwrite(0, b"y")
    assert world.stepped == stepped
    assert world.dirty.behind == 1
    assert world.forwarder.bytes_sent == 0


async def test_copies_are_cut_to_what_a_foreign_copy_takes() -> None:
    world = World(1, ours=False, slowness=0.0)
    connection = world.connect(payload_max=3 * 4096)
    connection.can_zero = False
    world.local.data[: 2 * GRANULE] = b"x" * (2 * GRANULE)
    world.remote.data[4 * GRANULE : 5 * GRANULE] = b"y" * GRANULE
    await world.dirty.mark_everything()
    world.mirror()
    await world.settle()
    assert world.local.data == world.remote.data
    assert world.dirty.behind == 0


async def test_no_way_is_no_bug_to_a_proof() -> None:
    world = World(1, ours=True, slowness=0.0)
    with pytest.raises(OSError, match="lost"):
        await world.forwarder.prove()


def test_the_fake_keeps_order_only_where_a_replnbd_does() -> None:
    """The judge, judged."""

    async def orders(ours: bool) -> set[bytes]:
        found = set()
        for seed in range(40):
            world = World(seed, ours=ours)
            connection = FakeConnection(world.remote, world.rng, ours=ours)
            for letter in b"ab":
                connection.submit(
                    c.CMD_WRITE, 0, 0, 512, payload=bytes([letter]) * 512, done=lambda _: None
                )
            while connection.step():
                pass
            found.add(bytes(world.remote.data[:1]))
        return found

    assert asyncio.run(orders(True)) == {b"b"}
    assert asyncio.run(orders(False)) == {b"a", b"b"}


async def test_what_may_land_late_stays_marked_even_where_both_are_equal_now() -> None:
    world = World(5, ours=False, slowness=0.0)
    world.connect().digests_known = True
    await world.gate.pwrite(0, b"x" * 4096)
    world.remote.late = [*world.connection.pending] if world.connection is not None else []
    assert len(world.remote.late) == 1
    for request in world.remote.late:
        request.landed = True  # as far as the end of the session is concerned
    world.lose()
    await world.gate.write_zeroes(0, 4096)
    world.connect().digests_known = True
    world.mirror()
    await world.settle()
    world.land_late()
    world.check()
    world.land_late(all_of_it=True)
    world.mirror()
    await world.settle()
    assert world.local.data == world.remote.data
