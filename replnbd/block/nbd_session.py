"""NbdSession: from GO to the end; NbdConnection (nbd_connection.py) adds what waits.

It dies once, and is not used again: whoever wants to go on connects anew (`connect_nbd`). However
it ends (we close it; the server hangs up, breaks the protocol, or is silent for too long), every
request that was submitted is told so, once, and then the owner.

`submit` is what all else is made of: a plain call that never waits. Requests go out in its order,
all of one turn of the loop in one write.

Nothing bounds here what may be outstanding: `bytes_outstanding` is for the owner to look at.
What a server can make us hold is bounded by what was asked for (see `ClientReplies`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable

from replnbd.block.node import Buffer
from replnbd.errors import ProtocolError
from replnbd.nbd import ClientReplies, Done, Progress, ServerOffer
from replnbd.nbd import constants as c
from replnbd.nbd.replies import EXTENDED_REPLIES
from replnbd.nbd.transmission import request_packer

RESPONSE_TIMEOUT_S = 30.0
"""How long a server may let us wait for anything, while it owes us replies. A disk that is busy
flushing takes seconds; the kernel's own NBD client gives up after 30 s, too."""

STUCK_TIMEOUTS = 15
"""How many times as long one request may take while others are answered: to flush a slow disk, of
which a tenth of the memory has been written, takes minutes."""

CLOSE_TIMEOUT_S = 2.0
"""How long a server may take to answer what is outstanding, and to hang up, when we leave."""

BATCH_BYTES_MAX = 256 << 10
"""Of requests that wait for the end of the loop's turn."""

OWN_WRITE_MIN = 32 << 10
"""A payload from here on is a write of its own, and not moved into the batch."""

_TICKS = 4  # of the watch, in one timeout
_LINGER_0_S = struct.pack("ii", 1, 0)
_SIGN_OF_LIFE_BYTES = 4096  # received in a tick
_PROGRESS_BYTES = 64 << 10  # sent in a tick: a large payload on a slow line is no silence


