"""What hostile clients send before there is a session, to three servers: replnbd answers as the
table says, the others as they did when it was made; and everybody serves the next client.

The inputs are those of security bugs in QEMU, nbd-server, nbdkit and libnbd, and what the three
servers were found to disagree about.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hostile_support import SERVERS, Victim, serving
from peers import RawClient
from peers import nbd_wire as wire
from peers.nbd_wire import (
    ABORT,
    ERR_INVALID,
    ERR_POLICY,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FIXED,
    GO,
    INFO,
    LIST,
    LIST_META_CONTEXT,
    PEEK_EXPORT,
    READ,
    REP_ACK,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    choose,
    meta_context,
    option,
    request,
    string,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

ACK = REP_ACK
MAX32, MAX31 = 0xFFFFFFFF, 0x7FFFFFFF
EVERY_OPTION = [*range(1, 12), 99]


class Said(NamedTuple):
    """How each option in turn ends, by REP_ACK or an error; and whether the connection does."""

    options: list[int]
    closes: bool = False


class NotRun(str):
    """Why a row is not sent to a server."""


@dataclass(frozen=True)
class Row:
    """`sent` after the client flags. `closes`: the server must hang up; otherwise it must know what
    an ABORT is. `others`: what another server than replnbd says."""

    claim: str
    sent: bytes
    options: list[int] = field(default_factory=list)
    closes: bool = False
    others: Mapping[str, Said | NotRun] = field(default_factory=dict)
    client_flags: bytes = FIXED

    def of(self, server: str) -> Said | NotRun:
        """What it says."""
        return self.others.get(server) or Said(self.options, self.closes)


NBDKIT_NAMES = NotRun("its file plugin has one disk, under every name")
QEMU_TEXT = NotRun("it echoes the name, and its text is no string any more")
NO_EXTENDED = {"qemu-nbd": Said([ERR_UNSUP]), "nbdkit": Said([ERR_UNSUP])}
BOTH_ACK = {"qemu-nbd": Said([ACK, ACK]), "nbdkit": Said([ACK, ACK])}
STARTS = {INFO: "INFO", GO: "GO"}
CONTEXTS = {LIST_META_CONTEXT: "LIST_META_CONTEXT", SET_META_CONTEXT: "SET_META_CONTEXT"}
LONG_QUERIES = ["x:" + "y" * 4094] * 30

ROWS = [
    Row("client flags that are not known", b"", closes=True, client_flags=b"\0\0\xff\xff"),
    Row("one client flag that is not known", b"", closes=True, client_flags=b"\0\0\0\x07"),
    Row("a wrong option magic", b"IHAVENOT" + bytes(8), closes=True),
    Row("a request before GO", request(READ, 0, 512), closes=True),
    Row("a request after INFO", choose(INFO, "d") + request(READ, 0, 512), [ACK], closes=True),
    Row("HTTP", b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n", closes=True, client_flags=b""),
    Row("TLS", bytes.fromhex("1603010200010001fc0303") + bytes(64), closes=True, client_flags=b""),
    *(
        Row(f"option {number} of 2^32 - 1 bytes", option(number, length=MAX32), closes=True)
        for number in EVERY_OPTION
    ),
    Row("an unknown option with data", option(99, b"x" * 70_000), [ERR_UNSUP]),
    Row("PEEK_EXPORT", option(PEEK_EXPORT, b"d"), [ERR_UNSUP]),
    Row("EXPORT_NAME of 2^31 - 1 bytes", option(EXPORT_NAME, length=MAX31), closes=True),
    Row("EXPORT_NAME of 4097 bytes", option(EXPORT_NAME, b"n" * 4097), closes=True),
    Row("EXPORT_NAME of nothing known", option(EXPORT_NAME, b"nosuch"), closes=True,
        others={"nbdkit": NBDKIT_NAMES}),
    Row("33 options", option(99) * 33, [ERR_UNSUP] * 32, closes=True,
        others={"qemu-nbd": Said([ERR_UNSUP] * 33)}),
    *(
        Row(f"option {number} with data", option(number, b"????"), [ERR_INVALID],
            others=NO_EXTENDED if number == EXTENDED_HEADERS else {})
        for number in (LIST, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS)
    ),
    Row("ABORT with data", option(ABORT, b"????"), [ACK], closes=True),
    *(
        row
        for number, name in STARTS.items()
        for row in (
            Row(f"{name} of no bytes", option(number), [ERR_INVALID]),
            Row(f"{name} of 2 bytes", option(number, b"ab"), [ERR_INVALID]),
            Row(f"{name} of an unknown name of 4096 bytes", choose(number, "n" * 4096),
                [ERR_UNKNOWN], others={"nbdkit": NBDKIT_NAMES}),
            Row(f"{name} of an unknown name of 256 bytes", choose(number, "n" * 256),
                [ERR_UNKNOWN], others={"nbdkit": NBDKIT_NAMES}),
            Row(f"{name} of a name of 4097 bytes", choose(number, "n" * 4097), [ERR_INVALID]),
            Row(f"{name} of a name that is not UTF-8", choose(number, b"\xff\xfe"),
                [ERR_INVALID], others={"qemu-nbd": QEMU_TEXT, "nbdkit": NBDKIT_NAMES}),
            Row(f"{name} with a name length of 2^32 - 1",
                choose(number, "d", name_length=MAX32), [ERR_INVALID]),
            Row(f"{name} with a name length of 2^31 - 1",
                choose(number, "d", name_length=MAX31), [ERR_INVALID]),
            Row(f"{name} with a name longer than the option",
                choose(number, "d", name_length=4), [ERR_INVALID]),
            Row(f"{name} with a name that leaves no room for a count",
                choose(number, "d", name_length=2), [ERR_INVALID]),
            Row(f"{name} with more requests than bytes", choose(number, "d", 0, count=2),
                [ERR_INVALID]),
            Row(f"{name} that claims 65,535 requests", choose(number, "d", count=65535),
                [ERR_INVALID]),
            Row(f"{name} with fewer requests than bytes", choose(number, "d", 0, count=0),
                [ERR_INVALID]),
        )
    ),
    Row("INFO twice", choose(INFO, "d", 0, 1, 2, 3) * 2, [ACK, ACK]),
    Row("INFO with every information type", choose(INFO, "d", *range(16), 65535), [ACK]),
    Row("LIST_META_CONTEXT before structured replies", meta_context(LIST_META_CONTEXT, "d"),
        [ACK]),
    Row("SET_META_CONTEXT before structured replies",
        meta_context(SET_META_CONTEXT, "d", "base:allocation"), [ERR_INVALID]),
    Row("STRUCTURED_REPLY twice", option(STRUCTURED_REPLY) * 2, [ACK, ERR_INVALID],
        others={"nbdkit": Said([ACK, ACK])}),
    *(
        Row(f"{name}: {claim}", option(STRUCTURED_REPLY) + sent, [ACK, error],
            others=others)
        for number, name in CONTEXTS.items()
        for claim, sent, error, others in (
            ("no bytes", option(number), ERR_INVALID, {}),
            ("a name length of 2^32 - 1",
             meta_context(number, "d", name_length=MAX32), ERR_INVALID, {}),
            ("a name longer than the option",
             meta_context(number, "d", name_length=9), ERR_INVALID, {}),
            ("a name of 4097 bytes", meta_context(number, "n" * 4097), ERR_INVALID, {}),
            ("an unknown name of 4096 bytes", meta_context(number, "n" * 4096, "base:"),
             ERR_UNKNOWN, {"nbdkit": NBDKIT_NAMES}),
            ("30 queries of 4096 bytes", meta_context(number, "d", *LONG_QUERIES), ACK, {}),
            ("30 queries of 4096 bytes for an unknown name",
             meta_context(number, "n" * 4096, *LONG_QUERIES[:-1]), ERR_UNKNOWN,
             {"nbdkit": NBDKIT_NAMES}),
            ("a query of 4097 bytes", meta_context(number, "d", "x:" + "y" * 4095),
             ERR_INVALID, {"qemu-nbd": Said([ACK, ACK])}),
            ("more queries than bytes", meta_context(number, "d", "base:", count=2),
             ERR_INVALID, {}),
            ("2^32 - 1 queries", meta_context(number, "d", "base:", count=MAX32),
             ERR_INVALID, {}),
            ("257 queries", meta_context(number, "d", *["x:"] * 257), ERR_TOO_BIG,
             BOTH_ACK),
            ("fewer queries than bytes", meta_context(number, "d", "base:", "base:", count=1),
             ERR_INVALID, BOTH_ACK | {"qemu-nbd": Said([ACK, ACK], closes=True)}),
            ("a query without a colon", meta_context(number, "d", "base"), ERR_INVALID,
             BOTH_ACK),
        )
    ),
    Row("a query longer than the option",
        option(STRUCTURED_REPLY)
        + option(LIST_META_CONTEXT, string("d") + struct.pack(">I", 1)
                 + string("base:", length=MAX32)),
        [ACK, ERR_INVALID]),
    Row("STARTTLS where there is none", option(STARTTLS), [ERR_POLICY]),
    Row("STARTTLS twice where there is none", option(STARTTLS) * 2, [ERR_POLICY] * 2),
    Row("STARTTLS after INFO", choose(INFO, "d") + option(STARTTLS), [ACK, ERR_POLICY]),
]  # fmt: skip


@pytest.fixture(scope="module", params=SERVERS)
def victim(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Victim]]:
    with serving(request.param, tmp_path_factory.mktemp("v")) as running:
        yield request.param, running


def endings(client: RawClient, count: int) -> list[int]:
    """How that many options end."""
    found: list[int] = []
    while len(found) < count:
        reply = wire.read_option_reply(client)
        if reply.last:
            found.append(reply.kind)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.claim)
def test_the_table(victim: tuple[str, Victim], row: Row) -> None:
    server, running = victim
    expected = row.of(server)
    if isinstance(expected, NotRun):
        return
    options, closes = expected
    with running.checked(), running.raw() as client:
        try:
            client.send(row.client_flags + row.sent)
            if not closes:
                client.send(option(ABORT))
        except (BrokenPipeError, ConnectionResetError):
            assert closes
        assert endings(client, len(options)) == options
        if not closes:
            assert wire.read_option_replies(client, ABORT)[-1].kind == ACK
        assert client.receive_rest() == b""
