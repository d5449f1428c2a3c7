"""Reading a qcow2 header: every field checked, each error naming the field and its value.

What passes here is what the rest of the room may rely on: geometry within the limits, tables
aligned, inside the file and apart from each other, no feature that replnbd does not have. The
limits are QEMU's, so that an image QEMU made opens and one we made opens in QEMU. They also bound
what a hostile header can make us allocate: 32 MiB for the L1 table, 8 MiB for the refcount table.
"""

from __future__ import annotations

from typing import Any, NoReturn

from replnbd.block import BlockNode, read_bytes
from replnbd.errors import ImageError, ImageUnsupportedError
from replnbd.qcow2.header import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_RAW_EXTERNAL,
    BITMAPS,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_DEFLATE,
    COMPRESSION_ZSTD,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_DATA_FILE,
    EXTENSION_ENCRYPTION,
    EXTENSION_END,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_IDENTITY,
    EXTENSION_NAMES,
    EXTENSION_START,
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3_MIN,
    HEADER_V2,
    HEADER_V3,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2,
    MAGIC,
    OFFSET_AUTOCLEAR_FEATURES,
    OFFSET_INCOMPATIBLE_FEATURES,
    OFFSET_REFCOUNT_TABLE,
    BitmapsExtension,
    Header,
    HeaderExtension,
    build_header,
    feature_name_table,
    feature_names,
    string_extension,
)

__all__ = [
    "AUTOCLEAR_BITMAPS",
    "AUTOCLEAR_RAW_EXTERNAL",
    "COMPATIBLE_LAZY_REFCOUNTS",
    "COMPRESSION_DEFLATE",
    "COMPRESSION_ZSTD",
    "EXTENSION_BACKING_FORMAT",
    "EXTENSION_BITMAPS",
    "EXTENSION_DATA_FILE",
    "EXTENSION_ENCRYPTION",
    "EXTENSION_END",
    "EXTENSION_FEATURE_NAMES",
    "EXTENSION_IDENTITY",
    "INCOMPATIBLE_COMPRESSION",
    "INCOMPATIBLE_CORRUPT",
    "INCOMPATIBLE_DATA_FILE",
    "INCOMPATIBLE_DIRTY",
    "INCOMPATIBLE_EXTENDED_L2",
    "L1_BYTES_MAX",
    "MAGIC",
    "MAX_HOST_OFFSET",
    "OFFSET_AUTOCLEAR_FEATURES",
    "OFFSET_INCOMPATIBLE_FEATURES",
    "OFFSET_REFCOUNT_TABLE",
    "REFCOUNT_TABLE_BYTES_MAX",
    "BitmapsExtension",
    "Header",
    "HeaderExtension",
    "build_header",
    "feature_name_table",
    "parse_header",
    "path_of",
    "read_header",
    "string_extension",
]

CLUSTER_BITS_MIN = 9
CLUSTER_BITS_MAX = 21
CLUSTER_BITS_MIN_EXTENDED_L2 = 14
SIZE_MAX = (1 << 63) - 1  # offsets are signed 64-bit in NBD, QEMU and the kernel
L1_BYTES_MAX = 32 << 20
REFCOUNT_TABLE_BYTES_MAX = 8 << 20
REFCOUNT_ORDER_MAX = 6
MAX_HOST_OFFSET = 1 << 56
"""L1 and L2 entries have 56 bits for a host offset (spec, "Cluster mapping")."""
BACKING_FILE_SIZE_MAX = 1023
BACKING_FORMAT_SIZE_MAX = 15  # QEMU's limit; its longest format name has 15 letters
SNAPSHOTS_MAX = 65536
BITMAPS_MAX = 65535
BITMAP_DIRECTORY_BYTES_MAX = BITMAPS_MAX * (24 + 1023 + 1)  # entry, longest name, padding

_KNOWN_INCOMPATIBLE = (
    INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2
)


def path_of(file: BlockNode) -> str:
    """What to call an image in messages: the path of its file, or the name of its node."""
    return str(getattr(file, "path", "") or file.name)


async def read_header(file: BlockNode, *, file_size: int | None = None) -> Header:
    """Read and check the header of the image in `file`; errors as `parse_header`.

    `file_size` is for a node whose `size` is not the file's present one.
    """
    if file_size is None:
        file_size = file.size
    data = await read_bytes(file, 0, min(file_size, HEADER_LENGTH_V3_MIN))
    # How much more to read; a value out of range is refused by parse_header, on these bytes.
    cluster_bits = int.from_bytes(data[20:24], "big")
    if CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        data = await read_bytes(file, 0, min(file_size, 1 << cluster_bits))
    return parse_header(data, path_of(file), file_size=file_size)


