"""Metadata contexts: their names, and which of them a client's queries mean.

    base:allocation              holes and zeroes (proto.md, "The `base:` metadata namespace")
    qemu:allocation-depth        which layer decides the bytes (QEMU's docs/interop/nbd)
    qemu:dirty-bitmap:NAME       what has changed since some time (the same)

A query of LIST_META_CONTEXT is a name, or what a name begins with up to one of its colons: "base:",
"qemu:", "qemu:dirty-bitmap:". One of SET_META_CONTEXT is a name; anything else selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

BASE_ALLOCATION = "base:allocation"
QEMU_ALLOCATION_DEPTH = "qemu:allocation-depth"
QEMU_DIRTY_BITMAP = "qemu:dirty-bitmap:"

DIRTY = 1
"""The status flag of a dirty extent (QEMU's docs/interop/nbd)."""


def list_contexts(names: tuple[str, ...], queries: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that a query matches; without a query, all."""
    queries = frozenset(queries)
    if not queries:
        return names
    return tuple(name for name in names if queries & _prefixes(name))


def set_contexts(names: tuple[str, ...], queries: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that a query names; without a query, none."""
    queries = frozenset(queries)
    return tuple(name for name in names if name in queries)


def _prefixes(name: str) -> frozenset[str]:
    """A name, and what it begins with up to each of its colons."""
    ends = [at + 1 for at, letter in enumerate(name) if letter == ":"]
    return frozenset([name, *(name[:end] for end in ends)])
