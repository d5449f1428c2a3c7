"""Connection: one client in the transmission phase: its life, and when it may have the loop.

Life. SERVING: requests are parsed and run as they arrive. REFUSING (the export goes away, the
server stops): what is in flight ends and is answered, what comes is answered by ESHUTDOWN, for a
moment. DRAINING (after that; or the client said DISC or shut its side down): nothing is parsed any
more. LINGERING: we have shut our side down, and wait for the client to do the same; to close at
once would reset a connection on which something is still on its way, and the client might lose its
last replies. CLOSED: the transport is gone; operations may still be in flight, and `closed` is set
when the last has ended.

Holding. While `Requests.hold` is set nothing is parsed, and at the end of a batch reading stops
too. It is set by whatever makes going on wrong, and `_release` clears it once none of that is true
any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import IntEnum, auto

from replnbd.events import EventBus
from replnbd.nbd import Outcome
from replnbd.nbd import constants as c
from replnbd.server.answers import Answers
from replnbd.server.export import Export
from replnbd.server.limits import (
    FAREWELL_S,
    LINGER_S,
    UNSENT_BYTES_MAX,
    UNSENT_TLS_BYTES_MAX,
)
from replnbd.server.operations import InFlight, Operation
from replnbd.server.pieces import Pieces
from replnbd.server.polling import BusyPoll
from replnbd.server.requests import Requests
from replnbd.server.slabs import TAIL_BYTES, Inbox, Outbox, Pool

log = logging.getLogger(__name__)


class State(IntEnum):
    """The life of a connection, see above; it only goes on."""

    SERVING = auto()
    REFUSING = auto()
    DRAINING = auto()
    LINGERING = auto()
    CLOSED = auto()


class Connection(asyncio.BufferedProtocol):
    """Serves one client. The handshake makes it, and hands the transport over with `start`."""

    def __init__(
        self,
        export: Export,
        peer: str,
        outcome: Outcome,
        bus: EventBus,
        pool: Pool,
        on_closed: Callable[[Connection], None],
    ) -> None:
        self.export = export
        self.peer = peer
        self.contexts = frozenset(outcome.contexts)
        """Metadata contexts that the client has selected."""
        self.writable = not outcome.transmission_flags & c.FLAG_READ_ONLY
        self.state = State.SERVING
        self.closed = asyncio.Event()
        self._bus = bus
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        # Flow
        self._batch = 0  # requests in the last one
        self._write_paused = False
        self._reading_paused = False
        self._peer_done = False
        self._in_batch = False
        self._in_flight = InFlight(self._completed)
        self.idle = self._in_flight.idle
        """Set while no operation is in flight; after `refuse` or `finish` none begins again."""
        self.stirred = True  # bytes came, or replies went, since Deadlines looked last
        self._timer: asyncio.TimerHandle | None = None  # of REFUSING, then of LINGERING
        # Buffers
        self._pool = pool
        self._inbox = Inbox(pool)
        self._requests = Requests(
            export, outcome, self._inbox, pool, self._in_flight,
            self.finish, self._violated, self._release_soon,
        )  # fmt: skip

    # Section: the transport's callbacks

    def start(self, transport: asyncio.Transport, early: bytes, *, write_paused: bool) -> None:
        """Take over a transport whose handshake is done; `early` are bytes received after it."""
        self._transport = transport
        # What TLS has encrypted cannot be read past it.
        self._secure = transport.get_extra_info("sslcontext") is not None
        self._pieces = Pieces(transport, self._pieces_wait) if self._secure else None
        self._outbox = Outbox(self._pieces or transport, self._pool)
        self._answers = Answers(
            self._outbox, self._requests.replies, self.export, self._bus, self._pool
        )
        self._requests.start(self._outbox, self._answers)
        self._busy_poll = BusyPoll(
            -1 if self._secure else transport.get_extra_info("socket").fileno()
        )
        high = UNSENT_TLS_BYTES_MAX if self._secure else UNSENT_BYTES_MAX
        transport.set_write_buffer_limits(high=high, low=min(high // 4, TAIL_BYTES))
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
        self.stirred = True
        self._busy_poll.begin()
        while nbytes and self.state <= State.REFUSING:
            if self._inbox.received(nbytes):
                self._run()
            if self._requests.hold or self._in_flight.count or self._transport.is_closing():
                break
            nbytes = self._busy_poll.receive(self._inbox.get_buffer(), self._batch)

    def eof_received(self) -> bool:
        """The client will send no more; it may still want its answers, as after DISC."""
        self._peer_done = True
        if self._pieces is not None:
            # TLS lets us write no more: "discarding any pending writes" (RFC 5246, 7.2.1).
            self._pieces.stop()
        self.finish()
        # If not, the transport may close itself; over TLS it does in any case.
        return self.state is State.DRAINING and not self._secure

    def pause_writing(self) -> None:
        self._write_paused = self._requests.hold = True
        if self._pieces is not None:
            self._pieces.pause()

    def resume_writing(self) -> None:
        self.stirred = True
        # Some transports call this from within write().
        if self._pieces is not None:
            self._loop.call_soon(self._send_pieces)
            return
        self._write_paused = False
        if self._requests.hold:
            self._release_soon()

    def _pieces_wait(self) -> None:
        self.pause_writing()
        self._loop.call_soon(self._send_pieces)

    def _send_pieces(self) -> None:
        if self._pieces is None or self.state is State.CLOSED or self._transport.is_closing():
            return
        self._write_paused = False
        self._pieces.resume()  # and it may be paused again
        if self._write_paused:
            return
        if self.state is State.LINGERING:
            self._hang_up()
        elif self._requests.hold:
            self._release()

    def connection_lost(self, exc: Exception | None) -> None:
        # Who has said DISC may hang up before it hears our end of TLS.
        if exc is not None and self.state is not State.LINGERING:
            log.info("%s: connection to export %s lost: %s", self.peer, self.export.name, exc)
        if self._timer is not None:
            self._timer.cancel()
        self.state = State.CLOSED
        self._requests.hold = True
        if not self._in_flight.count:
            self._end()

    # Section: ending

    def refuse(self, reason: str) -> None:
        """Answer all that comes from now on by ESHUTDOWN, then finish. Returns at once.

        May be called from within an operation of the batch that is running."""
        if self.state is State.SERVING:
            self.state = State.REFUSING
            self.export.connections.discard(self)
            self._requests.refuse_all(reason)
            self._requests.hold = True  # a batch that is running ends here
            self._release_soon()
            self._timer = self._loop.call_later(FAREWELL_S, self.finish)

    def finish(self) -> None:
        """Parse nothing more, answer what is in flight, then close. Returns at once."""
        if self.state <= State.REFUSING:
            self.state = State.DRAINING
            self._requests.hold = True
            self._inbox.drop_everything()
            if self._reading_paused and not self._transport.is_closing():
                self._transport.resume_reading()  # to hear the client hang up
            if not self._in_flight.count and not self._in_batch:
                self._close()

    def abort(self) -> None:
        """Drop the client now, without its replies. Operations in flight still end."""
        self._transport.abort()

    @property
    def unsent_bytes(self) -> int:
        """Of replies that the client has not taken yet."""
        return (self._pieces or self._transport).get_write_buffer_size()

    def _close(self) -> None:
        self._outbox.flush()
        self.state = State.LINGERING
        self.export.connections.discard(self)
        self._hang_up()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_S, self._transport.abort)

    def _hang_up(self) -> None:
        transport = self._transport
        if self._pieces is not None and self._pieces.waiting_bytes:
            return  # until they are sent
        if self._peer_done or not transport.can_write_eof():
            transport.close()
        elif not transport.is_closing():
            transport.write_eof()

    def _end(self) -> None:
        self.export.connections.discard(self)
        # They refer to us, and so do loops that have done TLS for us: the buffers would stay until
        # the collector comes.
        del self._in_flight, self._requests, self._answers, self._outbox, self._inbox
        if self._pieces is not None:
            self._pieces.stop()
        self.closed.set()
        self._on_closed(self)

    def _violated(self, what: str) -> None:
        log.info("%s: closed, export %s: %s", self.peer, self.export.name, what)
        self.finish()

    # Section: batches

    def _release_soon(self) -> None:
        self._loop.call_soon(self._release)

    def _release(self) -> None:
        """Go on parsing, if nothing forbids it any more."""
        if (
            self.state <= State.REFUSING
            and self._requests.hold
            and not self._write_paused
            and not self._in_flight.full
        ):
            self._requests.hold = False
            self._run()

    def _run(self) -> None:
        """One batch: run all complete requests, send their replies, get ready to receive."""
        self._in_batch = True
        self._outbox.begin()
        self._requests.run_payload()
        if self._inbox.payload is None:
            self._batch = self._requests.parse()
        self._outbox.flush()
        self._in_batch = False
        if self.state > State.REFUSING:
            if self.state is State.DRAINING and not self._in_flight.count:
                self._close()
            return
        if self._requests.hold:
            if not self._reading_paused and not self._transport.is_closing():
                self._reading_paused = True
                self._transport.pause_reading()
            return
        self._inbox.settle()
        if self._reading_paused and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    # Section: operations that have suspended

    def _completed(self, operation: Operation, failure: BaseException | None) -> None:
        """A suspended operation has ended: answer it, and go on with what waited for that."""
        if self.state is State.CLOSED or self._transport.is_closing():
            self._answers.drop(operation, failure)
        else:
            self._answers.end(operation, failure)
            self._outbox.flush()
        if not self._in_flight.count:
            if self.state is State.DRAINING:
                self._close()
            elif self.state is State.CLOSED:
                self._end()
                return
        if self._requests.hold:
            self._release()
