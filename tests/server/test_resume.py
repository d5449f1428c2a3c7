"""A coroutine that was started by hand and has suspended can be carried on by a task."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from server_wire import on_both_loops

from replnbd.server.resume import carry_on


def start(coroutine: Coroutine[Any, Any, None]) -> Any:
    """What it waits for."""
    return coroutine.send(None)


async def carried(coroutine: Coroutine[Any, Any, None]) -> None:
    await carry_on(coroutine, start(coroutine))


@on_both_loops
async def test_it_goes_on_when_its_future_is_done_and_suspends_again_as_often_as_it_likes() -> None:
    steps: list[object] = []
    futures = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def work() -> None:
        for future in futures:
            steps.append(await future)
            await asyncio.sleep(0)

    task = asyncio.create_task(carried(work()))
    for index, future in enumerate(futures):
        await asyncio.sleep(0)
        assert len(steps) <= index
        future.set_result(index)
    await task
    assert steps == [0, 1, 2]


@on_both_loops
async def test_a_future_that_was_done_in_between_is_no_problem() -> None:
    future = asyncio.get_running_loop().create_future()

    async def work() -> None:
        assert await future == "early"

    coroutine = work()
    waiting = start(coroutine)
    future.set_result("early")
    await asyncio.create_task(carry(coroutine, waiting))


async def carry(coroutine: Coroutine[Any, Any, None], waiting: Any) -> None:
    await carry_on(coroutine, waiting)


@on_both_loops
async def test_exceptions_of_future_and_coroutine_come_through() -> None:
    future = asyncio.get_running_loop().create_future()

    async def work() -> None:
        with pytest.raises(ZeroDivisionError):
            await future
        raise OSError(28, "full")

    task = asyncio.create_task(carried(work()))
    await asyncio.sleep(0)
    future.set_exception(ZeroDivisionError())
    with pytest.raises(OSError, match="full"):
        await task


@on_both_loops
async def test_cancellation_reaches_the_coroutine_and_it_may_end_in_order() -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cleaned.append("up")
            raise

    task = asyncio.create_task(carried(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == ["up"]


@on_both_loops
async def test_a_contended_lock_taken_outside_any_task_is_handed_over() -> None:
    lock = asyncio.Lock()
    await lock.acquire()
    order: list[int] = []

    async def work(number: int) -> None:
        async with lock:
            order.append(number)

    tasks = []
    for number in range(3):
        coroutine = work(number)
        tasks.append(asyncio.create_task(carry(coroutine, start(coroutine))))
    lock.release()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]
