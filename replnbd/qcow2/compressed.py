"""Compressed clusters: read whole, never written. A write to one gives it a cluster of its own.

The compressed bytes are a disk's contents, so a peer's: what they inflate to is bounded by the
cluster, and memory by the window.
"""

from __future__ import annotations

import errno
import zlib

import zstandard

from replnbd.block import read_bytes
from replnbd.block.threads import run_blocking
from replnbd.qcow2.format import COMPRESSION_ZSTD
from replnbd.qcow2.state import Image

_WINDOW_MAX = 8 << 20  # what RFC 8878 wants every decoder to have; no cluster needs as much
_INLINE_MAX = 128 * 1024
"""Bytes of a cluster to inflate on the loop: some 300 µs; a thread costs 50, and a GIL fight."""


async def read_compressed(image: Image, descriptor: int) -> bytes:
    """The guest's bytes of a compressed cluster; OSError(EIO) if they do not inflate."""
    known, content = image.inflated
    if known == descriptor:
        return content
    shape = image.shape
    offset, length = shape.compressed_extent(descriptor)
    data = bytes(await read_bytes(image.file, offset, length))
    inflate = _inflate_zstd if image.compression_type == COMPRESSION_ZSTD else _inflate_deflate
    size = shape.cluster_size
    try:
        if size <= _INLINE_MAX:
            content = inflate(data, size)
        else:
            content = await run_blocking(inflate, data, size)
    except (zlib.error, zstandard.ZstdError) as exc:
        raise _broken(image, offset, str(exc)) from exc
    if len(content) != size:
        raise _broken(image, offset, f"{len(content)} bytes instead of {size}")
    image.inflated = descriptor, content
    return content


def _inflate_deflate(data: bytes, size: int) -> bytes:
    # Raw deflate. QEMU writes a 4 KiB window; a decoder with a larger one reads any.
    return zlib.decompressobj(-15).decompress(data, size)


def _inflate_zstd(data: bytes, size: int) -> bytes:
    decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
    return decoder.stream_reader(data).read(size)


def _broken(image: Image, offset: int, what: str) -> OSError:
    # No corrupt bit: the mapping is sound, and the cluster can be written anew.
    return OSError(
        errno.EIO,
        f"{image.host.path}: the compressed cluster at offset {offset:#x} does not inflate: {what}",
    )
