"""From a valid request to the node operation that it asks for."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from replnbd.block import BlockNode, Buffer
from replnbd.nbd import SIMPLE_REPLY_SIZE
from replnbd.nbd import constants as c

if TYPE_CHECKING:
    from replnbd.server.connection import Request


def operation(
    node: BlockNode, request: Request, payload: Buffer | None, reply: memoryview | None
) -> Coroutine[Any, Any, None]:
    """The coroutine, not started. `payload`: a WRITE's; `reply`: a READ's, header and place."""
    flags, command, _cookie, offset, length = request
    if command == c.CMD_READ:
        # FUA on a READ is valid and means nothing.
        assert reply is not None
        return node.pread(offset, reply[SIMPLE_REPLY_SIZE:])
    if command == c.CMD_FLUSH:
        return node.flush()
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


async def _durable(node: BlockNode, changing: Coroutine[Any, Any, None]) -> None:
    # "it MUST NOT send its reply to that command until all write operations (if any) associated
    # with that command have been completed and persisted to non-volatile storage"
    await changing
    await node.flush()
