"""Limits: what one peer can make a connection hold, and how long.

At worst, in MiB: operations hold 16 (IN_FLIGHT_BYTES_MAX) without what a last one needs; that is a
payload of 32 which has nearly all arrived, beside the 8 that it grew from; and of replies that the
peer has not taken, 2 (UNSENT_BYTES_MAX) and the rest of a slab of 2 that it has taken in part. With
inbox and outbox that is 61, and no more because of what is kept for later (POOL_BYTES_MAX). Over
TLS, 2 more are encrypted and on their way out (pieces.py).
"""

from __future__ import annotations

from replnbd.nbd import constants as c
from replnbd.server.slabs import OUTBOX_BYTES

IN_FLIGHT_MAX = 128
"""Suspended operations of one connection: the Linux client's queue depth. QEMU allows 16."""

IN_FLIGHT_BYTES_MAX = 16 << 20
"""What suspended operations hold, their slabs mostly. No other begins once it is reached: so the
last one may be of the largest (PAYLOAD_BYTES_MAX)."""

STATUS_BYTES_MAX = 2 << 20
"""Of a BLOCK_STATUS: 4096 extents in each of three contexts, as Python has them; a fourth, of
digests, has few."""

UNSENT_BYTES_MAX = 2 << 20
"""Reply bytes that the peer has not read, before we stop reading from it."""

UNSENT_TLS_BYTES_MAX = 512 << 10
"""The same of encrypted ones. They are copied twice on their way out."""

BATCH_REQUESTS_MAX = 1024
"""Requests run in one turn of the loop: some 3 ms, then other connections have theirs."""

BATCH_BYTES_MAX = c.PAYLOAD_BYTES_MAX
"""Read in one turn of the loop by large requests: some 10 ms. A client that is gone takes its
replies without end, and CACHE has none: nothing else would stop them."""

WHOLE_PAYLOAD_MAX = 32 * 1024
"""A WRITE up to this waits in the inbox until its payload is complete (and may be moved there,
at 20 GB/s); a larger one gets a buffer of its own."""

PACKED_READ_MAX = OUTBOX_BYTES // 4
"""A READ up to this has its reply packed into the outbox; a larger one gets a buffer."""

UNIX_SEND_BUFFER = 512 * 1024
"""What a unix socket holds of replies on their way; TCP finds its own measure."""

POLL_S = 32e-6
"""How long to look for the next request, see polling.py."""

POLL_BATCH_MAX = 4
"""Requests. After more, there is so much to do that sleeping costs each of them little."""

POLL_TURN_S = 1e-3
"""How long one connection may have the loop by that."""

POLL_SKIPS_MAX = 63
"""Batches after which not to look, where looking does not pay."""

LINGER_S = 10.0
"""How long the peer has to read its last replies and to hang up."""

FAREWELL_S = 0.1
"""How long requests are answered by ESHUTDOWN, once an export is gone or the server stops: who has
requests on their way learns the reason, and does not just see its connection end."""

CACHE_CHUNK = 256 << 10
"""A CACHE request reads so much at a time."""

CACHE_BYTES_MAX = c.PAYLOAD_BYTES_MAX
"""Of one CACHE request: no more than a READ could ask for."""

FAREWELL_TLS_S = 1.0
"""How long a client with which TLS failed has to read why, and to hang up."""

TLS_SHUTDOWN_TIMEOUT_S = 5.0
"""How long a client has to answer the end of TLS, before the connection just ends."""
WRITE_TIMEOUT_S = 60.0
"""How long a client may take none of the replies that wait for it: nginx's send_timeout, which
counts from the last bytes that it took, too."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 5, 3
"""An idle client's host is asked whether it is there, and given up after 25 s. The kernel's own
numbers make that two hours: for so long a dead primary would keep its place."""

UNACKNOWLEDGED_S = 20.0
"""How long the host of a client that is not idle may be silent; with the time until somebody looks
(deadlines.py) as long as that of an idle one."""

assert UNACKNOWLEDGED_S > KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S  # so long an idle host is silent
