"""Requests: from received bytes to operations. This file is the data path of the server.

A *plain* request is a READ or WRITE of ordinary size, without flags, within the export, whose bytes
are all there: it runs in line, in `parse`. All others are looked at by `_uncommon`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from replnbd.block import Buffer
from replnbd.nbd import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    NothingAllowed,
    Outcome,
    Refusal,
    Request,
    RequestRules,
    pack_simple_reply_into,
)
from replnbd.nbd import constants as c
from replnbd.nbd.constants import CMD_CACHE, CMD_READ, CMD_WRITE, SIMPLE_REPLY_MAGIC
from replnbd.server.answers import Answers
from replnbd.server.export import Export
from replnbd.server.limits import (
    BATCH_BYTES_MAX,
    BATCH_REQUESTS_MAX,
    PACKED_READ_MAX,
    WHOLE_PAYLOAD_MAX,
)
from replnbd.server.operations import Contexts, InFlight, Operation, filter_contexts
from replnbd.server.slabs import Inbox, Outbox, Pool, Slab


class Requests:
    """Of one connection. `hold`: nothing is parsed while it is set; who sets it clears it.

    `on_disconnect` is called for DISC, `on_violation(what)` when the peer is beyond repair, and
    `on_turn_over` when `hold` was set only to let others have the loop.
    """

    def __init__(
        self,
        export: Export,
        outcome: Outcome,
        inbox: Inbox,
        pool: Pool,
        in_flight: InFlight,
        on_disconnect: Callable[[], None],
        on_violation: Callable[[str], None],
        on_turn_over: Callable[[], None],
    ) -> None:
        self._export = export
        self._inbox = inbox
        self._pool = pool
        self._in_flight = in_flight
        self._on_disconnect = on_disconnect
        self._on_violation = on_violation
        self._on_turn_over = on_turn_over
        self._incomplete: Request | None = None
        self._batch_bytes = 0  # read by those requests of it that are not plain
        self.hold = False
        # As negotiated: a client is held to what it was told.
        offer = outcome.export
        assert offer is not None
        self.replies = outcome.replies
        self._contexts = [
            (offer.contexts.index(name) + 1, export.contexts[name]) for name in outcome.contexts
        ]
        self._plain_end = offer.size  # no request that ends behind it is plain
        self._writable = not outcome.transmission_flags & c.FLAG_READ_ONLY
        self._rules = RequestRules(
            offer.size,
            outcome.transmission_flags,
            extended=outcome.replies is EXTENDED_REPLIES,
            contexts=len(outcome.contexts),
        )

    def start(self, outbox: Outbox, answers: Answers) -> None:
        """Where replies go, now that there is a transport."""
        self._outbox = outbox
        self._answers = answers

    def refuse_all(self, reason: str) -> None:
        """Answer all that is parsed from now on by ESHUTDOWN."""
        self._rules = NothingAllowed(reason)
        self._plain_end = -1

    def run_payload(self) -> None:
        """Run the request whose payload the inbox was waiting for, if it is complete."""
        complete = self._inbox.take_payload()
        if complete is None:
            return
        request, self._incomplete = self._incomplete, None
        assert request is not None
        payload, slab = complete
        refusal = self._rules.refusal(request)  # once more: the export may have gone meanwhile
        if refusal is None:
            self._start(request, payload, slab)
        else:
            self._answers.refuse(request, refusal)
            self._pool.give(slab)

    def parse(self) -> int:
        """Run all requests that are there. The loop that everything is about.

        Returns how many were plain.
        """
        inbox, outbox, node, size = self._inbox, self._outbox, self._export.node, self._plain_end
        received, replies = inbox.slab, self.replies
        unpack, header, magic_expected = (
            replies.unpack_request, replies.request_size, replies.request_magic,
        )  # fmt: skip
        prefix, write_flags, ack_size = replies.read_prefix, replies.write_flags, replies.ack_size
        simple_reads, simple_acks = replies is SIMPLE_REPLIES, replies is not EXTENDED_REPLIES
        nowait = node.pread_nowait, node.pwrite_nowait  # CMD_READ is 0, CMD_WRITE is 1
        operations, volume = [0, 0], [0, 0]
        self._batch_bytes = 0
        for _ in range(BATCH_REQUESTS_MAX):
            start, end = inbox.start, inbox.end
            if end - start < header or self.hold:
                break
            magic, flags, command, cookie, offset, length = unpack(received.buffer, start)
            body = start + header
            plain = magic == magic_expected and offset + length <= size
            if plain and command == CMD_READ and not flags and 0 < length <= PACKED_READ_MAX:
                reply_size = prefix + length
            elif (
                plain and command == CMD_WRITE and flags == write_flags and self._writable
                and 0 < length <= end - body
            ):  # fmt: skip
                reply_size = ack_size
            elif self._uncommon(magic, Request(flags, command, cookie, offset, length)):
                continue
            else:
                break
            if outbox.at + reply_size > outbox.limit:
                outbox.turn()
                if self.hold:  # the peer does not read: this request waits in the inbox
                    break
            at = outbox.at
            reply = outbox.slab
            if command == CMD_READ:
                inbox.start = body
                place = reply.view[at + prefix : at + reply_size]
            else:
                inbox.start = body + length
                place = received.view[body : body + length]
            try:
                done = nowait[command](offset, place)
            except (Exception, asyncio.CancelledError) as exc:
                self._answers.end(Operation(Request(flags, command, cookie, offset, length)), exc)
                continue
            if not done:
                request = Request(flags, command, cookie, offset, length)
                operation = Operation(request, received if command else reply, at)
                if not self._run_eagerly(operation, place, at + reply_size):
                    continue
            if simple_reads or (command and simple_acks):
                pack_simple_reply_into(reply.buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
            elif command == CMD_READ:
                reply_size = replies.pack_read(reply.buffer, at, flags, cookie, offset, length)
            else:
                replies.pack_ack(reply.buffer, at, cookie, offset)
            outbox.at = at + reply_size
            operations[command] += 1
            volume[command] += length
        else:
            self._end_turn()
        for command in (CMD_READ, CMD_WRITE):
            self._export.stats.count(command, operations[command], volume[command])
        return operations[0] + operations[1]

    def _run_eagerly(self, operation: Operation, place: memoryview, reply_end: int) -> bool:
        """A plain request that has to wait for something, or may have to. True: it has not, and
        its reply is to be packed; otherwise it is seen to."""
        reading = operation.request.command == CMD_READ
        node, offset = self._export.node, operation.request.offset
        running = node.pread(offset, place) if reading else node.pwrite(offset, place)
        try:
            waiting = running.send(None)
        except StopIteration:
            return True
        except (Exception, asyncio.CancelledError) as exc:
            operation.slab = None  # nothing to give back
            self._answers.end(operation, exc)
            return False
        if reading:
            self._outbox.lend(reply_end)
        self.hold |= self._in_flight.carry(operation, running, waiting)
        return False

    def _uncommon(self, magic: int, request: Request) -> bool:
        """Run or refuse any request at inbox.start. False: the rest of it has to arrive first."""
        inbox, replies = self._inbox, self.replies
        if magic != replies.request_magic:
            self._on_violation(f"request magic is {magic:#010x}, not {replies.request_magic:#010x}")
            return False
        if request.command == c.CMD_DISC:
            self._on_disconnect()
            return False
        refusal = self._rules.refusal(request)
        length = replies.payload_length(request)
        start = inbox.start + replies.request_size
        if refusal is not None:
            inbox.start = start
            self._answers.refuse(request, refusal)
            return self._refuse_payload(request, length)
        payload: memoryview | None = None
        if length:
            if length <= inbox.end - start:
                payload = inbox.slab.view[start : start + length]
            elif length <= WHOLE_PAYLOAD_MAX:
                return False
            else:
                inbox.start = start
                inbox.expect(length)
                self._incomplete = request
                return False
        inbox.start = start + length
        if not request.length and request.command != c.CMD_FLUSH:
            self._answers.succeed(request)
        else:
            self._start(request, payload, None if payload is None else inbox.slab)
        return True

    def _refuse_payload(self, request: Request, length: int) -> bool:
        """A request was refused: its payload is coming all the same."""
        if length > c.PAYLOAD_BYTES_MAX:
            # Nobody should have to read 4 GiB to hear of the next request.
            name = c.command_name(request.command)
            self._on_violation(f"{name} of {length} bytes, more than {c.PAYLOAD_BYTES_MAX}")
            return False
        self._inbox.skip(length)
        return True

    def _start(self, request: Request, payload: Buffer | None, slab: Slab | None) -> None:
        """Run a valid request. `slab`: what `payload` is a slice of."""
        place: memoryview | None = None
        contexts: Contexts = self._contexts
        if request.command == CMD_READ:
            prefix = self.replies.read_prefix
            slab = self._pool.take(prefix + request.length)
            place = slab.view[prefix : prefix + request.length]
        elif request.command == c.CMD_BLOCK_STATUS and payload is not None:
            filtered = filter_contexts(request, payload, contexts, self._rules)
            if isinstance(filtered, Refusal):
                self._answers.refuse(request, filtered)
                return
            (request, contexts), slab = filtered, None
        operation = Operation(request, slab)
        running = operation.run(self._export.node, payload, place, contexts)
        try:
            waiting = running.send(None)
        except StopIteration:
            self._answers.end(operation)
            if request.command in (CMD_READ, CMD_CACHE):
                self._batch_bytes += request.length
                if self._batch_bytes >= BATCH_BYTES_MAX:
                    self._end_turn()
        except (Exception, asyncio.CancelledError) as exc:
            self._answers.end(operation, exc)
        else:
            self.hold |= self._in_flight.carry(operation, running, waiting)

    def _end_turn(self) -> None:
        self.hold = True
        self._on_turn_over()
