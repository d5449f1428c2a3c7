"""Where commands are found by name: each room of commands adds its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from replnbd.control.backend import Backend, JsonObject
from replnbd.control.schema import Argument, Union

Arguments = dict[str, Any]
Handler = Callable[[Backend, Arguments], Awaitable[Any]]


class Command(NamedTuple):
    """`arguments` in the order in which they are checked. `oob`: it may be asked for by
    "exec-oob"."""

    name: str
    handler: Handler
    arguments: Sequence[Argument] | Union = ()
    oob: bool = False


COMMANDS: dict[str, Command] = {}
"""All commands."""


def command(name: str, *arguments: Argument, oob: bool = False) -> Callable[[Handler], Handler]:
    """Make a handler the command `name`."""
    return union_command(name, arguments, oob=oob)


def union_command(
    name: str, arguments: Sequence[Argument] | Union, *, oob: bool = False
) -> Callable[[Handler], Handler]:
    """As `command`, where arguments depend on one of them."""

    def register(handler: Handler) -> Handler:
        assert name not in COMMANDS
        COMMANDS[name] = Command(name, handler, arguments, oob)
        return handler

    return register


def listed(objects: list[JsonObject], member: str, value: str) -> bool:
    """Whether an object of a query's answer has this value."""
    return any(item[member] == value for item in objects)
