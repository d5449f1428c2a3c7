"""RangeLock: who waits for whom, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from replnbd.block import RangeLock
from replnbd.block.range_lock import EVERYTHING


def begin(lock: RangeLock, offset: int, length: int, exclusive: bool) -> asyncio.Task[int]:
    return asyncio.create_task(lock.acquire(offset, length, exclusive))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_an_uncontended_acquire_does_not_suspend() -> None:
    lock = RangeLock(512)
    coroutine = lock.acquire(0, 4096, True)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        lock.release(stop.value)
    else:
        raise AssertionError("suspended")
    assert not lock


async def test_readers_share_and_a_writer_waits_for_them() -> None:
    lock = RangeLock()
    first = await lock.acquire(0, 100, False)
    second = await lock.acquire(50, 100, False)
    writer = begin(lock, 99, 1, True)
    await settle()
    assert not writer.done()
    lock.release(first)
    await settle()
    assert not writer.done()
    lock.release(second)
    lock.release(await writer)
    assert not lock


async def test_neighbours_do_not_wait_unless_they_share_a_granule() -> None:
    fine, coarse = RangeLock(1), RangeLock(64)
    await fine.acquire(0, 10, True)
    await fine.acquire(10, 10, True)
    await coarse.acquire(0, 10, True)
    blocked = begin(coarse, 63, 1, True)
    beyond = begin(coarse, 64, 1, True)
    await settle()
    assert not blocked.done()
    assert beyond.done()
    blocked.cancel()


async def test_a_writer_is_not_starved_by_readers_that_come_later() -> None:
    lock = RangeLock()
    reader = await lock.acquire(0, 10, False)
    writer = begin(lock, 0, 10, True)
    await settle()
    late = begin(lock, 5, 1, False)
    await settle()
    assert not late.done()
    lock.release(reader)
    await settle()
    assert writer.done()
    assert not late.done()
    lock.release(await writer)
    lock.release(await late)


async def test_everything_drains_and_holds_back() -> None:
    lock = RangeLock(65536)
    held = await lock.acquire(1 << 44, 4096, False)
    drain = begin(lock, 0, EVERYTHING, True)
    await settle()
    after = begin(lock, 0, 1, False)
    await settle()
    assert not drain.done()
    lock.release(held)
    await settle()
    assert drain.done()
    assert not after.done()
    lock.release(await drain)
    lock.release(await after)


async def test_a_cancelled_waiter_leaves_nothing_behind_and_wakes_who_waited_for_it() -> None:
    lock = RangeLock()
    reader = await lock.acquire(0, 10, False)
    writer = begin(lock, 0, 10, True)
    await settle()
    late = begin(lock, 0, 10, False)
    await settle()
    writer.cancel()
    await settle()
    assert late.done()
    lock.release(reader)
    lock.release(await late)
    assert not lock


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_no_two_conflicting_holders_ever_and_all_get_their_turn(seed: int) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        lock = RangeLock(rng.choice([1, 4, 16]))
        cells: list[tuple[int, int]] = [(0, 0)] * 64  # readers, writers on each granule of 16

        async def request() -> None:
            offset = rng.randrange(0, 900)
            length = rng.randrange(1, 1024 - offset)
            exclusive = rng.random() < 0.4
            await asyncio.sleep(0)
            key = await lock.acquire(offset, length, exclusive)
            touched = range(offset // 16, (offset + length - 1) // 16 + 1)
            inner = [i for i in touched if offset <= i * 16 and (i + 1) * 16 <= offset + length]
            for i in inner:
                readers, writers = cells[i]
                assert writers == 0
                assert not (exclusive and readers)
                cells[i] = (readers + (not exclusive), writers + exclusive)
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            for i in inner:
                readers, writers = cells[i]
                cells[i] = (readers - (not exclusive), writers - exclusive)
            lock.release(key)

        await asyncio.gather(*(request() for _ in range(60)))
        assert not lock

    asyncio.run(run())
