"""What the bits of L1 and L2 entries mean. Pure: no I/O, no state.

Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries".

    L1 entry            0-8 reserved | 9-55 L2 table offset | 56-62 reserved | 63 COPIED
    L2, standard        0 reads as zeroes (version 3, not extended) | 1-8 reserved
                        9-55 host cluster offset | 56-61 reserved | 62 = 0 | 63 COPIED
    L2, compressed      0 to x-1 host offset | x to 61 more 512-byte sectors | 62 = 1 | 63 = 0
                        x = 62 - (cluster_bits - 8)
    L2, extended        a second word: 0-31 subcluster is allocated | 32-63 reads as zeroes

One form for all. Inside the engine an L2 entry is always the pair (descriptor, bitmap), as in an
extended entry. A plain entry is a cluster with one subcluster: bit 0 of its bitmap says that it is
allocated, bit 32 that it reads as zeroes. So nothing above this file asks which kind an image has,
but the two fast paths of image.py.

    host offset   bitmap                 state (the words of qemu-img map and QEMU's block layer)
    0             0                      unallocated: the backing shows
    0             zero bits              zero plain
    set           allocated bits         data
    set           zero bits              zero alloc: reads as zeroes, the space is kept
    compressed    all allocated          compressed
"""

from __future__ import annotations

from replnbd.qcow2.format import Header

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
ZERO_FLAG = 1
ZERO_SHIFT = 32
"""Bit n + ZERO_SHIFT of a bitmap: subcluster n reads as zeroes."""

_WORD = (1 << 64) - 1
_COMPRESSED_SECTOR = 512


class Shape:
    """The geometry of an image: how guest offsets split into tables, clusters and subclusters."""

    __slots__ = (
        "cluster_bits",
        "cluster_mask",
        "cluster_size",
        "entry_shift",
        "extended",
        "full",
        "invalid",
        "l1_shift",
        "size",
        "slice_bits",
        "slice_bytes",
        "slice_mask",
        "sub_bits",
        "sub_count",
        "sub_mask",
        "sub_size",
        "table_slices",
        "table_slices_bits",
        "version",
    )

    def __init__(self, header: Header) -> None:
        self.version = header.version
        self.size = header.size
        self.extended = header.extended_l2
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.cluster_mask = self.cluster_size - 1
        self.sub_count = header.subclusters_per_cluster
        self.sub_size = header.subcluster_size
        self.sub_mask = self.sub_size - 1
        self.sub_bits = self.sub_size.bit_length() - 1
        self.full = (1 << self.sub_count) - 1
        """The bitmap of a cluster whose every subcluster is allocated."""
        self.entry_shift = 1 if self.extended else 0
        """Words of an L2 entry, as a shift."""
        # 4 KiB, a page: a store inside one cannot be torn by the death of the process, and a
        # lookup in a sparse disk does not load a table of up to 2 MiB for one entry.
        self.slice_bytes = min(4096, self.cluster_size)
        self.slice_bits = self.slice_bytes.bit_length() - 1 - 3 - self.entry_shift
        """Clusters that one slice maps, as a shift."""
        self.slice_mask = (1 << self.slice_bits) - 1
        self.table_slices = self.cluster_size // self.slice_bytes
        self.table_slices_bits = self.table_slices.bit_length() - 1
        self.l1_shift = self.slice_bits + self.table_slices_bits
        """Clusters that one L2 table maps, as a shift."""
        aligned = OFFSET_MASK & ~self.cluster_mask
        self.invalid = _WORD & ~(COPIED | aligned)
        """Bits that the descriptor of a sound standard cluster never has."""

    def decode(self, first: int, second: int) -> tuple[int, int]:
        """(descriptor, bitmap) of an L2 entry's words; `second` counts if they are extended."""
        if self.extended:
            return first, (self.full if first & COMPRESSED else second)
        if first & COMPRESSED:
            return first, 1
        if first & ZERO_FLAG and self.version >= 3:
            return first & ~ZERO_FLAG, 1 << ZERO_SHIFT
        return first, 1 if first & OFFSET_MASK else 0

    def encode(self, descriptor: int, bitmap: int) -> tuple[int, ...]:
        """The words of an L2 entry, in the order of the file."""
        if self.extended:
            return descriptor, (0 if descriptor & COMPRESSED else bitmap)
        return (descriptor | (ZERO_FLAG if bitmap >> ZERO_SHIFT else 0),)

    def fault(self, descriptor: int, bitmap: int) -> str | None:
        """What is wrong with an entry, as the end of a sentence; None for a sound one."""
        if descriptor & COMPRESSED:
            return None
        if descriptor & self.invalid & ~OFFSET_MASK:
            return "has reserved bits set"
        if descriptor & self.invalid:
            return f"points to an offset that is not aligned to {self.cluster_size} bytes"
        if bitmap & (bitmap >> ZERO_SHIFT) & self.full:
            return f"has subclusters both allocated and zero (bitmap {bitmap:#018x})"
        if bitmap & self.full and not descriptor & OFFSET_MASK:
            return f"has subclusters allocated at offset 0 (bitmap {bitmap:#018x})"
        return None

    def l1_fault(self, entry: int) -> str | None:
        """As `fault`, for a nonzero L1 entry."""
        if entry & ~(COPIED | OFFSET_MASK):
            return "has reserved bits set"
        if entry & OFFSET_MASK & self.cluster_mask:
            return f"points to an offset that is not aligned to {self.cluster_size} bytes"
        if not entry & OFFSET_MASK:
            return "points to an L2 table at offset 0"
        return None

    def compressed_extent(self, descriptor: int) -> tuple[int, int]:
        """(host offset, length) of the bytes that may belong to a compressed cluster."""
        x = 62 - (self.cluster_bits - 8)
        offset = descriptor & ((1 << x) - 1)
        sectors = ((descriptor & (COMPRESSED - 1)) >> x) + 1
        return offset, sectors * _COMPRESSED_SECTOR - offset % _COMPRESSED_SECTOR

    def mask(self, start: int, end: int) -> int:
        """The allocated bits of the subclusters that the bytes `start` to `end` of a cluster
        touch; `start` < `end`."""
        return (2 << ((end - 1) >> self.sub_bits)) - (1 << (start >> self.sub_bits))


def run_of_subclusters(bitmap: int, first: int, count: int) -> tuple[int, int]:
    """(state, length) of the run of equal subclusters from `first` on, in a cluster of `count`.

    `state`: 1 allocated, 0 unallocated, 2 reads as zeroes.
    """
    bits = bitmap >> first
    if bits & 1:
        state = 1
    elif bits >> ZERO_SHIFT & 1:
        state = 2
        bits >>= ZERO_SHIFT
    else:
        state = 0
        # A run of unallocated ones ends where either bit is set: look for ones instead.
        bits = ~(bits | bits >> ZERO_SHIFT)
    # The lowest clear bit: adding one turns the run of ones below it over.
    length = (~bits & (bits + 1)).bit_length() - 1
    rest = count - first
    return state, rest if length < 0 or length > rest else length