class NbdSession(asyncio.BufferedProtocol):
    """A session; `connect_nbd` makes it. `name`: the server's, for errors."""

    def __init__(self, offer: ServerOffer, name: str, response_timeout_s: float) -> None:
        self.offer = offer
        self.name = name
        self.size = offer.size
        self.transmission_flags = flags = offer.transmission_flags
        self.block_size_min = offer.block_sizes.minimum
        payload_max = min(offer.block_sizes.payload_max, c.PAYLOAD_BYTES_MAX)
        self.payload_bytes_max = payload_max - payload_max % self.block_size_min
        """Of a READ or WRITE that is submitted."""
        self.contexts = offer.contexts
        """Ids of metadata contexts, by name."""
        self.extended = offer.replies is EXTENDED_REPLIES
        self.read_only = bool(flags & c.TransmissionFlag.READ_ONLY)
        self.can_flush = bool(flags & c.TransmissionFlag.SEND_FLUSH)
        self.can_fua = bool(flags & c.TransmissionFlag.SEND_FUA)
        self.can_trim = bool(flags & c.TransmissionFlag.SEND_TRIM)
        self.can_zero = bool(flags & c.TransmissionFlag.SEND_WRITE_ZEROES)
        self.can_fast_zero = self.can_zero and bool(flags & c.TransmissionFlag.SEND_FAST_ZERO)
        self.can_cache = bool(flags & c.TransmissionFlag.SEND_CACHE)
        # The end
        self._reason: OSError | None = None
        self._leaving = False
        self._lost = asyncio.Event()
        self._on_closed: Callable[[OSError], None] | None = None
        # Requests
        self._loop = asyncio.get_running_loop()
        self._replies = ClientReplies(offer)
        self._pack, self._header_size = request_packer(extended=self.extended)
        self._payload_flags = c.CMD_FLAG_PAYLOAD_LEN if self.extended else 0
        self._cookie = 0
        self._batch = bytearray()
        self._flush_scheduled = False
        # The watch
        self._tick_s = response_timeout_s / _TICKS
        self._silent_ticks = 0
        self._seen = (0, 0, 0)
        self._stuck_ticks = self._oldest = 0
        self._bytes_arrived = self._bytes_written = 0

    # Section: the session's life

    def start(self, transport: asyncio.Transport, early: bytes) -> None:
        """Take over a transport whose handshake is done; `early` are bytes received after it."""
        self._transport = transport
        # What TLS has to encrypt goes through the transport.
        secure = transport.get_extra_info("sslcontext") is not None
        self._fd = -1 if secure else transport.get_extra_info("socket").fileno()
        transport.set_protocol(self)
        self._watch = self._loop.call_later(self._tick_s, self._tick)
        for at in range(0, len(early), BATCH_BYTES_MAX // 2):
            part = early[at : at + BATCH_BYTES_MAX // 2]
            self.get_buffer(-1)[: len(part)] = part
            self.buffer_updated(len(part))

    @property
    def closed(self) -> bool:
        """Whether the session is over: what is submitted now fails."""
        return self._reason is not None

    @property
    def on_closed(self) -> Callable[[OSError], None] | None:
        """Called once with the reason when the session is over; if it is already, soon."""
        return self._on_closed

    @on_closed.setter
    def on_closed(self, callback: Callable[[OSError], None] | None) -> None:
        self._on_closed = callback
        if self._reason is not None and callback is not None:
            self._loop.call_soon(self._tell_owner)

    @property
    def bytes_outstanding(self) -> int:
        """Of requests, with their payloads, whose reply has not come: what the owner bounds."""
        return self._replies.bytes_outstanding

    @property
    def requests_outstanding(self) -> int:
        """How many these are."""
        return len(self._replies.pending)

    def abort(self, reason: OSError) -> None:
        """End the session now; nothing of it is waited for."""
        self._end(reason)

    async def close(self) -> None:
        """Soft disconnect: the server answers what is outstanding and hangs up, or we do after
        CLOSE_TIMEOUT_S. What is submitted meanwhile fails."""
        if self._reason is None and not self._leaving:
            self._flush()
            self._leaving = True
            if not self._replies.pending:
                self._say_goodbye()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._lost.wait()
            except TimeoutError:
                pass
            finally:
                self._end(self._closed_by_us())
        await self._lost.wait()

    def _say_goodbye(self) -> None:
        self._leaving = True
        self._batch += self._pack(0, c.CMD_DISC, 0, 0, 0)
        self._flush()

    def _closed_by_us(self) -> OSError:
        return OSError(errno.ESHUTDOWN, f"{self.name}: the session was closed")

    def _end(self, reason: OSError) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        self._watch.cancel()
        self._batch = bytearray()
        if not self._replies.shutting_down:
            if self._replies.pending:
                _forget_unsent(self._transport)
            self._transport.abort()
        self._replies.end(reason)
        self._tell_owner()

    @property
    def silence(self) -> str | None:
        """That replies are owed and none has come, if that is so for more than a moment."""
        silent_s = (self._silent_ticks - 1) * self._tick_s
        return f"the server has not answered for {silent_s:g} s" if silent_s > 0 else None

    def _tell_owner(self) -> None:
        callback, self._on_closed = self._on_closed, None
        if callback is not None:
            assert self._reason is not None
            callback(self._reason)

    def _tick(self) -> None:
        """The watch: end a session in which replies are owed and none comes, or one does not."""
        replies = self._replies
        seen = (
            self._cookie - len(replies.pending),
            self._bytes_arrived // _SIGN_OF_LIFE_BYTES,
            (self._bytes_written - self._transport.get_write_buffer_size()) // _PROGRESS_BYTES,
        )
        alive = not replies.pending or seen != self._seen
        self._seen = seen
        self._stuck_ticks = self._stuck_ticks + 1 if self._is_stuck() else 0
        self._silent_ticks = 0 if alive else self._silent_ticks + 1
        if self._silent_ticks > _TICKS:
            self._end(OSError(errno.ETIMEDOUT, f"{self.name}: {self.silence}"))
        elif self._stuck_ticks > STUCK_TIMEOUTS * _TICKS:
            stuck_s = self._tick_s * self._stuck_ticks
            text = f"{self.name}: the server has left a request unanswered for {stuck_s:g} s"
            self._end(OSError(errno.ETIMEDOUT, text))
        else:
            self._watch = self._loop.call_later(self._tick_s, self._tick)

    def _is_stuck(self) -> bool:
        """Whether the oldest request is the one of the last tick: all of it is sent, and its reply
        has not begun, whatever becomes of others."""
        pending = self._replies.pending
        before, self._oldest = self._oldest, next(iter(pending), 0)
        if not self._oldest or self._oldest != before or self._transport.get_write_buffer_size():
            return False
        return pending[self._oldest][5] is None

    # Section: the transport's callbacks

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._replies.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._reason is not None:
            return
        self._bytes_arrived += nbytes
        self._flush_scheduled = True  # below: what `done` callbacks submit is one batch
        try:
            self._replies.received(nbytes)
        except ProtocolError as exc:
            self._end(OSError(errno.EPROTO, f"{self.name}: the server broke the protocol: {exc}"))
            return
        self._flush()
        if self._leaving:
            if not self._replies.pending:
                # "SHOULD wait until there are no inflight requests": nbdkit cancels some at DISC.
                self._say_goodbye()
        elif self._replies.shutting_down:
            self._say_goodbye()
            self._transport.close()  # it sends that first
            self._loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)
            self._end(OSError(errno.ESHUTDOWN, f"{self.name}: the server is shutting down"))

    def eof_received(self) -> None:
        self._hung_up(None)  # and the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self._hung_up(exc)
        self._lost.set()

    def _hung_up(self, exc: Exception | None) -> None:
        if self._leaving and not self._replies.pending:
            self._end(self._closed_by_us())
            return
        number = getattr(exc, "errno", None) if isinstance(exc, OSError) else None
        if number not in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
            number = errno.ECONNRESET
        text = f"{self.name}: the server closed the connection"
        self._end(OSError(number, f"{text}: {exc}" if exc is not None else text))

    # Section: requests

    def submit(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        *,
        payload: Buffer | None = None,
        buffer: memoryview | None = None,
        statuses: dict[int, list[tuple[int, int]]] | None = None,
        done: Done,
    ) -> int:
        """Send a request, valid for this export; its cookie. `done` is told once how it ended, and
        not before this returns: by the reply, or by the session's end.

        A WRITE needs its `payload`, which is the caller's again at once (or, if it is a read-only
        view, does not change before the end, and is not copied); a READ its `buffer`, which
        is not before the end (`forget`); `statuses` gets a BLOCK_STATUS's descriptors, by context
        id. 4 KiB written and acknowledged: 3 µs, if there are many at a time.
        """
        if self._reason is not None or self._leaving:
            self._loop.call_soon(done, self._reason or self._closed_by_us())
            return 0
        replies = self._replies
        self._cookie = cookie = self._cookie + 1
        cost = self._header_size
        progress = None
        if payload is not None:
            cost += len(payload)
            self._batch += self._pack(flags | self._payload_flags, command, cookie, offset, length)
            if len(payload) < OWN_WRITE_MIN:
                self._batch += payload
            else:
                self._write_alone(payload)
        else:
            self._batch += self._pack(flags, command, cookie, offset, length)
            if buffer is not None or statuses is not None:
                progress = Progress(buffer, statuses)
        replies.pending[cookie] = (command, offset, length, cost, done, progress)
        replies.bytes_outstanding += cost
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        elif len(self._batch) > BATCH_BYTES_MAX:
            self._write_batch()
        return cookie

    def forget(self, cookie: int) -> None:
        """Nobody wants a READ any more: its buffer is the caller's again. `done` is still told."""
        self._replies.forget(cookie)

    def _write_alone(self, payload: Buffer) -> None:
        transport = self._transport
        if self._fd >= 0 and not transport.get_write_buffer_size() and not transport.is_closing():
            payload = self._write_at_once(payload)
        self._write_batch()
        if not payload:
            return
        # The transport keeps what it cannot send at once, and the caller may change his buffer.
        kept = isinstance(payload, bytes) or (isinstance(payload, memoryview) and payload.readonly)
        self._transport.write(payload if kept else bytes(payload))
        self._bytes_written += len(payload)

    def _write_at_once(self, payload: Buffer) -> Buffer:
        """The batch and a payload to the socket, in one call and without a copy; what did not fit
        is left, in the batch and in the answer."""
        batch = self._batch
        try:
            sent = os.writev(self._fd, (batch, payload))
        except OSError:  # nothing fits, or the transport is about to learn of the session's end
            return payload
        self._bytes_written += sent
        self._batch = batch[sent:]
        return memoryview(payload)[max(0, sent - len(batch)) :]

    def _write_batch(self) -> None:
        batch = self._batch
        if batch:
            self._batch = bytearray()
            self._transport.write(batch)
            self._bytes_written += len(batch)

    def _flush(self) -> None:
        self._flush_scheduled = False
        self._write_batch()


def _forget_unsent(transport: asyncio.Transport) -> None:
    """TCP would go on sending for a quarter of an hour, to a server whose next session has begun.
    With a linger of 0 it forgets what it has, and says so by a RST."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0_S)
