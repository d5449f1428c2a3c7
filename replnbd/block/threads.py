"""The one pool of threads for system calls that may wait for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# QEMU's block layer uses up to 64 for a device. The calls block in the kernel without the GIL,
# so more threads than cores make sense, and 32 keep one slow disk from taking all of them
# from an NVMe drive with deep queues.
_POOL = ThreadPoolExecutor(max_workers=32, thread_name_prefix="replnbd-io")


async def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call in the pool.

    The call cannot be cut short, and it uses its buffers and file descriptors to its end: so a
    cancelled caller waits for that end, and only then is cancelled.
    """
    call = asyncio.get_running_loop().run_in_executor(_POOL, partial(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            try:
                await asyncio.wait([call])
            except asyncio.CancelledError:
                continue
        if not call.cancelled():
            call.exception()  # seen: nobody is left to hear of it
        raise
