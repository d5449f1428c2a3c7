"""Threads for blocking calls: as many as there are calls, none that wait for each other."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from loops import on_both_loops

from replnbd.block import threads
from replnbd.block.threads import run_blocking


@pytest.fixture(autouse=True)
def fresh_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """None are idle yet."""
    monkeypatch.setattr(threads, "_threads", threads._Threads())


@on_both_loops
async def test_a_call_gives_what_the_function_returns_or_raises() -> None:
    assert await run_blocking(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        await run_blocking(divmod, 7, 0)


@on_both_loops
async def test_any_number_of_calls_run_at_the_same_time() -> None:
    meet = threading.Barrier(100)
    places = await asyncio.gather(*(run_blocking(meet.wait, 30) for _ in range(100)))
    assert sorted(places) == list(range(100))


@on_both_loops
async def test_calls_one_after_the_other_share_threads() -> None:
    names = set()
    for _ in range(50):
        names.add(await run_blocking(threading.get_ident))
        await run_blocking(time.sleep, 0)
    # A thread may still be on its way back when the next call comes.
    assert len(names) < 25


@on_both_loops
async def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE_S", 0.01)
    meet = threading.Barrier(8)
    idents = asyncio.gather(*(run_blocking(_meet, meet) for _ in range(8)))
    for thread in await idents:
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()
    assert await run_blocking(divmod, 7, 3) == (2, 1)


def _meet(barrier: threading.Barrier) -> threading.Thread:
    barrier.wait(30)
    return threading.current_thread()


@on_both_loops
async def test_where_no_more_threads_can_begin_calls_wait_for_those_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = threading.Event()
    first = asyncio.create_task(run_blocking(go.wait, 30))
    await asyncio.sleep(0)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    others = [asyncio.create_task(run_blocking(divmod, n, 3)) for n in range(3)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in others)
    go.set()
    assert await first
    assert await asyncio.gather(*others) == [(0, 0), (0, 1), (0, 2)]
    monkeypatch.setattr(threads, "_threads", threads._Threads())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await run_blocking(divmod, 7, 3)
