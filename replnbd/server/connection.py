"""Connection: one client in the transmission phase. This file is the data path of the server.

Life. SERVING: requests are parsed and run as they arrive. DRAINING (the client said DISC or shut
its side down, the export goes away, the server stops): nothing is parsed any more, what is in
flight ends and is answered. LINGERING: we have shut our side down, and wait for the client to do
the same; to close at once would reset a connection on which something is still on its way, and
the client might lose its last replies. CLOSED: the transport is gone; operations may still be in
flight, and `closed` is set when the last has ended.

Holding. While `_hold` is set nothing is parsed, and at the end of a batch reading stops too. It is
set by whatever makes going on wrong, and `_release` clears it once none of that is true any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum, auto

from replnbd.block import Buffer
from replnbd.events import EventBus
from replnbd.nbd import (
    REQUEST_SIZE,
    SIMPLE_REPLY_SIZE,
    pack_simple_reply,
    pack_simple_reply_into,
    request_error,
    unpack_request,
)
from replnbd.nbd import constants as c
from replnbd.nbd.constants import CMD_READ, CMD_WRITE, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC
from replnbd.server.export import Export
from replnbd.server.limits import (
    BATCH_REQUESTS_MAX,
    LINGER_S,
    PACKED_READ_MAX,
    UNSENT_BYTES_MAX,
    WHOLE_PAYLOAD_MAX,
)
from replnbd.server.operations import InFlight, Request, operation
from replnbd.server.polling import BusyPoll
from replnbd.server.slabs import Inbox, Outbox, Pool, Slab

log = logging.getLogger(__name__)


class State(Enum):
    """The life of a connection, see above."""

    SERVING = auto()
    DRAINING = auto()
    LINGERING = auto()
    CLOSED = auto()


class Connection(asyncio.BufferedProtocol):
    """Serves one client. The handshake makes it, and hands the transport over with `start`."""

    def __init__(
        self,
        export: Export,
        peer: str,
        bus: EventBus,
        pool: Pool,
        on_closed: Callable[[Connection], None],
    ) -> None:
        self.export = export
        self.peer = peer
        self.state = State.SERVING
        self.closed = asyncio.Event()
        self._bus = bus
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        # As negotiated: a client is held to what it was told.
        self._size = export.node.size
        self._flags = export.transmission_flags
        self._writable = export.writable
        # Flow
        self._hold = False
        self._batch = 0  # requests in the last one
        self._write_paused = False
        self._reading_paused = False
        self._peer_done = False
        self._in_batch = False
        self._in_flight = InFlight(self._completed)
        self._linger: asyncio.TimerHandle | None = None
        # Buffers
        self._pool = pool
        self._inbox = Inbox(pool)
        self._incomplete: Request | None = None

    # Section: the transport's callbacks

    def start(self, transport: asyncio.Transport, early: bytes, *, write_paused: bool) -> None:
        """Take over a transport whose handshake is done; `early` are bytes received after it."""
        self._transport = transport
        self._outbox = Outbox(transport, self._pool)
        self._busy_poll = BusyPoll(transport.get_extra_info("socket").fileno())
        transport.set_write_buffer_limits(high=UNSENT_BYTES_MAX)
        self.export.connections.add(self)
        if write_paused:
            self.pause_writing()
        transport.set_protocol(self)
        if early:
            self._inbox.get_buffer()[: len(early)] = early
            self.buffer_updated(len(early))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._inbox.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        # What comes later is dropped: "A client MUST NOT send anything to the server after DISC".
        self._busy_poll.begin()
        while nbytes and self.state is State.SERVING:
            if self._inbox.received(nbytes):
                self._run()
            if self._hold or self._in_flight.count or self._transport.is_closing():
                break
            nbytes = self._busy_poll.receive(self._inbox.get_buffer(), self._batch)

    def eof_received(self) -> bool:
        """The client will send no more; it may still want its answers, as after DISC."""
        self._peer_done = True
        self.finish()
        return self.state is State.DRAINING  # if not, the transport may close itself

    def pause_writing(self) -> None:
        self._write_paused = self._hold = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._hold:
            # Not at once: some transports call this from within write().
            self._loop.call_soon(self._release)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            log.info("%s: connection to export %s lost: %s", self.peer, self.export.name, exc)
        if self._linger is not None:
            self._linger.cancel()
        self.state = State.CLOSED
        self._hold = True
        self.export.connections.discard(self)
        if not self._in_flight.count:
            self._end()

    # Section: ending

    def finish(self) -> None:
        """Parse nothing more, answer what is in flight, then close. Returns at once.

        May be called from within an operation of the batch that is running."""
        if self.state is State.SERVING:
            self.state = State.DRAINING
            self._hold = True
            self._inbox.drop_everything()
            if self._reading_paused and not self._transport.is_closing():
                self._transport.resume_reading()  # to hear the client hang up
            if not self._in_flight.count and not self._in_batch:
                self._close()

    def abort(self) -> None:
        """Drop the client now, without its replies. Operations in flight still end."""
        self._transport.abort()

    async def wait_idle(self) -> None:
        """Wait until no operation is in flight; after `finish` none begins again."""
        await self._in_flight.idle.wait()

    @property
    def unsent_bytes(self) -> int:
        """Of replies that the client has not taken yet."""
        return self._transport.get_write_buffer_size()

    def _close(self) -> None:
        self._outbox.flush()
        self.state = State.LINGERING
        self.export.connections.discard(self)
        transport = self._transport
        if self._peer_done or not transport.can_write_eof():
            transport.close()
        elif not transport.is_closing():
            transport.write_eof()
        self._linger = self._loop.call_later(LINGER_S, transport.abort)

    def _end(self) -> None:
        self.closed.set()
        self._on_closed(self)

    def _protocol_error(self, what: str) -> None:
        log.info("%s: closed, export %s: %s", self.peer, self.export.name, what)
        self.finish()

    # Section: batches

    def _release(self) -> None:
        """Go on parsing, if nothing forbids it any more."""
        if (
            self._hold
            and self.state is State.SERVING
            and not self._write_paused
            and not self._in_flight.full
        ):
            self._hold = False
            self._run()

    def _run(self) -> None:
        """One batch: run all complete requests, send their replies, get ready to receive."""
        self._in_batch = True
        self._outbox.begin()
        complete = self._inbox.take_payload()
        if complete is not None:
            request, self._incomplete = self._incomplete, None
            assert request is not None
            self._start(request, *complete)
        if self._inbox.payload is None:
            self._parse()
        self._outbox.flush()
        self._in_batch = False
        if self.state is not State.SERVING:
            if self.state is State.DRAINING and not self._in_flight.count:
                self._close()
            return
        if self._hold:
            if not self._reading_paused and not self._transport.is_closing():
                self._reading_paused = True
                self._transport.pause_reading()
            return
        self._inbox.settle()
        if self._reading_paused and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    def _parse(self) -> None:
        """The loop that everything is about: plain READs and WRITEs run here, in line."""
        inbox, outbox, node, size = self._inbox, self._outbox, self.export.node, self._size
        received = inbox.slab
        # By command: CMD_READ is 0, CMD_WRITE is 1.
        nowait, eager = (node.pread_nowait, node.pwrite_nowait), (node.pread, node.pwrite)
        operations, volume = [0, 0], [0, 0]
        for _ in range(BATCH_REQUESTS_MAX):
            start, end = inbox.start, inbox.end
            if end - start < REQUEST_SIZE or self._hold:
                break
            magic, flags, command, cookie, offset, length = unpack_request(received.buffer, start)
            body = start + REQUEST_SIZE
            plain = not flags and magic == REQUEST_MAGIC and offset + length <= size
            if plain and command == CMD_READ and 0 < length <= PACKED_READ_MAX:
                reply_size = SIMPLE_REPLY_SIZE + length
            elif plain and command == CMD_WRITE and self._writable and 0 < length <= end - body:
                reply_size = SIMPLE_REPLY_SIZE
            elif self._uncommon(magic, Request(flags, command, cookie, offset, length)):
                continue
            else:
                break
            if outbox.at + reply_size > outbox.limit:
                outbox.turn()
                if self._hold:  # the peer does not read: this request waits in the inbox
                    break
            at = outbox.at
            reply = outbox.slab
            if command == CMD_READ:
                inbox.start = body
                place = reply.view[at + SIMPLE_REPLY_SIZE : at + reply_size]
            else:
                inbox.start = body + length
                place = received.view[body : body + length]
            try:
                done = nowait[command](offset, place)
                if not done:
                    running = eager[command](offset, place)
                    try:
                        waiting = running.send(None)
                    except StopIteration:  # it has ended without suspending
                        done = True
            except (Exception, asyncio.CancelledError) as exc:
                outbox.put(self.export.failed(exc, command, flags, self._bus), cookie)
                continue
            if not done:
                request = Request(flags, command, cookie, offset, length)
                later = outbox.lend(at + reply_size) if command == CMD_READ else None
                self._hold |= self._in_flight.carry(
                    running, waiting, request, later, received if later is None else reply
                )
                continue
            pack_simple_reply_into(reply.buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
            outbox.at = at + reply_size
            operations[command] += 1
            volume[command] += length
        else:
            self._hold = True
            self._loop.call_soon(self._release)
        self._batch = operations[0] + operations[1]
        for command in (CMD_READ, CMD_WRITE):
            self.export.stats.count(command, operations[command], volume[command])

    # Section: requests off the common path

    def _uncommon(self, magic: int, request: Request) -> bool:
        """Run or refuse any request at inbox.start. False: the rest of it has to arrive first."""
        inbox = self._inbox
        if magic != REQUEST_MAGIC:
            self._protocol_error(f"request magic is {magic:#010x}, not {REQUEST_MAGIC:#010x}")
            return False
        flags, command, cookie, offset, length = request
        if command == c.CMD_DISC:
            self.finish()
            return False
        error = request_error(flags, command, offset, length, self._size, self._flags)
        payload: memoryview | None = None
        if command == CMD_WRITE and not error:
            start = inbox.start + REQUEST_SIZE
            if length <= inbox.end - start:
                payload = inbox.slab.view[start : start + length]
                inbox.start = start + length
            elif length <= WHOLE_PAYLOAD_MAX:
                return False
            else:
                inbox.start = start
                inbox.expect(length)
                self._incomplete = request
                return False
        else:
            inbox.start += REQUEST_SIZE
        if error or (not length and command != c.CMD_FLUSH):
            self._outbox.put(error, cookie)
            if error and command == CMD_WRITE:
                return self._refuse_payload(length)
            return True
        self._start(request, payload, None if payload is None else inbox.slab)
        return True

    def _refuse_payload(self, length: int) -> bool:
        """A WRITE was refused: its payload is coming all the same."""
        if length > c.PAYLOAD_BYTES_MAX:
            # Nobody should have to read 4 GiB to hear of the next request.
            self._protocol_error(f"WRITE of {length} bytes, more than {c.PAYLOAD_BYTES_MAX}")
            return False
        self._inbox.skip(length)
        return True

    def _start(self, request: Request, payload: Buffer | None, slab: Slab | None) -> None:
        """Run a valid request. `slab`: what `payload` is a slice of."""
        reply: memoryview | None = None
        if request.command == CMD_READ:
            slab = self._pool.take(SIMPLE_REPLY_SIZE + request.length)
            reply = slab.view[: SIMPLE_REPLY_SIZE + request.length]
        running = operation(self.export.node, request, payload, reply)
        try:
            waiting = running.send(None)
        except StopIteration:
            self.export.stats.count(request.command, 1, request.length)
            if reply is None:
                self._outbox.put(0, request.cookie)
                self._pool.give(slab)
            else:
                self._send(reply, request.cookie, slab)
        except (Exception, asyncio.CancelledError) as exc:
            error = self.export.failed(exc, request.command, request.flags, self._bus)
            self._outbox.put(error, request.cookie)
            self._pool.give(slab)
        else:
            self._hold |= self._in_flight.carry(running, waiting, request, reply, slab)

    def _send(self, reply: memoryview, cookie: int, slab: Slab | None) -> None:
        pack_simple_reply_into(reply, 0, SIMPLE_REPLY_MAGIC, 0, cookie)
        self._outbox.send(reply, slab)

    # Section: operations that have suspended

    def _completed(
        self,
        request: Request,
        failure: BaseException | None,
        reply: memoryview | None,
        slab: Slab | None,
    ) -> None:
        """A suspended operation has ended: answer it, and go on with what waited for that."""
        error = 0
        if failure is None:
            self.export.stats.count(request.command, 1, request.length)
        else:
            error = self.export.failed(failure, request.command, request.flags, self._bus)
        alive = self.state is not State.CLOSED and not self._transport.is_closing()
        if alive and reply is not None and not error:
            self._send(reply, request.cookie, slab)
        else:
            self._pool.give(slab)
            if alive:
                self._transport.write(pack_simple_reply(error, request.cookie))
        if not self._in_flight.count:
            if self.state is State.DRAINING:
                self._close()
            elif self.state is State.CLOSED:
                self._end()
        if self._hold:
            self._release()
