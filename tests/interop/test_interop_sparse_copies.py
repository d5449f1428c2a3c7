"""Sparse images through both exports, in and out: all bytes arrive, holes stay holes, and what is
sent is the data and little more. A proxy counts what travels."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from interop_support import KIB, MIB, START, Standby, assert_same, fresh_seed, run
from libnbd_support import BLOCK, EXPORTS, NAME, TOP, data_blocks, sparse_disk, write_sparse
from peers import CountingProxy

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 16 * MIB
OVERHEAD = 64 * KIB
"""For the handshakes of a few connections, and the headers of some hundred requests and chunks."""


def islands(rng: random.Random, *, count: int = 40) -> bytearray:
    """Zeroes with some islands of data in them: about 1 MiB in all.

    One is at 0, where qemu-img allocates a block whatever it copies."""
    content = bytearray(SIZE)
    for number in range(count):
        start = rng.randrange(SIZE // BLOCK) * BLOCK * (number > 0)
        data = rng.randbytes(BLOCK * rng.randint(1, 16))[: SIZE - start]
        content[start : start + len(data)] = data
    return content


def data_bytes(content: bytes | bytearray) -> int:
    """How much of it is in blocks that are not all zeroes."""
    return sum(len(block) for _, block in data_blocks(content))


def allocated(path: Path) -> int:
    """The bytes that a file takes."""
    return path.stat().st_blocks * 512


def image_map(path: Path) -> list[tuple[int, int, bool]]:
    """(start, length, whether data) of a raw file, as qemu-img sees it."""
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path))
    return [(each["start"], each["length"], each["data"]) for each in extents]


def exported_map(uri: str) -> list[tuple[int, int, bool]]:
    """The same of an export."""
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", uri))
    assert all(each["zero"] is not each["data"] for each in extents)
    return [(each["start"], each["length"], each["data"]) for each in extents]


@dataclass
class Sparse:
    """A running standby with a sparse disk, behind a proxy, and a file with the same content."""

    folder: Path
    standby: Standby
    proxy: CountingProxy
    content: bytearray
    source: Path

    def uri(self, export: str) -> str:
        """Of an export, through the proxy."""
        return self.proxy.uri(export)


def serve(folder: Path) -> Iterator[Sparse]:
    """A fixture: the standby runs as long as whoever asked for it wants it."""
    content = islands(random.Random(fresh_seed()))
    source = folder / "source"
    write_sparse(source, content)
    with Standby(folder, sparse_disk(folder, bytes(content))) as standby:
        standby.qmp.execute(*START)
        with CountingProxy(folder / "proxy", standby.nbd_socket) as proxy:
            yield Sparse(folder, standby, proxy, content, source)
        standby.quit()


@pytest.fixture
def sparse(short_dir: Path) -> Iterator[Sparse]:
    """For one test."""
    yield from serve(short_dir)


@pytest.fixture(scope="module")
def still() -> Iterator[Sparse]:
    """For tests that change nothing."""
    with tempfile.TemporaryDirectory(prefix="rnbd-") as name:
        yield from serve(Path(name))


# Section: out

COPIES_OUT = {
    "nbdcopy": ["nbdcopy"],
    # Without BLOCK_STATUS it is the structured replies that spare the zeroes.
    "nbdcopy --no-extents": ["nbdcopy", "--no-extents"],
    "nbdcopy --synchronous": ["nbdcopy", "--synchronous"],
    "qemu-img convert": ["qemu-img", "convert", "-f", "raw", "-O", "raw"],
}


@pytest.mark.parametrize("tool", COPIES_OUT)
@pytest.mark.parametrize("export", EXPORTS)
def test_a_copy_out_is_as_sparse_and_no_zeroes_travelled(
    still: Sparse, export: str, tool: str
) -> None:
    still.proxy.count()
    copy = still.folder / f"{export} by {tool}"
    run(*COPIES_OUT[tool], still.uri(export), copy)
    assert_same(copy.read_bytes(), still.content, "the copy")
    assert image_map(copy) == image_map(still.source)
    assert allocated(copy) < data_bytes(still.content) + 64 * KIB  # some for the file system
    assert still.proxy.count().to_client < data_bytes(still.content) + OVERHEAD


@pytest.mark.parametrize("export", EXPORTS)
def test_what_was_trimmed_and_written_is_copied_out_sparse_too(sparse: Sparse, export: str) -> None:
    other = EXPORTS[export == NAME]
    with sparse.standby.connect(other) as client:  # that must not be seen
        client.trim(0, SIZE)
        client.pwrite(0, b"!" * MIB)
    with sparse.standby.connect(export) as client:
        client.trim(0, SIZE // 2)
        sparse.content[: SIZE // 2] = bytes(SIZE // 2)
        client.pwrite(5 * MIB, b"a" * MIB)
        sparse.content[5 * MIB : 6 * MIB] = b"a" * MIB
        client.write_zeroes(5 * MIB, 512 * KIB)
        sparse.content[5 * MIB : 5 * MIB + 512 * KIB] = bytes(512 * KIB)
    write_sparse(sparse.source, sparse.content)
    copy = sparse.folder / "copy"
    run("nbdcopy", sparse.uri(export), copy)
    assert_same(copy.read_bytes(), sparse.content, "the copy")
    assert image_map(copy) == image_map(sparse.source)
    assert sparse.proxy.count().to_client < data_bytes(sparse.content) + OVERHEAD


# Section: in

COPIES_IN = {
    "nbdcopy": ["nbdcopy", "--flush"],
    "nbdcopy --synchronous": ["nbdcopy", "--flush", "--synchronous"],
    "qemu-img convert": ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"],
}


@pytest.mark.parametrize("tool", COPIES_IN)
@pytest.mark.parametrize("export", EXPORTS)
def test_a_copy_in_leaves_holes_and_no_zeroes_travelled(
    sparse: Sparse, export: str, tool: str
) -> None:
    rng = random.Random(fresh_seed())
    with sparse.standby.connect(export) as client:  # data to be overwritten, and to become holes
        for _ in range(20):
            client.pwrite(rng.randrange(SIZE - 300_000), b"old" * 100_000)
    content = islands(rng)
    write_sparse(sparse.source, content)
    sparse.proxy.count()
    run(*COPIES_IN[tool], sparse.source, sparse.uri(export))
    assert sparse.proxy.count().to_server < data_bytes(content) + OVERHEAD
    assert_same(sparse.standby.content(export), content, export)
    other = EXPORTS[export == NAME]
    assert_same(sparse.standby.content(other), sparse.content, other)
    assert exported_map(sparse.uri(export)) == image_map(sparse.source)


def test_from_export_to_export_no_zeroes_travel(sparse: Sparse) -> None:
    with sparse.standby.connect(NAME) as client:
        content = islands(random.Random(fresh_seed()))
        client.trim(0, SIZE)
        for start, block in data_blocks(content):
            client.pwrite(start, block)
    run("nbdcopy", sparse.uri(NAME), sparse.uri(TOP))
    assert_same(sparse.standby.content(TOP), content, TOP)
    traffic = sparse.proxy.count()
    assert traffic.to_client < data_bytes(content) + OVERHEAD
    assert traffic.to_server < data_bytes(content) + OVERHEAD


# Section: qemu-img on the exports themselves


@pytest.mark.parametrize("export", EXPORTS)
def test_qemu_img_map_and_compare_and_bench(sparse: Sparse, export: str) -> None:
    uri = sparse.uri(export)
    assert exported_map(uri) == image_map(sparse.source)
    sparse.proxy.count()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, sparse.source)
    assert sparse.proxy.count().to_client < data_bytes(sparse.content) + OVERHEAD
    run("qemu-img", "bench", "-f", "raw", "-c", "500", "-d", "16", "-s", "4096", uri)
    # It writes zeroes, to where the disk may have data.
    run("qemu-img", "bench", "-f", "raw", "-w", "-c", "500", "-d", "16", "-s", "4096", uri)
    sparse.content[: 500 * 4096] = bytes(500 * 4096)
    assert_same(sparse.standby.content(export), sparse.content, export)
