"""Answers: from the end of an operation to the bytes that tell the client."""

from __future__ import annotations

from replnbd.events import EventBus
from replnbd.nbd import Refusal, Replies, Request
from replnbd.nbd.constants import CMD_READ
from replnbd.server.export import Export
from replnbd.server.operations import Operation
from replnbd.server.slabs import Outbox, Pool


class Answers:
    """Of one connection. Everything goes to `outbox`; who calls sees to it that it is flushed."""

    def __init__(
        self, outbox: Outbox, replies: Replies, export: Export, bus: EventBus, pool: Pool
    ) -> None:
        self._outbox = outbox
        self._replies = replies
        self._export = export
        self._bus = bus
        self._pool = pool

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """A request that no node gets to see."""
        self._outbox.put(self._replies.error(request, refusal.error, refusal.text))

    def succeed(self, request: Request) -> None:
        """A request that there is nothing to do for."""
        self._outbox.put(self._replies.ack(request))

    def end(self, operation: Operation, failure: BaseException | None = None) -> None:
        """An operation has ended: count it, and send its reply."""
        request, slab = operation.request, operation.slab
        refusal = self._count(operation, failure)
        if refusal is not None:
            self._outbox.put(
                self._replies.error(request, refusal.error, refusal.text, request.offset)
            )
        elif request.command == CMD_READ:
            assert slab is not None
            at = operation.at
            size = self._replies.pack_read(
                slab.buffer, at, request.flags, request.cookie, request.offset, request.length
            )
            self._outbox.send(slab.view[at : at + size], slab)
            return
        elif operation.statuses:
            self._outbox.put(self._replies.status(request, operation.statuses))
        else:
            self._outbox.put(self._replies.ack(request))
        self._pool.give(slab)

    def drop(self, operation: Operation, failure: BaseException | None) -> None:
        """An operation has ended, and its client is gone."""
        self._count(operation, failure)
        self._pool.give(operation.slab)

    def _count(self, operation: Operation, failure: BaseException | None) -> Refusal | None:
        request = operation.request
        if failure is not None:
            return self._export.failed(failure, request, self._bus)
        self._export.stats.count(request.command, 1, request.length)
        return None
