"""The one pool of threads for system calls that may wait for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# QEMU's block layer uses up to 64 for a device. The calls block in the kernel without the GIL,
# so more threads than cores make sense, and 32 keep one slow disk from taking all of them
# from an NVMe drive with deep queues.
_POOL = ThreadPoolExecutor(max_workers=32, thread_name_prefix="replnbd-io")


async def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call in the pool. A cancelled caller does not cut it short: the call goes
    on, and its result is dropped, so never cancel what holds a buffer or a file descriptor."""
    loop = asyncio.get_running_loop()
    if kwargs:
        return await loop.run_in_executor(_POOL, lambda: function(*args, **kwargs))
    return await loop.run_in_executor(_POOL, function, *args)
