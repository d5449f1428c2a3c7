"""Requests off the common path: what one asks a node for, and what becomes of it if it suspends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from replnbd.block import BlockNode, Buffer
from replnbd.nbd import SIMPLE_REPLY_SIZE
from replnbd.nbd import constants as c
from replnbd.server.limits import IN_FLIGHT_BYTES_MAX, IN_FLIGHT_MAX
from replnbd.server.resume import carry_on
from replnbd.server.slabs import Slab


class Request(NamedTuple):
    """A request, where it has to be kept."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    @property
    def payload_bytes(self) -> int:
        """What it makes us hold."""
        return self.length if self.command in (c.CMD_READ, c.CMD_WRITE) else 0


def operation(
    node: BlockNode, request: Request, payload: Buffer | None, reply: memoryview | None
) -> Coroutine[Any, Any, None]:
    """The coroutine, not started. `payload`: a WRITE's; `reply`: a READ's, header and place."""
    flags, command, _cookie, offset, length = request
    if command == c.CMD_READ:
        # FUA on a READ is valid and means nothing.
        assert reply is not None
        return node.pread(offset, reply[SIMPLE_REPLY_SIZE:])
    if command == c.CMD_FLUSH:
        return node.flush()
    if command == c.CMD_WRITE:
        assert payload is not None
        changing = node.pwrite(offset, payload)
    elif command == c.CMD_TRIM:
        changing = node.discard(offset, length)
    else:
        assert command == c.CMD_WRITE_ZEROES
        unmap = not flags & c.CMD_FLAG_NO_HOLE
        fast = bool(flags & c.CMD_FLAG_FAST_ZERO)
        changing = node.write_zeroes(offset, length, unmap=unmap, fast=fast)
    return _durable(node, changing) if flags & c.CMD_FLAG_FUA else changing


async def _durable(node: BlockNode, changing: Coroutine[Any, Any, None]) -> None:
    # "it MUST NOT send its reply to that command until all write operations (if any) associated
    # with that command have been completed and persisted to non-volatile storage"
    await changing
    await node.flush()


Completed = Callable[[Request, BaseException | None, memoryview | None, Slab | None], None]


class InFlight:
    """The suspended operations of one connection: each is carried on by a task, to its end."""

    def __init__(self, completed: Completed) -> None:
        """`completed(request, failure, reply, slab)` is called for each, after it was counted out;
        `reply` and `slab` are what `carry` got."""
        self._completed = completed
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.count = 0
        self.bytes = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def full(self) -> bool:
        """Whether no more may begin."""
        return self.count >= IN_FLIGHT_MAX or self.bytes >= IN_FLIGHT_BYTES_MAX

    def carry(
        self,
        running: Coroutine[Any, Any, None],
        waiting: Any,  # noqa: ANN401 - what the loop's futures yield
        request: Request,
        reply: memoryview | None,
        slab: Slab | None,
    ) -> bool:
        """Take over an operation that has yielded `waiting`: its request, a READ's place for the
        reply, the slab it uses. Whether no more may begin now."""
        if slab is not None:
            slab.users += 1
        self.count += 1
        self.bytes += request.payload_bytes
        self.idle.clear()
        task = self._loop.create_task(self._complete(running, waiting, request, reply, slab))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self.full

    async def _complete(
        self,
        running: Coroutine[Any, Any, None],
        waiting: Any,  # noqa: ANN401
        request: Request,
        reply: memoryview | None,
        slab: Slab | None,
    ) -> None:
        failure: BaseException | None = None
        try:
            await carry_on(running, waiting)
        except (Exception, asyncio.CancelledError) as exc:
            failure = exc
        if slab is not None:
            slab.users -= 1
        self.count -= 1
        self.bytes -= request.payload_bytes
        if not self.count:
            self.idle.set()
        self._completed(request, failure, reply, slab)
