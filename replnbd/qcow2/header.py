"""The qcow2 header on disk: layouts, the `Header` they become, and back to bytes.

Source: QEMU's docs/interop/qcow2.rst, "Header" to "Bitmaps extension"; all integers big-endian.

The first cluster of an image:

    0                       72               104      header_length
    +-----------------------+----------------+--------+------------+-----+--------------+
    | version 2 fields      | version 3 only | more   | extensions | end | backing name |
    +-----------------------+----------------+--------+------------+-----+--------------+

This file knows what the bytes mean; `format`, which reads them, knows which of them are wrong.
Nothing here does I/O or runs per request: construct is for headers alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from construct import Aligned, Bytes, GreedyBytes, Int32ub, Int64ub, Prefixed, Struct

from replnbd.errors import ImageError

MAGIC = 0x514649FB
"""`QFI\\xfb`."""

# Feature bits, as masks: plain integers, because the engine tests them (spec, bytes 72 to 95).
INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_EXTERNAL = 1 << 1

COMPRESSION_DEFLATE = 0
COMPRESSION_ZSTD = 1

EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_ENCRYPTION = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441
EXTENSION_IDENTITY = 0x72706E62
"""replnbd's own ("rpnb"), of the overlays that it makes; others keep it, and need not know it."""

IDENTITY_SIZE_MAX = 32
"""Bytes; a longer one is cut, because it goes into a journal of limited size."""

EXTENSION_NAMES = {
    EXTENSION_BACKING_FORMAT: "backing file format name",
    EXTENSION_FEATURE_NAMES: "feature name table",
    EXTENSION_BITMAPS: "bitmaps",
    EXTENSION_ENCRYPTION: "full disk encryption",
    EXTENSION_DATA_FILE: "external data file name",
}

# Where single fields lie, for whoever sets a bit in place with one small write.
OFFSET_INCOMPATIBLE_FEATURES = 72
OFFSET_AUTOCLEAR_FEATURES = 88
OFFSET_REFCOUNT_TABLE = 48
"""refcount_table_offset and, right after it, refcount_table_clusters: twelve bytes."""

HEADER_V2 = Struct(
    "magic" / Int32ub,
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
HEADER_V3 = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
EXTENSION_START = Struct("type" / Int32ub, "length" / Int32ub)
EXTENSION = Aligned(8, Struct("type" / Int32ub, "data" / Prefixed(Int32ub, GreedyBytes)))
FEATURE_NAME = Struct("kind" / Bytes(1), "bit" / Bytes(1), "name" / Bytes(46))
BITMAPS = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "directory_size" / Int64ub,
    "directory_offset" / Int64ub,
)

HEADER_LENGTH_V2 = 72
HEADER_LENGTH_V3_MIN = 104
assert HEADER_V2.sizeof() == HEADER_LENGTH_V2
assert HEADER_V2.sizeof() + HEADER_V3.sizeof() == HEADER_LENGTH_V3_MIN
assert FEATURE_NAME.sizeof() == 48
assert BITMAPS.sizeof() == 24

_KINDS = ("incompatible", "compatible", "autoclear")
_FEATURES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


_STORED_FIELDS = (
    "version",
    "cluster_bits",
    "size",
    "crypt_method",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "refcount_order",
    "header_length",
)


