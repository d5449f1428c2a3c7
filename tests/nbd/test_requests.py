"""Requests and replies on the wire, which requests are valid, which errno becomes which error."""

from __future__ import annotations

import errno
import struct

import pytest

from replnbd.nbd import (
    EXTENDED_REQUEST_SIZE,
    REQUEST_SIZE,
    SIMPLE_REPLIES,
    NothingAllowed,
    Request,
    RequestRules,
    pack_request,
    pack_simple_reply_into,
    parse_status_payload,
    unpack_extended_request,
    unpack_request,
    wire_error,
)
from replnbd.nbd.constants import command_name, option_name

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
WRITABLE = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x800
READ_ONLY = 0x1 | 0x2 | 0x4 | 0x8 | 0x100
STRUCTURED = WRITABLE | 0x80 | 0x400
EXTENDED = STRUCTURED | 0x1000
PAYLOAD_LEN = 32
SIZE = 1 << 20
MIB32 = 32 << 20


def request_error(
    flags: int,
    command: int,
    offset: int,
    length: int,
    size: int,
    transmission_flags: int,
    *,
    contexts: int = 0,
) -> int:
    """The error that answers a request, 0 if a node may have it."""
    rules = RequestRules(
        size, transmission_flags, extended=transmission_flags >= 0x1000, contexts=contexts
    )
    refusal = rules.refusal(Request(flags, command, 7, offset, length))
    assert refusal is None or refusal.text
    return 0 if refusal is None else refusal.error


@pytest.mark.parametrize(
    ("claim", "flags", "command", "offset", "length", "expected"),
    [
        ("read", 0, READ, 0, SIZE, 0),
        ("read of the last byte", 0, READ, SIZE - 1, 1, 0),
        ("read past the end", 0, READ, SIZE - 1, 2, errno.EINVAL),
        ("read at 2^64 - 512", 0, READ, 2**64 - 512, 512, errno.EINVAL),
        ("read of nothing", 0, READ, 0, 0, 0),
        ("read of nothing at the end", 0, READ, SIZE, 0, 0),
        ("read of nothing past the end", 0, READ, SIZE + 1, 0, errno.EINVAL),
        ("read with FUA, as some clients send", FUA, READ, 0, 1, 0),
        ("read with DF, not negotiated", DF, READ, 0, 1, errno.EINVAL),
        ("write", 0, WRITE, 0, SIZE, 0),
        ("write with FUA", FUA, WRITE, 0, 1, 0),
        ("write with DF", DF, WRITE, 0, 1, errno.EINVAL),
        ("write with NO_HOLE", NO_HOLE, WRITE, 0, 1, errno.EINVAL),
        ("write past the end", 0, WRITE, SIZE - 1, 2, errno.ENOSPC),
        ("write of nothing", 0, WRITE, 0, 0, 0),
        ("write of 4 GiB", 0, WRITE, 0, 2**32 - 1, errno.EINVAL),
        ("flush", 0, FLUSH, 0, 0, 0),
        ("flush with FUA", FUA, FLUSH, 0, 0, 0),
        ("flush with an offset", 0, FLUSH, 1, 0, errno.EINVAL),
        ("flush with a length", 0, FLUSH, 0, 1, errno.EINVAL),
        ("trim", 0, TRIM, 0, SIZE, 0),
        ("trim past the end", 0, TRIM, SIZE - 1, 2, errno.EINVAL),
        ("trim of nothing", 0, TRIM, 0, 0, 0),
        ("trim with NO_HOLE", NO_HOLE, TRIM, 0, 1, errno.EINVAL),
        ("zeroes", 0, ZEROES, 0, SIZE, 0),
        ("zeroes with all their flags", FUA | NO_HOLE | FAST_ZERO, ZEROES, 0, 1, 0),
        ("zeroes with REQ_ONE", REQ_ONE, ZEROES, 0, 1, errno.EINVAL),
        ("zeroes past the end", 0, ZEROES, SIZE - 1, 2, errno.ENOSPC),
        ("cache, not advertised", 0, CACHE, 0, 1, errno.EINVAL),
        ("block status, not negotiated", 0, STATUS, 0, 1, errno.EINVAL),
        ("resize", 0, RESIZE, 0, 0, errno.EINVAL),
        ("command 99", 0, 99, 0, 0, errno.EINVAL),
        ("flag 0x8000", 0x8000, READ, 0, 1, errno.EINVAL),
    ],
)
def test_request_on_a_writable_export(
    claim: str, flags: int, command: int, offset: int, length: int, expected: int
) -> None:
    assert request_error(flags, command, offset, length, SIZE, WRITABLE) == expected, claim


