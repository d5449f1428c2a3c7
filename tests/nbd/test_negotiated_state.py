"""What options change: replies, contexts, TLS; what resets it, and what is refused after what."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from handshake_support import (
    ABORT,
    ACK,
    BASE,
    BITMAP,
    DEPTH,
    DIRECTORY,
    DISK,
    ERR_EXT_HEADER_REQD,
    ERR_INVALID,
    ERR_POLICY,
    ERR_SHUTDOWN,
    ERR_TLS_REQD,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FIXED,
    GO,
    GREETING,
    INFO,
    LIST,
    LIST_META,
    LONG,
    LONG_NAME,
    PLAIN,
    SET_META,
    STARTTLS,
    STRUCTURED_REPLY,
    Case,
    Directory,
    check,
    choose,
    contexts,
    converse,
    details,
    drain,
    error,
    listed,
    meta,
    option,
    reply,
)

from replnbd.errors import ProtocolError
from replnbd.nbd import (
    EXTENDED_REPLIES,
    SIMPLE_REPLIES,
    STRUCTURED_REPLIES,
    ExportOffer,
    Handshake,
    Replies,
    TlsMode,
)

READ_ONLY, DF, STATUS_PAYLOAD = 0x2, 0x80, 0x1000
WRITER_FLAGS = 0x20 | 0x40 | 0x800
"""SEND_TRIM, SEND_WRITE_ZEROES, SEND_FAST_ZERO."""
SECRET = ExportOffer("secret", "for the few", 4096, 1, needs_tls=True)
STRUCTURED = option(STRUCTURED_REPLY)
EXTENDED = option(EXTENDED_HEADERS)
STRUCTURED_ACK, EXTENDED_ACK = reply(STRUCTURED_REPLY, ACK), reply(EXTENDED_HEADERS, ACK)
ALL = ((0, BASE), (0, DEPTH), (0, BITMAP))


def _bad_queries(name: str) -> list[tuple[str, str, list[str | bytes], int | None, int, str]]:
    """(what, export, queries, their count if it lies, error, text) for an option of that name."""
    return [
        (
            "without_a_colon", "disk", ["base"], None, ERR_INVALID,
            f"{name}: a query is longer than 4096 bytes, not UTF-8, or has no colon",
        ),
        (
            "with_a_query_of_4097_bytes", "disk", ["x:" + "y" * 4095], None, ERR_INVALID,
            f"{name}: a query is longer than 4096 bytes, not UTF-8, or has no colon",
        ),
        (
            "that_is_not_utf8", "disk", [b"base:\xff"], None, ERR_INVALID,
            f"{name}: a query is longer than 4096 bytes, not UTF-8, or has no colon",
        ),
        (
            "with_fewer_queries_than_it_says", "disk", ["base:"], 2, ERR_INVALID,
            f"{name}: the lengths in it do not fit the option's length",
        ),
        (
            "with_4_gib_of_queries", "disk", [], 0xFFFFFFFF, ERR_INVALID,
            f"{name}: the lengths in it do not fit the option's length",
        ),
        (
            "with_bytes_left_over", "disk", ["base:", "base:"], 1, ERR_INVALID,
            f"{name}: there are bytes behind its last query",
        ),
        (
            "with_257_queries", "disk", ["base:"] * 257, None, ERR_TOO_BIG,
            f"{name} with more than 256 queries",
        ),
        (
            "of_more_than_128_kib", "disk", ["x:" + "y" * 4094] * 33, None, ERR_TOO_BIG,
            f"{name} is too long",
        ),
        (
            "for_no_such_export", "nosuch", ["base:"], None, ERR_UNKNOWN,
            "there is no export named 'nosuch'",
        ),
        (
            "for_no_such_export_with_a_long_name", "z" * 4096, ["base:"], None, ERR_UNKNOWN,
            f"there is no export named '{'z' * 64}'...",
        ),
        (
            "for_a_fenced_export", "fenced", ["base:"], None, ERR_POLICY,
            "failover is under way",
        ),
    ]  # fmt: skip


CASES = [
    Case(
        "structured_replies_bring_the_flag_df",
        FIXED + STRUCTURED + choose(GO, "disk"),
        STRUCTURED_ACK + details(GO, DISK, more_flags=DF),
        chosen=DISK,
    ),
    Case(
        "structured_replies_go_with_export_name_too",
        FIXED + STRUCTURED + option(EXPORT_NAME, b"disk"),
        STRUCTURED_ACK + struct.pack(">QH", DISK.size, DISK.transmission_flags | DF) + bytes(124),
        chosen=DISK,
    ),
    Case(
        "structured_reply_twice_is_invalid",
        FIXED + STRUCTURED + STRUCTURED + choose(GO, "plain"),
        STRUCTURED_ACK
        + error(STRUCTURED_REPLY, ERR_INVALID, "STRUCTURED_REPLY is in effect already")
        + details(GO, PLAIN, more_flags=DF),
        chosen=PLAIN,
    ),
    *(
        Case(
            f"{number}_with_data_is_invalid_and_the_stream_stays_in_step",
            FIXED + option(number, b"data") + choose(GO, "disk"),
            error(number, ERR_INVALID, f"{name} takes no data") + details(GO, DISK),
            chosen=DISK,
        )
        for number, name in (
            (STRUCTURED_REPLY, "STRUCTURED_REPLY"),
            (EXTENDED_HEADERS, "EXTENDED_HEADERS"),
            (STARTTLS, "STARTTLS"),
        )
    ),
    Case(
        "extended_headers_take_the_place_of_structured_replies",
        FIXED + STRUCTURED + EXTENDED + STRUCTURED + EXTENDED + choose(GO, "disk"),
        STRUCTURED_ACK
        + EXTENDED_ACK
        + error(STRUCTURED_REPLY, ERR_EXT_HEADER_REQD, "extended headers are in use")
        + error(EXTENDED_HEADERS, ERR_INVALID, "EXTENDED_HEADERS is in effect already")
        + details(GO, DISK, more_flags=DF),
        chosen=DISK,
    ),
    Case(
        "export_name_after_extended_headers_ends_without_an_answer",
        FIXED + EXTENDED + option(EXPORT_NAME, b"disk"),
        EXTENDED_ACK,
        ended="EXPORT_NAME after EXTENDED_HEADERS",
    ),
    Case(
        "list_meta_context_is_answered_before_structured_replies",
        FIXED + meta(LIST_META, "disk") + option(ABORT),
        contexts(LIST_META, *ALL) + reply(ABORT, ACK),
        ended="the client aborted",
    ),
    *(
        Case(
            f"list_meta_context_{what}",
            FIXED + meta(LIST_META, "disk", *queries) + option(ABORT),
            contexts(LIST_META, *found) + reply(ABORT, ACK),
            ended="the client aborted",
        )
        for what, queries, found in [
            ("with_a_name", ["base:allocation"], [(0, BASE)]),
            ("with_a_namespace", ["base:"], [(0, BASE)]),
            ("with_another_namespace", ["qemu:"], [(0, DEPTH), (0, BITMAP)]),
            ("with_a_part_of_a_name", ["qemu:dirty-bitmap:"], [(0, BITMAP)]),
            ("with_a_part_that_is_no_wildcard", ["qemu:dirty-bitmap", "base:alloc"], []),
            ("with_what_nobody_knows", ["x-what:ever", "base:none", ":"], []),
            ("with_overlapping_queries", ["base:", BASE, BASE], [(0, BASE)]),
            ("with_the_longest_query", ["x:" + "y" * 4094], []),
        ]
    ),
    *(
        Case(
            f"{name}_{what}".lower(),
            FIXED + STRUCTURED + meta(number, export, *queries, count=count) + choose(GO, "plain"),
            STRUCTURED_ACK + error(number, kind, why) + details(GO, PLAIN, more_flags=DF),
            chosen=PLAIN,
        )
        for number, name in ((LIST_META, "LIST_META_CONTEXT"), (SET_META, "SET_META_CONTEXT"))
        for what, export, queries, count, kind, why in _bad_queries(name)
    ),
    Case(
        "set_meta_context_before_structured_replies_is_invalid",
        FIXED + meta(SET_META, "disk", BASE) + choose(GO, "disk"),
        error(SET_META, ERR_INVALID, "SET_META_CONTEXT before STRUCTURED_REPLY")
        + details(GO, DISK),
        chosen=DISK,
    ),
    Case(
        "set_meta_context_for_the_longest_name",
        FIXED + STRUCTURED + meta(SET_META, LONG_NAME, BASE) + choose(GO, LONG_NAME),
        STRUCTURED_ACK + contexts(SET_META) + details(GO, LONG, more_flags=DF),
        chosen=LONG,
    ),
    Case(
        "starttls_where_there_is_none_is_against_policy",
        FIXED + option(STARTTLS) + choose(GO, "disk"),
        error(STARTTLS, ERR_POLICY, "TLS is not offered here") + details(GO, DISK),
        chosen=DISK,
    ),
    Case(
        "abort_is_served_in_clear_text_where_tls_is_required",
        FIXED + option(ABORT, b"data"),
        reply(ABORT, ACK),
        ended="the client aborted",
        tls=TlsMode.REQUIRE,
    ),
    Case(
        "export_name_in_clear_text_where_tls_is_required_ends_without_an_answer",
        FIXED + option(EXPORT_NAME, b"disk"),
        ended="EXPORT_NAME without TLS",
        tls=TlsMode.REQUIRE,
    ),
    *(
        Case(
            f"option_{number}_in_clear_text_needs_tls_where_it_is_required",
            FIXED + option(number, data) + option(ABORT),
            error(number, ERR_TLS_REQD, "TLS is required here") + reply(ABORT, ACK),
            ended="the client aborted",
            tls=TlsMode.REQUIRE,
        )
        for number, data in (
            (LIST, b""), (INFO, choose(INFO, "disk")[16:]), (GO, choose(GO, "nosuch")[16:]),
            (STRUCTURED_REPLY, b""), (EXTENDED_HEADERS, b""), (99, b"x" * 70000),
            (LIST_META, meta(LIST_META, "disk")[16:]), (SET_META, b"?"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conversation(case: Case) -> None:
    check(case, [case.sent])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conversation_split_at_every_offset(case: Case) -> None:
    size = len(case.sent)
    offsets = {*range(min(size, 200)), *range(0, size, max(1, size // 64))}
    for offset in offsets:
        check(case, [case.sent[:offset], case.sent[offset:]])


@pytest.mark.parametrize(
    ("sent", "replies", "selected", "flags"),
    [
        (choose(GO, "disk"), SIMPLE_REPLIES, (), 0),
        (STRUCTURED + choose(GO, "disk"), STRUCTURED_REPLIES, (), DF),
        (EXTENDED + choose(GO, "disk"), EXTENDED_REPLIES, (), DF),
        (
            STRUCTURED + meta(SET_META, "disk", BITMAP, BASE, "x-a:b") + choose(GO, "disk"),
            STRUCTURED_REPLIES, (BASE, BITMAP), DF,
        ),
        (
            EXTENDED + meta(SET_META, "disk", DEPTH) + choose(GO, "disk"),
            EXTENDED_REPLIES, (DEPTH,), DF | STATUS_PAYLOAD,
        ),
        (  # wildcards select nothing
            STRUCTURED + meta(SET_META, "disk", "base:", "qemu:") + choose(GO, "disk"),
            STRUCTURED_REPLIES, (), DF,
        ),
        (  # without queries, none
            STRUCTURED + meta(SET_META, "disk", BASE) + meta(SET_META, "disk")
            + choose(GO, "disk"),
            STRUCTURED_REPLIES, (), DF,
        ),
        (  # the last one counts, even if it failed
            STRUCTURED + meta(SET_META, "disk", BASE) + meta(SET_META, "nosuch", BASE)
            + choose(GO, "disk"),
            STRUCTURED_REPLIES, (), DF,
        ),
        (  # of another export
            EXTENDED + meta(SET_META, "plain", BASE) + choose(GO, "disk"),
            EXTENDED_REPLIES, (), DF,
        ),
        (  # neither LIST_META_CONTEXT nor INFO change it
            STRUCTURED + meta(SET_META, "disk", BASE) + meta(LIST_META, "disk", DEPTH)
            + choose(INFO, "plain") + choose(GO, "disk"),
            STRUCTURED_REPLIES, (BASE,), DF,
        ),
    ],
)  # fmt: skip
def test_what_a_go_has_negotiated(
    sent: bytes, replies: Replies, selected: tuple[str, ...], flags: int
) -> None:
    _, handshake, dropped = converse([FIXED + sent])
    assert dropped is None
    assert handshake.outcome is not None
    assert handshake.outcome.replies is replies
    assert handshake.outcome.contexts == selected
    assert handshake.outcome.transmission_flags == DISK.transmission_flags | flags


@pytest.mark.parametrize(
    ("sent", "writes"),
    [
        (option(EXPORT_NAME, b"disk"), False),
        (choose(GO, "disk"), False),
        (STRUCTURED + meta(SET_META, "disk", BASE, DEPTH) + choose(GO, "disk"), False),
        (STRUCTURED + meta(SET_META, "disk", BITMAP) + choose(GO, "disk"), True),
        (EXTENDED + meta(SET_META, "disk", BASE, BITMAP) + choose(GO, "disk"), True),
        (
            STRUCTURED + meta(SET_META, "disk", BITMAP) + meta(SET_META, "disk", BASE)
            + choose(GO, "disk"),
            False,
        ),
    ],
    ids=["by-name", "without", "with-others", "with-it", "with-it-and-another", "given-up"],
)  # fmt: skip
def test_who_has_not_chosen_the_context_of_those_who_write_may_only_read(
    sent: bytes, writes: bool
) -> None:
    handshake = Handshake(Directory(replace(DISK, writers=BITMAP)))
    handshake.receive(FIXED + sent)
    drain(handshake)
    assert handshake.outcome is not None
    read_only = DISK.transmission_flags & ~WRITER_FLAGS | READ_ONLY
    expected = DISK.transmission_flags if writes else read_only
    assert handshake.outcome.transmission_flags & ~(DF | STATUS_PAYLOAD) == expected


def test_ids_of_contexts_are_unique_and_the_same_each_time() -> None:
    sent = (
        FIXED + STRUCTURED + meta(SET_META, "disk", BITMAP) + meta(SET_META, "disk", BITMAP, BASE)
    )
    answer, _, _ = converse([sent])
    expected = contexts(SET_META, (3, BITMAP)) + contexts(SET_META, (1, BASE), (3, BITMAP))
    assert answer == GREETING + STRUCTURED_ACK + expected


@pytest.mark.parametrize("tls", [TlsMode.ON, TlsMode.REQUIRE])
def test_starttls_forgets_what_was_negotiated_and_what_came_behind_it(tls: TlsMode) -> None:
    handshake = Handshake(DIRECTORY, tls)
    before = STRUCTURED + meta(SET_META, "disk", BASE)
    handshake.receive(FIXED + before)
    drain(handshake)
    # An attacker's options, in one packet with STARTTLS and right after it.
    handshake.receive(option(STARTTLS) + before + choose(GO, "disk"))
    assert drain(handshake) == reply(STARTTLS, ACK)
    assert handshake.tls_wanted
    handshake.receive(before + choose(GO, "disk"))
    assert drain(handshake) == b""
    handshake.tls_started()
    assert drain(handshake) == b""
    handshake.receive(option(STARTTLS) + choose(GO, "disk"))
    repeated = error(STARTTLS, ERR_INVALID, "STARTTLS is in effect already")
    assert drain(handshake) == repeated + details(GO, DISK)
    assert handshake.outcome is not None
    assert handshake.outcome.replies is SIMPLE_REPLIES
    assert handshake.outcome.contexts == ()


def test_an_export_for_tls_alone_is_not_told_of_in_clear_text() -> None:
    handshake = Handshake(Directory(PLAIN, SECRET), TlsMode.ON)
    handshake.receive(
        FIXED + option(LIST) + choose(INFO, "secret") + choose(GO, "secret")
        + meta(LIST_META, "secret") + option(STARTTLS)
    )  # fmt: skip
    text = "export 'secret' needs TLS"
    assert drain(handshake) == (
        GREETING + listed(PLAIN) + reply(LIST, ACK) + error(INFO, ERR_TLS_REQD, text)
        + error(GO, ERR_TLS_REQD, text) + error(LIST_META, ERR_POLICY, text)
        + reply(STARTTLS, ACK)
    )  # fmt: skip
    handshake.tls_started(frozenset(["client"]))
    handshake.receive(option(LIST) + choose(GO, "secret"))
    shown = listed(PLAIN) + listed(SECRET) + reply(LIST, ACK)
    assert drain(handshake) == shown + details(GO, SECRET)


def test_where_tls_is_not_offered_nobody_is_told_to_use_it() -> None:
    handshake = Handshake(Directory(PLAIN, SECRET))
    handshake.receive(FIXED + choose(INFO, "secret") + choose(GO, "secret"))
    text = "export 'secret' needs TLS"
    expected = GREETING + error(INFO, ERR_POLICY, text) + error(GO, ERR_POLICY, text)
    assert drain(handshake) == expected


def test_export_name_of_an_export_for_tls_alone_ends_without_an_answer() -> None:
    handshake = Handshake(Directory(SECRET), TlsMode.ON)
    handshake.receive(FIXED + option(EXPORT_NAME, b"secret"))
    assert drain(handshake) == GREETING
    assert handshake.outcome is not None
    assert handshake.outcome.export is None


def test_a_server_that_ends_answers_every_option_but_abort_with_err_shutdown() -> None:
    handshake = Handshake(DIRECTORY)
    handshake.receive(FIXED)
    drain(handshake)
    handshake.shutting_down = True
    handshake.receive(option(LIST) + choose(GO, "disk") + option(ABORT))
    text = "the server is shutting down"
    assert drain(handshake) == (
        error(LIST, ERR_SHUTDOWN, text) + error(GO, ERR_SHUTDOWN, text) + reply(ABORT, ACK)
    )


def test_starttls_without_fixed_newstyle_is_dropped() -> None:
    handshake = Handshake(DIRECTORY, TlsMode.ON)
    handshake.receive(bytes(4) + option(STARTTLS))
    with pytest.raises(ProtocolError, match="STARTTLS without fixed newstyle"):
        drain(handshake)
