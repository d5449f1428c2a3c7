"""The buffers of a connection: Inbox, where requests land, and Outbox, where replies are packed.

Both hand out slices of a slab and go on behind them; the slab is used from its start again when
nothing holds a slice. So the common batch costs no allocation and no copy, and an operation that
suspends keeps its bytes without anybody having foreseen it. Large payloads and replies have slabs
of their own, from a pool: a fresh megabyte costs 300 to 600 µs in page faults and zeroing, ten
times what it costs to move one.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

INBOX_BYTES = 256 * 1024
"""More than the kernel's default for a unix socket, so that one recv empties it."""

OUTBOX_BYTES = 256 * 1024
"""Replies to 63 reads of 4 KiB; beyond it a batch takes more than one write."""

START_BYTES = 16 * 1024
"""Of both, until a batch fills them: a thousand idle clients must not cost half a gigabyte."""

EXPECTED_BYTES = 1 << 20
"""Of a payload's buffer before its bytes come; it grows with them. Who claims 32 MiB and sends none
shall not make us hold them."""

_SCRAP = memoryview(bytearray(64 * 1024))  # written by all who drop what they receive, never read
_ROOM_MIN = INBOX_BYTES // 4  # with less behind lent slices, take a new slab


POOL_BYTES_MAX = 48 << 20
"""What is kept for later and what is in use, in all of a server: a payload of 32 MiB, and what it
grows in. Where more is in use, nothing is kept: so no client makes us hold more because of those
that were there before it."""

TAIL_BYTES = 512 << 10
"""Of a large reply, copied: who has so little left to take is answered again, and must not have the
slab of what it took already, of 32 MiB maybe, beside those of the next replies."""

_TAILED_MIN = 4 * TAIL_BYTES  # with less to gain, 50 to 100 µs are too much

_HEADERS_BYTES = 4096  # room for those of a reply, so that a READ fits where a WRITE does


class Slab:
    """A buffer, and how many suspended operations have slices of it.

    `pooled`: it came from a pool, for one request alone, and goes back there.
    """

    __slots__ = ("buffer", "pooled", "users", "view")

    def __init__(self, size: int, *, pooled: bool = False) -> None:
        self.buffer = bytearray(size)
        self.view = memoryview(self.buffer)
        self.users = 0
        self.pooled = pooled


class _Account:
    """How many bytes the slabs of a pool have, whoever has them."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class _PooledSlab(Slab):
    """Is in its pool's account for as long as it exists: not all come back."""

    __slots__ = ("_account",)

    def __init__(self, size: int, account: _Account) -> None:
        super().__init__(size, pooled=True)
        self._account = account
        account.bytes += size

    def __del__(self) -> None:
        self._account.bytes -= len(self.buffer)


class Pool:
    """Slabs that nobody uses, for the next who needs one of about that size."""

    def __init__(self) -> None:
        self._free: dict[int, list[Slab]] = {}
        self._account = _Account()

    @property
    def bytes(self) -> int:
        """Of all slabs that it has made and that are still there, used or not."""
        return self._account.bytes

    def take(self, size: int) -> Slab:
        """A slab of at least `size` bytes, with anything in it."""
        rounded = _rounded(size)
        free = self._free.get(rounded)
        if free:
            return free.pop()
        if self._account.bytes + rounded > POOL_BYTES_MAX:
            self._free.clear()  # they may all be of sizes that nobody wants any more
        return _PooledSlab(rounded, self._account)

    def give(self, slab: Slab | None) -> None:
        """Nobody uses `slab` any more, and nobody will. One that did not come from here, or none
        at all, is nothing to take back."""
        if slab is None or not slab.pooled:
            return
        assert not slab.users
        if self._account.bytes <= POOL_BYTES_MAX:
            self._free.setdefault(len(slab.buffer), []).append(slab)


