"""Messages of QMP: bytes in, JSON values or syntax errors out; and back to bytes. No I/O.

A message is complete when its brackets are balanced; only then is the client told what is wrong
with it, so one bad message gets one error, and the next message is read as if nothing had been.
Errors are worded as QEMU words them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from enum import Enum
from typing import Any

from replnbd.control.lexer import FLOAT, INTEGER, KEYWORD, STRAY_BYTES, STRING, Lexer

MESSAGE_SIZE_MAX = 256 * 1024
"""Bytes. QEMU takes 64 MiB; the longest command here has a few hundred bytes, and a client that
sends more than this is not speaking QMP: it is told so, and disconnected."""

NESTING_DEPTH_MAX = 256
"""QEMU allows 1024; this is well within what Python's JSON encoder can echo in an id."""

_INT64_MIN = -(1 << 63)
_UINT64_MAX = (1 << 64) - 1
_INTEGER_DIGITS_MAX = 20  # of 2**64 - 1

_KEYWORDS = {b"true": True, b"false": False, b"null": None}
_ESCAPES = {
    b'"': b'"',
    b"'": b"'",
    b"\\": b"\\",
    b"/": b"/",
    b"b": b"\b",
    b"f": b"\f",
    b"n": b"\n",
    b"r": b"\r",
    b"t": b"\t",
}
# Outside the escapes, everything up to the next one; the group is the character escaped.
_STRING_PART = re.compile(rb"[^\\]+|\\(.)", re.DOTALL)
_HEX4 = re.compile(rb"\\u([0-9a-fA-F]{4})")


class Malformed:
    """A message that could not be understood; `desc` says why, in QEMU's words."""

    __slots__ = ("desc",)

    def __init__(self, desc: str) -> None:
        self.desc = desc

    def __repr__(self) -> str:
        return f"Malformed({self.desc!r})"


class _JsonError(Exception):
    """The text of a syntax error."""


class _Expect(Enum):
    """What may come next in a container. In a key's place any value is read, and refused whole."""

    FIRST = "a value (a key in an object), or the end"
    ITEM = "a value (a key in an object)"
    COLON = ":"
    MEMBER = "an object member's value"
    SEPARATOR = ", or the end"


