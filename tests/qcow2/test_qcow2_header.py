"""Headers: every malformed one is refused with its field and value, and changes nothing."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_helpers import ALL, header_of, make_variant, memory_of

from replnbd.block import FileNode, MemoryNode
from replnbd.errors import ImageError, ImageUnsupportedError
from replnbd.qcow2 import create_qcow2, open_qcow2
from replnbd.qcow2.format import (
    AUTOCLEAR_BITMAPS,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_ENCRYPTION,
    EXTENSION_FEATURE_NAMES,
    HeaderExtension,
    build_header,
    parse_header,
    read_header,
)

CLUSTER = 65536
FILE_SIZE = 4 * CLUSTER  # header, refcount table, refcount block, L1 table


async def new_image(*, version: int = 3, cluster_size: int = CLUSTER) -> bytearray:
    node = MemoryNode()
    await create_qcow2(node, 1 << 20, version=version, cluster_size=cluster_size)
    return node.data


Edit = Callable[[bytearray], None]


def put(layout: str, *places: tuple[int, int]) -> Edit:
    """Store values at offsets."""

    def edit(data: bytearray) -> None:
        for offset, value in places:
            struct.pack_into(">" + layout, data, offset, value)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(data: bytearray) -> None:
        for one in edits:
            one(data)

    return edit


def extensions(*items: tuple[int, bytes]) -> Edit:
    """Rebuild the header with these extensions."""

    def edit(data: bytearray) -> None:
        header = parse_header(data[:CLUSTER], "base")
        new = replace(header, extensions=tuple(HeaderExtension(*item) for item in items))
        built = build_header(new)
        data[: len(built)] = built

    return edit


def cut(size: int) -> Edit:
    def edit(data: bytearray) -> None:
        del data[size:]

    return edit


def bitmaps(nb: int, size: int, offset: int) -> Edit:
    """The bitmaps extension, and the autoclear bit that vouches for it."""
    data = struct.pack(">IIQQ", nb, 0, size, offset)
    return both(extensions((EXTENSION_BITMAPS, data)), put("Q", (88, AUTOCLEAR_BITMAPS)))


def feature_name(bit: int, name: bytes) -> bytes:
    return bytes((0, bit)) + name.ljust(46, b"\0")


@dataclass(frozen=True)
class Bad:
    """A damaged header and the words of the error: field, value."""

    says: str
    edit: Edit
    unsupported: bool = False
    version: int = 3
    cluster_size: int = CLUSTER


U32 = 0xFFFFFFFF
U64 = 0xFFFFFFFF_FFFFFFFF

BAD_HEADERS = [
    # How much file there is
    Bad("file size is 0", cut(0)),
    Bad("file size is 71", cut(71)),
    Bad("file size is 71", cut(71), version=2),
    Bad("file size is 103", cut(103)),
    Bad("header_length is 112", cut(104)),
    Bad("refcount_table_offset is 65536", cut(112)),
    Bad("l1_table_offset is 196608", cut(3 * CLUSTER)),
    # magic, version
    Bad("magic is 0x514649fa", put("I", (0, 0x514649FA))),
    Bad("magic is 0x00000000", put("I", (0, 0))),
    *(Bad(f"version is {v}", put("I", (4, v)), unsupported=True) for v in (0, 1, 4, U32)),
    # backing_file_offset, backing_file_size
    Bad("backing_file_offset is 64", both(put("Q", (8, 64)), put("I", (16, 4)))),
    Bad("backing_file_offset is 65536", both(put("Q", (8, CLUSTER)), put("I", (16, 4)))),
    Bad(f"backing_file_offset is {U64}", both(put("Q", (8, U64)), put("I", (16, 4)))),
    Bad("backing_file_size is 1024", both(put("Q", (8, 1024)), put("I", (16, 1024)))),
    Bad(f"backing_file_size is {U32}", both(put("Q", (8, 1024)), put("I", (16, U32)))),
    Bad("backing_file_size is 7", both(put("Q", (8, CLUSTER - 6)), put("I", (16, 7)))),
    Bad("backing_file is b'\\x00", both(put("Q", (8, 1024)), put("I", (16, 4)))),
    # cluster_bits
    *(Bad(f"cluster_bits is {n}", put("I", (20, n))) for n in (0, 1, 8, 22, 63, 64, U32)),
    Bad("cluster_bits is 13", put("Q", (72, 16)), cluster_size=8192),
    # size, l1_size
    Bad(f"size is {1 << 63}", put("Q", (24, 1 << 63))),
    Bad(f"size is {U64}", put("Q", (24, U64))),
    Bad("l1_size is 1: a disk of 72057594037927936 bytes", put("Q", (24, 1 << 56))),
    Bad("l1_size is 0", put("I", (36, 0))),
    Bad("l1_size is 4194305", put("I", (36, 4194305)), unsupported=True),
    Bad(f"l1_size is {U32}", put("I", (36, U32)), unsupported=True),
    # crypt_method
    Bad("crypt_method is 1", put("I", (32, 1)), unsupported=True),
    Bad("crypt_method is 2", put("I", (32, 2)), unsupported=True),
    Bad("crypt_method is 3", put("I", (32, 3))),
    # l1_table_offset
    Bad("l1_table_offset is 0: the table overlaps the header", put("Q", (40, 0))),
    Bad("l1_table_offset is 65536: the table overlaps refcount_table", put("Q", (40, CLUSTER))),
    Bad("l1_table_offset is 197120", put("Q", (40, 197120))),
    Bad(f"l1_table_offset is {FILE_SIZE}", put("Q", (40, FILE_SIZE))),
    Bad(f"l1_table_offset is {1 << 63}", put("Q", (40, 1 << 63))),
    Bad(f"l1_table_offset is {U64 - 65535}", put("Q", (40, U64 - 65535))),
    Bad("l1_table_offset is 196608: the table (65544 bytes)", put("I", (36, 8193))),
    # refcount_table_offset, refcount_table_clusters
    Bad("refcount_table_offset is 0", put("Q", (48, 0))),
    Bad("refcount_table_offset is 65537", put("Q", (48, 65537))),
    Bad(f"refcount_table_offset is {FILE_SIZE}", put("Q", (48, FILE_SIZE))),
    Bad(f"refcount_table_offset is {U64 - 65535}", put("Q", (48, U64 - 65535))),
    Bad("refcount_table_clusters is 0", put("I", (56, 0))),
    Bad("refcount_table_clusters is 129", put("I", (56, 129))),
    Bad("refcount_table_clusters is 131073", put("I", (56, 0x20001))),
    Bad(f"refcount_table_clusters is {U32}", put("I", (56, U32))),
    Bad("refcount_table_offset is 65536: the table (262144 bytes)", put("I", (56, 4))),
    # nb_snapshots, snapshots_offset
    Bad("nb_snapshots is 65537", put("I", (60, 65537)), unsupported=True),
    Bad(f"nb_snapshots is {U32}", put("I", (60, U32)), unsupported=True),
    Bad("snapshots_offset is 0", put("I", (60, 1))),
    Bad("snapshots_offset is 4660", both(put("I", (60, 1)), put("Q", (64, 4660)))),
    Bad("snapshots_offset is 196608", both(put("I", (60, 1)), put("Q", (64, 3 * CLUSTER)))),
    Bad(f"snapshots_offset is {1 << 62}", both(put("I", (60, 1)), put("Q", (64, 1 << 62)))),
    Bad("snapshots_offset is 131072", both(put("I", (60, 65536)), put("Q", (64, 2 * CLUSTER)))),
    # incompatible_features, compression_type
    Bad("incompatible_features is 0x14: an external data file", put("Q", (72, 0x14)), True),
    Bad("incompatible_features is 0x30: unknown: bit 5", put("Q", (72, 0x30)), True),
    Bad(
        "incompatible_features is 0x8000000000000000: unknown: bit 63 (time travel?)",
        both(
            extensions((EXTENSION_FEATURE_NAMES, feature_name(63, b"time travel\x1b"))),
            put("Q", (72, 1 << 63)),
        ),
        unsupported=True,
    ),
    Bad("compression_type is 0", put("Q", (72, 0x18))),
    Bad("compression_type is 1", put("B", (104, 1))),
    Bad("compression_type is 2", both(put("Q", (72, 0x18)), put("B", (104, 2))), True),
    # autoclear_features
    Bad("autoclear_features is 0x1", put("Q", (88, 1))),
    # refcount_order, header_length
    Bad("refcount_order is 7", put("I", (96, 7))),
    Bad(f"refcount_order is {U32}", put("I", (96, U32))),
    *(Bad(f"header_length is {n}", put("I", (100, n))) for n in (0, 72, 103, 105, 65544, U32)),
    # Extensions
    Bad("length of header extension 0x6803f857 is 65417", put("I", (116, 65417))),
    Bad("length of header extension 0x6803f857 is 2147483647", put("I", (116, 0x7FFFFFFF))),
    Bad(f"length of header extension 0x6803f857 is {U32}", put("I", (116, U32))),
    Bad(
        "number of backing file format name extensions is 2",
        extensions(*[(EXTENSION_BACKING_FORMAT, b"raw")] * 2),
    ),
    Bad(
        "length of the backing file format name is 16",
        extensions((EXTENSION_BACKING_FORMAT, b"r" * 16)),
    ),
    Bad("full disk encryption extension is present", extensions((EXTENSION_ENCRYPTION, b""))),
    Bad("length of the bitmaps extension is 23", extensions((EXTENSION_BITMAPS, bytes(23)))),
    Bad("nb_bitmaps is 0", bitmaps(0, 32, 2 * CLUSTER)),
    Bad("nb_bitmaps is 65536", bitmaps(65536, 65536 * 32, 2 * CLUSTER)),
    Bad("bitmap_directory_size is 23", bitmaps(1, 23, 2 * CLUSTER)),
    Bad(f"bitmap_directory_size is {U64}", bitmaps(1, U64, 2 * CLUSTER)),
    Bad("bitmap_directory_offset is 0", bitmaps(1, 32, 0)),
    Bad("bitmap_directory_offset is 131080", bitmaps(1, 32, 131080)),
    Bad(f"bitmap_directory_offset is {1 << 60}", bitmaps(1, 32, 1 << 60)),
    # Version 2
    Bad("cluster_bits is 8", put("I", (20, 8)), version=2),
    Bad("refcount_table_clusters is 0", put("I", (56, 0)), version=2),
    Bad("length of header extension 0x12345678 is 65457",
        put("I", (72, 0x12345678), (76, 65457)), version=2),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_HEADERS, ids=lambda bad: f"v{bad.version} {bad.says[:60]}")
async def test_malformed_header_is_refused_by_field_and_value_and_nothing_changes(
    bad: Bad, tmp_path: Path
) -> None:
    data = await new_image(version=bad.version, cluster_size=bad.cluster_size)
    bad.edit(data)
    path = tmp_path / "bad.qcow2"
    path.write_bytes(data)
    for read in (read_header, open_qcow2):
        file = FileNode.open(path)
        try:
            with pytest.raises(ImageError) as caught:
                await read(file)
        finally:
            await file.close()
        message = str(caught.value)
        assert message.startswith(f"{path}: {bad.says}"), message
        assert "\n" not in message
        assert message.isprintable()
        assert isinstance(caught.value, ImageUnsupportedError) == bad.unsupported, message
    assert path.read_bytes() == data


BASE = bytes(asyncio.run(new_image())[:CLUSTER])


@given(data=st.data())
def test_whatever_the_bytes_parsing_gives_a_header_or_an_image_error(data: st.DataObject) -> None:
    raw = bytearray(BASE)
    places = st.integers(0, 119).flatmap(
        lambda at: st.tuples(st.just(at), st.binary(min_size=1, max_size=16))
    )
    for at, piece in data.draw(st.lists(places, min_size=1, max_size=4)):
        raw[at : at + len(piece)] = piece
    raw = raw[: data.draw(st.sampled_from([len(raw), 1024, 120, 104, 72, 10, 0]))]
    try:
        header = parse_header(raw, "image", file_size=FILE_SIZE)
    except ImageError:
        return
    # What was accepted is within the bounds that the engine relies on.
    assert 9 <= header.cluster_bits <= 21
    assert header.l1_entries_needed <= header.l1_size <= 1 << 22
    for offset, length in (
        (header.l1_table_offset, header.l1_size * 8),
        (header.refcount_table_offset, header.refcount_table_bytes),
    ):
        assert length == 0 or offset % header.cluster_size == 0
        assert length == 0 or offset + length <= FILE_SIZE + header.cluster_size


async def test_an_unknown_extension_is_kept_as_it_is() -> None:
    data = await new_image()
    extensions((0x7E57, b"not a multiple of eight"), (0x7E58, b""))(data)
    header = await read_header(memory_of(data))
    assert [(e.type, e.data) for e in header.extensions] == [
        (0x7E57, b"not a multiple of eight"),
        (0x7E58, b""),
    ]
    built = build_header(header)
    assert built == data[: len(built)]


async def test_additional_header_fields_are_kept_as_they_are() -> None:
    data = await new_image()
    header = await read_header(memory_of(data))
    longer = replace(header, header_length=128, additional=bytes(range(23)))
    built = build_header(longer)
    data[: len(built)] = built
    again = await read_header(memory_of(data))
    assert again == longer
    assert build_header(again) == built


async def test_dirty_and_corrupt_images_can_be_looked_at() -> None:
    data = await new_image()
    put("Q", (72, 0x13))(data)
    header = await read_header(memory_of(data))
    assert header.dirty
    assert header.corrupt
    assert header.extended_l2


async def test_backing_name_that_is_no_utf8_survives() -> None:
    data = await new_image()
    name = b"d\xe9but.raw"
    both(put("Q", (8, 1024)), put("I", (16, len(name))))(data)
    data[1024 : 1024 + len(name)] = name
    header = await read_header(memory_of(data))
    assert header.backing_file is not None
    assert header.backing_file.encode("utf-8", "surrogateescape") == name
    assert name in build_header(header)


@pytest.mark.parametrize(
    "name", ["json:{}", "nbd://host/export", "/etc/passwd", "../../secret", "fd:3"]
)
async def test_a_backing_name_is_text_and_never_opened(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.touch()
    file = FileNode.open(path)
    await create_qcow2(file, 1 << 20, backing_file=name, backing_format="raw")
    assert (await read_header(file)).backing_file == name
    with pytest.raises(ImageError, match="backing file"):
        await open_qcow2(file)  # without a node for it, it is not looked for
    await file.close()


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
async def test_a_header_that_qemu_wrote_is_rebuilt_to_the_byte(
    variant: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    make_variant(variant, path)
    built = build_header(await header_of(path))
    assert path.read_bytes().startswith(built)
