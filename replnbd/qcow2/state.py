"""Image: the parts of an open image, and the lookups that all verbs share.

The verbs (`read`, `write`, `zeroes`, `empty`) are functions over an Image; Qcow2Node in `image.py`
puts them behind the BlockNode interface and holds the range lock while they run.
"""

from __future__ import annotations

from replnbd.block import BlockNode
from replnbd.qcow2.allocation import Allocator
from replnbd.qcow2.entries import COMPRESSED, OFFSET_MASK, Shape, run_of_subclusters
from replnbd.qcow2.format import Header
from replnbd.qcow2.host import HostFile
from replnbd.qcow2.mapping import Mapping

# The state of a run of bytes. Plain integers: they are compared on the data path.
UNALLOCATED = 0
DATA = 1
ZERO = 2
DEFLATED = 3
"""A compressed cluster, whatever its algorithm."""

_L1_ENTRIES_MAX = 1 << 16
"""Looked at in one go: 16 TiB of an overlay, 3 ms."""


class Image:
    """An open image: where things are, and who changes them."""

    __slots__ = (
        "allocator",
        "backing",
        "backing_size",
        "compression_type",
        "copy_buffer",
        "file",
        "host",
        "inflated",
        "mapping",
        "ordered",
        "shape",
    )

    def __init__(
        self,
        host: HostFile,
        header: Header,
        mapping: Mapping,
        allocator: Allocator | None,
        backing: BlockNode | None,
    ) -> None:
        self.host = host
        self.file = host.file
        self.shape: Shape = mapping.shape
        self.mapping = mapping
        self.allocator = allocator
        """None if the image is open read-only."""
        self.backing = backing
        self.backing_size = min(backing.size, header.size) if backing is not None else 0
        self.ordered = host.power_safe and backing is not None
        """Data in a new cluster must be durable before the entry that shows it. Without a backing
        it need not: the cluster is blank till then (allocation.py), as what it stands for was."""
        self.compression_type = header.compression_type
        self.copy_buffer: memoryview | None = None
        """Of copy_up.py: used again, because fresh memory costs more than it does to fill it."""
        self.inflated: tuple[int, bytes] = (0, b"")
        """The compressed cluster that was read last: (descriptor, its bytes)."""

    async def extent(self, offset: int, end: int) -> tuple[int, int, int]:
        """(state, host offset, length) of the first run of bytes from `offset` in one state.

        `host offset` is that of the first byte if the state is DATA, the descriptor if DEFLATED.
        Runs go on over neighbouring clusters, DATA ones while the file's bytes are contiguous,
        but not past what one L2 slice maps, nor past `end`.
        """
        shape = self.shape
        cluster = offset >> shape.cluster_bits
        number = cluster >> shape.slice_bits
        words = self.mapping.slices.get(number) or await self.mapping.load(number)
        if words is None:
            return UNALLOCATED, 0, self._untouched(cluster, end) - offset
        limit = min(end, (number + 1) << shape.slice_bits << shape.cluster_bits)
        first_state = host = -1
        position = offset
        while position < limit:
            descriptor, bitmap = self.mapping.decode(words, cluster)
            fault = self.mapping.fault(descriptor, bitmap)
            if fault is not None:
                raise await self.mapping.corruption(cluster, descriptor, fault)
            inside = position & shape.cluster_mask
            if descriptor & COMPRESSED:
                if first_state >= 0:
                    break
                return DEFLATED, descriptor, min(limit - position, shape.cluster_size - inside)
            first = inside >> shape.sub_bits
            state, count = run_of_subclusters(bitmap, first, shape.sub_count)
            place = (descriptor & OFFSET_MASK) + inside
            if first_state < 0:
                first_state, host = state, place
            elif state != first_state or (state == DATA and place != host + position - offset):
                break
            position += ((first + count) << shape.sub_bits) - inside
            cluster += 1
            if first + count < shape.sub_count:
                break
        return first_state, host if first_state == DATA else 0, min(position, limit) - offset

    def metadata_clusters(self) -> int:
        """Host clusters of the structures of the active image: tables, blocks, header."""
        assert self.allocator is not None
        refcounts = self.allocator.refcounts
        l1_clusters = -(-len(self.mapping.l1) * 8 // self.shape.cluster_size)
        table_clusters = len(refcounts.table) * 8 // self.shape.cluster_size
        blocks = len(refcounts.table) - refcounts.table.count(0)
        return 1 + l1_clusters + table_clusters + blocks + self.mapping.table_count

    def _untouched(self, cluster: int, end: int) -> int:
        """A guest offset up to which no L2 table exists, from a cluster that has none on."""
        l1 = self.mapping.l1
        shift = self.shape.l1_shift
        index = cluster >> shift
        last = min((end - 1) >> self.shape.cluster_bits >> shift, index + _L1_ENTRIES_MAX)
        while index < last and not l1[index + 1]:
            index += 1
        return min(end, (index + 1) << shift << self.shape.cluster_bits)

    async def read_backing(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the backing; zeroes where it has ended, or where there is none."""
        backed = min(len(buffer), self.backing_size - offset)
        if backed > 0:
            assert self.backing is not None
            await self.backing.pread(offset, buffer[:backed])
        else:
            backed = 0
        if backed < len(buffer):
            buffer[backed:] = bytes(len(buffer) - backed)
