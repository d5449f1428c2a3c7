"""Requests off the common path: what one asks a node for, and what becomes of it if it suspends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from replnbd.block import BlockNode, Buffer
from replnbd.nbd import Descriptor, Refusal, Request, RequestRules, parse_status_payload
from replnbd.nbd import constants as c
from replnbd.server.contexts import ContextStatus
from replnbd.server.limits import (
    CACHE_BYTES_MAX,
    CACHE_CHUNK,
    IN_FLIGHT_BYTES_MAX,
    IN_FLIGHT_MAX,
    STATUS_BYTES_MAX,
)
from replnbd.server.resume import carry_on
from replnbd.server.slabs import Slab

Contexts = Sequence[tuple[int, ContextStatus]]
"""Selected metadata contexts: id, and what answers for it."""


class Operation:
    """A valid request, and what it needs until it is answered.

    `slab`: what its payload is a slice of, or where a READ's reply will be, from `at` on.
    `statuses`: the answer to a BLOCK_STATUS.
    """

    __slots__ = ("at", "request", "slab", "statuses")

    def __init__(self, request: Request, slab: Slab | None = None, at: int = 0) -> None:
        self.request = request
        self.slab = slab
        self.at = at
        self.statuses: list[tuple[int, list[Descriptor]]] = []

    @property
    def bytes_held(self) -> int:
        """What it makes us hold, at most."""
        command, length = self.request.command, self.request.length
        if command in (c.CMD_READ, c.CMD_WRITE):
            return length
        if command == c.CMD_CACHE:
            return min(length, CACHE_CHUNK)
        return STATUS_BYTES_MAX if command == c.CMD_BLOCK_STATUS else 0

    def run(
        self, node: BlockNode, payload: Buffer | None, place: memoryview | None, contexts: Contexts
    ) -> Coroutine[Any, Any, None]:
        """The coroutine, not started. `payload`: a WRITE's; `place`: for a READ's bytes."""
        flags, command, _cookie, offset, length = self.request
        if command == c.CMD_READ:
            # FUA on a READ is valid and means nothing.
            assert place is not None
            return node.pread(offset, place)
        if command == c.CMD_FLUSH:
            return node.flush()
        if command == c.CMD_BLOCK_STATUS:
            return self._block_status(node, contexts)
        if command == c.CMD_CACHE:
            return _cache(node, offset, length)
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

    async def _block_status(self, node: BlockNode, contexts: Contexts) -> None:
        flags, _command, _cookie, offset, length = self.request
        for number, status in contexts:
            descriptors = await status(node, offset, length)
            # "the server MUST NOT send metadata on more than one extent in the reply"
            self.statuses.append(
                (number, descriptors[:1] if flags & c.CMD_FLAG_REQ_ONE else descriptors)
            )


def filter_contexts(
    request: Request, payload: Buffer, contexts: Contexts, rules: RequestRules
) -> tuple[Request, Contexts] | Refusal:
    """A BLOCK_STATUS with a payload: the request that it stands for, and the contexts it wants."""
    parsed = parse_status_payload(payload)
    assert parsed is not None, "the rules have let its size pass"
    length, wanted = parsed
    selected = dict(contexts)
    # "or detects duplicate or unknown metacontext ids in the client's payload, the server MUST
    # gracefully consume the client's payload before failing with NBD_EINVAL"
    if len(set(wanted)) < len(wanted) or not selected.keys() >= set(wanted):
        return Refusal(c.EINVAL, f"BLOCK_STATUS in contexts {wanted}")
    refusal = rules.effect_refusal(request.offset, length)
    if refusal is not None:
        return refusal
    return request._replace(length=length), [(each, selected[each]) for each in wanted]


async def _durable(node: BlockNode, changing: Coroutine[Any, Any, None]) -> None:
    # "it MUST NOT send its reply to that command until all write operations (if any) associated
    # with that command have been completed and persisted to non-volatile storage"
    await changing
    await node.flush()


async def _cache(node: BlockNode, offset: int, length: int) -> None:
    """Read a range for the sake of the page cache: "by performing the actions of NBD_CMD_READ but
    replying with just status". "there is no guarantee": the rest of a very long one is left."""
    end = offset + min(length, CACHE_BYTES_MAX)
    scratch = memoryview(bytearray(min(end - offset, CACHE_CHUNK)))
    for position in range(offset, end, CACHE_CHUNK):
        await node.pread(position, scratch[: end - position])


class InFlight:
    """The suspended operations of one connection: each is carried on by a task, to its end."""

    def __init__(self, completed: Callable[[Operation, BaseException | None], None]) -> None:
        """`completed(operation, failure)` is called for each, after it was counted out."""
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
        operation: Operation,
        running: Coroutine[Any, Any, None],
        waiting: Any,  # noqa: ANN401 - what the loop's futures yield
    ) -> bool:
        """Take over an operation that has yielded `waiting`. Whether no more may begin now."""
        self._hold(operation, 1)
        self.idle.clear()
        task = self._loop.create_task(self._complete(operation, running, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self.full

    def _hold(self, operation: Operation, change: int) -> None:
        """Count an operation in (1), or out (-1)."""
        self.count += change
        slab = operation.slab
        if slab is None:
            self.bytes += change * operation.bytes_held
            return
        if slab.pooled:
            self.bytes += change * len(slab.buffer)
        else:
            self.bytes += change * operation.bytes_held
            # A small one keeps all of the slab that it shares with others.
            if slab.users == (change < 0):
                self.bytes += change * len(slab.buffer)
        slab.users += change

    async def _complete(
        self,
        operation: Operation,
        running: Coroutine[Any, Any, None],
        waiting: Any,  # noqa: ANN401
    ) -> None:
        failure: BaseException | None = None
        try:
            await carry_on(running, waiting)
        except (Exception, asyncio.CancelledError) as exc:
            failure = exc
        self._hold(operation, -1)
        if not self.count:
            self.idle.set()
        self._completed(operation, failure)
