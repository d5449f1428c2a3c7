"""A link's target, over the wire: how it is reached, what it is asked, what it is told."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

from replnbd.block import GRANULE
from replnbd.block.digest import digest_of_zeroes
from replnbd.block.nbd_connect import connect_nbd
from replnbd.block.nbd_connection import NbdConnection
from replnbd.block.nbd_uri import NbdTarget
from replnbd.nbd import BASE_ALLOCATION, DIRTY, X_REPLNBD_DIGEST
from replnbd.nbd.constants import AllocationState
from replnbd.replication.lineage import OUTDATED, STRANGERS, TWO_PRIMARIES, Claim, Plan, plan
from replnbd.replication.peer import (
    EXPORT_PREFIX,
    NODE_BYTES,
    RESYNC_CONTEXT,
    Begin,
    End,
    Enter,
    PeerState,
    decode_state,
    encode,
)

CONNECT_TIMEOUT_S = 10.0
"""For a connection and its handshake."""
RESPONSE_TIMEOUT_S = 20.0
"""How long a target may leave everything unanswered."""

STATUS_BYTES = 1 << 30
"""Of the disk, asked about at a time."""

_ZERO = int(AllocationState.ZERO)


class Refused(Exception):
    """The target must not be overwritten, or cannot be; the text says why."""


async def connect(
    target: NbdTarget, contexts: tuple[str, ...], stack: AsyncExitStack
) -> NbdConnection:
    """A connection that ends with `stack`. OSError or ProtocolError."""
    connection = await connect_nbd(
        target,
        contexts=contexts,
        timeout_s=CONNECT_TIMEOUT_S,
        response_timeout_s=RESPONSE_TIMEOUT_S,
    )
    stack.push_async_callback(connection.close)
    return connection


def decide(source: Claim, state: PeerState) -> Plan:
    """What has to be done to make a replnbd's disk a copy of `source`. Refused if it must not."""
    if state.refusal is not None:
        raise Refused(state.refusal)
    decided = plan(source, state.claim)
    if decided in (*Plan, STRANGERS) and (state.primary or state.fenced):
        decided = TWO_PRIMARIES if state.primary else OUTDATED
    if not isinstance(decided, Plan):
        raise Refused(decided)
    return decided


def check(connection: NbdConnection, size: int) -> None:
    """Refused if it is no place for a disk of `size` bytes."""
    if connection.size != size:
        raise Refused(f"it has {connection.size} bytes, and this disk {size}")
    if connection.read_only:
        raise Refused("it can only be read")


async def connect_peer(target: NbdTarget, stack: AsyncExitStack) -> NbdConnection | None:
    """To the export for what two replnbd say to each other; None: the target is none of ours."""
    try:
        peer = await connect(replace(target, export=EXPORT_PREFIX + target.export), (), stack)
    except OSError as exc:
        if exc.errno != errno.ENOENT:
            raise
        return None
    if await _speaks(peer):
        return peer
    await peer.close()  # there may be servers that take one client at a time
    return None


async def _speaks(peer: NbdConnection) -> bool:
    """Whether an export tells what its target is. nbdkit has one disk by all names: it does not."""
    if peer.size != NODE_BYTES:
        return False
    buffer = bytearray(NODE_BYTES)
    await peer.pread(0, memoryview(buffer))
    return buffer.startswith(b"{")


def contexts_for(peer: NbdConnection | None) -> tuple[str, ...]:
    """What is asked about the data of a target."""
    return (BASE_ALLOCATION,) if peer is None else (X_REPLNBD_DIGEST, RESYNC_CONTEXT)


def can_tell(connection: NbdConnection) -> bool:
    """Whether the target tells digests of all that it has."""
    # Compact headers have room for a half of each: too little to rely on.
    return X_REPLNBD_DIGEST in connection.contexts and connection.extended


async def ask(peer: NbdConnection) -> PeerState:
    """What the target is. OSError; ValueError if it cannot be understood."""
    buffer = bytearray(NODE_BYTES)
    await peer.pread(0, memoryview(buffer))
    return decode_state(buffer)


async def say(peer: NbdConnection, message: Enter | Begin | End) -> None:
    """Returns when the target has taken note. OSError with EPERM and a reason if it refuses."""
    await peer.pwrite(0, encode(message))


async def known_digests(
    connection: NbdConnection, offset: int, length: int, key: bytes
) -> list[tuple[int, int | None]] | None:
    """What can be known of the target's granules from `offset` on: runs of one digest, None where
    there is data of which nothing is known. They may fall short. None: it tells nothing."""
    if can_tell(connection):
        return list((await connection.block_status(offset, length))[X_REPLNBD_DIGEST])
    if BASE_ALLOCATION not in connection.contexts:
        return None
    found = (await connection.block_status(offset, length))[BASE_ALLOCATION]
    return _holes(found, length, digest_of_zeroes(GRANULE, key))


async def marks(connection: NbdConnection) -> AsyncIterator[tuple[int, int]]:
    """(offset, length) of what the target says it may have otherwise. OSError."""
    offset, size = 0, connection.size
    while offset < size:
        length = min(size - offset, STATUS_BYTES)
        for count, flags in (await connection.block_status(offset, length))[RESYNC_CONTEXT]:
            if flags & DIRTY:
                yield offset, count
            offset += count


def _holes(extents: list[tuple[int, int]], length: int, zero: int) -> list[tuple[int, int | None]]:
    """Of block descriptors from a granule's beginning on: which whole granules are zeroes."""
    runs: list[tuple[int, int | None]] = []
    position = covered = 0
    for count, flags in extents:
        end = position + count
        # The last granule of the disk may be a short one.
        stop = end if end == length else end // GRANULE * GRANULE
        if flags & _ZERO and stop > covered:
            start = min(-(-position // GRANULE) * GRANULE, stop)
            if start > covered:
                runs.append((start - covered, None))
            if stop > start:
                runs.append((stop - start, zero))
            covered = max(covered, stop)
        position = end
    stop = position if position == length else position // GRANULE * GRANULE
    if stop > covered:
        runs.append((stop - covered, None))
    return runs or [(min(GRANULE, length), None)]
