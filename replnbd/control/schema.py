"""Arguments of commands: their names and types, and the errors in QEMU's words.

The order of declaration is the order of checking: the first argument that is missing or of the
wrong type is the one the client hears of; unknown ones come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from replnbd.errors import ControlError

_INT64_MIN = -(1 << 63)
_INT64_MAX = (1 << 63) - 1


class Argument(NamedTuple):
    """`kind` is bool, int (of 64 bits, signed), str, or list (of strings).

    `choices`: the strings allowed (an enum of QAPI); of a list, the strings allowed in it.
    """

    name: str
    kind: type
    optional: bool = False
    choices: tuple[str, ...] = ()


def check_arguments(declared: Sequence[Argument], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, checked. Optional arguments that were not given are not in the result.

    Raises ControlError for the first that does not fit; of several unknown ones, QEMU names any.
    """
    checked: dict[str, Any] = {}
    for argument in declared:
        name = argument.name
        if name in given:
            _check_value(argument, given[name])
            checked[name] = given[name]
        elif not argument.optional:
            raise ControlError(f"Parameter '{name}' is missing")
    for name in given:
        if name not in checked:
            raise ControlError(f"Parameter '{name}' is unexpected")
    return checked


def _check_value(argument: Argument, value: Any) -> None:  # noqa: ANN401 - any JSON value
    name, kind = argument.name, argument.kind
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong_type(name, "boolean")
    elif kind is int:
        # JSON has no 64-bit integers: what does not fit has become a double, as in QEMU.
        if type(value) is not int or not _INT64_MIN <= value <= _INT64_MAX:
            raise _wrong_type(name, "integer")
    elif kind is list:
        if not isinstance(value, list):
            raise _wrong_type(name, "array")
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise _wrong_type(f"{name}[{index}]", "string")
            # QEMU has no name for a list's item here, and says so.
            _check_choice("null", argument.choices, item)
    else:
        if not isinstance(value, str):
            raise _wrong_type(name, "string")
        _check_choice(name, argument.choices, value)


def _check_choice(name: str, choices: tuple[str, ...], value: str) -> None:
    if choices and value not in choices:
        raise ControlError(f"Parameter '{name}' does not accept value '{value}'")


def _wrong_type(name: str, expected: str) -> ControlError:
    return ControlError(f"Invalid parameter type for '{name}', expected: {expected}")
