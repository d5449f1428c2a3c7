"""`image info` and `image map` say what qemu-img says, in its words."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from image_helpers import ALL, MIB, make_variant, memory_of, run, word

from replnbd.block import FileNode, MemoryNode
from replnbd.errors import ImageError
from replnbd.qcow2 import create_image, create_qcow2, open_qcow2, read_header
from replnbd.qcow2.inspect import MapEntry, image_info, map_image

OFFSET = 0x00FF_FFFF_FFFF_FE00


async def look_at(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    file = FileNode.open(path, read_only=True)
    try:
        header = await read_header(file)
        info = await image_info(file, header)
        runs = [entry.to_json() async for entry in map_image(file, header)]
        return json.loads(json.dumps(info.to_json())), json.loads(json.dumps(runs))
    finally:
        await file.close()


async def runs_of(file: MemoryNode) -> list[MapEntry]:
    return [entry async for entry in map_image(file, await read_header(file))]


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
async def test_info_and_map_are_qemus(variant: str, tmp_path: Path) -> None:
    made = tmp_path / "made.qcow2"
    make_variant(variant, made)
    # Without holes in the file: qemu-img map looks for those too, and calls them zeroes.
    path = tmp_path / "image.qcow2"
    path.write_bytes(made.read_bytes())
    run("sync", path)  # so that "actual-size" stands still
    info, runs = await look_at(path)
    theirs = json.loads(run("qemu-img", "info", "--output=json", path))
    theirs.pop("children", None)  # since QEMU 8: the file node, which is not the image's
    assert info == theirs
    for entry in runs:
        entry.pop("compressed")  # QEMU has it since 8.2
    map_of_qemu = json.loads(run("qemu-img", "map", "--output=json", path))
    for entry in map_of_qemu:
        entry.pop("compressed", None)
    assert runs == map_of_qemu


@pytest.mark.interop
async def test_a_backing_file_is_named_as_qemu_does_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * MIB)
    path = tmp_path / "image.qcow2"
    await create_image(path, MIB, backing_file="disk.raw", backing_format="raw")
    assert (await look_at(path))[0] == json.loads(run("qemu-img", "info", "--output=json", path))
    (tmp_path / "disk.raw").unlink()
    info, runs = await look_at(path)
    assert info["full-backing-filename"] == str(tmp_path / "disk.raw")
    assert runs == [
        {
            "start": 0,
            "length": MIB,
            "depth": 1,
            "present": False,
            "zero": False,
            "data": False,
            "compressed": False,
        }
    ]


async def test_subclusters_are_told_apart_and_the_end_of_the_disk_is_kept() -> None:
    file = MemoryNode()
    size = MIB + 1024  # half a subcluster more than a number of clusters
    await create_qcow2(file, size, backing_file="disk", backing_format="raw")
    image = await open_qcow2(file, backing=MemoryNode(size))
    await image.pwrite(2048, b"d" * 4096)
    await image.write_zeroes(8192, 2048, unmap=False)
    await image.pwrite(MIB, b"e" * 1024)
    await image.close()
    runs = await runs_of(file)
    assert [(r.start, r.length, r.present, r.zero, r.data) for r in runs] == [
        (0, 2048, False, False, False),
        (2048, 4096, True, False, True),
        (6144, 2048, False, False, False),
        (8192, 2048, True, True, False),
        (10240, MIB - 10240, False, False, False),
        (MIB, 1024, True, False, True),
    ]
    for entry in runs:
        assert entry.depth == (0 if entry.present else 1)
        if entry.data:
            assert entry.offset is not None
            value = file.data[entry.offset : entry.offset + entry.length]
            assert value in (b"d" * 4096, b"e" * 1024)


async def test_an_empty_disk_has_an_empty_map() -> None:
    file = MemoryNode()
    await create_qcow2(file, 0)
    assert await runs_of(file) == []


async def test_a_petabyte_of_nothing_is_one_run() -> None:
    file = MemoryNode()
    await create_qcow2(file, 1 << 50, cluster_size=2 * MIB, extended_l2=False)
    runs = await runs_of(file)
    assert [(r.start, r.length, r.present, r.zero) for r in runs] == [(0, 1 << 50, False, True)]


@pytest.mark.parametrize("where", ["L1", "L2"])
async def test_an_entry_that_cannot_be_is_named(where: str) -> None:
    file = MemoryNode()
    await create_qcow2(file, MIB, extended_l2=False)
    image = await open_qcow2(file)
    await image.pwrite(65536, b"d" * 65536)
    await image.close()
    header = await read_header(file)
    at = header.l1_table_offset
    if where == "L2":
        at = (word(file.data, at) & OFFSET) + 8
    struct.pack_into(">Q", file.data, at, word(file.data, at) | 1 << 56)
    words = "L1 entry 0 " if where == "L1" else "L2 entry of guest offset 0x10000 "
    with pytest.raises(ImageError, match=f"image: {words}.*reserved bits"):
        await runs_of(memory_of(file.data))


async def test_a_cut_snapshot_table_is_an_image_error() -> None:
    file = MemoryNode()
    await create_qcow2(file, MIB)
    start = len(file.data)
    entry = struct.pack(">QIHHIIQII", 0, 0, 1, 1, 0, 0, 0, 0, 1 << 30)
    await file.pwrite(start, entry.ljust(65536, b"\0"))
    struct.pack_into(">IQ", file.data, 60, 1, start)
    with pytest.raises(ImageError, match="snapshot 0 ends at"):
        await image_info(file, await read_header(file))
