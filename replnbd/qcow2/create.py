"""New, empty images.

The layout is the smallest there can be: all metadata at the start, nothing allocated.

    | header | refcount table | refcount blocks | L1 table (a hole) |

The header is stored last, after a flush: what a crash leaves behind has no magic, and so is no
image, rather than a damaged one.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from replnbd.block import BlockNode
from replnbd.block.directory import new_file
from replnbd.errors import ConfigError, ImageError
from replnbd.qcow2.format import (
    BACKING_FILE_SIZE_MAX,
    BACKING_FORMAT_SIZE_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    CLUSTER_BITS_MIN_EXTENDED_L2,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_IDENTITY,
    INCOMPATIBLE_EXTENDED_L2,
    L1_BYTES_MAX,
    REFCOUNT_TABLE_BYTES_MAX,
    SIZE_MAX,
    Header,
    HeaderExtension,
    build_header,
    feature_name_table,
    parse_header,
    path_of,
    string_extension,
)
from replnbd.qcow2.refcounts import RefcountBlock

CLUSTER_SIZE_DEFAULT = 65536
_FEATURE_NAMES_CLUSTER_SIZE_MIN = 4096
"""Bytes. In smaller clusters the table of names would take the room of a backing file name."""


async def create_qcow2(
    file: BlockNode,
    size: int,
    *,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
    extended_l2: bool | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
    version: int = 3,
    refcount_bits: int = 16,
    identity: bytes = b"",
) -> None:
    """Make `file`, whatever it holds, an empty image of `size` bytes; durable on return.

    `extended_l2`: 32 subclusters per cluster; None: where the version and the cluster size allow
    it. `backing_file` is recorded, not opened, and needs `backing_format` beside it, because a
    format that is guessed from content lets a guest choose it (CVE-2008-2004). `identity`: up to
    32 bytes that no other image has (`Header.identity`).

    Raises ConfigError naming the argument that is out of range, or OSError.
    """
    header = _plan(
        size, cluster_size, extended_l2, backing_file, backing_format, version, refcount_bits
    )
    if identity:
        extension = HeaderExtension(EXTENSION_IDENTITY, identity)
        header = replace(header, extensions=(*header.extensions, extension))
    end = header.l1_table_offset + header.l1_size * 8
    end = -(-end // cluster_size) * cluster_size
    first = _header_bytes(header, path_of(file), end)
    await file.truncate(0)
    await file.truncate(end)
    await _write_refcounts(file, header, end // cluster_size)
    await file.flush()
    await file.pwrite(0, first)
    await file.flush()


async def create_image(
    path: str | Path,
    size: int,
    *,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
    extended_l2: bool | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
    version: int = 3,
    refcount_bits: int = 16,
    identity: bytes = b"",
) -> None:
    """Create an image file, mode 0600. It appears under its name complete and durable; where the
    file system has no nameless files, it appears first and is completed then.

    Arguments as `create_qcow2`. Raises ConfigError if the file exists or cannot be made; whatever
    is raised, no new file is left behind.
    """
    async with new_file(path) as file:
        await create_qcow2(
            file,
            size,
            cluster_size=cluster_size,
            extended_l2=extended_l2,
            backing_file=backing_file,
            backing_format=backing_format,
            version=version,
            refcount_bits=refcount_bits,
            identity=identity,
        )


def _plan(
    size: int,
    cluster_size: int,
    extended_l2: bool | None,
    backing_file: str | None,
    backing_format: str | None,
    version: int,
    refcount_bits: int,
) -> Header:
    """The header of the new image, its arguments checked and its tables placed."""
    if version not in (2, 3):
        raise ConfigError(f"version is {version}: must be 2 or 3")
    cluster_bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << max(cluster_bits, 0) or not (
        CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX
    ):
        limits = f"{1 << CLUSTER_BITS_MIN} to {1 << CLUSTER_BITS_MAX}"
        raise ConfigError(f"cluster size is {cluster_size}: must be a power of two from {limits}")
    can_extend = version == 3 and cluster_bits >= CLUSTER_BITS_MIN_EXTENDED_L2
    if extended_l2 is None:
        extended_l2 = can_extend
    elif extended_l2 and not can_extend:
        raise ConfigError(
            f"extended L2 entries need version 3 and clusters of at least "
            f"{1 << CLUSTER_BITS_MIN_EXTENDED_L2} bytes, not version {version} and {cluster_size}"
        )
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ConfigError(f"refcount bits is {refcount_bits}: must be a power of two from 1 to 64")
    if version == 2 and refcount_bits != 16:
        raise ConfigError(f"refcount bits is {refcount_bits}: version 2 images have 16")
    if not 0 <= size <= SIZE_MAX:
        raise ConfigError(f"size is {size}: must be 0 to {SIZE_MAX}")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=0,
        l1_table_offset=0,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=1,
        backing_file=backing_file,
        incompatible_features=INCOMPATIBLE_EXTENDED_L2 if extended_l2 else 0,
        refcount_order=refcount_bits.bit_length() - 1,
        header_length=72 if version == 2 else 112,
        extensions=_extensions(backing_file, backing_format, version, cluster_size),
    )
    return _place_tables(header)


def _extensions(
    backing_file: str | None, backing_format: str | None, version: int, cluster_size: int
) -> tuple[HeaderExtension, ...]:
    found: list[HeaderExtension] = []
    if backing_file is not None:
        length = len(backing_file.encode("utf-8", "surrogateescape"))
        if not 1 <= length <= BACKING_FILE_SIZE_MAX or "\0" in backing_file:
            raise ConfigError(
                f"backing file name has {length} bytes: must be 1 to {BACKING_FILE_SIZE_MAX}, "
                "without NUL"
            )
        if not backing_format:
            raise ConfigError(f"backing file {backing_file} needs a backing format: raw or qcow2")
        if len(backing_format.encode()) > BACKING_FORMAT_SIZE_MAX:
            raise ConfigError(
                f"backing format is {backing_format}: must have at most {BACKING_FORMAT_SIZE_MAX} "
                "bytes"
            )
        found.append(string_extension(EXTENSION_BACKING_FORMAT, backing_format))
    elif backing_format is not None:
        raise ConfigError(f"backing format is {backing_format}, but there is no backing file")
    if version == 3 and cluster_size >= _FEATURE_NAMES_CLUSTER_SIZE_MIN:
        found.append(feature_name_table())
    return tuple(found)


def _place_tables(header: Header) -> Header:
    """The header with table sizes and offsets: each table just behind the one before."""
    cluster_size = header.cluster_size
    l1_size = header.l1_entries_needed
    if l1_size * 8 > L1_BYTES_MAX:
        largest = L1_BYTES_MAX // 8 * header.l2_entries * cluster_size
        raise ConfigError(
            f"size is {header.size}: with clusters of {cluster_size} bytes at most {largest}"
        )
    l1_clusters = -(-l1_size * 8 // cluster_size)
    blocks = table = 1
    while True:  # table and blocks count themselves; both only grow, so this ends
        clusters = 1 + table + blocks + l1_clusters
        if blocks < -(-clusters // header.refcount_block_entries):
            blocks = -(-clusters // header.refcount_block_entries)
        elif table < -(-blocks * 8 // cluster_size):
            table = -(-blocks * 8 // cluster_size)
        else:
            break
    if table * cluster_size > REFCOUNT_TABLE_BYTES_MAX:
        raise ConfigError(f"size is {header.size}: too large for clusters of {cluster_size} bytes")
    # An empty disk has no L1 table; its offset is where the table would begin.
    l1_table_offset = (1 + table + blocks) * cluster_size
    return replace(
        header, l1_size=l1_size, l1_table_offset=l1_table_offset, refcount_table_clusters=table
    )


def _header_bytes(header: Header, path: str, end: int) -> bytes:
    try:
        data = build_header(header)
    except ImageError as exc:
        raise ConfigError(str(exc)) from exc
    parse_header(data, path, file_size=end)  # what we make, we must be able to open
    return data


async def _write_refcounts(file: BlockNode, header: Header, clusters: int) -> None:
    """Refcount 1 for each of the file's `clusters`, and the table that points to the blocks."""
    cluster_size = header.cluster_size
    entries = header.refcount_block_entries
    first = header.refcount_table_offset + header.refcount_table_bytes
    offsets = [first + number * cluster_size for number in range(-(-clusters // entries))]
    for number, offset in enumerate(offsets):
        block = RefcountBlock(bytes(cluster_size), header.refcount_bits)
        block.set_run(0, min(entries, clusters - number * entries), 1)
        # The rest of the block is a hole: up to 2 MiB in which no refcount is set.
        await file.pwrite(offset, block.encode().rstrip(b"\0"))
    await file.pwrite(header.refcount_table_offset, struct.pack(f">{len(offsets)}Q", *offsets))
