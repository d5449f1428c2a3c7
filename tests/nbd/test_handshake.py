"""Option haggling: what a client sends, what it gets, and how it ends; whole, and in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from handshake_support import (
    ABORT,
    ACK,
    DEFAULT,
    DIRECTORY,
    DISK,
    ERR_INVALID,
    ERR_POLICY,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    FIXED,
    FIXED_NO_ZEROES,
    GO,
    GREETING,
    INFO,
    LIST,
    LONG,
    LONG_NAME,
    NOT_FIXED,
    PEEK,
    PLAIN,
    STARTTLS,
    Case,
    Directory,
    check,
    choose,
    converse,
    details,
    error,
    listed,
    option,
    reply,
)
from hypothesis import given
from hypothesis import strategies as st

from replnbd.nbd import Handshake, TlsMode

CASES = [
    Case(
        "export_name_gets_size_flags_and_124_zeroes",
        FIXED + option(EXPORT_NAME, b"disk"),
        struct.pack(">QH", 12345, 0x96D) + bytes(124),
        chosen=DISK,
    ),
    Case(
        "export_name_with_no_zeroes_gets_ten_bytes",
        FIXED_NO_ZEROES + option(EXPORT_NAME, b"disk"),
        struct.pack(">QH", 12345, 0x96D),
        chosen=DISK,
    ),
    Case(
        "export_name_without_fixed_newstyle_is_served",
        NOT_FIXED + option(EXPORT_NAME, b"disk"),
        struct.pack(">QH", 12345, 0x96D) + bytes(124),
        chosen=DISK,
    ),
    Case(
        "export_name_of_nothing_ends_without_an_answer",
        FIXED + option(EXPORT_NAME, b"nosuch"),
        ended="no export named 'nosuch'",
    ),
    Case(
        "export_name_of_a_fenced_export_ends_without_an_answer",
        FIXED + option(EXPORT_NAME, b"fenced"),
        ended="failover is under way",
    ),
    Case(
        "export_name_that_is_not_utf8_ends_without_an_answer",
        FIXED + option(EXPORT_NAME, b"\xff"),
        ended="not UTF-8",
    ),
    Case(
        "export_name_of_4096_bytes_is_served",
        FIXED_NO_ZEROES + option(EXPORT_NAME, LONG_NAME.encode()),
        struct.pack(">QH", 1, 1),
        chosen=LONG,
    ),
    Case(
        "export_name_of_4097_bytes_is_dropped",
        FIXED + option(EXPORT_NAME, b"n" * 4097),
        dropped="a name of 4097 bytes",
    ),
    Case(
        "go_without_requests_gets_export_and_block_size",
        FIXED + choose(GO, "disk"),
        details(GO, DISK),
        chosen=DISK,
    ),
    Case(
        "go_with_all_requests_gets_name_and_description_too",
        FIXED + choose(GO, "disk", 0, 1, 2, 3),
        details(GO, DISK, (1, "disk"), (2, "a disk")),
        chosen=DISK,
    ),
    Case(
        "go_ignores_information_types_it_does_not_know",
        FIXED + choose(GO, "disk", 77, 1, 0xFFFF),
        details(GO, DISK, (1, "disk")),
        chosen=DISK,
    ),
    Case(
        "go_hands_over_what_the_client_sent_too_early",
        FIXED + choose(GO, "disk") + b"first request",
        details(GO, DISK),
        chosen=DISK,
        unconsumed=b"first request",
    ),
    Case(
        "info_leaves_the_haggling_open",
        FIXED + choose(INFO, "plain", 2) + choose(GO, "disk"),
        details(INFO, PLAIN, (2, "")) + details(GO, DISK),
        chosen=DISK,
    ),
    Case(
        "go_for_nothing_is_an_error_and_the_next_go_works",
        FIXED + choose(GO, "nosuch") + choose(GO, "disk"),
        error(GO, ERR_UNKNOWN, "there is no export named 'nosuch'") + details(GO, DISK),
        chosen=DISK,
    ),
    Case(
        "go_for_an_unknown_name_of_4096_bytes_gets_a_short_answer",
        FIXED + choose(GO, "x" * 4096) + option(ABORT),
        error(GO, ERR_UNKNOWN, f"there is no export named '{'x' * 64}'...") + reply(ABORT, ACK),
        ended="the client aborted",
    ),
    Case(
        "go_and_info_for_a_fenced_export_are_refused_with_the_reason",
        FIXED + choose(GO, "fenced") + choose(INFO, "fenced") + option(ABORT),
        error(GO, ERR_POLICY, "failover is under way")
        + error(INFO, ERR_POLICY, "failover is under way")
        + reply(ABORT, ACK),
        ended="the client aborted",
    ),
    Case(
        "go_that_promises_65535_requests_in_full_is_served",
        FIXED + choose(GO, LONG_NAME, *[0] * 65535),
        details(GO, LONG),
        chosen=LONG,
    ),
    Case(
        "list_shows_names_and_descriptions_but_not_the_fenced",
        FIXED + option(LIST) + option(ABORT),
        listed(DISK) + listed(PLAIN) + listed(LONG) + reply(LIST, ACK) + reply(ABORT, ACK),
        ended="the client aborted",
    ),
    Case(
        "list_with_data_is_invalid_and_the_stream_stays_in_step",
        FIXED + option(LIST, b"????") + option(ABORT),
        error(LIST, ERR_INVALID, "LIST takes no data") + reply(ABORT, ACK),
        ended="the client aborted",
    ),
    Case(
        "abort_with_data_is_acknowledged",
        FIXED + option(ABORT, b"whatever"),
        reply(ABORT, ACK),
        ended="the client aborted",
    ),
    Case(
        "options_that_nobody_uses_are_unsupported_and_haggling_goes_on",
        FIXED + option(PEEK, b"disk") + option(99, b"x" * 70000) + choose(GO, "disk"),
        error(PEEK, ERR_UNSUP, "PEEK_EXPORT is not supported")
        + error(99, ERR_UNSUP, "option 99 is not supported")
        + details(GO, DISK),
        chosen=DISK,
    ),
    *(
        Case(
            f"{what}_is_invalid_and_the_stream_stays_in_step",
            FIXED + option(INFO, body) + choose(GO, "disk"),
            error(INFO, ERR_INVALID, f"INFO: {why}") + details(GO, DISK),
            chosen=DISK,
        )
        for what, body, why in [
            ("info_of_no_bytes", b"", "the lengths in it do not fit the option's length"),
            ("info_of_2_bytes", b"ab", "the lengths in it do not fit the option's length"),
            (
                "info_with_a_name_length_of_4_gib",
                struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
                "the lengths in it do not fit the option's length",
            ),
            (
                "info_with_a_name_length_of_2_gib",
                struct.pack(">I", 0x7FFFFFFF) + b"disk\0\0",
                "the lengths in it do not fit the option's length",
            ),
            (
                "info_with_more_requests_than_bytes",
                struct.pack(">I", 4) + b"disk" + struct.pack(">HH", 2, 0),
                "the lengths in it do not fit the option's length",
            ),
            (
                "info_with_bytes_left_over",
                struct.pack(">I", 4) + b"disk" + struct.pack(">HH", 0, 0),
                "the lengths in it do not fit the option's length",
            ),
            (
                "info_with_a_name_of_4097_bytes",
                struct.pack(">I", 4097) + b"n" * 4097 + b"\0\0",
                "the export name is longer than 4096 bytes, or not UTF-8",
            ),
            (
                "info_with_a_name_that_is_not_utf8",
                struct.pack(">I", 1) + b"\xff" + b"\0\0",
                "the export name is longer than 4096 bytes, or not UTF-8",
            ),
        ]
    ),
    Case(
        "info_longer_than_any_valid_one_is_invalid_and_skipped",
        FIXED + option(INFO, bytes(200_000)) + choose(GO, "disk"),
        error(INFO, ERR_INVALID, "INFO is too long") + details(GO, DISK),
        chosen=DISK,
    ),
    Case("unknown_client_flags_are_dropped", b"\0\0\xff\xff", dropped="client flags 0xffff"),
    Case(
        "a_wrong_option_magic_is_dropped",
        FIXED + b"IHAVENOT" + bytes(8),
        dropped=f"option magic is {b'IHAVENOT'.hex()}, not",
    ),
    Case(
        "an_option_of_4_gib_is_dropped_at_its_header",
        FIXED + option(99, length=0xFFFFFFFF),
        dropped="option 99 with 4294967295 bytes",
    ),
    Case(
        "an_option_without_fixed_newstyle_is_dropped",
        NOT_FIXED + option(LIST),
        dropped="LIST without fixed newstyle",
    ),
    Case(
        "the_33rd_option_is_never_answered",
        FIXED + option(99) * 33,
        error(99, ERR_UNSUP, "option 99 is not supported") * 32,
        dropped="more than 32 options",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conversation(case: Case) -> None:
    check(case, [case.sent])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conversation_split_in_two_at_every_offset(case: Case) -> None:
    size = len(case.sent)
    offsets: Iterable[int] = range(size)
    if size > 300:  # the long ones are mostly filling
        offsets = {*range(64), *range(size - 64, size), *range(0, size, size // 32)}
    for offset in offsets:
        check(case, [case.sent[:offset], case.sent[offset:]])


@given(st.data())
def test_any_fragmentation_gives_the_same_conversation(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from([each for each in CASES if len(each.sent) < 10_000]))
    cuts = data.draw(st.lists(st.integers(0, len(case.sent)), max_size=20))
    edges = [0, *sorted(cuts), len(case.sent)]
    check(case, [case.sent[a:b] for a, b in pairwise(edges)])


@given(st.binary(max_size=400))
def test_garbage_is_answered_or_dropped_but_never_crashes(garbage: bytes) -> None:
    answer, _, _ = converse([garbage])
    assert answer.startswith(GREETING)
    converse([FIXED + garbage])
    converse([FIXED + option(INFO, garbage)])
    converse([FIXED + option(GO, garbage) + garbage])


def test_a_conversation_cut_short_at_any_byte_has_no_outcome() -> None:
    sent = FIXED + choose(INFO, "plain") + choose(GO, "disk")
    for length in range(len(sent)):
        _, handshake, dropped = converse([sent[:length]])
        assert handshake.outcome is None
        assert dropped is None


def test_the_empty_name_is_the_default_export_if_there_is_one() -> None:
    handshake = Handshake(Directory(DEFAULT))
    handshake.receive(FIXED + choose(GO, ""))
    while handshake.advance() is not None:
        pass
    assert handshake.outcome is not None
    assert handshake.outcome.export == DEFAULT


def test_exports_are_looked_up_when_the_option_comes_not_before() -> None:
    directory = Directory()
    handshake = Handshake(directory)
    handshake.receive(FIXED + choose(INFO, "disk"))
    while handshake.advance() is not None:
        pass
    directory.by_name["disk"] = DISK
    handshake.receive(choose(GO, "disk"))
    while handshake.advance() is not None:
        pass
    assert handshake.outcome is not None
    assert handshake.outcome.export == DISK


def test_advance_answers_one_option_a_time() -> None:
    handshake = Handshake(DIRECTORY)
    handshake.receive(FIXED + option(99) + option(98))
    assert handshake.advance() == GREETING
    assert handshake.advance() == error(99, ERR_UNSUP, "option 99 is not supported")
    assert handshake.advance() == error(98, ERR_UNSUP, "option 98 is not supported")
    assert handshake.advance() is None


def test_data_of_an_unknown_option_is_not_kept() -> None:
    handshake = Handshake(DIRECTORY)
    handshake.receive(FIXED + option(99, length=32 << 20))
    while handshake.advance() is not None:
        pass
    for _ in range(100):
        handshake.receive(bytes(65536))
        assert handshake.advance() is None
        assert handshake.unconsumed == b""


def test_a_refusal_that_is_too_long_is_cut_between_characters() -> None:
    fenced = replace(DISK, refusal="x" + "é" * 4096)
    handshake = Handshake(Directory(fenced))
    handshake.receive(FIXED + choose(GO, "disk"))
    assert handshake.advance() == GREETING
    assert handshake.advance() == error(GO, ERR_POLICY, "x" + "é" * 2047)


def test_the_last_refusal_is_known_until_tls_begins() -> None:
    sent = FIXED + choose(GO, "nosuch") + choose(INFO, "fenced")
    for tls, refusal in [
        (TlsMode.OFF, "failover is under way"),
        (TlsMode.ON, "failover is under way"),
        (TlsMode.REQUIRE, "TLS is required here"),
    ]:
        _, handshake, _ = converse([sent, option(LIST)], tls)
        assert handshake.refusal == refusal
        _, handshake, _ = converse([sent, option(STARTTLS)], tls)
        assert handshake.refusal == ("TLS is not offered here" if tls is TlsMode.OFF else "")
