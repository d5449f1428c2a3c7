"""Images to look at: made by QEMU in every shape, and damaged in known places."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

from replnbd.block import FileNode, MemoryNode
from replnbd.qcow2.check import CheckReport, check_image
from replnbd.qcow2.format import Header, read_header

KIB = 1 << 10
MIB = 1 << 20

# Each with what QEMU can do to it; 1-bit refcounts leave no room for snapshots.
VARIANTS: dict[str, tuple[str, bool]] = {
    "v3": ("compat=1.1", True),
    "extended": ("extended_l2=on", True),
    "v2": ("compat=0.10", True),
    "clusters of 512, 1-bit": ("cluster_size=512,refcount_bits=1", False),
    "clusters of 512, 64-bit": ("cluster_size=512,refcount_bits=64", True),
    "clusters of 2M": ("cluster_size=2M", True),
    "clusters of 4k, 2-bit": ("cluster_size=4k,refcount_bits=2", True),
    "clusters of 4k, 4-bit": ("cluster_size=4k,refcount_bits=4", True),
    "clusters of 4k, 8-bit": ("cluster_size=4k,refcount_bits=8", True),
    "extended 16k, 32-bit": ("cluster_size=16k,extended_l2=on,refcount_bits=32", True),
}
COMPRESSED = {
    "deflate": "compat=1.1",
    "zstd 4k": "compression_type=zstd,cluster_size=4k",
    "deflate 512": "cluster_size=512",
    "deflate extended": "extended_l2=on",
}
ALL = [*VARIANTS, *COMPRESSED]


def run(*arguments: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run a program and return what it prints; its exit code must be one of `ok`."""
    words = [os.fspath(argument) for argument in arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in ok, (words, done.returncode, done.stdout + done.stderr)
    return done.stdout


def make_variant(name: str, path: Path) -> None:
    """An image with data, zeroes, holes, fragments; snapshots, a bitmap, compression as it can."""
    if name in COMPRESSED:
        raw = path.with_suffix(".raw")
        pieces = (bytes((n % 251, n * 7 % 256)) * 4096 for n in range(64))
        raw.write_bytes(b"".join(pieces) + os.urandom(128 * KIB))
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", COMPRESSED[name], raw, path)
        return
    options, snapshots = VARIANTS[name]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "64M")
    io = ("qemu-io", "-c", "write 0 1M", "-c", "write 5M 300k", "-c", "write 40M 4k")
    run(*io, "-c", "write 3M 4k", "-c", "discard 0 64k", "-c", "write -z 10M 2M", path)
    if snapshots:
        run("qemu-img", "snapshot", "-c", "first", path)
        run("qemu-io", "-c", "write 32k 200k", path)
        run("qemu-img", "snapshot", "-c", "second", path)
    if not options.startswith("compat=0"):
        run("qemu-img", "bitmap", "--add", path, "dirt")


async def header_of(path: Path) -> Header:
    file = FileNode.open(path, read_only=True)
    try:
        return await read_header(file)
    finally:
        await file.close()


async def check_file(path: Path) -> CheckReport:
    """replnbd's verdict on an image."""
    file = FileNode.open(path, read_only=True)
    try:
        return await check_image(file, await read_header(file))
    finally:
        await file.close()


def qemu_check(path: Path) -> dict[str, Any]:
    """QEMU's verdict. Its exit code says what was found; 1: it could not tell all."""
    text = run("qemu-img", "check", "--output=json", path, ok=(0, 1, 2, 3))
    verdict: dict[str, Any] = json.loads(text)
    return verdict


def word(data: bytes | bytearray, offset: int) -> int:
    value: int = struct.unpack_from(">Q", data, offset)[0]
    return value


def memory_of(data: bytes | bytearray) -> MemoryNode:
    """A node with these bytes."""
    node = MemoryNode(len(data), name="image")
    node.data[:] = data
    return node
