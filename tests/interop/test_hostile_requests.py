"""Requests that no client should send, to three servers: replnbd answers as the table says, the
others as they did when it was made; the session goes on where it should, no byte of the disk has
changed, and everybody serves the next client."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from errno import EINVAL, ENOSPC
from typing import NamedTuple

import pytest
from hostile_support import CONTENT, KIB, MIB, SERVERS, SIZE, Victim, serving
from peers import RawClient
from peers.nbd_answers import Asked
from peers.nbd_wire import (
    CACHE,
    DF,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    RESIZE,
    SET_META_CONTEXT,
    STARTTLS,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Shape,
    meta_context,
    option,
    request,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
MAX32, MAX63, MAX64 = 2**32 - 1, 2**63 - 1, 2**64 - 1
COOKIE = 2**64 - 2
EXTENDED_SERVERS = ("replnbd",)
"""Who knows extended headers, of the versions that Debian 12 has."""


class Said(NamedTuple):
    """The error of the answer (0: success; None: no answer), and whether the session ends."""

    error: int | None
    closes: bool = False


class NotRun(str):
    """Why a row is not sent to a server."""


@dataclass(frozen=True)
class Row:
    """A request and its answer. `others`: what another server than replnbd says, in any shape."""

    claim: str
    asked: Asked
    error: int | None
    payload: bytes = b""
    closes: bool = False
    others: Mapping[str, Said | NotRun] = field(default_factory=dict)

    def of(self, server: str) -> Said | NotRun:
        """What it says."""
        return self.others.get(server) or Said(self.error, self.closes)


QEMU_EINVAL = {"qemu-nbd": Said(EINVAL)}
QEMU_OK = {"qemu-nbd": Said(0)}
NBDKIT_ENOSPC = {"nbdkit": Said(ENOSPC)}
END = SIZE

COMPACT_ROWS = [
    Row("READ past the end", Asked(READ, END - 1, 2), EINVAL),
    Row("READ at 2^64 - 512", Asked(READ, 2**64 - 512, 512), EINVAL),
    Row("READ at 2^63", Asked(READ, 2**63, 1), EINVAL),
    Row("READ of 2^32 - 1 bytes", Asked(READ, 0, MAX32), EINVAL),
    Row("READ of 32 MiB and a byte", Asked(READ, 0, 32 * MIB + 1), EINVAL),
    Row("WRITE past the end", Asked(WRITE, END - 1, 2), ENOSPC, b"ab", others=QEMU_EINVAL),
    Row("WRITE at 2^64 - 1", Asked(WRITE, MAX64, 1), ENOSPC, b"a", others=QEMU_EINVAL),
    Row("WRITE of 1 MiB past the end", Asked(WRITE, 1, MIB), ENOSPC, bytes(MIB),
        others=QEMU_EINVAL),
    Row("ZEROES past the end", Asked(ZEROES, END, 1), ENOSPC, others=QEMU_EINVAL),
    Row("ZEROES of 2^32 - 1 bytes", Asked(ZEROES, 0, MAX32), ENOSPC, others=QEMU_EINVAL),
    Row("TRIM past the end", Asked(TRIM, END, 1), EINVAL),
    Row("TRIM of 2^32 - 1 bytes", Asked(TRIM, 512, MAX32), EINVAL),
    Row("CACHE past the end", Asked(CACHE, END, 1), EINVAL),
    Row("READ of nothing", Asked(READ), 0, others={"nbdkit": Said(EINVAL)}),
    Row("READ of nothing at the end", Asked(READ, END), 0, others={"nbdkit": Said(EINVAL)}),
    Row("READ of nothing past the end", Asked(READ, END + 1), EINVAL),
    Row("WRITE of nothing", Asked(WRITE), 0, others=NBDKIT_ENOSPC),
    Row("TRIM of nothing", Asked(TRIM), 0, others={"nbdkit": Said(EINVAL)}),
    Row("ZEROES of nothing", Asked(ZEROES), 0, others=NBDKIT_ENOSPC),
    Row("CACHE of nothing", Asked(CACHE), 0, others={"nbdkit": Said(EINVAL)}),
    Row("FLUSH with an offset", Asked(FLUSH, 1), EINVAL, others=QEMU_OK),
    Row("FLUSH with a length", Asked(FLUSH, 0, 1), EINVAL, others=QEMU_OK),
    Row("RESIZE", Asked(RESIZE, 0, 1), EINVAL),
    Row("command 99", Asked(99), EINVAL),
    Row("command 65535 with every flag", Asked(65535, MAX64, MAX32, 0xFFFF), EINVAL),
    *(
        Row(f"command {command} with flag 0x8000",
            Asked(command, 0, 0 if command == FLUSH else 1, 0x8000), EINVAL,
            b"a" if command == WRITE else b"")
        for command in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES)
    ),
    Row("WRITE with DF", Asked(WRITE, 0, 2, DF), EINVAL, b"ab"),
    Row("WRITE with NO_HOLE", Asked(WRITE, 0, 2, NO_HOLE), EINVAL, b"ab"),
    Row("WRITE with FAST_ZERO", Asked(WRITE, 0, 2, FAST_ZERO), EINVAL, b"ab"),
    Row("WRITE with REQ_ONE", Asked(WRITE, 0, 2, REQ_ONE), EINVAL, b"ab"),
    Row("READ with REQ_ONE", Asked(READ, 0, 1, REQ_ONE), EINVAL),
    Row("READ with FAST_ZERO", Asked(READ, 0, 1, FAST_ZERO), EINVAL),
    Row("TRIM with NO_HOLE", Asked(TRIM, 0, 1, NO_HOLE), EINVAL),
    Row("CACHE with DF", Asked(CACHE, 0, 1, DF), EINVAL),
    Row("ZEROES with REQ_ONE", Asked(ZEROES, 0, 1, REQ_ONE), EINVAL),
    Row("READ with PAYLOAD_LEN in a compact header", Asked(READ, 0, 1, PAYLOAD_LEN), EINVAL),
    Row("WRITE with PAYLOAD_LEN in a compact header", Asked(WRITE, 0, 2, PAYLOAD_LEN), EINVAL,
        b"ab"),
    Row("WRITE of 2^32 - 1 bytes", Asked(WRITE, 0, MAX32), EINVAL, closes=True,
        others={"nbdkit": Said(None, True)}),
    Row("WRITE of 64 MiB and a byte", Asked(WRITE, 0, 64 * MIB + 1), EINVAL, closes=True,
        others={"nbdkit": NotRun("it waits for the payload")}),
    Row("WRITE of 32 MiB and a byte", Asked(WRITE, 0, 32 * MIB + 1), EINVAL, closes=True,
        others={"nbdkit": NotRun("it takes 64 MiB")}),
    Row("FLUSH with FUA", Asked(FLUSH, 0, 0, FUA), 0),
]  # fmt: skip
SIMPLE_ROWS = [
    Row("READ with DF where it is not offered", Asked(READ, 0, 1, DF), EINVAL),
    Row("BLOCK_STATUS without structured replies", Asked(STATUS, 0, 1), EINVAL),
    Row(
        "BLOCK_STATUS with REQ_ONE without structured replies", Asked(STATUS, 0, 1, REQ_ONE), EINVAL
    ),
]
STATUS_ROWS = [
    Row("BLOCK_STATUS of nothing", Asked(STATUS), EINVAL),
    Row("BLOCK_STATUS past the end", Asked(STATUS, END - 1, 2), EINVAL),
    Row("BLOCK_STATUS of 2^32 - 1 bytes", Asked(STATUS, 0, MAX32), EINVAL),
    Row("BLOCK_STATUS with DF", Asked(STATUS, 0, 1, DF), EINVAL),
    Row("BLOCK_STATUS with FAST_ZERO", Asked(STATUS, 0, 1, FAST_ZERO), EINVAL),
]
STATUS_PAYLOAD = struct.pack(">QI", SIZE, 1)
EXTENDED_ROWS = [
    Row("WRITE without PAYLOAD_LEN", Asked(WRITE, 0, 512), EINVAL),
    Row("READ with PAYLOAD_LEN", Asked(READ, 0, 3, PAYLOAD_LEN), EINVAL, b"abc"),
    Row("FLUSH with PAYLOAD_LEN", Asked(FLUSH, 0, 3, PAYLOAD_LEN), EINVAL, b"abc"),
    Row("TRIM with PAYLOAD_LEN", Asked(TRIM, 0, 100_000, PAYLOAD_LEN), EINVAL, bytes(100_000)),
    Row("command 99 with PAYLOAD_LEN", Asked(99, 0, MIB, PAYLOAD_LEN), EINVAL, bytes(MIB)),
    Row("READ of 2^63 - 1 bytes", Asked(READ, 0, MAX63), EINVAL),
    Row("READ of 2^32 bytes", Asked(READ, 0, 2**32), EINVAL),
    Row("READ that wraps", Asked(READ, 2**63, 2**63), EINVAL),
    Row("TRIM of 2^64 - 1 bytes", Asked(TRIM, 0, MAX64), EINVAL),
    Row("TRIM that wraps to 0", Asked(TRIM, 1, MAX64), EINVAL),
    Row("ZEROES of 2^64 - 1 bytes at 2^64 - 1", Asked(ZEROES, MAX64, MAX64), ENOSPC),
    Row("ZEROES that wrap to 1", Asked(ZEROES, 2, MAX64), ENOSPC),
    Row("CACHE of 2^63 bytes", Asked(CACHE, 0, 2**63), EINVAL),
    Row("BLOCK_STATUS of 2^64 - 1 bytes", Asked(STATUS, 0, MAX64), EINVAL),
    Row("WRITE with a payload of 2^64 - 1 bytes", Asked(WRITE, 0, MAX64, PAYLOAD_LEN), EINVAL,
        closes=True),
    Row("FLUSH with a payload of 2^63 bytes", Asked(FLUSH, 0, 2**63, PAYLOAD_LEN), EINVAL,
        closes=True),
    Row("BLOCK_STATUS with a payload of 32 MiB and a byte",
        Asked(STATUS, 0, 32 * MIB + 1, PAYLOAD_LEN), EINVAL, closes=True),
    *(
        Row(f"BLOCK_STATUS with {claim}", Asked(STATUS, offset, len(payload), PAYLOAD_LEN),
            EINVAL, payload)
        for claim, offset, payload in (
            ("a payload of 8 bytes", 0, struct.pack(">Q", SIZE)),
            ("a payload of 11 bytes", 0, STATUS_PAYLOAD[:11]),
            ("a payload of 13 bytes", 0, STATUS_PAYLOAD + b"?"),
            ("a payload of 1 MiB", 0, STATUS_PAYLOAD + bytes(MIB - 12)),
            ("an unknown context", 0, struct.pack(">QI", SIZE, 77)),
            ("a context that was not selected", 0, struct.pack(">QI", SIZE, 3)),
            ("the same context twice", 0, struct.pack(">QII", SIZE, 1, 1)),
            ("an effect length of 0", 0, struct.pack(">QI", 0, 1)),
            ("an effect length past the end", 1, STATUS_PAYLOAD),
            ("an effect length of 2^64 - 1", 0, struct.pack(">QI", MAX64, 1)),
            ("an effect length that wraps", 2, struct.pack(">QI", MAX64, 1)),
        )
    ),
    Row("BLOCK_STATUS with an empty payload", Asked(STATUS, 0, 0, PAYLOAD_LEN), EINVAL),
]  # fmt: skip


@pytest.fixture(scope="module", params=SERVERS)
def victim(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Victim]]:
    with serving(request.param, tmp_path_factory.mktemp("v")) as running:
        yield request.param, running


def check(server: str, client: RawClient, row: Row) -> None:
    expected = row.of(server)
    assert not isinstance(expected, NotRun)
    client.expect(COOKIE, row.asked)
    command, offset, length, flags, _ = row.asked
    header = request(command, offset, length, cookie=COOKIE, flags=flags, shape=client.shape)
    client.send(header + row.payload)
    if expected.error is not None:
        answer = client.answer()
        assert answer is not None
        assert answer.cookie == COOKIE
        assert answer.error == expected.error
        assert answer.text or client.shape is Shape.SIMPLE or not answer.error or server == "nbdkit"
    if expected.closes:
        assert client.receive_rest() == b""
    else:
        assert client.ask(READ, 0, 512).data == CONTENT[:512]
        client.finish()


SHAPED = [
    *((Shape.SIMPLE, row) for row in (*COMPACT_ROWS, *SIMPLE_ROWS)),
    *((Shape.STRUCTURED, row) for row in (*COMPACT_ROWS, *STATUS_ROWS)),
    *((Shape.EXTENDED, row) for row in EXTENDED_ROWS),
]
"""Every row in every shape that it is about."""


@pytest.mark.parametrize(
    ("shape", "row"), SHAPED, ids=[f"{row.claim}, {shape.value}" for shape, row in SHAPED]
)
def test_the_table(victim: tuple[str, Victim], shape: Shape, row: Row) -> None:
    server, running = victim
    if isinstance(row.of(server), NotRun) or (
        shape is Shape.EXTENDED and server not in EXTENDED_SERVERS
    ):
        return
    contexts = () if shape is Shape.SIMPLE else (BASE,)
    with running.checked(), running.raw().go("d", shape, *contexts) as client:
        check(server, client, row)


OUT_OF_STEP = {
    "zeroes": bytes(28),
    "a request that is one bit off": b"\x25\x60\x95\x12" + bytes(24),
    "an extended request": request(READ, 0, 1, shape=Shape.EXTENDED),
    "SET_META_CONTEXT": meta_context(SET_META_CONTEXT, "d", BASE),
    "STARTTLS": option(STARTTLS),
    "a simple reply": struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(12),
}
"""What no server can make sense of in the transmission phase."""


# QEMU answers this, too, by the cookie it finds there; nbdkit forgets the answer.
@pytest.mark.parametrize("victim", ["replnbd"], indirect=True)
@pytest.mark.parametrize("shape", [Shape.SIMPLE, Shape.STRUCTURED])
@pytest.mark.parametrize("claim", OUT_OF_STEP)
def test_what_is_no_request_ends_the_session(
    victim: tuple[str, Victim], claim: str, shape: Shape
) -> None:
    """What came before it is answered."""
    _, running = victim
    with running.checked(), running.raw().go("d", shape) as client:
        first = client.begin(READ, 0, 512)
        client.send(OUT_OF_STEP[claim].ljust(32, b"\0"))
        answer = client.answer()
        assert answer is not None
        assert (answer.cookie, answer.data) == (first, CONTENT[:512])
        assert client.receive_rest() == b""


def test_a_status_goes_no_further_than_it_was_asked(victim: tuple[str, Victim]) -> None:
    """nbdkit tells of whole extents, as it may without REQ_ONE."""
    server, running = victim
    with running.checked(), running.raw().go("d", Shape.STRUCTURED, BASE) as client:
        for offset, length in ((0, 1), (1000, 512), (64 * KIB - 1, 2), (SIZE - 1, 1)):
            for flags in (0, REQ_ONE):
                answer = client.ask(STATUS, offset, length, flags=flags)
                (descriptors,) = answer.statuses.values()
                covered = sum(size for size, _ in descriptors)
                assert covered <= length or (server == "nbdkit" and not flags)
        client.finish()
