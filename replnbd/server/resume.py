"""Eager coroutines: how to go on with one that has suspended.

The server starts an operation with `coroutine.send(None)`, outside any task, and nearly always
that was all. If it suspends, it has yielded the future that it waits for, and that future must
reach a task: `carry_on` yields it first, as if the coroutine had just been awaited there.
"""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from typing import Any


@types.coroutine
def carry_on(coroutine: Coroutine[Any, Any, None], waiting: Any) -> Generator[Any, Any, None]:  # noqa: ANN401 - whatever the loop's futures yield
    """Await the rest of `coroutine`, which has been started and has yielded `waiting`.

    A cancellation of the awaiting task is thrown into the coroutine, as `await` would do.
    """
    while True:
        try:
            value = yield waiting
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as exc:
            try:
                waiting = coroutine.throw(exc)
            except StopIteration:
                return
        else:
            try:
                waiting = coroutine.send(value)
            except StopIteration:
                return
