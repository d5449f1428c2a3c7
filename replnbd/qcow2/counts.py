"""ClusterCounts: how often each host cluster is referred to, counted from nothing.

What a check compares the image's own refcounts with. One byte for the count and one for the kind
of reference, in pages that exist only where something is referred to: a check's memory follows
what is allocated, not the size of the file, and has a bound.
"""

from __future__ import annotations

from replnbd.errors import ImageUnsupportedError
from replnbd.qcow2.refcounts import RefcountBlock

DATA = 1
COMPRESSED = 2
L2_TABLE = 3
HEADER = 4
L1_TABLE = 5
SNAPSHOT_TABLE = 6
BITMAP = 7
REFCOUNT_TABLE = 8
REFCOUNT_BLOCK = 9

KIND_NAMES = (
    "nothing",
    "guest data",
    "compressed guest data",
    "an L2 table",
    "the header",
    "an L1 table",
    "the snapshot table",
    "a bitmap",
    "the refcount table",
    "a refcount block",
)

_PAGE_BITS = 14
_PAGE = 1 << _PAGE_BITS
_PAGE_MASK = _PAGE - 1
_PAGES_MAX = 8192
"""256 MiB together: 8 TiB of data in 64 KiB clusters, if it is not too scattered."""
_SATURATED = 255


class ClusterCounts:
    """References to host clusters, by cluster number."""

    __slots__ = ("_counts", "_kinds", "_large", "most", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._counts: dict[int, bytearray] = {}
        self._kinds: dict[int, bytearray] = {}
        self._large: dict[int, int] = {}
        """Counts of 255 and more, which do not fit into the byte."""
        self.most = 1
        """The highest count there was."""

    def add(self, cluster: int, kind: int) -> int:
        """Count a reference. Returns the kind of an earlier one that it cannot share the cluster
        with, else 0: snapshots share data and L2 tables, all else has one reference."""
        counts = self._counts.get(cluster >> _PAGE_BITS)
        if counts is None:
            counts = self._add_page(cluster >> _PAGE_BITS)
        index = cluster & _PAGE_MASK
        count = counts[index]
        kinds = self._kinds[cluster >> _PAGE_BITS]
        if count == 0:
            counts[index] = 1
            kinds[index] = kind
            return 0
        if count < _SATURATED - 1:
            counts[index] = count = count + 1
        else:
            counts[index] = _SATURATED
            self._large[cluster] = count = self._large.get(cluster, _SATURATED - 1) + 1
        if count > self.most:
            self.most = count
        earlier = kinds[index]
        return earlier if earlier != kind or kind >= HEADER else 0

    def remove(self, cluster: int) -> None:
        """Take one counted reference back."""
        counts = self._counts[cluster >> _PAGE_BITS]
        index = cluster & _PAGE_MASK
        large = self._large.pop(cluster, 0)
        if large > _SATURATED:
            self._large[cluster] = large - 1
        else:
            counts[index] -= 1

    def get(self, cluster: int) -> int:
        """How many references were counted."""
        counts = self._counts.get(cluster >> _PAGE_BITS)
        if counts is None:
            return 0
        count = counts[cluster & _PAGE_MASK]
        return count if count < _SATURATED else self._large[cluster]

    def as_block(self, index: int, cluster_size: int, bits: int) -> RefcountBlock:
        """The refcount block that says what was counted; counts that do not fit are the highest
        that does (`most` tells)."""
        block = RefcountBlock(bytes(cluster_size), bits)
        entries = cluster_size * 8 // bits
        first = index * entries
        width = block.width
        limit = (1 << bits) - 1
        position = 0
        while position < entries:
            start = (first + position) & _PAGE_MASK
            part = min(_PAGE - start, entries - position)
            counts = self._counts.get((first + position) >> _PAGE_BITS)
            if counts is not None:
                run = counts[start : start + part]
                if limit < _SATURATED:
                    run = run.translate(bytes(min(value, limit) for value in range(256)))
                block.counts[(position + 1) * width - 1 : (position + part) * width : width] = run
                large = run.find(_SATURATED)
                while large >= 0:
                    count = min(self._large[first + position + large], limit)
                    block.set_run(position + large, 1, count)
                    large = run.find(_SATURATED, large + 1)
            position += part
        return block

    def block_numbers(self, entries: int) -> set[int]:
        """Which refcount blocks of `entries` refcounts have anything to count."""
        found: set[int] = set()
        for page, counts in self._counts.items():
            first = page << _PAGE_BITS
            for index in range(first // entries, (first + _PAGE - 1) // entries + 1):
                start = max(index * entries - first, 0)
                end = min((index + 1) * entries - first, _PAGE)
                if index not in found and any(counts[start:end]):
                    found.add(index)
        return found

    def end(self) -> int:
        """The number after that of the last cluster with a reference."""
        for page in sorted(self._counts, reverse=True):
            used = len(self._counts[page].rstrip(b"\0"))
            if used:
                return (page << _PAGE_BITS) + used
        return 0

    def _add_page(self, page: int) -> bytearray:
        if len(self._counts) >= _PAGES_MAX:
            raise ImageUnsupportedError(
                f"{self.path}: checking it needs more than 256 MiB of memory: use qemu-img check"
            )
        counts = self._counts[page] = bytearray(_PAGE)
        self._kinds[page] = bytearray(_PAGE)
        return counts
