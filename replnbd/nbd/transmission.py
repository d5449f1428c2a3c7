"""The transmission phase's messages: request header and simple reply.

Request (28 bytes, big-endian)              Simple reply (16 bytes, then a READ's bytes)
    0  u32  magic 0x25609513                    0  u32  magic 0x67446698
    4  u16  command flags                       4  u32  error, 0 for success
    6  u16  type                                8  u64  cookie
    8  u64  cookie
   16  u64  offset
   24  u32  length (of a WRITE: so many bytes follow)
"""

from __future__ import annotations

import struct

from replnbd.nbd.constants import REQUEST_MAGIC, SIMPLE_REPLY_MAGIC

_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE_REPLY = struct.Struct(">IIQ")

REQUEST_SIZE = _REQUEST.size
SIMPLE_REPLY_SIZE = _SIMPLE_REPLY.size
assert REQUEST_SIZE == 28
assert SIMPLE_REPLY_SIZE == 16

unpack_request = _REQUEST.unpack_from
"""`(buffer, position) -> (magic, flags, type, cookie, offset, length)`; bound, for speed."""

pack_simple_reply_into = _SIMPLE_REPLY.pack_into
"""`(buffer, offset, SIMPLE_REPLY_MAGIC, error, cookie)`."""


def pack_simple_reply(error: int, cookie: int) -> bytes:
    """A reply that stands alone: an error, or success without payload."""
    return _SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def pack_request(flags: int, command: int, cookie: int, offset: int, length: int) -> bytes:
    """A request's header, as a client sends it."""
    return _REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
