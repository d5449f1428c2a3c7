"""Metadata contexts: their names, and which of them a client's queries mean.

    base:allocation              holes and zeroes (proto.md, "The `base:` metadata namespace")
    qemu:allocation-depth        which layer decides the bytes (QEMU's docs/interop/nbd)
    qemu:dirty-bitmap:NAME       what has changed since some time (the same)
    x-replnbd:digest             a digest of the bytes (see X_REPLNBD_DIGEST)

A query of LIST_META_CONTEXT is a name, or what a name begins with up to one of its colons: "base:",
"qemu:", "qemu:dirty-bitmap:". One of SET_META_CONTEXT is a name; anything else selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

BASE_ALLOCATION = "base:allocation"
QEMU_ALLOCATION_DEPTH = "qemu:allocation-depth"
QEMU_DIRTY_BITMAP = "qemu:dirty-bitmap:"
X_REPLNBD_DIGEST = "x-replnbd:digest"
"""replnbd's own: whether two disks are equal can be seen without sending the bytes.

The status flags of a descriptor are BLAKE2b, digest size 8, as a big-endian number, of the bytes
of each piece that it has when cut at the multiples of 64 KiB; by a key, if the disk has a peer: the
name of the pair. So a descriptor of many granules says that all of them are equal, and a hole of a
TiB is one. What is asked for from, or to, the middle of a granule is answered by digests of those
pieces: ask in whole granules, but for the end of the export. Answers fall short after a few MiB of
data, but end between two granules.

Compact headers have room for the low 32 bits only.
"""

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
