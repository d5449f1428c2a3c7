"""The NBD protocol without I/O: bytes in, bytes and decisions out.

The source is proto.md of the NBD project; quoted sentences are its. What is here: the server's
side of fixed newstyle option haggling, and the pieces of the transmission phase (request header,
simple reply, which request is valid, which errno becomes which error). What will join it:
structured replies, metadata contexts, TLS, the client's side.

Words. *Handshake*: everything before the transmission phase. *Option haggling*: the client's
options and our replies. *Export*: a named disk; what the handshake knows of one is an
`ExportOffer`. *Cookie*: the client's name for a request, which we hand back. *Command flags* and
*transmission flags*: per request, and per connection.

Laws.
1. No sockets, no clock, no loop (import-linter holds this room to it). Time limits, and closing
   connections, are the server's business.
2. A peer's bytes never reach an assert. What cannot be answered raises ProtocolError, and the
   connection must be closed; what can be answered is answered, and the stream stays in step.
3. Nothing is allocated by a length that the peer claims before its bytes are there.
4. construct describes messages of the handshake only: it takes 20 to 40 µs for what `Struct` does
   in 0.2 µs. The transmission phase works on plain ints.
"""

from replnbd.nbd.errors import wire_error
from replnbd.nbd.handshake import ExportDirectory, ExportOffer, Handshake, Outcome
from replnbd.nbd.transmission import (
    REQUEST_SIZE,
    SIMPLE_REPLY_SIZE,
    pack_request,
    pack_simple_reply,
    pack_simple_reply_into,
    unpack_request,
)
from replnbd.nbd.validate import request_error

__all__ = [
    "REQUEST_SIZE",
    "SIMPLE_REPLY_SIZE",
    "ExportDirectory",
    "ExportOffer",
    "Handshake",
    "Outcome",
    "pack_request",
    "pack_simple_reply",
    "pack_simple_reply_into",
    "request_error",
    "unpack_request",
    "wire_error",
]
