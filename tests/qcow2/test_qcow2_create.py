"""New images: QEMU is content with every shape, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from image_helpers import MIB, header_of, qemu_check, run

from replnbd.block import Buffer, MemoryNode, PassThrough, read_bytes
from replnbd.errors import ConfigError, ImageError
from replnbd.qcow2 import create_image, create_qcow2, open_qcow2, read_header
from replnbd.qcow2.check import check_image

SHAPES = [
    (cluster_size, version, refcount_bits)
    for cluster_size in (512, 4096, 16384, 65536, 2 * MIB)
    for version, refcount_bits in ((2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (3, 16), (3, 64))
]
SIZES = (0, 512, MIB, 5 * MIB + 512, 100 << 30)


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize(("cluster_size", "version", "refcount_bits"), SHAPES)
async def test_qemu_finds_nothing_wrong_with_any_shape(
    cluster_size: int, version: int, refcount_bits: int, tmp_path: Path
) -> None:
    for size in SIZES:
        path = tmp_path / f"{size}.qcow2"
        await create_image(
            path, size, cluster_size=cluster_size, version=version, refcount_bits=refcount_bits
        )
        verdict = qemu_check(path)
        assert verdict.get("corruptions", 0) == verdict.get("leaks", 0) == 0, verdict
        assert verdict["image-end-offset"] == path.stat().st_size
        info = json.loads(run("qemu-img", "info", "--output=json", path))
        assert info["virtual-size"] == size
        assert info["cluster-size"] == cluster_size
        data = info["format-specific"]["data"]
        assert data["compat"] == ("1.1" if version == 3 else "0.10")
        assert data["refcount-bits"] == refcount_bits
        assert data.get("extended-l2", False) == (version == 3 and cluster_size >= 16384)


@pytest.mark.parametrize("seed", range(30))
async def test_our_own_check_finds_nothing_wrong_with_any_shape(seed: int) -> None:
    print(f"seed {seed}")
    choose = random.Random(seed)
    cluster_size, version, refcount_bits = choose.choice(SHAPES)
    size = choose.choice([*SIZES, choose.randrange(1 << 36)])
    file = MemoryNode(choose.randrange(3 * MIB))
    file.data[:] = choose.randbytes(file.size)  # whatever was there
    await create_qcow2(
        file, size, cluster_size=cluster_size, version=version, refcount_bits=refcount_bits
    )
    header = await read_header(file)
    assert header.size == size
    report = await check_image(file, header)
    assert report.clean, report.findings
    assert report.allocated_clusters == 0
    assert report.image_end_offset == file.size


async def test_the_largest_disks_that_fit_and_the_smallest_that_do_not(tmp_path: Path) -> None:
    largest = (32 << 20) // 8 * (512 // 8) * 512  # 32 MiB of L1 entries, each a table of 64
    await create_image(tmp_path / "fits", largest, cluster_size=512, extended_l2=False)
    assert (await header_of(tmp_path / "fits")).size == largest
    with pytest.raises(ConfigError, match=f"size is {largest + 1}.*at most {largest}"):
        await create_image(tmp_path / "too large", largest + 1, cluster_size=512)
    assert not (tmp_path / "too large").exists()


async def test_a_new_image_takes_the_space_of_its_metadata_only(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    await create_image(path, 1 << 50, cluster_size=2 * MIB, extended_l2=False)
    assert path.stat().st_size == 4 * 2 * MIB
    assert path.stat().st_blocks * 512 <= 64 << 10


@pytest.mark.interop
async def test_qemu_follows_the_backing_chain_we_record(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * MIB)
    await create_image(tmp_path / "hidden", MIB, backing_file="disk.raw", backing_format="raw")
    await create_image(tmp_path / "active", MIB, backing_file="hidden", backing_format="qcow2")
    text = run("qemu-img", "info", "--backing-chain", "--output=json", tmp_path / "active")
    chain = json.loads(text)
    assert [os.path.basename(image["filename"]) for image in chain] == [
        "active", "hidden", "disk.raw",
    ]  # fmt: skip
    assert [image.get("backing-filename-format") for image in chain] == ["qcow2", "raw", None]
    run("qemu-img", "compare", tmp_path / "active", tmp_path / "disk.raw")
    assert qemu_check(tmp_path / "active")["check-errors"] == 0


async def test_defaults_are_64k_clusters_with_extended_l2_entries() -> None:
    file = MemoryNode()
    await create_qcow2(file, MIB)
    header = await read_header(file)
    assert (header.cluster_size, header.extended_l2, header.subcluster_size) == (65536, True, 2048)
    assert (header.version, header.refcount_bits, header.backing_file) == (3, 16, None)


BAD_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("version is 4", {"version": 4}),
    ("cluster size is 0", {"cluster_size": 0}),
    ("cluster size is -512", {"cluster_size": -512}),
    ("cluster size is 256", {"cluster_size": 256}),
    ("cluster size is 65535", {"cluster_size": 65535}),
    ("cluster size is 4194304", {"cluster_size": 4 * MIB}),
    ("at least 16384 bytes, not version 3 and 8192", {"cluster_size": 8192, "extended_l2": True}),
    ("not version 2 and 65536", {"version": 2, "extended_l2": True}),
    ("refcount bits is 3", {"refcount_bits": 3}),
    ("refcount bits is 128", {"refcount_bits": 128}),
    ("refcount bits is 8: version 2", {"refcount_bits": 8, "version": 2}),
    ("size is -1", {"size": -1}),
    ("size is 9223372036854775808", {"size": 1 << 63}),
    ("size is 9223372036854775807: with clusters", {"size": (1 << 63) - 1}),
    ("backing file name has 0 bytes", {"backing_file": "", "backing_format": "raw"}),
    ("backing file name has 1024 bytes", {"backing_file": "x" * 1024, "backing_format": "raw"}),
    ("without NUL", {"backing_file": "a\0b", "backing_format": "raw"}),
    ("a.raw needs a backing format", {"backing_file": "a.raw"}),
    ("at most 15 bytes", {"backing_file": "a", "backing_format": "sixteen-letters-"}),
    ("there is no backing file", {"backing_format": "raw"}),
    (
        "more than a cluster of 512 bytes",
        {"cluster_size": 512, "backing_file": "x" * 500, "backing_format": "raw"},
    ),
]


@pytest.mark.parametrize(("says", "arguments"), BAD_ARGUMENTS, ids=[b[0] for b in BAD_ARGUMENTS])
async def test_a_bad_argument_is_named_and_makes_no_file(
    says: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        await create_image(tmp_path / "image.qcow2", **({"size": MIB} | arguments))
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


async def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="File exists"):
        await create_image(path, MIB)
    assert path.read_bytes() == b"precious"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="File exists"):
        await create_image(tmp_path / "link", MIB)
    assert not (tmp_path / "nowhere").exists()


async def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory") as caught:
        await create_image(tmp_path / "missing" / "image.qcow2", MIB)
    assert "\n" not in str(caught.value)


async def test_only_the_owner_may_read_a_new_image(tmp_path: Path) -> None:
    await create_image(tmp_path / "image.qcow2", MIB)
    assert stat.S_IMODE((tmp_path / "image.qcow2").stat().st_mode) == 0o600


async def test_a_relative_path_without_directory_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await create_image("image.qcow2", MIB)
    assert (await header_of(tmp_path / "image.qcow2")).size == MIB


@pytest.mark.parametrize("failure", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
async def test_file_systems_without_nameless_files_work(
    failure: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without_tmpfile(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(failure, os.strerror(failure))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without_tmpfile)
    await create_image(tmp_path / "image.qcow2", MIB)
    assert (await header_of(tmp_path / "image.qcow2")).size == MIB
    with pytest.raises(ConfigError, match="refcount bits"):
        await create_image(tmp_path / "other.qcow2", MIB, refcount_bits=5)
    assert not (tmp_path / "other.qcow2").exists()


class CutOff(PassThrough):
    """A file whose operations fail from the n-th on: a disk that went away, or a death."""

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

    async def flush(self) -> None:
        self._count()
        await super().flush()


@pytest.mark.parametrize("before", [b"", b"QFI\xfb\0\0\0\3" + bytes(1 << 16)])
async def test_what_is_cut_short_is_no_image_or_the_whole_one(before: bytes) -> None:
    for count in range(100):
        file = MemoryNode(len(before))
        file.data[:] = before
        try:
            await create_qcow2(CutOff(file, count), MIB)
        except OSError:
            pass
        else:
            assert count > 4
            return
        try:
            header = await read_header(file)
        except ImageError:
            continue
        assert (await check_image(file, header)).clean
    pytest.fail("never finished")


async def test_a_new_image_reads_as_its_backing(tmp_path: Path) -> None:
    backing = MemoryNode(MIB)
    backing.data[:] = random.Random(1).randbytes(MIB)
    file = MemoryNode()
    await create_qcow2(file, MIB, backing_file="disk.raw", backing_format="raw")
    image = await open_qcow2(file, backing=backing)
    assert await read_bytes(image, 0, MIB) == backing.data
    await image.close()
