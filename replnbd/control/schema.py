"""Arguments of commands: their names and types, and the errors in QEMU's words.

The order of declaration is the order of checking: the first argument that is missing or of the
wrong type is the one the client hears of; unknown ones come last, those of a nested object with it.
An argument is named by its path ("server.path", "instances[0].id"); but what is wrong with a value
of the right type is said of the last name alone, as QEMU does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from replnbd.errors import ControlError

_INT64_MIN = -(1 << 63)
_INT64_MAX = (1 << 63) - 1
_UINT64_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Unsigned:
    """An integer of so many bits."""

    bits: int


@dataclass(frozen=True, slots=True)
class Object:
    """An object with these members."""

    members: Sequence[Argument]


@dataclass(frozen=True, slots=True)
class Union:
    """An object with `base` members, the one named `tag` among them, and further ones that depend
    on that one's value. A branch that is a text is the reason why that value is refused."""

    base: Sequence[Argument]
    tag: str
    branches: Mapping[str, Sequence[Argument] | str]


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, of values of this kind."""

    kind: Kind


Kind = type | Unsigned | Object | Union | ListOf
"""bool, int (of 64 bits, signed) or str; or one of the above."""


class Argument(NamedTuple):
    """`choices`: the strings allowed (an enum of QAPI); of a list, the strings allowed in it."""

    name: str
    kind: Kind
    optional: bool = False
    choices: tuple[str, ...] = ()


def check_arguments(
    declared: Sequence[Argument] | Union, given: dict[str, Any], path: str = ""
) -> dict[str, Any]:
    """`given`, checked. Optional arguments that were not given are not in the result.

    Raises ControlError for the first that does not fit; of several unknown ones, QEMU names any.
    """
    checked: dict[str, Any] = {}
    if isinstance(declared, Union):
        _check_members(declared.base, given, path, checked)
        branch = declared.branches[checked[declared.tag]]
        if isinstance(branch, str):
            raise ControlError(branch)
        declared = branch
    _check_members(declared, given, path, checked)
    for name in given:
        if name not in checked:
            raise ControlError(f"Parameter '{path}{name}' is unexpected")
    return checked


def _check_members(
    declared: Sequence[Argument], given: dict[str, Any], path: str, checked: dict[str, Any]
) -> None:
    for argument in declared:
        name = argument.name
        if name in given:
            checked[name] = _checked_value(argument, given[name], path + name)
        elif not argument.optional:
            raise ControlError(f"Parameter '{path}{name}' is missing")


def _checked_value(argument: Argument, value: Any, path: str) -> Any:  # noqa: ANN401 - JSON values
    kind = argument.kind
    if isinstance(kind, Object | Union):
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        members = kind.members if isinstance(kind, Object) else kind
        return check_arguments(members, value, f"{path}.")
    if isinstance(kind, ListOf):
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        item = Argument("null", kind.kind, choices=argument.choices)
        return [_checked_value(item, each, f"{path}[{at}]") for at, each in enumerate(value)]
    if isinstance(kind, Unsigned):
        _check_unsigned(argument.name, kind.bits, value, path)
    else:
        _check_plain(argument, kind, value, path)
    return value


def _check_unsigned(name: str, bits: int, value: Any, path: str) -> None:  # noqa: ANN401
    # QEMU takes a negative number for the one that has the same 64 bits.
    if type(value) is not int or not _INT64_MIN <= value <= _UINT64_MAX:
        raise ControlError(f"Parameter '{path}' expects uint64")
    if not 0 <= value < 1 << bits:
        raise ControlError(f"Parameter '{name}' expects uint{bits}_t")


def _check_plain(argument: Argument, kind: type, value: Any, path: str) -> None:  # noqa: ANN401
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong_type(path, "boolean")
    elif kind is int:
        # JSON has no 64-bit integers: what does not fit has become a double, as in QEMU.
        if type(value) is not int or not _INT64_MIN <= value <= _INT64_MAX:
            raise _wrong_type(path, "integer")
    elif kind is str:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if argument.choices and value not in argument.choices:
            # QEMU has no name for a list's item here, and says so ("null").
            raise ControlError(f"Parameter '{argument.name}' does not accept value '{value}'")
    else:
        raise AssertionError(f"no kind of argument: {kind}")


def _wrong_type(path: str, expected: str) -> ControlError:
    return ControlError(f"Invalid parameter type for '{path}', expected: {expected}")
