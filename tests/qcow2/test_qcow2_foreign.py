"""Images as QEMU makes them: compressed clusters, internal snapshots, bitmaps, dirty bits."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from engine_helpers import World, assert_same, qemu_img

from replnbd.block import FileNode, read_bytes
from replnbd.errors import ImageError, ImageUnsupportedError, StateError
from replnbd.qcow2 import open_qcow2

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def compressible(size: int, seed: int) -> bytes:
    """Noise, text and zeroes in turn, so that clusters compress differently."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    while sum(len(part) for part in parts) < size:
        parts.append(rng.randbytes(rng.randint(1, 30000)))
        parts.append(b"all work and no play " * rng.randint(1, 4000))
        parts.append(bytes(rng.randint(1, 100000)))
    return b"".join(parts)[:size]


COMPRESSED = [
    "cluster_size=65536",
    "cluster_size=65536,extended_l2=on",
    "cluster_size=65536,compression_type=zstd",
    "cluster_size=16384,extended_l2=on,compression_type=zstd",
    "cluster_size=512",
    "cluster_size=2M,compression_type=zstd",
    "cluster_size=2M",
    "cluster_size=4096,compat=0.10",
]


@pytest.mark.parametrize("options", COMPRESSED)
async def test_compressed_images_read_and_write(options: str, tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    size = (3 << 20) + 512
    raw.write_bytes(compressible(size, 4))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    world = World(await open_qcow2(FileNode.open(path)), None, bytes(size), 17)
    world.model[:] = raw.read_bytes()
    await world.verify()
    for number in range(60):
        await world.step()
        if number % 15 == 0:
            await world.node.flush()
            qemu_img("check", "-q", "-U", path)
            await world.verify()
    await world.verify()
    await world.node.close()
    qemu_img("check", "-q", path)


@pytest.mark.parametrize("damage", [b"\xff" * 64, b"\0" * 64])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
async def test_a_compressed_cluster_that_does_not_inflate_is_an_io_error(
    kind: str, damage: bytes, tmp_path: Path
) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"all work and no play " * 50000)
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, path)
    node = await open_qcow2(FileNode.open(path, read_only=True), read_only=True)
    state, descriptor, _ = await node._image.extent(0, 1)
    assert state == 3
    offset, _ = node._image.shape.compressed_extent(descriptor)
    await node.close()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(damage)
    node = await open_qcow2(FileNode.open(path))
    with pytest.raises(OSError, match="does not inflate"):
        await read_bytes(node, 0, 512)
    # The mapping is sound: other clusters read, and the broken one can be written as a whole.
    await read_bytes(node, 1 << 17, 512)
    await node.write_zeroes(0, 65536)
    assert not any(await read_bytes(node, 0, 65536))
    await node.close()
    qemu_img("check", "-q", path)


SNAPSHOTS = [
    "cluster_size=65536",
    "cluster_size=65536,extended_l2=on",
    "cluster_size=512,refcount_bits=2",
    "cluster_size=4096,compat=0.10",
    "cluster_size=1M,refcount_bits=64",
]


@pytest.mark.parametrize("options", SNAPSHOTS)
async def test_writing_leaves_internal_snapshots_alone(options: str, tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    size = 3 << 20
    raw.write_bytes(compressible(size, 5))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    first = raw.read_bytes()
    qemu_img("snapshot", "-c", "one", path)
    world = World(await open_qcow2(FileNode.open(path)), None, first, 23)
    world.model[:] = first
    for round_ in range(2):
        for number in range(24):
            operation, offset, length = world.choose()
            if operation in ("drop", "empty"):
                continue
            data = world.rng.randbytes(length)
            await world.apply(operation, offset, length, data)
            world.model = world.expected(operation, offset, length, data)
            if number % 8 == 0:
                await world.node.flush()
                qemu_img("check", "-q", "-U", path)
        await world.verify()
        await world.node.close()
        qemu_img("check", "-q", path)
        if round_ == 0:
            second = bytes(world.model)
            qemu_img("snapshot", "-c", "two", path)
            world.node = await open_qcow2(FileNode.open(path))
    last = bytes(world.model)
    for name, content in (("one", first), ("two", second)):
        out = tmp_path / name
        qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", path, out)
        assert_same(out.read_bytes(), content)
    out = tmp_path / "now"
    qemu_img("convert", "-O", "raw", path, out)
    assert_same(out.read_bytes(), last)


async def test_an_overlay_with_snapshots_is_not_emptied_or_dropped_from(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("snapshot", "-c", "one", path)
    node = await open_qcow2(FileNode.open(path))
    with pytest.raises(StateError, match="1 internal snapshots"):
        await node.make_empty()
    with pytest.raises(StateError, match="1 internal snapshots"):
        await node.drop(0, 65536)
    await node.close()


async def test_persistent_bitmaps_are_refused_for_writing_only(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "b0")
    file = FileNode.open(path)
    with pytest.raises(ImageUnsupportedError, match="qemu-img bitmap --remove"):
        await open_qcow2(file)
    node = await open_qcow2(file, read_only=True)
    assert not any(await read_bytes(node, 0, 4096))
    await node.close()


async def test_a_dirty_image_is_repaired_when_opened_for_writing(tmp_path: Path) -> None:
    """QEMU, killed in the middle of writing with lazy refcounts."""
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    commands = ["write -P 7 0 1M", "write -P 9 2M 1M", "flush", "abort"]
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", *arguments, path], capture_output=True, check=False)
    assert qemu_img("check", "-q", path, ok=(0, 2, 3)).returncode != 0
    node = await open_qcow2(FileNode.open(path))
    assert await read_bytes(node, 0, 1 << 20) == b"\7" * (1 << 20)
    await node.pwrite(1 << 20, b"\5" * (1 << 20))
    await node.close()
    qemu_img("check", "-q", path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    mib = 1 << 20
    assert raw.read_bytes() == b"\7" * mib + b"\5" * mib + b"\x09" * mib + bytes(mib)


async def test_the_dirty_bit_is_on_disk_while_the_image_is_open(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    node = await open_qcow2(FileNode.open(path), power_safe=True)
    await node.pwrite(0, b"x" * 65536)
    await node.flush()
    assert path.read_bytes()[79] & 1
    qemu_img("check", "-q", "-U", path)
    # As a power failure might leave it: the entries are there, the refcounts are not.
    survivor = tmp_path / "survivor.qcow2"
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[48:56], "big")
    block = int.from_bytes(content[table : table + 8], "big")
    content[block + 8 : block + 32] = bytes(24)
    survivor.write_bytes(content)
    await node.close()
    assert not path.read_bytes()[79] & 1
    qemu_img("check", "-q", path)
    node = await open_qcow2(FileNode.open(survivor))
    await node.pwrite(1 << 20, b"y" * 65536)
    assert await read_bytes(node, 0, 65536) == b"x" * 65536
    await node.close()
    qemu_img("check", "-q", survivor)


async def test_a_backing_file_is_never_opened_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    name = 'json:{"driver":"nbd","host":"example.org"}'
    qemu_img("create", "-u", "-q", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
    file = FileNode.open(path)
    with pytest.raises(ImageError, match=r"backing file .*none was given"):
        await open_qcow2(file)
    await file.close()
