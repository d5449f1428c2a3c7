"""The lexer of QMP: bytes in, tokens out, one byte at a time through a table; no I/O.

The language is QEMU's: JSON, and strings in single quotes too, but no exponent right after a
lone 0 (`0e1` is two tokens). A byte that fits nowhere is an error of its own, and then comes
recovery: everything is skipped up to a byte that a message can begin or go on after. So a client
that sends garbage hears of it, and its next command works.

One byte per step is slow (0.1 µs each) and good enough: a command has a hundred bytes. In return
a message cut into any pieces costs no more than a whole one, because nothing is scanned twice.

States: what the bytes since the token's start can still become. A table row maps the next byte
to the next state or to one of the actions FINISH, FINISH_BEFORE, STRAY, SKIP.
"""

from __future__ import annotations

from collections.abc import Iterator

# Kinds of tokens. A structural character is its own kind: "{", "}", "[", "]", ":", ",".
STRING = "string"
INTEGER = "integer"
FLOAT = "float"
KEYWORD = "keyword"
STRAY_BYTES = "stray"

Token = tuple[str, bytes]
"""Kind and bytes: of a string with its quotes, of stray bytes up to the one that did not fit."""

# Section: states

_START = 0
_DOUBLE_QUOTED = 1
_DOUBLE_QUOTED_ESCAPE = 2
_SINGLE_QUOTED = 3
_SINGLE_QUOTED_ESCAPE = 4
_MINUS = 5
_ZERO = 6
_DIGITS = 7
_POINT = 8
_FRACTION = 9
_EXPONENT = 10
_EXPONENT_SIGN = 11
_EXPONENT_DIGITS = 12
_WORD = 13
_RECOVERY = 14

# Section: actions, distinguished from states by their value

_ACTIONS = 0x80
_FINISH = 0x80
"""This byte ends the token and belongs to it."""
_FINISH_BEFORE = 0x81
"""This byte ended the token and does not belong to it: look at it again from the start."""
_STRAY = 0x82
"""This byte does not fit: the token up to and including it is stray."""
_SKIP = 0x83
"""White space between tokens."""

_STRUCTURAL = b"{}[]:,"
_SPACE = b" \t\r\n"
_DIGIT = b"0123456789"
_LOWER = b"abcdefghijklmnopqrstuvwxyz"
# 0xfe and 0xff are in no UTF-8 sequence of any age: a string with them is no string.
_TEXT = bytes(range(0x20, 0xFE))
# A stray byte makes the rest of its line suspect, up to one of these; tabs, spaces and quotes do
# not count, because after garbage they may as well be inside as outside of a string.
_RESTART = bytes(set(range(0x20)) - {0x09}) + b"\xfe\xff" + _STRUCTURAL

_KIND = {
    _DOUBLE_QUOTED: STRING,
    _SINGLE_QUOTED: STRING,
    _ZERO: INTEGER,
    _DIGITS: INTEGER,
    _FRACTION: FLOAT,
    _EXPONENT_DIGITS: FLOAT,
    _WORD: KEYWORD,
}


def _row(default: int, *transitions: tuple[bytes, int]) -> bytes:
    row = bytearray([default]) * 256
    for byte_set, target in transitions:
        for byte in byte_set:
            row[byte] = target
    return bytes(row)


def _build_table() -> tuple[bytes, ...]:
    rows = {
        _START: _row(
            _STRAY,
            (_SPACE, _SKIP),
            (_STRUCTURAL, _FINISH),
            (b'"', _DOUBLE_QUOTED),
            (b"'", _SINGLE_QUOTED),
            (b"-", _MINUS),
            (_DIGIT, _DIGITS),
            (b"0", _ZERO),
            (_LOWER, _WORD),
        ),
        _DOUBLE_QUOTED: _row(
            _STRAY, (_TEXT, _DOUBLE_QUOTED), (b'"', _FINISH), (b"\\", _DOUBLE_QUOTED_ESCAPE)
        ),
        _DOUBLE_QUOTED_ESCAPE: _row(_STRAY, (_TEXT, _DOUBLE_QUOTED)),
        _SINGLE_QUOTED: _row(
            _STRAY, (_TEXT, _SINGLE_QUOTED), (b"'", _FINISH), (b"\\", _SINGLE_QUOTED_ESCAPE)
        ),
        _SINGLE_QUOTED_ESCAPE: _row(_STRAY, (_TEXT, _SINGLE_QUOTED)),
        _MINUS: _row(_STRAY, (_DIGIT, _DIGITS), (b"0", _ZERO)),
        _ZERO: _row(_FINISH_BEFORE, (_DIGIT, _STRAY), (b".", _POINT)),
        _DIGITS: _row(_FINISH_BEFORE, (_DIGIT, _DIGITS), (b".", _POINT), (b"eE", _EXPONENT)),
        _POINT: _row(_STRAY, (_DIGIT, _FRACTION)),
        _FRACTION: _row(_FINISH_BEFORE, (_DIGIT, _FRACTION), (b"eE", _EXPONENT)),
        _EXPONENT: _row(_STRAY, (_DIGIT, _EXPONENT_DIGITS), (b"+-", _EXPONENT_SIGN)),
        _EXPONENT_SIGN: _row(_STRAY, (_DIGIT, _EXPONENT_DIGITS)),
        _EXPONENT_DIGITS: _row(_FINISH_BEFORE, (_DIGIT, _EXPONENT_DIGITS)),
        _WORD: _row(_FINISH_BEFORE, (_LOWER, _WORD)),
        _RECOVERY: _row(_RECOVERY, (_RESTART, _FINISH_BEFORE)),
    }
    return tuple(rows[state] for state in range(len(rows)))


_TABLE = _build_table()


class Lexer:
    """Feed it bytes as they come; tokens do not care how the bytes were cut."""

    __slots__ = ("_state", "_token")

    def __init__(self) -> None:
        self._state = _START
        self._token = bytearray()

    @property
    def unfinished_size(self) -> int:
        """Bytes of the token that is not complete yet."""
        return len(self._token)

    def feed(self, data: bytes) -> Iterator[Token]:
        """The tokens that `data` completes. Exhaust it before feeding more."""
        state = self._state
        token = self._token
        for byte in data:
            target = _TABLE[state][byte]
            if target == _FINISH_BEFORE:
                if state != _RECOVERY:
                    yield _KIND[state], bytes(token)
                    token.clear()
                # No row leads from the start to FINISH_BEFORE: the byte is looked at once more.
                state = _START
                target = _TABLE[_START][byte]
            if target < _ACTIONS:
                if target != _RECOVERY:
                    token.append(byte)
                state = target
            elif target != _SKIP:
                token.append(byte)
                text = bytes(token)
                token.clear()
                if target == _STRAY:
                    state = _RECOVERY
                    self._state = state
                    yield STRAY_BYTES, text
                else:
                    kind = _KIND[state] if state else text.decode()
                    state = _START
                    yield kind, text
        self._state = state
