"""The check agrees with QEMU's, on sound images and damaged ones; a repair satisfies QEMU, and what
cannot be repaired is left alone to the byte."""

from __future__ import annotations

import errno
import os
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from image_helpers import (
    ALL,
    MIB,
    check_file,
    header_of,
    make_variant,
    memory_of,
    qemu_check,
    run,
    word,
)

from replnbd.block import Buffer, FileNode, MemoryNode, PassThrough, read_bytes
from replnbd.errors import ImageError, ImageUnsupportedError
from replnbd.qcow2 import Header, counts, create_qcow2, open_qcow2, read_header, report
from replnbd.qcow2.check import (
    CheckReport,
    check_image,
    repair_image,
    repair_leaks,
    repair_refcounts,
)
from replnbd.qcow2.format import (
    AUTOCLEAR_BITMAPS,
    EXTENSION_BITMAPS,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    HeaderExtension,
)

OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COUNTED = (
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "corruptions",
    "leaks",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant once; tests damage copies."""
    directory = tmp_path_factory.mktemp("images")
    paths = {name: directory / f"{number}.qcow2" for number, name in enumerate(ALL)}
    for name, path in paths.items():
        make_variant(name, path)
    return paths


async def repair_file(path: Path, *, leaks_only: bool = False) -> CheckReport:
    file = FileNode.open(path)
    try:
        return await repair_image(file, await read_header(file), leaks_only=leaks_only)
    finally:
        await file.close()


# Sound images


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
async def test_a_sound_image_gives_qemus_numbers(variant: str, images: dict[str, Path]) -> None:
    before = images[variant].read_bytes()
    ours = (await check_file(images[variant])).to_json()
    theirs = qemu_check(images[variant])
    assert {key: ours[key] for key in COUNTED} == {key: theirs.get(key, 0) for key in COUNTED}
    assert ours["findings"] == []
    assert images[variant].read_bytes() == before


# Damage in known places: an image with one cluster of data at guest offset 0 and one at 1 MiB


@dataclass(frozen=True)
class Places:
    """Where things are in the image that `damaged` tests use."""

    header: Header
    l1: int
    l2: int
    data: int
    refcount_table: int
    refcount_block: int


async def small_image() -> tuple[bytearray, Places]:
    file = MemoryNode()
    await create_qcow2(file, 8 * MIB, extended_l2=False)
    image = await open_qcow2(file)
    await image.pwrite(0, b"a" * 65536)
    await image.pwrite(MIB, b"b" * 65536)
    await image.close()
    header = await read_header(file)
    l2 = word(file.data, header.l1_table_offset) & OFFSET
    places = Places(
        header=header,
        l1=header.l1_table_offset,
        l2=l2,
        data=word(file.data, l2) & OFFSET,
        refcount_table=header.refcount_table_offset,
        refcount_block=word(file.data, header.refcount_table_offset),
    )
    return file.data, places


def put(data: bytearray, offset: int, value: int) -> None:
    struct.pack_into(">Q", data, offset, value)


def put_refcount(data: bytearray, at: Places, offset: int, value: int) -> None:
    struct.pack_into(">H", data, at.refcount_block + offset // 65536 * 2, value)


def add_leaked_cluster(data: bytearray, at: Places) -> None:
    put_refcount(data, at, len(data), 1)
    data.extend(bytes(65536))


@dataclass(frozen=True)
class Damage:
    """What was done, what a finding must say, and whether a repair may help."""

    name: str
    do: Callable[[bytearray, Places], None]
    finding: str
    corrupt: bool
    repairable: bool
    qemu_agrees: bool = True


DAMAGES = [
    Damage(
        "a refcount that is too high",
        lambda d, at: put_refcount(d, at, at.l1, 2),
        "leaked 1 cluster at 0x30000: refcount 2, referred to 1 times",
        corrupt=False,
        repairable=True,
    ),
    Damage(
        "a free cluster with a refcount",
        add_leaked_cluster,
        "leaked 1 cluster at 0x70000: refcount 1, referred to 0 times",
        corrupt=False,
        repairable=True,
    ),
    Damage(
        "a refcount past the end of the file",
        lambda d, at: put_refcount(d, at, len(d) + (100 << 16), 1),
        "leaked 1 cluster at",
        corrupt=False,
        repairable=True,
        qemu_agrees=False,  # it looks at the refcounts of the file's own clusters only
    ),
    Damage(
        "a refcount that is too low",
        lambda d, at: put_refcount(d, at, at.data, 0),
        "the COPIED flag is set, but the refcount is 0",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "a COPIED flag that is missing",
        lambda d, at: put(d, at.l2, at.data),
        "the COPIED flag is clear, but the refcount is 1",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "a COPIED flag without a cluster",
        lambda d, at: put(d, at.l2 + 24, COPIED),
        "has the COPIED flag and no offset",
        corrupt=True,
        repairable=True,
        qemu_agrees=False,  # it takes the entry for an unallocated one
    ),
    Damage(
        "no refcount block",
        lambda d, at: put(d, at.refcount_table, 0),
        "wrong refcount of",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "a refcount block past the end of the file",
        lambda d, at: put(d, at.refcount_table, 1 << 40),
        "refcount table entry 0 (0x10000000000) is past the end of the file",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "a refcount block that is not aligned",
        lambda d, at: put(d, at.refcount_table, at.refcount_block + 512),
        "refcount table entry 0 (0x20200) is not aligned to a cluster",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "a refcount table entry with reserved bits",
        lambda d, at: put(d, at.refcount_table, at.refcount_block | 4),
        "refcount table entry 0 (0x20004) has reserved bits set",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "a refcount block on guest data",
        lambda d, at: put(d, at.refcount_table, at.data),
        "overlaps guest data",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "guest data on the refcount table",
        lambda d, at: put(d, at.l2 + 8, at.refcount_table | COPIED),
        "the refcount table overlaps guest data",
        corrupt=True,
        repairable=True,
    ),
    Damage(
        "guest data on the L1 table",
        lambda d, at: put(d, at.l2 + 8, at.l1 | COPIED),
        "65536 bytes at 0x30000 overlap an L1 table",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "guest data on its own L2 table",
        lambda d, at: put(d, at.l2 + 8, at.l2 | COPIED),
        "overlap an L2 table",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "guest data past the end of the file",
        lambda d, at: put(d, at.l2 + 8, 1 << 40 | COPIED),
        "L2 entry of guest offset 0x10000 (0x8000010000000000): 65536 bytes at 0x10000000000 are"
        " past the end",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "guest data that is not aligned",
        lambda d, at: put(d, at.l2, (at.data + 512) | COPIED),
        "points to an offset that is not aligned",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "an L2 entry with reserved bits",
        lambda d, at: put(d, at.l2, at.data | COPIED | 1 << 57),
        "has reserved bits set",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "a compressed cluster with the COPIED flag",
        lambda d, at: put(d, at.l2, at.data | COPIED | 1 << 62),
        "has the COPIED flag on a compressed cluster",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "a compressed cluster past the end of the file",
        lambda d, at: put(d, at.l2 + 8, 1 << 40 | 1 << 62),
        "are past the end of the file",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "an L1 entry with reserved bits",
        lambda d, at: put(d, at.l1, at.l2 | COPIED | 8),
        "L1 entry 0 (0x8000000000050008) has reserved bits set",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "an L2 table past the end of the file",
        lambda d, at: put(d, at.l1, 1 << 40 | COPIED),
        "L1 entry 0 (0x8000010000000000): 65536 bytes at 0x10000000000 are past the end",
        corrupt=True,
        repairable=False,
    ),
    Damage(
        "an L2 table that is the header",
        lambda d, at: put(d, at.l1, COPIED),
        "L1 entry 0 (0x8000000000000000) points to an L2 table at offset 0",
        corrupt=True,
        repairable=False,
    ),
]


@pytest.mark.interop
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
async def test_damage_is_found_and_repaired_or_left_alone(damage: Damage, tmp_path: Path) -> None:
    data, places = await small_image()
    damage.do(data, places)
    path = tmp_path / "image.qcow2"
    path.write_bytes(data)
    found = await check_file(path)
    assert (found.corruptions > 0) == damage.corrupt
    assert found.corruptions or found.leaks
    assert any(damage.finding in line for line in found.findings), found.findings
    if damage.qemu_agrees:
        theirs = qemu_check(path)
        assert (theirs.get("corruptions", 0) > 0) == damage.corrupt
        assert damage.corrupt or theirs["leaks"] == found.leaks
    assert path.read_bytes() == data

    leaks_only = await repair_file(path, leaks_only=True)
    assert leaks_only.clean != damage.corrupt
    assert not damage.corrupt or path.read_bytes() == data
    repaired = await repair_file(path)
    if not damage.repairable:
        assert repaired.corruptions == found.corruptions
        assert path.read_bytes() == data
        with pytest.raises(ImageError, match="cannot be repaired"):
            await repair_refcounts(memory_of(data), places.header)
        return
    assert repaired.clean, repaired.findings
    assert (await check_file(path)).clean
    assert repaired.corruptions_fixed == found.corruptions
    assert leaks_only.leaks_fixed + repaired.leaks_fixed == found.leaks
    qemu = qemu_check(path)
    assert qemu.get("corruptions", 0) == qemu.get("leaks", 0) == 0
    assert not (await header_of(path)).dirty


# Damage anywhere, against QEMU


def damage_at_random(data: bytearray, header: Header, choose: random.Random) -> None:
    """Change one word of an L1 table, L2 table, refcount table or refcount block."""
    table, l1 = header.refcount_table_offset, header.l1_table_offset
    table_end = table + header.refcount_table_bytes
    blocks = [at for at in range(table, table_end, 8) if word(data, at)]
    tables = [at for at in range(l1, l1 + header.l1_size * 8, 8) if word(data, at)]
    position = choose.choice(choose.choice((blocks or tables, tables or blocks)))
    if choose.random() < 0.7:  # in what it points to
        start = word(data, position) & OFFSET
        if start + header.cluster_size > len(data):
            return
        used = range(start, start + header.cluster_size, 8)
        position = choose.choice([at for at in used if word(data, at)] or used)
    value = word(data, position)
    anywhere = choose.randrange(len(data)) & -header.cluster_size
    bit = 1 << choose.randrange(64)
    new = choose.choice((value ^ bit, value ^ COPIED, 0, anywhere, anywhere | COPIED))
    put(data, position, new)


def leaks_before(end: int, cluster_size: int, findings: list[str]) -> int:
    """Leaked clusters that begin before `end`, from lines that each tell of a run."""
    total = 0
    for line in findings:
        match = re.match(r"leaked (\d+) clusters? at (0x[0-9a-f]+):", line)
        if match:
            count, offset = int(match[1]), int(match[2], 16)
            total += max(0, min(count, -(-(end - offset) // cluster_size)))
    return total


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
async def test_damage_anywhere_gets_qemus_verdict(
    seed: int, images: dict[str, Path], tmp_path: Path
) -> None:
    print(f"seed {seed}")
    choose = random.Random(seed)
    variant = choose.choice(ALL)
    data = bytearray(images[variant].read_bytes())
    header = await header_of(images[variant])
    for _ in range(choose.choice((1, 1, 2, 4))):
        damage_at_random(data, header, choose)
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(data)
    ours = await check_file(path)
    theirs = qemu_check(path)
    # QEMU takes a lone COPIED flag for nothing; everything else it finds, too.
    serious = [line for line in ours.findings if "COPIED flag and no offset" not in line]
    if theirs.get("corruptions", 0):
        assert ours.corruptions, theirs
    elif serious:
        # What is leaked past the end of the file, QEMU does not look for.
        inside = leaks_before(len(data), header.cluster_size, serious)
        assert inside == theirs.get("leaks", 0), (variant, ours.findings)
        assert all(line.startswith("leaked") for line in serious), (variant, serious)

    repaired = await repair_file(path)
    if repaired.corruptions:
        assert path.read_bytes() == data
    else:
        assert repaired.clean
        after = qemu_check(path)
        assert after.get("corruptions", 0) == after.get("leaks", 0) == 0, (variant, after)


# Repairs that move things, and repairs cut short


class CutOff(PassThrough):
    """A file whose writes fail from the n-th on, as when the process dies there."""

    def __init__(self, file: MemoryNode, count: int) -> None:
        super().__init__("cut off", file)
        self.left = count

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self._count()
        await super().pwrite(offset, data)

    async def truncate(self, size: int) -> None:
        self._count()
        await super().truncate(size)
        self.size = size


async def content_of(data: bytes | bytearray) -> bytes:
    image = await open_qcow2(memory_of(data), read_only=True)
    try:
        return bytes(await read_bytes(image, 0, image.size))
    finally:
        await image.close()


async def without_refcounts(cluster_size: int, refcount_bits: int) -> tuple[bytearray, bytes]:
    """An image whose whole refcount table is zero: the worst that a dirty image can be."""
    file = MemoryNode()
    await create_qcow2(file, MIB, cluster_size=cluster_size, refcount_bits=refcount_bits)
    image = await open_qcow2(file)
    choose = random.Random(7)
    for _ in range(40):
        await image.pwrite(choose.randrange(MIB - 4096), choose.randbytes(4096))
    await image.close()
    header = await read_header(file)
    content = await content_of(file.data)
    table = header.refcount_table_offset
    file.data[table : table + header.refcount_table_bytes] = bytes(header.refcount_table_bytes)
    put(file.data, 72, header.incompatible_features | INCOMPATIBLE_DIRTY)
    return file.data, content


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_lost_refcounts_are_rebuilt(cluster_size: int, refcount_bits: int) -> None:
    data, content = await without_refcounts(cluster_size, refcount_bits)
    file = memory_of(data)
    repaired = await repair_refcounts(file, await read_header(file))
    assert repaired.clean
    assert repaired.corruptions_fixed > 0
    header = await read_header(file)
    assert not header.dirty
    assert (await check_image(file, header)).clean
    assert await content_of(file.data) == content


async def test_a_refcount_table_that_is_too_small_grows() -> None:
    file = MemoryNode()
    await create_qcow2(file, 4 * MIB, cluster_size=512, refcount_bits=64)
    image = await open_qcow2(file)
    await image.pwrite(0, random.Random(3).randbytes(3 * MIB))
    await image.close()
    header = await read_header(file)
    assert header.refcount_table_clusters > 1  # one describes 2 MiB
    content = await content_of(file.data)
    struct.pack_into(">I", file.data, 56, 1)
    repaired = await repair_image(file, await read_header(file))
    assert repaired.clean, repaired.findings
    header = await read_header(file)
    assert header.refcount_table_clusters > 1
    assert (await check_image(file, header)).clean
    assert await content_of(file.data) == content


async def test_a_repair_cut_short_anywhere_is_finished_by_the_next() -> None:
    data, content = await without_refcounts(512, 64)
    for count in range(10_000):
        file = memory_of(data)
        try:
            cut = CutOff(file, count)
            await repair_refcounts(cut, await read_header(cut))
        except OSError:
            assert await content_of(file.data) == content
            assert (await read_header(file)).dirty
            repaired = await repair_refcounts(file, await read_header(file))
            assert repaired.clean
            assert await content_of(file.data) == content
        else:
            assert count > 8
            return
    pytest.fail("never finished")


async def test_opening_a_dirty_image_for_writing_repairs_it() -> None:
    data, content = await without_refcounts(65536, 16)
    file = memory_of(data)
    image = await open_qcow2(file)
    assert await read_bytes(image, 0, image.size) == content
    await image.pwrite(0, b"z" * 512)
    await image.close()
    header = await read_header(file)
    assert not header.dirty
    assert (await check_image(file, header)).clean


async def test_a_repair_clears_the_corrupt_bit_only_when_all_is_well() -> None:
    data, places = await small_image()
    put(data, 72, INCOMPATIBLE_CORRUPT)
    file = memory_of(data)
    assert (await repair_leaks(file, await read_header(file))).clean
    assert not (await read_header(file)).corrupt
    put(data, places.l1, 1 << 40)
    file = memory_of(data)
    assert (await repair_image(file, await read_header(file))).corruptions
    assert (await read_header(file)).corrupt
    assert file.data == data


# Limits


async def test_a_cluster_referred_to_too_often_for_its_refcount_is_beyond_repair() -> None:
    file = MemoryNode()
    await create_qcow2(file, MIB, extended_l2=False, refcount_bits=1)
    image = await open_qcow2(file)
    await image.pwrite(0, b"a" * 65536)
    await image.close()
    header = await read_header(file)
    l2 = word(file.data, header.l1_table_offset) & OFFSET
    put(file.data, l2 + 8, word(file.data, l2))
    before = bytes(file.data)
    found = await repair_image(file, header)
    assert "a cluster is referred to 2 times: refcounts end at 1" in found.findings
    assert file.data == before


async def test_references_beyond_255_are_counted() -> None:
    data, places = await small_image()
    for index in range(300):
        put(data, places.l2 + index * 8, places.data | COPIED)
    file = memory_of(data)
    repaired = await repair_image(file, places.header)
    assert repaired.clean
    refcount = struct.unpack_from(">H", file.data, places.refcount_block + places.data // 32768)
    assert refcount == (300,)
    assert word(file.data, places.l2 + 8) == places.data


async def test_findings_and_memory_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    data, places = await small_image()
    monkeypatch.setattr(report, "FINDINGS_MAX", 10)
    for index in range(100):
        put(data, places.l2 + index * 8, 1 << 57)
    found = await check_image(memory_of(data), places.header)
    assert len(found.findings) == 10
    assert found.findings_omitted == found.corruptions + found.leaks - 10
    monkeypatch.setattr(counts, "_PAGES_MAX", 1)
    put(data, places.l2, (1 << 40) | COPIED)
    with pytest.raises(ImageUnsupportedError, match="more than 256 MiB of memory"):
        await check_image(memory_of(data), places.header, file_size=1 << 41)


async def test_a_snapshot_table_that_does_not_end_is_corruption() -> None:
    data, places = await small_image()
    entry = struct.pack(">QIHHIIQII", 0, 0, 1, 1, 0, 0, 0, 0, 0xFFFFFFF0)
    data.extend(entry.ljust(65536, b"\0"))
    header = replace(places.header, nb_snapshots=65536, snapshots_offset=len(data) - 65536)
    found = await check_image(memory_of(data), header)
    assert any("the snapshot table does not end in snapshot 0" in f for f in found.findings)


BITMAP_DAMAGES: list[tuple[str, int, int]] = [
    # What a finding says; then an offset in the directory, where a word is changed to this.
    ("bitmap 0: table at 0x200 is not at the start of a cluster", 0, 512),
    ("bitmap 0: table: 8 bytes at 0x10000000000 are past the end", 0, 1 << 40),
    ("bitmap 0: table at 0x80000 has 4294967295 entries", 8, 0xFFFFFFFF_00000002),
    ("the bitmap directory (32 bytes) ends before bitmap 0", 16, 0x0110_FFFF_00000000),
    ("bitmap 0: entry 0 (0x4) has reserved bits set", 65536, 4),
    ("bitmap 0: data: 65536 bytes at 0x30000 overlap an L1 table", 65536, 0x30000),
]


@pytest.mark.parametrize(("finding", "place", "value"), BITMAP_DAMAGES)
async def test_bitmaps_are_counted_and_their_damage_is_found(
    finding: str, place: int, value: int
) -> None:
    data, at = await small_image()
    data.extend(bytes(max(0, 0x60000 - len(data))))
    directory, table = len(data), len(data) + 65536
    entry = struct.pack(">QIIBBHI", table, 1, 2, 1, 16, 4, 0) + b"dirt"
    data.extend(entry.ljust(65536, b"\0"))
    data.extend(bytes(65536))
    extension = HeaderExtension(EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 32, directory))
    header = replace(at.header, extensions=(extension,), autoclear_features=AUTOCLEAR_BITMAPS)
    for offset in (directory, table):
        put_refcount(data, at, offset, 1)
    assert (await check_image(memory_of(data), header)).clean
    put(data, directory + place, value)
    found = await check_image(memory_of(data), header)
    assert found.corruptions
    assert any(finding in line for line in found.findings), found.findings


@pytest.mark.interop
@pytest.mark.slow
async def test_repair_of_an_image_with_snapshots_keeps_every_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    make_variant("v3", path)
    names = ("first", "second")
    extract = ("qemu-img", "convert", "-O", "raw", "-l")
    for name in names:
        run(*extract, name, path, tmp_path / f"{name}.before")
    header = await header_of(path)
    data = bytearray(path.read_bytes())
    block = word(data, header.refcount_table_offset)
    data[block : block + 65536] = bytes(65536)
    path.write_bytes(data)
    assert (await repair_file(path)).clean
    qemu = qemu_check(path)
    assert qemu.get("corruptions", 0) == qemu.get("leaks", 0) == 0
    for name in names:
        run(*extract, name, path, tmp_path / f"{name}.after")
        before = (tmp_path / f"{name}.before").read_bytes()
        assert before == (tmp_path / f"{name}.after").read_bytes()