def parse_header(data: bytes | bytearray, path: str, *, file_size: int | None = None) -> Header:
    """The header in `data`: the first cluster of an image, or as much as the file has of it.

    `path` names the image in errors. With `file_size`, tables that begin or run past the end of
    the file are errors as well.

    Raises ImageError naming path, field, value and what is allowed, or its subclass
    ImageUnsupportedError if the image is sound but needs what replnbd does not have.
    """
    return _Parser(bytes(data), path, file_size).parse()


class _Parser:
    """One header being checked; each method one group of fields."""

    def __init__(self, data: bytes, path: str, file_size: int | None) -> None:
        self.data = data
        self.path = path
        self.file_size = file_size

    def refuse(self, field: str, value: object, why: str) -> NoReturn:
        raise ImageError(f"{self.path}: {field} is {value}: {why}")

    def unsupported(self, field: str, value: object, why: str) -> NoReturn:
        raise ImageUnsupportedError(f"{self.path}: {field} is {value}: {why}")

    def parse(self) -> Header:
        fields = self.fixed_fields()
        fields["compression_type"], additional = self.additional_fields(fields["header_length"])
        self.features(fields)
        backing_file = self.backing_file(fields, fields.pop("backing_file_size"))
        everything: dict[str, Any] = {
            **fields,
            "backing_file": backing_file,
            "additional": additional,
            "extensions": self.extensions(fields),
        }
        header = Header(**everything)
        self.disk(header)
        self.tables(header)
        self.extension_contents(header)
        return header

    def fixed_fields(self) -> dict[str, int]:
        """The fields at fixed offsets, and those that say where the others lie checked."""
        data = self.data
        if len(data) < HEADER_LENGTH_V2:
            self.refuse("file size", len(data), f"a qcow2 header has {HEADER_LENGTH_V2} bytes")
        fields = dict(HEADER_V2.parse(data))
        del fields["_io"]
        magic = fields.pop("magic")
        if magic != MAGIC:
            self.refuse("magic", f"0x{magic:08x}", f"not a qcow2 image (0x{MAGIC:08x})")
        version = fields["version"]
        if version not in (2, 3):
            self.unsupported("version", version, "only 2 and 3 are known")
        cluster_bits = fields["cluster_bits"]
        if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
            allowed = f"must be {CLUSTER_BITS_MIN} to {CLUSTER_BITS_MAX}"
            self.refuse("cluster_bits", cluster_bits, allowed)
        if version == 2:
            fields["header_length"] = HEADER_LENGTH_V2
            return fields
        if len(data) < HEADER_LENGTH_V3_MIN:
            why = f"a version 3 header has {HEADER_LENGTH_V3_MIN} bytes"
            self.refuse("file size", len(data), why)
        fields.update(HEADER_V3.parse(data[HEADER_LENGTH_V2:]))
        del fields["_io"]
        length = fields["header_length"]
        limit = 1 << cluster_bits
        if length < HEADER_LENGTH_V3_MIN or length > limit or length % 8:
            allowed = f"must be a multiple of 8 from {HEADER_LENGTH_V3_MIN} to {limit}, one cluster"
            self.refuse("header_length", length, allowed)
        if length > len(data):
            self.refuse("header_length", length, f"the file has only {len(data)} bytes")
        return fields

    def additional_fields(self, header_length: int) -> tuple[int, bytes]:
        """compression_type (0 when the header is too short to have it) and what follows it."""
        more = self.data[HEADER_LENGTH_V3_MIN:header_length]
        return (more[0], more[1:]) if more else (COMPRESSION_DEFLATE, b"")

    def features(self, fields: dict[str, int]) -> None:
        incompatible = fields.get("incompatible_features", 0)
        unknown = incompatible & ~_KNOWN_INCOMPATIBLE
        if unknown:
            self.unknown_features(fields, unknown)
        if incompatible & INCOMPATIBLE_DATA_FILE:
            why = "an external data file (bit 2) is not supported"
            self.unsupported("incompatible_features", f"0x{incompatible:x}", why)
        if fields["crypt_method"] > 2:
            self.refuse("crypt_method", fields["crypt_method"], "must be 0, 1 or 2")
        if fields["crypt_method"]:
            self.unsupported("crypt_method", fields["crypt_method"], "encryption is not supported")
        extended = incompatible & INCOMPATIBLE_EXTENDED_L2
        if extended and fields["cluster_bits"] < CLUSTER_BITS_MIN_EXTENDED_L2:
            why = f"must be at least {CLUSTER_BITS_MIN_EXTENDED_L2} with extended L2 entries"
            self.refuse("cluster_bits", fields["cluster_bits"], why)
        compression = fields["compression_type"]
        if incompatible & INCOMPATIBLE_COMPRESSION:
            if compression == COMPRESSION_DEFLATE:
                why = "must not be 0 while incompatible feature bit 3 is set"
                self.refuse("compression_type", compression, why)
        elif compression:
            why = "must be 0 while incompatible feature bit 3 is clear"
            self.refuse("compression_type", compression, why)
        if compression > COMPRESSION_ZSTD:
            self.unsupported("compression_type", compression, "only 0 and 1 (zstd) are known")
        if fields.get("refcount_order", 4) > REFCOUNT_ORDER_MAX:
            allowed = f"must be 0 to {REFCOUNT_ORDER_MAX}"
            self.refuse("refcount_order", fields["refcount_order"], allowed)

    def unknown_features(self, fields: dict[str, int], unknown: int) -> NoReturn:
        # "An implementation must fail to open an image if an unknown bit is set."
        names: dict[int, str] = {}
        try:
            for extension in self.extensions(fields):
                if extension.type == EXTENSION_FEATURE_NAMES:
                    names = feature_names(extension.data, 0)
        except ImageError:
            pass  # the unknown feature may well change what an extension looks like
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        text = ", ".join(f"bit {bit} ({names.get(bit, 'without a name')})" for bit in bits)
        value = f"0x{fields['incompatible_features']:x}"
        self.unsupported("incompatible_features", value, f"unknown: {text}")

    def backing_file(self, fields: dict[str, int], length: int) -> str | None:
        """The backing file's name as the header has it. It is never opened: the operator names
        the files that replnbd opens (CVE-2024-4467)."""
        offset = fields["backing_file_offset"]
        # "Undefined if the image doesn't have a backing file."
        if offset == 0 or length == 0:
            return None
        cluster_size = 1 << fields["cluster_bits"]
        if not fields["header_length"] <= offset < cluster_size:
            allowed = f"must be inside the first cluster ({cluster_size} bytes) after the header"
            self.refuse("backing_file_offset", offset, allowed)
        limit = min(BACKING_FILE_SIZE_MAX, cluster_size - offset)
        if length > limit:
            self.refuse("backing_file_size", length, f"must be at most {limit}")
        if offset + length > len(self.data):
            why = f"it ends past the end of the file ({len(self.data)} bytes)"
            self.refuse("backing_file_size", length, why)
        name = self.data[offset : offset + length]
        if b"\0" in name:
            self.refuse("backing_file", repr(name), "must not contain a NUL byte")
        return name.decode("utf-8", "surrogateescape")

    def extensions(self, fields: dict[str, int]) -> tuple[HeaderExtension, ...]:
        """All extensions up to the end marker, the backing file name or the cluster's end."""
        found: list[HeaderExtension] = []
        position = fields["header_length"]
        end = fields["backing_file_offset"] or 1 << fields["cluster_bits"]
        end = min(end, len(self.data))
        while position + 8 <= end:
            start = EXTENSION_START.parse(self.data[position : position + 8])
            if start.type == EXTENSION_END:
                break
            position += 8
            if start.length > end - position:
                why = f"only {end - position} bytes are left for it"
                self.refuse(f"length of header extension 0x{start.type:08x}", start.length, why)
            data = self.data[position : position + start.length]
            found.append(HeaderExtension(start.type, data))
            position += (start.length + 7) & ~7
        return tuple(found)

    def disk(self, header: Header) -> None:
        if header.size > SIZE_MAX:
            self.refuse("size", header.size, f"must be at most {SIZE_MAX}")
        l1_limit = L1_BYTES_MAX // 8
        if header.l1_size > l1_limit:
            self.unsupported("l1_size", header.l1_size, f"must be at most {l1_limit} (32 MiB)")
        if header.l1_size < header.l1_entries_needed:
            why = f"a disk of {header.size} bytes needs {header.l1_entries_needed}"
            self.refuse("l1_size", header.l1_size, why)

    def tables(self, header: Header) -> None:
        clusters = header.refcount_table_clusters
        limit = REFCOUNT_TABLE_BYTES_MAX >> header.cluster_bits
        if not 1 <= clusters <= limit:
            why = f"must be 1 to {limit} (8 MiB)"
            self.refuse("refcount_table_clusters", clusters, why)
        if header.nb_snapshots > SNAPSHOTS_MAX:
            self.unsupported("nb_snapshots", header.nb_snapshots, f"must be <= {SNAPSHOTS_MAX}")
        tables = [
            ("refcount_table_offset", header.refcount_table_offset, header.refcount_table_bytes),
            ("l1_table_offset", header.l1_table_offset, header.l1_size * 8),
            # Snapshot table entries have at least 40 bytes; how many, only the table tells.
            ("snapshots_offset", header.snapshots_offset, header.nb_snapshots * 40),
        ]
        taken = [("the header", 0, header.cluster_size)]
        for field, offset, length in tables:
            if length:
                self.table(header, field, offset, length)
                for other, start, end in taken:
                    if offset < end and start < offset + length:
                        self.refuse(field, offset, f"the table overlaps {other}")
                taken.append((field.removesuffix("_offset"), offset, offset + length))

    def table(self, header: Header, field: str, offset: int, length: int) -> None:
        cluster_size = header.cluster_size
        if offset % cluster_size:
            self.refuse(field, offset, f"must be a multiple of the cluster size, {cluster_size}")
        if offset > MAX_HOST_OFFSET - length:
            self.refuse(field, offset, f"the table must end below 2^56 (it has {length} bytes)")
        if self.file_size is None:
            return
        # The last cluster of a file may be cut short where nothing was written yet.
        end = -(-self.file_size // cluster_size) * cluster_size
        if offset + length > end:
            why = f"the table ({length} bytes) is not inside the file ({self.file_size} bytes)"
            self.refuse(field, offset, why)

    def extension_contents(self, header: Header) -> None:
        types = [extension.type for extension in header.extensions]
        for type_, name in EXTENSION_NAMES.items():
            # "each header extension type shall appear at most once in the same image"
            if types.count(type_) > 1:
                why = "an extension may appear once only"
                self.refuse(f"number of {name} extensions", types.count(type_), why)
        backing_format = header.extension(EXTENSION_BACKING_FORMAT)
        if backing_format is not None and len(backing_format) > BACKING_FORMAT_SIZE_MAX:
            why = f"must be at most {BACKING_FORMAT_SIZE_MAX}"
            self.refuse("length of the backing file format name", len(backing_format), why)
        if header.extension(EXTENSION_ENCRYPTION) is not None:
            why = "must be absent while crypt_method is 0"
            self.refuse("full disk encryption extension", "present", why)
        bitmaps = header.extension(EXTENSION_BITMAPS)
        if bitmaps is not None:
            self.bitmaps(header, bitmaps)
        elif header.autoclear_features & AUTOCLEAR_BITMAPS:
            # "It is an error if this bit is set without the bitmaps extension present."
            value = f"0x{header.autoclear_features:x}"
            self.refuse("autoclear_features", value, "bit 0 is set but there are no bitmaps")

    def bitmaps(self, header: Header, data: bytes) -> None:
        if len(data) != BITMAPS.sizeof():
            why = f"must be {BITMAPS.sizeof()}"
            self.refuse("length of the bitmaps extension", len(data), why)
        if not header.autoclear_features & AUTOCLEAR_BITMAPS:
            return  # inconsistent, and so not used: what it points to may be anything
        bitmaps = BITMAPS.parse(data)
        if not 1 <= bitmaps.nb_bitmaps <= BITMAPS_MAX:
            self.refuse("nb_bitmaps", bitmaps.nb_bitmaps, f"must be 1 to {BITMAPS_MAX}")
        size = bitmaps.directory_size
        if not bitmaps.nb_bitmaps * 24 <= size <= BITMAP_DIRECTORY_BYTES_MAX:
            why = f"must be {bitmaps.nb_bitmaps * 24} to {BITMAP_DIRECTORY_BYTES_MAX}"
            self.refuse("bitmap_directory_size", size, why)
        if bitmaps.directory_offset == 0:
            self.refuse("bitmap_directory_offset", 0, "the header is there")
        self.table(header, "bitmap_directory_offset", bitmaps.directory_offset, size)