class _Container:
    """An object or a list that is not complete yet."""

    __slots__ = ("expect", "items", "key")

    def __init__(self, items: dict[str, Any] | list[Any]) -> None:
        self.items = items
        self.expect = _Expect.FIRST
        self.key = ""

    @property
    def end(self) -> str:
        return "}" if isinstance(self.items, dict) else "]"

    def add(self, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """`value` is complete and stands where the next thing was expected."""
        if isinstance(self.items, list):
            self.items.append(value)
        elif self.expect is _Expect.MEMBER:
            if self.key in self.items:
                raise _JsonError("duplicate key")
            self.items[self.key] = value
        elif not isinstance(value, str):
            raise _JsonError("key is not a string in object")
        else:
            self.key = value
            self.expect = _Expect.COLON
            return
        self.expect = _Expect.SEPARATOR

    def punctuate(self, kind: str) -> None:
        """`kind` follows a key (then it must be a colon) or a value (then a comma)."""
        is_object = isinstance(self.items, dict)
        if self.expect is _Expect.COLON:
            if kind != ":":
                raise _JsonError("missing : in object pair")
            self.expect = _Expect.MEMBER
        elif kind == ",":
            self.expect = _Expect.ITEM
        else:
            raise _JsonError(f"expected separator in {'dict' if is_object else 'list'}")


class JsonParser:
    """A stream of JSON values. Differs from QEMU's in one answer: a number too large for a
    double is an error here, where QEMU echoes `inf`, which is no JSON."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self.exhausted = False
        """A message passed MESSAGE_SIZE_MAX: nothing more is read, end the connection."""
        self._begin()

    def _begin(self) -> None:
        self._stack: list[_Container] = []
        self._result: Any = None
        self._error: str | None = None
        self._open_braces = 0
        self._open_brackets = 0
        self._size = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes: JSON values and Malformed, in their order.

        Lazy, so that whoever answers slowly does not pile up what is still to be answered.
        """
        if self.exhausted:
            return
        for kind, text in self._lexer.feed(data):
            self._size += len(text)
            if self._size > MESSAGE_SIZE_MAX:
                break
            if kind == STRAY_BYTES:
                # Like a C string, the text ends at a NUL.
                stray = text.partition(b"\0")[0].decode(errors="replace")
                self._begin()
                yield Malformed(f"JSON parse error, stray '{stray}'")
                continue
            if self._count_brackets(kind):
                self._begin()
                yield Malformed("JSON nesting depth limit exceeded")
                continue
            if self._error is None:
                try:
                    self._accept(kind, text)
                except _JsonError as exc:
                    self._error = f"JSON parse error, {exc}"
            if self._balanced():
                result = self._result if self._error is None else Malformed(self._error)
                self._begin()
                yield result
        if self._size + self._lexer.unfinished_size > MESSAGE_SIZE_MAX:
            self.exhausted = True
            yield Malformed("JSON token size limit exceeded")

    def _count_brackets(self, kind: str) -> bool:
        """Keep count, whatever else is wrong with the message; True if it goes too deep."""
        if kind == "{":
            self._open_braces += 1
        elif kind == "}":
            self._open_braces -= 1
        elif kind == "[":
            self._open_brackets += 1
        elif kind == "]":
            self._open_brackets -= 1
        return self._open_braces + self._open_brackets > NESTING_DEPTH_MAX

    def _balanced(self) -> bool:
        braces, brackets = self._open_braces, self._open_brackets
        return (braces <= 0 and brackets <= 0) or braces < 0 or brackets < 0

    def _accept(self, kind: str, text: bytes) -> None:
        """One more token of the message; raises _JsonError where it does not fit."""
        top = self._stack[-1] if self._stack else None
        if top is not None:
            if kind == top.end and top.expect in (_Expect.FIRST, _Expect.SEPARATOR):
                self._stack.pop()
                self._complete(top.items)
                return
            if top.expect in (_Expect.COLON, _Expect.SEPARATOR):
                top.punctuate(kind)
                return
        if kind == "{":
            self._stack.append(_Container({}))
        elif kind == "[":
            self._stack.append(_Container([]))
        else:
            self._complete(_scalar(kind, text))

    def _complete(self, value: Any) -> None:  # noqa: ANN401 - any JSON value
        if self._stack:
            self._stack[-1].add(value)
        else:
            self._result = value


def _scalar(kind: str, text: bytes) -> Any:  # noqa: ANN401 - any JSON value
    if kind == STRING:
        return _unquote(text)
    if kind == INTEGER:
        if len(text) <= _INTEGER_DIGITS_MAX:
            number = int(text)
            if _INT64_MIN <= number <= _UINT64_MAX:
                return number
        kind = FLOAT  # as QEMU: an integer beyond 64 bits is a double
    if kind == FLOAT:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise _JsonError("number out of range")
        return value
    if kind == KEYWORD:
        try:
            return _KEYWORDS[text]
        except KeyError:
            raise _JsonError(f"invalid keyword '{text.decode()}'") from None
    raise _JsonError("expecting value")


def _unquote(text: bytes) -> str:
    """The value of a string token, of which the lexer knows that its escapes are complete."""
    parts: list[str] = []
    position, end = 1, len(text) - 1
    while position < end:
        match = _STRING_PART.match(text, position, end)
        assert match is not None
        escaped = match[1]
        if escaped is None:
            parts.append(_decode_utf8(match[0]))
            position = match.end()
        elif escaped == b"u":
            character, position = _unescape_unicode(text, position)
            parts.append(character)
        elif escaped in _ESCAPES:
            parts.append(_ESCAPES[escaped].decode())
            position = match.end()
        else:
            raise _JsonError("invalid escape sequence in string")
    return "".join(parts)


def _decode_utf8(raw: bytes) -> str:
    # Modified UTF-8, as QEMU reads it: C0 80 is NUL, and non-characters are no characters.
    try:
        text = raw.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        raise _JsonError("invalid UTF-8 sequence in string") from None
    if not text.isascii() and any(_is_noncharacter(ord(character)) for character in text):
        raise _JsonError("invalid UTF-8 sequence in string")
    return text


def _unescape_unicode(text: bytes, position: int) -> tuple[str, int]:
    """The character of `\\uXXXX`, or of the two that are a surrogate pair, and where it ends."""
    match = _HEX4.match(text, position)
    end = position + 6
    code = int(match[1], 16) if match else 0xFFFF
    if 0xD800 <= code < 0xDC00:
        low = _HEX4.match(text, end)
        low_code = int(low[1], 16) if low else 0
        if 0xDC00 <= low_code < 0xE000:
            code = 0x10000 + ((code - 0xD800) << 10) + (low_code - 0xDC00)
            end += 6
    if 0xD800 <= code < 0xE000 or _is_noncharacter(code):
        sequence = text[position:end].decode(errors="replace")
        raise _JsonError(f"{sequence} is not a valid Unicode character")
    return chr(code), end


def _is_noncharacter(code: int) -> bool:
    """Unicode 16.0, section 23.7: U+FDD0..U+FDEF, and the last two of every plane."""
    return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


# Section: the other direction


def encode(message: dict[str, Any]) -> bytes:
    """One message on a line of its own, pure ASCII, as QEMU sends them."""
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"


def error_message(desc: str, error_class: str = "GenericError") -> dict[str, Any]:
    """The `error` reply, without an id."""
    return {"error": {"class": error_class, "desc": desc}}


def event_message(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """The message of an event that happens now. As in QEMU, no data, no member `data`."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    timestamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    message: dict[str, Any] = {"timestamp": timestamp, "event": name}
    if data:
        message["data"] = data
    return message