def _rounded(size: int) -> int:
    """Up to a quarter of a power of two, and a page for headers: few sizes, little waste."""
    body = max(size - _HEADERS_BYTES, 1)
    step = 1 << max(14, body.bit_length() - 3)
    return -(-body // step) * step + _HEADERS_BYTES


class Inbox:
    """Received bytes: `slab.buffer[start:end]` is not parsed yet.

    A WRITE's payload that has not arrived in full may get a buffer of its own (`expect`): then
    the rest lands there, in place. Bytes nobody wants are dropped as they come (`skip`).
    """

    __slots__ = (
        "_expected",
        "_filled",
        "_payload_slab",
        "_pool",
        "_skipping",
        "end",
        "payload",
        "slab",
        "start",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.slab = Slab(START_BYTES)
        self.start = 0
        self.end = 0
        self.payload: memoryview | None = None
        self._payload_slab: Slab | None = None
        self._expected = 0
        self._filled = 0
        self._skipping = 0

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty after `settle`."""
        if self.payload is not None:
            return self.payload[self._filled :]
        return self.slab.view[self.end :]

    def received(self, count: int) -> bool:
        """`count` bytes are there. Whether there may be something to parse or a payload to use."""
        if self.payload is not None:
            self._filled += count
            if self._filled == len(self.payload) < self._expected:
                self._grow()
            return self._filled == self._expected
        self.end += count
        if self._skipping:
            self.skip(0)
        return True

    def expect(self, length: int) -> None:
        """Take `length` bytes from `start` on as a payload, of which some have not arrived."""
        self._expected = length
        self._filled = self.end - self.start
        self._take_payload_slab(EXPECTED_BYTES, self.slab.view[self.start : self.end])
        self.start = self.end

    def _grow(self) -> None:
        slab, payload = self._payload_slab, self.payload
        assert payload is not None
        # By eight: 1, 8 and 32 MiB. A quarter of the bytes are moved, at 10 GB/s.
        self._take_payload_slab(8 * self._filled, payload)
        self._pool.give(slab)

    def _take_payload_slab(self, size: int, arrived: memoryview) -> None:
        size = min(size, self._expected)
        self._payload_slab = self._pool.take(size)
        self.payload = self._payload_slab.view[:size]
        self.payload[: len(arrived)] = arrived

    def take_payload(self) -> tuple[memoryview, Slab] | None:
        """The expected payload and its slab, which the caller gives back to the pool, if it is
        complete; then nothing is expected any more."""
        payload, slab = self.payload, self._payload_slab
        if payload is None or slab is None or self._filled < len(payload):
            return None
        self.payload = self._payload_slab = None
        return payload, slab

    def skip(self, length: int) -> None:
        """Drop `length` more bytes, now and as they arrive."""
        self._skipping += length
        dropped = min(self._skipping, self.end - self.start)
        self._skipping -= dropped
        self.start += dropped

    def drop_everything(self) -> None:
        """Nothing is parsed any more: let what still arrives overwrite itself."""
        self.payload = _SCRAP
        self._filled = 0

    def settle(self) -> None:
        """After a batch: make room behind `end`, without touching lent slices."""
        slab, start, end = self.slab, self.start, self.end
        room = len(slab.buffer) - end
        grow = not room and end < INBOX_BYTES
        if grow or (slab.users and room < _ROOM_MIN):
            self.slab = Slab(INBOX_BYTES)
        elif slab.users or not start:
            return
        if start != end:
            self.slab.view[: end - start] = slab.view[start:end]
        self.start, self.end = 0, end - start


class Writer(Protocol):
    """What an Outbox writes to: a transport, or what stands before one."""

    def write(self, data: bytes | memoryview, /) -> None:
        """Send it, or keep it until it can be sent."""

    def get_write_buffer_size(self) -> int:
        """How many bytes are not sent yet."""


class Outbox:
    """Replies, packed side by side: `slab.buffer[start:at]` is not written yet.

    Who packs a reply writes it at `at` and moves `at`; a suspended READ leaves a hole for its
    reply (`lend`), which is written on its own when it is ready.
    """

    __slots__ = ("_pool", "_sent", "_start", "_writer", "_written", "at", "limit", "slab")

    def __init__(self, writer: Writer, pool: Pool) -> None:
        self._writer = writer
        self._pool = pool
        self._written = 0  # bytes, ever
        self._sent: deque[tuple[int, Slab]] = deque()  # with what was written by its end
        self.slab = Slab(START_BYTES)
        self.limit = START_BYTES
        self.at = 0
        self._start = 0

    def begin(self) -> None:
        """Before a batch: use the slab from its start again, if everything in it has been sent."""
        if self.at or self._sent:
            unsent = self._writer.get_write_buffer_size()
            if not unsent and not self.slab.users:
                self.at = self._start = 0
            if self._sent:
                self._recycle(unsent)

    def flush(self) -> None:
        """Write what is packed. May call the protocol's pause_writing."""
        at = self.at
        if at > self._start:
            self._writer.write(self.slab.view[self._start : at])
            self._written += at - self._start
            self._start = at
            if not self.slab.users and not self._writer.get_write_buffer_size():
                self.at = self._start = 0  # it is all gone: stay where the cache is warm

    def put(self, reply: bytes) -> None:
        """Pack a reply that is complete."""
        end = self.at + len(reply)
        if end > self.limit:
            self.turn()
            end = self.at + len(reply)
            if end > self.limit:
                self._writer.write(reply)
                self._written += len(reply)
                return
        self.slab.buffer[self.at : end] = reply
        self.at = end

    def send(self, reply: memoryview, slab: Slab) -> None:
        """Write a reply that lies in `slab`, which goes back to the pool when it is sent."""
        self.flush()  # any order will do, but the order of requests is nicest
        self._written += len(reply)
        if not slab.pooled:
            self._writer.write(reply)
        elif 2 * len(reply) < len(slab.buffer):
            # Most of what was read were holes. How much may wait to be sent is bounded; what it
            # holds on to must not be a multiple of that.
            self._writer.write(bytes(reply))
            self._pool.give(slab)
        elif len(reply) <= _TAILED_MIN:
            self._writer.write(reply)
            self._sent.append((self._written, slab))
        else:
            self._writer.write(reply[:-TAIL_BYTES])
            self._writer.write(bytes(reply[-TAIL_BYTES:]))
            self._sent.append((self._written - TAIL_BYTES, slab))

    def _recycle(self, unsent: int) -> None:
        sent = self._sent
        while sent and sent[0][0] <= self._written - unsent:
            self._pool.give(sent.popleft()[1])

    def turn(self) -> None:
        """The slab is full: write it, and start on a fresh one."""
        self.flush()
        self.begin()
        if self.at or self.limit < OUTBOX_BYTES:
            if not self.slab.users:
                self.slab.pooled = True  # nobody but the transport has it: the pool's, once sent
                self._sent.append((self._written, self.slab))
            self.slab = self._pool.take(OUTBOX_BYTES)
            self.slab.pooled = False
            self.limit = OUTBOX_BYTES
            self.at = self._start = 0

    def lend(self, end: int) -> None:
        """The reply from `at` to `end` comes later: write what is before it, go on behind it.

        The caller counts itself as a user of the slab for as long as it uses the reply's bytes.
        """
        self.flush()
        self.at = self._start = end
