"""The parser without a socket: every cut of the stream gives the same messages; limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replnbd.control.schema import Argument, ListOf, Object, Union, Unsigned, check_arguments
from replnbd.control.wire import (
    MESSAGE_SIZE_MAX,
    NESTING_DEPTH_MAX,
    JsonParser,
    Malformed,
    encode,
    event_message,
)
from replnbd.errors import ControlError

PIECES = [
    *(bytes([c]) for c in b"{}[]:,\"'\\ \n\t\x00\x01\xff\xc3\x80-+.0123eEaz_A%/"),
    *(b'{"execute":"query-jobs"}', b"\\u00e9", b"\\ud834\\udd1e", b"[1,2]", b"null", b'"a"'),
]

# What a QMP client can send: no non-characters (Unicode 16.0, 23.7), no surrogates alone.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]).filter(
        lambda c: not (0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE)
    )
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


def _messages(parser: JsonParser, *chunks: bytes) -> list[Any]:
    found = [message for chunk in chunks for message in parser.feed(chunk)]
    return [("malformed", m.desc) if isinstance(m, Malformed) else m for m in found]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join), st.data())
def test_messages_do_not_depend_on_how_the_stream_is_cut(data: bytes, draw: st.DataObject) -> None:
    whole = _messages(JsonParser(), data)
    assert _messages(JsonParser(), *(bytes([byte]) for byte in data)) == whole
    cut = draw.draw(st.integers(0, len(data)))
    assert _messages(JsonParser(), data[:cut], data[cut:]) == whole


@given(st.binary(max_size=200))
def test_any_bytes_are_survived_and_a_command_after_a_newline_is_understood(data: bytes) -> None:
    parser = JsonParser()
    _messages(parser, data)
    # A stray byte ends whatever is open; the newline ends the recovery from it.
    assert _messages(parser, b'\x01\n{"execute":"x"}')[-1] == {"execute": "x"}


@given(VALUES, st.booleans())
def test_json_is_read_as_the_standard_library_writes_it(value: Any, ascii_only: bool) -> None:
    text = json.dumps([value], ensure_ascii=ascii_only).encode()
    # The one thing that QEMU's language lacks: nothing that json.dumps writes begins with 0e.
    assert _messages(JsonParser(), text) == [[value]]


@given(VALUES)
def test_id_comes_back_unchanged(value: Any) -> None:
    line = encode({"return": {}, "id": value})
    assert line.endswith(b"\r\n")
    assert line.isascii()
    assert b"\n" not in line[:-2]
    assert json.loads(line) == {"return": {}, "id": value}


def test_nesting_at_the_limit_is_read_and_echoed() -> None:
    parser = JsonParser()
    [message] = parser.feed(b"[" * NESTING_DEPTH_MAX + b"]" * NESTING_DEPTH_MAX)
    assert isinstance(message, list)
    assert encode({"id": message}).count(b"[") == NESTING_DEPTH_MAX


def test_nesting_beyond_the_limit_is_refused_and_the_parser_goes_on() -> None:
    parser = JsonParser()
    messages = _messages(parser, b"[" * (NESTING_DEPTH_MAX + 1) + b' {"execute":"x"}')
    assert messages == [("malformed", "JSON nesting depth limit exceeded"), {"execute": "x"}]


@pytest.mark.parametrize("start", [b'"', b"[", b'{"a":', b"9", b"a"])
def test_endless_message_is_refused_once_and_held_no_longer(start: bytes) -> None:
    filler = {b"[": b"1,", b'"': b"x", b'{"a":': b"8", b"9": b"9", b"a": b"a"}[start] * 2048
    parser = JsonParser()
    messages = _messages(parser, start, *([filler] * (2 * MESSAGE_SIZE_MAX // len(filler))))
    assert messages == [("malformed", "JSON token size limit exceeded")]
    assert parser.exhausted


def test_message_just_below_the_limit_is_read() -> None:
    text = b'"' + b"x" * (MESSAGE_SIZE_MAX - 2) + b'"'
    assert _messages(JsonParser(), text) == ["x" * (MESSAGE_SIZE_MAX - 2)]


def test_limits_count_for_one_message_and_not_for_the_stream() -> None:
    parser = JsonParser()
    message = b'["' + b"x" * 1000 + b'"]  '
    for _ in range(2 * MESSAGE_SIZE_MAX // len(message)):
        assert len(_messages(parser, message)) == 1
    assert not parser.exhausted


def test_number_beyond_a_double_is_refused_where_qemu_would_echo_inf() -> None:
    assert _messages(JsonParser(), b"[1e999]") == [
        ("malformed", "JSON parse error, number out of range")
    ]
    assert _messages(JsonParser(), b"[" + b"9" * 5000 + b"]") == [
        ("malformed", "JSON parse error, number out of range")
    ]


def test_event_without_data_has_no_member_data() -> None:
    assert event_message("STOP", {}).keys() == {"timestamp", "event"}
    event = event_message("X", {"a": 1})
    assert event["data"] == {"a": 1}
    assert 0 <= event["timestamp"]["microseconds"] < 1_000_000


def test_arguments_are_checked_in_the_order_of_declaration() -> None:
    declared = (Argument("a", bool), Argument("b", int, optional=True))
    assert check_arguments(declared, {"b": 1, "a": True}) == {"a": True, "b": 1}
    assert check_arguments(declared, {"a": True}) == {"a": True}
    with pytest.raises(ControlError, match="'a', expected: boolean"):
        check_arguments(declared, {"z": 1, "b": "x", "a": 0})
    with pytest.raises(ControlError, match="'b', expected: integer"):
        check_arguments(declared, {"z": 1, "b": True, "a": True})
    with pytest.raises(ControlError, match="'z' is unexpected"):
        check_arguments(declared, {"z": 1, "a": True})


NESTED = Union(
    (Argument("kind", str, choices=("a", "b", "c")), Argument("base", Unsigned(16), optional=True)),
    "kind",
    {
        "a": (Argument("list", ListOf(Object((Argument("x", int),)))),),
        "b": (Argument("inner", Object((Argument("y", str, choices=("on", "off")),))),),
        "c": "there is no c today",
    },
)


@pytest.mark.parametrize(
    ("given", "desc"),
    [
        ({}, "Parameter 'kind' is missing"),
        ({"kind": "d"}, "Parameter 'kind' does not accept value 'd'"),
        ({"kind": "c", "z": 1}, "there is no c today"),
        ({"kind": "c", "base": -1}, "Parameter 'base' expects uint16_t"),
        ({"kind": "a"}, "Parameter 'list' is missing"),
        ({"kind": "a", "list": {}}, "Invalid parameter type for 'list', expected: array"),
        ({"kind": "a", "list": [1]}, "Invalid parameter type for 'list[0]', expected: object"),
        ({"kind": "a", "list": [{"x": 1}, {}]}, "Parameter 'list[1].x' is missing"),
        ({"kind": "a", "list": [{"x": 1, "y": 2}]}, "Parameter 'list[0].y' is unexpected"),
        ({"kind": "a", "list": [], "inner": {}}, "Parameter 'inner' is unexpected"),
        ({"kind": "b", "inner": {"y": "x"}}, "Parameter 'y' does not accept value 'x'"),
        (
            {"kind": "b", "inner": {"y": 1}},
            "Invalid parameter type for 'inner.y', expected: string",
        ),
    ],
)
def test_nested_arguments_are_named_by_their_path(given: dict[str, Any], desc: str) -> None:
    with pytest.raises(ControlError) as caught:
        check_arguments(NESTED, given)
    assert str(caught.value) == desc


def test_nested_arguments_that_fit_are_given_back() -> None:
    for arguments in (
        {"kind": "a", "base": 65535, "list": [{"x": 1}, {"x": -1}]},
        {"kind": "b", "inner": {"y": "off"}},
    ):
        assert check_arguments(NESTED, arguments) == arguments
