"""Both event loops that replnbd runs under: asyncio's own, and uvloop's."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

DEADLINE_S = 30.0  # a bound for a hang, far above what a loaded machine needs


def on_both_loops(
    test: Callable[..., Coroutine[Any, Any, None]],
) -> Callable[..., None]:
    """Run an async test under asyncio's own loop, and under uvloop."""

    @functools.wraps(test)
    def run(*args: Any, loop_factory: Callable[[], asyncio.AbstractEventLoop], **kw: Any) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(*args, **kw), DEADLINE_S)

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(bounded())

    signature = inspect.signature(test)
    parameter = inspect.Parameter("loop_factory", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), parameter]
    )
    factories = [asyncio.new_event_loop, uvloop.new_event_loop]
    mark = pytest.mark.parametrize("loop_factory", factories, ids=["asyncio", "uvloop"])
    parametrized: Callable[..., None] = mark(run)
    return parametrized