@dataclass(frozen=True, slots=True)
class HeaderExtension:
    """One header extension, its data without length and padding; unknown types are kept."""

    type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the directory of persistent bitmaps lies (spec, "Bitmaps extension")."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A qcow2 header. Fields have the spec's names; offsets and sizes are bytes.

    One from `parse_header` is valid. Version 2 images get the values the spec implies: no
    features, refcount_order 4, header_length 72.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    backing_file_offset: int = 0
    backing_file: str | None = None
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = 112
    compression_type: int = COMPRESSION_DEFLATE
    additional: bytes = b""
    """Bytes 105 up to header_length: fields newer than this program, kept as they are."""
    extensions: tuple[HeaderExtension, ...] = ()
    """In the order of the file, without the end marker."""

    # Geometry

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """L2 entries have 128 bits, and clusters 32 subclusters."""
        return bool(self.incompatible_features & INCOMPATIBLE_EXTENDED_L2)

    @property
    def subclusters_per_cluster(self) -> int:
        """32 with extended L2 entries, else 1: the cluster is its own subcluster."""
        return 32 if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        """Bytes: the smallest unit that can be allocated."""
        return self.cluster_size // self.subclusters_per_cluster

    @property
    def l2_entry_size(self) -> int:
        """Bytes."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table, which is one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l1_entries_needed(self) -> int:
        """Entries of the L1 table that map the disk; l1_size may be more (a VM state)."""
        return -(-self.size // (self.cluster_size * self.l2_entries))

    @property
    def refcount_bits(self) -> int:
        """Bits of one refcount, 1 to 64."""
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        """Refcounts in a refcount block, which is one cluster."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def refcount_table_bytes(self) -> int:
        """Bytes that the refcount table takes in the file."""
        return self.refcount_table_clusters << self.cluster_bits

    # State and extensions

    @property
    def dirty(self) -> bool:
        """Refcounts may be wrong: repair them before the first write."""
        return bool(self.incompatible_features & INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Any structure may be wrong: the image must not be written to."""
        return bool(self.incompatible_features & INCOMPATIBLE_CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        """Writers may leave refcounts behind while the dirty bit is set; replnbd does not."""
        return bool(self.compatible_features & COMPATIBLE_LAZY_REFCOUNTS)

    @property
    def backing_format(self) -> str | None:
        """The format the header records for the backing file; information, never acted upon."""
        data = self.extension(EXTENSION_BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """Persistent bitmaps; consistent only while AUTOCLEAR_BITMAPS is set."""
        data = self.extension(EXTENSION_BITMAPS)
        if data is None or len(data) != BITMAPS.sizeof():
            return None
        raw = BITMAPS.parse(data)
        return BitmapsExtension(raw.nb_bitmaps, raw.directory_size, raw.directory_offset)

    @property
    def identity(self) -> str:
        """What no other image has, in hexadecimal; "" if who made this one gave it none."""
        data = self.extension(EXTENSION_IDENTITY)
        return "" if data is None else data[:IDENTITY_SIZE_MAX].hex()

    def extension(self, type_: int) -> bytes | None:
        """The data of the first extension of that type."""
        return next((e.data for e in self.extensions if e.type == type_), None)


def string_extension(type_: int, text: str) -> HeaderExtension:
    """An extension that is one string, such as the backing file format name."""
    return HeaderExtension(type_, text.encode("utf-8", "surrogateescape"))


def feature_name_table() -> HeaderExtension:
    """The names of the features the spec defines, for programs that do not know them yet."""
    entries = (
        FEATURE_NAME.build(
            {"kind": bytes((kind,)), "bit": bytes((bit,)), "name": name.encode().ljust(46, b"\0")}
        )
        for kind, bit, name in _FEATURES
    )
    return HeaderExtension(EXTENSION_FEATURE_NAMES, b"".join(entries))


def feature_names(table: bytes, kind: int) -> dict[int, str]:
    """The names that an image's feature name table gives to the bits of one bitmap.

    `kind` is 0 (incompatible), 1 (compatible) or 2 (autoclear). Incomplete entries are ignored,
    and unprintable characters replaced: the text goes into an error message.
    """
    size = FEATURE_NAME.sizeof()
    names: dict[int, str] = {}
    for start in range(0, len(table) - size + 1, size):
        entry = FEATURE_NAME.parse(table[start : start + size])
        if entry.kind[0] == kind:
            text = entry.name.split(b"\0", 1)[0].decode("ascii", "replace")
            names[entry.bit[0]] = "".join(c if c.isprintable() else "?" for c in text)
    return names


def build_header(header: Header) -> bytes:
    """The bytes for offset 0: header, extensions, end marker and backing file name.

    The name goes behind the extensions, wherever `backing_file_offset` says it was. What follows
    in the first cluster has no meaning and need not be cleared. Raises ImageError if it all does
    not fit into the first cluster.
    """
    extensions = b"".join(
        EXTENSION.build({"type": e.type, "data": e.data}) for e in header.extensions
    ) + EXTENSION.build({"type": EXTENSION_END, "data": b""})
    name = (header.backing_file or "").encode("utf-8", "surrogateescape")
    name_offset = header.header_length + len(extensions)
    end = name_offset + len(name)
    if end > header.cluster_size:
        raise ImageError(
            f"the header with its extensions and the backing file name takes {end} bytes: more "
            f"than a cluster of {header.cluster_size} bytes; use larger clusters or a shorter name"
        )
    fields = {name_: getattr(header, name_) for name_ in _STORED_FIELDS}
    fields["magic"] = MAGIC
    fields["backing_file_offset"] = name_offset if name else 0
    fields["backing_file_size"] = len(name)
    parts = [HEADER_V2.build(fields)]
    if header.version >= 3:
        parts.append(HEADER_V3.build(fields))
        more = bytes((header.compression_type,)) + header.additional
        room = header.header_length - HEADER_LENGTH_V3_MIN
        parts.append(more[:room].ljust(room, b"\0"))
    return b"".join((*parts, extensions, name))