@pytest.mark.parametrize(
    ("claim", "flags", "command", "offset", "length", "expected"),
    [
        ("read with DF", DF, READ, 0, SIZE, 0),
        ("cache", 0, CACHE, 0, SIZE, 0),
        ("cache with a flag", DF, CACHE, 0, SIZE, errno.EINVAL),
        ("cache past the end", 0, CACHE, SIZE, 1, errno.EINVAL),
        ("block status", 0, STATUS, 0, SIZE, 0),
        ("block status with REQ_ONE", REQ_ONE, STATUS, 0, SIZE, 0),
        ("block status of nothing", 0, STATUS, 0, 0, errno.EINVAL),
        ("block status past the end", 0, STATUS, SIZE - 1, 2, errno.EINVAL),
        ("block status with DF", DF, STATUS, 0, 1, errno.EINVAL),
        ("block status with a payload", PAYLOAD_LEN, STATUS, 0, 12, errno.EINVAL),
        ("write with a payload length", PAYLOAD_LEN, WRITE, 0, 1, errno.EINVAL),
    ],
)
def test_request_with_structured_replies_and_two_contexts(
    claim: str, flags: int, command: int, offset: int, length: int, expected: int
) -> None:
    error = request_error(flags, command, offset, length, SIZE, STRUCTURED, contexts=2)
    assert error == expected, claim


@pytest.mark.parametrize(
    ("claim", "flags", "command", "offset", "length", "expected"),
    [
        ("write", PAYLOAD_LEN, WRITE, 0, 1, 0),
        ("write without a payload", 0, WRITE, 0, 1, errno.EINVAL),
        ("write past the end", PAYLOAD_LEN, WRITE, SIZE, 1, errno.ENOSPC),
        ("read with a payload", PAYLOAD_LEN, READ, 0, 1, errno.EINVAL),
        ("flush with a payload", PAYLOAD_LEN, FLUSH, 0, 1, errno.EINVAL),
        ("trim of 2^63 bytes", 0, TRIM, 0, 2**63, errno.EINVAL),
        ("zeroes of 2^64 - 1 bytes", 0, ZEROES, 1, 2**64 - 1, errno.ENOSPC),
        ("read of 2^32 bytes", 0, READ, 0, 2**32, errno.EINVAL),
        ("block status, one context", PAYLOAD_LEN, STATUS, 0, 12, 0),
        ("block status, two contexts", PAYLOAD_LEN, STATUS, 0, 16, 0),
        ("block status, three contexts", PAYLOAD_LEN, STATUS, 0, 20, errno.EINVAL),
        ("block status, no context", PAYLOAD_LEN, STATUS, 0, 8, errno.EINVAL),
        ("block status, half a context", PAYLOAD_LEN, STATUS, 0, 14, errno.EINVAL),
        ("block status, a payload of 1 byte", PAYLOAD_LEN, STATUS, 0, 1, errno.EINVAL),
        ("block status, an empty payload", PAYLOAD_LEN, STATUS, 0, 0, errno.EINVAL),
    ],
)
def test_request_with_extended_headers_and_two_contexts(
    claim: str, flags: int, command: int, offset: int, length: int, expected: int
) -> None:
    error = request_error(flags, command, offset, length, SIZE, EXTENDED, contexts=2)
    assert error == expected, claim


def test_extended_requests_may_be_longer_than_32_bits() -> None:
    assert request_error(0, ZEROES, 2**32, 2**62, 2**63, EXTENDED) == 0
    assert request_error(0, TRIM, 2**32, 2**62, 2**63, EXTENDED) == 0
    assert request_error(0, STATUS, 2**32, 2**62, 2**63, EXTENDED, contexts=1) == 0


@pytest.mark.parametrize("command", [*range(9), 99])
def test_a_connection_that_is_to_end_answers_everything_with_eshutdown(command: int) -> None:
    refusal = NothingAllowed("the end").refusal(Request(0, command, 7, 0, 1))
    assert refusal == (errno.ESHUTDOWN, "the end")


