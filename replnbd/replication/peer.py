"""What two replnbd say to each other beside the data: over NBD, too.

Of each disk that may be somebody's copy there is a second export, x-replnbd/NAME, that no list
shows. Reading it gives what the target is (PeerState), writing to it says what the source does:

    Enter   a session begins: nothing of an earlier one counts any more. Whatever a network still
            holds of those, be it data for NAME or a message, comes too late
    Begin   from now on the source writes to NAME what makes it its copy. Until `End` the disk is
            not what the source was at any moment
    End     all has arrived: from now on it is

Both are JSON, at offset 0, zeroes behind. What is refused is an error, with the reason as its text.
A target that has no such export is none of ours (QEMU, nbdkit): then nobody keeps account there.
"""

from __future__ import annotations

import errno
from typing import Annotated, Protocol

import msgspec

from replnbd.block import BlockNode, Buffer, Extent
from replnbd.errors import StateError
from replnbd.nbd import QEMU_DIRTY_BITMAP
from replnbd.replication.lineage import Claim, Lineage, Name, Plan

EXPORT_PREFIX = "x-replnbd/"
NODE_BYTES = 64 << 10
RESYNC_BITMAP = "resync"
"""Of NAME: what the target may have otherwise than the source (qemu:dirty-bitmap:resync)."""
RESYNC_CONTEXT = QEMU_DIRTY_BITMAP + RESYNC_BITMAP
"""Which every source selects, and hardly anybody else."""


def peer_export(name: str) -> str:
    """The export where a source speaks to the target NAME."""
    return EXPORT_PREFIX + name


VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]

# The last two: of text that is not UTF-8, and of deep nesting, even where nobody looks at it.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class PeerState(msgspec.Struct, forbid_unknown_fields=False, rename="kebab", kw_only=True):
    """What a target is. Members of a later version are not looked at."""

    version: int = VERSION
    name: str
    size: int
    stage: str
    fenced: bool
    """It has taken over."""
    syncing: bool
    claim: Claim
    failed: Count = 0
    """How many writes of sources have failed in this process."""
    primary: bool = False
    """It is none for anybody."""
    refusal: str | None = None
    """Why it is none: an export that is something else."""


class Enter(msgspec.Struct, tag="enter", tag_field="say", rename="kebab", kw_only=True):
    """The source has a new session, of that name."""

    session: Name


class Begin(msgspec.Struct, tag="begin", tag_field="say", rename="kebab", kw_only=True):
    """The source begins to make the target its copy."""

    claim: Claim
    """The source's; its pair is the target's from then on."""
    plan: Plan
    session: Name | None = None
    """None: only to have it refused."""


class End(msgspec.Struct, tag="end", tag_field="say", rename="kebab", kw_only=True):
    """The target is a copy of a source of that lineage."""

    lineage: Lineage
    session: Name | None = None
    failed: Count | None = None
    """Of the target's state, before the source proved that all has arrived."""


class Target(Protocol):
    """A disk that a source may write to."""

    async def enter(self) -> None:
        """A source has a new session: when this returns, what it sent in earlier ones is on the
        disk, or never will be."""

    def peer_state(self) -> PeerState:
        """What it is."""

    async def begin_sync(self, claim: Claim, plan: Plan) -> None:
        """A source begins. StateError, with the reason, if it must not."""

    async def end_sync(self, lineage: Lineage, failed: int | None) -> None:
        """All has arrived. StateError if nothing has begun, or more than `failed` writes have
        failed: that the source knows of the others is not certain."""


class NoDisk:
    """A `Target` that is none, because the export is something else: `what`."""

    def __init__(self, name: str, size: int, what: str) -> None:
        self._state = PeerState(
            name=name,
            size=size,
            stage="none",
            fenced=False,
            syncing=False,
            claim=Claim(),
            refusal=f"'{name}' is {what}: no place for a source to write to",
        )

    def peer_state(self) -> PeerState:
        """See `Target`."""
        return self._state

    async def enter(self) -> None:
        """See `Target`."""

    async def begin_sync(self, claim: Claim, begin: Plan) -> None:
        """See `Target`."""
        raise StateError(str(self._state.refusal))

    async def end_sync(self, lineage: Lineage, failed: int | None) -> None:
        """See `Target`."""
        raise StateError(str(self._state.refusal))


class PeerNode(BlockNode):
    """The node behind x-replnbd/NAME."""

    driver = "replication-peer"
    size = NODE_BYTES

    def __init__(self, name: str, target: Target) -> None:
        self.name = name
        self._target = target
        self._session: str | None = None

    async def pread(self, offset: int, buffer: memoryview) -> None:
        state = encode(self._target.peer_state())
        part = state[offset : offset + len(buffer)]
        buffer[:] = part + bytes(len(buffer) - len(part))

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if offset:
            raise OSError(errno.EINVAL, f"a message begins at offset 0, not {offset}")
        try:
            message = msgspec.json.decode(bytes(data).rstrip(b"\0"), type=Enter | Begin | End)
        except _UNREADABLE as exc:
            raise OSError(errno.EINVAL, f"not a message of replnbd: {exc}") from exc
        try:
            await self._take(message)
        except StateError as exc:
            raise OSError(errno.EPERM, str(exc)) from exc

    async def _take(self, message: Enter | Begin | End) -> None:
        if isinstance(message, Enter):
            self._session = message.session
            await self._target.enter()
            return
        if message.session not in (None, self._session):
            raise StateError("the source has another session by now")
        if isinstance(message, Begin):
            await self._target.begin_sync(message.claim, message.plan)
        else:
            await self._target.end_sync(message.lineage, message.failed)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        raise OSError(errno.EINVAL, "only messages can be written here")

    async def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.EINVAL, "only messages can be written here")

    async def flush(self) -> None:
        return  # a message that was answered is durable

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, zero=False, depth=0)]

    async def close(self) -> None:
        return


def encode(message: PeerState | Enter | Begin | End) -> bytes:
    """As it is read and written: padded to whole blocks, for servers that want those."""
    text = msgspec.json.encode(message)
    return text + bytes(-len(text) % 4096)


def decode_state(data: bytes | bytearray) -> PeerState:
    """What a target says it is. ValueError, in one line, if that is no such thing."""
    try:
        state = msgspec.json.decode(bytes(data).rstrip(b"\0"), type=PeerState)
    except _UNREADABLE as exc:
        raise ValueError(f"the peer's state cannot be read: {exc}") from exc
    if state.version != VERSION:
        raise ValueError(f"the peer speaks version {state.version} of a later replnbd")
    return state