@pytest.mark.parametrize("command", [READ, WRITE])
def test_a_payload_may_be_32_mib_and_not_a_byte_more(command: int) -> None:
    assert request_error(0, command, 0, MIB32, 1 << 40, WRITABLE) == 0
    assert request_error(0, command, 0, MIB32 + 1, 1 << 40, WRITABLE) == errno.EINVAL


@pytest.mark.parametrize("command", [TRIM, ZEROES])
def test_a_request_without_payload_may_be_as_long_as_the_wire_allows(command: int) -> None:
    assert request_error(0, command, 0, 2**32 - 1, 1 << 40, WRITABLE) == 0


@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
@pytest.mark.parametrize("length", [0, 1, 2 * SIZE])
def test_whatever_changes_a_read_only_export_gets_eperm(command: int, length: int) -> None:
    assert request_error(0, command, 0, length, SIZE, READ_ONLY) == errno.EPERM


def test_flags_that_were_not_advertised_are_einval() -> None:
    assert request_error(FAST_ZERO, ZEROES, 0, 1, SIZE, WRITABLE & ~0x800) == errno.EINVAL
    assert request_error(FUA, ZEROES, 0, 1, SIZE, WRITABLE & ~0x8) == errno.EINVAL


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (errno.EPERM, errno.EPERM),
        (errno.EACCES, errno.EPERM),
        (errno.EROFS, errno.EPERM),
        (errno.EIO, errno.EIO),
        (errno.ENOMEM, errno.ENOMEM),
        (errno.EINVAL, errno.EINVAL),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EFBIG, errno.ENOSPC),
        (errno.ESHUTDOWN, errno.ESHUTDOWN),
        (errno.ENODEV, errno.EIO),
        (errno.ENOTSUP, errno.EIO),
    ],
)
def test_errno_on_the_wire(cause: int, expected: int) -> None:
    assert wire_error(OSError(cause, "why")) == expected


def test_enotsup_is_the_answer_to_fast_zero_only() -> None:
    assert wire_error(OSError(errno.ENOTSUP, "slow"), FAST_ZERO) == errno.ENOTSUP
    assert wire_error(OSError(errno.ENOTSUP, "no"), FUA) == errno.EIO


def test_an_oserror_without_errno_is_an_i_o_error() -> None:
    assert wire_error(OSError("no number")) == errno.EIO


def test_request_and_reply_have_the_layout_of_the_protocol() -> None:
    request = struct.pack(">IHHQQI", 0x25609513, 1, 2, 3, 2**63, 5)
    assert pack_request(1, 2, 3, 2**63, 5) == request
    assert len(request) == REQUEST_SIZE
    assert unpack_request(b"skip" + request, 4) == (0x25609513, 1, 2, 3, 2**63, 5)
    extended = struct.pack(">IHHQQQ", 0x21E41C71, 1, 2, 3, 2**63, 2**33)
    assert pack_request(1, 2, 3, 2**63, 2**33, extended=True) == extended
    assert len(extended) == EXTENDED_REQUEST_SIZE
    assert unpack_extended_request(extended, 0) == (0x21E41C71, 1, 2, 3, 2**63, 2**33)
    failed = SIMPLE_REPLIES.error(Request(0, 0, 2**64 - 1, 0, 0), 5, "not sent")
    assert failed == struct.pack(">IIQ", 0x67446698, 5, 2**64 - 1)
    buffer = bytearray(20)
    pack_simple_reply_into(buffer, 4, 0x67446698, 0, 9)
    assert bytes(buffer) == bytes(4) + struct.pack(">IIQ", 0x67446698, 0, 9)


def test_numbers_have_names_for_logs() -> None:
    assert command_name(6) == "WRITE_ZEROES"
    assert command_name(99) == "command 99"
    assert option_name(7) == "GO"
    assert option_name(99) == "option 99"


def test_the_payload_of_a_block_status_has_a_length_and_ids() -> None:
    assert parse_status_payload(struct.pack(">QII", 2**40, 1, 7)) == (2**40, [1, 7])
    for length in (0, 1, 7, 8, 9, 11, 13, 15):
        assert parse_status_payload(bytes(length)) is None
