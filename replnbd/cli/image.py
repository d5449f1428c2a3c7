"""replnbd image: qcow2 images without a daemon."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click

from replnbd.block import FileNode
from replnbd.cli import show
from replnbd.errors import ImageError
from replnbd.qcow2 import Header, create_image, read_header
from replnbd.qcow2.check import CheckReport, check_image, repair_image
from replnbd.qcow2.inspect import ImageInfo, MapEntry, image_info, map_image

T = TypeVar("T")

_SIZE = re.compile(r"(\d+)([kKMGTP]?)(?:i?B)?")
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


class SizeType(click.ParamType[int]):
    """Bytes, with a suffix K, M, G, T or P if wanted (powers of 1024, as in qemu-img)."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The number of bytes that a text like "10G" or "512" means."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value))
        if match is None:
            self.fail(f"'{value}' is no size: use bytes, or a suffix K, M, G, T, P", param, ctx)
        return int(match[1]) * _FACTORS[match[2].upper()]


file_argument = click.argument("file", type=click.Path())
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, as qemu-img does.")
force_share = click.option(
    "-U", "--force-share", is_flag=True, help="Even if in use; what is shown may be torn."
)


@click.group()
def image() -> None:
    """Create, look into and check qcow2 images."""


@image.command()
@file_argument
@click.argument("size", type=SizeType(), required=False)
@click.option("-b", "--backing-file", help="Shows where FILE has nothing; gives SIZE if unset.")
@click.option("-F", "--backing-format", type=click.Choice(["raw", "qcow2"]))
@click.option("--cluster-size", type=SizeType(), default="64K", show_default=True)
@click.option("--extended-l2/--no-extended-l2", default=None, help="32 subclusters per cluster.")
@click.option("--version", type=click.IntRange(2, 3), default=3, show_default=True)
@click.option("--refcount-bits", type=int, default=16, show_default=True)
def create(
    file: str,
    size: int | None,
    backing_file: str | None,
    backing_format: str | None,
    cluster_size: int,
    extended_l2: bool | None,
    version: int,
    refcount_bits: int,
) -> None:
    """Create an empty image.

    SIZE in bytes, or with a suffix K, M, G, T, P.
    """

    async def run() -> int:
        disk_size = size
        if disk_size is None:
            if backing_file is None or backing_format is None:
                raise click.UsageError("SIZE is missing, and no --backing-file with its format")
            disk_size = await _size_of(str(Path(file).parent / backing_file), backing_format)
        await create_image(
            file,
            disk_size,
            cluster_size=cluster_size,
            extended_l2=extended_l2,
            backing_file=backing_file,
            backing_format=backing_format,
            version=version,
            refcount_bits=refcount_bits,
        )
        return disk_size

    click.echo(f"{file}: {show.size(asyncio.run(run()))}")


@image.command()
@file_argument
@as_json
@force_share
def info(file: str, as_json: bool, force_share: bool) -> None:
    """Show an image's properties."""
    found: ImageInfo = asyncio.run(_with_image(file, image_info, force_share=force_share))
    if as_json:
        show.json(found.to_json())
        return
    _print_members(found.to_json())


@image.command()
@file_argument
@as_json
@force_share
@click.option(
    "--repair", type=click.Choice(["leaks", "all"]),
    help="Give leaked clusters back, or put all right that can be.",
)  # fmt: skip
def check(file: str, as_json: bool, force_share: bool, repair: str | None) -> None:
    """Check an image's metadata.

    Exit code 1 if something is wrong and has not been repaired.
    """
    if repair and force_share:
        raise click.UsageError("--repair needs the image for itself: no --force-share")

    async def run(node: FileNode, header: Header) -> CheckReport:
        if repair is None:
            return await check_image(node, header)
        return await repair_image(node, header, leaks_only=repair == "leaks")

    report = asyncio.run(_with_image(file, run, force_share=force_share, read_only=repair is None))
    if as_json:
        show.json(report.to_json())
    else:
        for finding in report.findings:
            click.echo(finding)
        if report.findings_omitted:
            click.echo(f"... and {report.findings_omitted} more")
        if report.corruptions_fixed or report.leaks_fixed:
            fixed = f"{report.corruptions_fixed} corruptions and {report.leaks_fixed} leaks"
            click.echo(f"repaired: {fixed}")
    if not report.clean:
        raise ImageError(
            f"{file}: {report.corruptions} corruptions, {report.leaks} leaked clusters"
            + ("" if repair else "; --repair puts right what can be")
        )
    if not as_json:
        share = f"{report.allocated_clusters} of {report.total_clusters} clusters allocated"
        click.echo(f"{file}: no errors, {share}")


@image.command("map")
@file_argument
@as_json
@force_share
def map_(file: str, as_json: bool, force_share: bool) -> None:
    """Show where each byte of an image is."""

    async def run(node: FileNode, header: Header) -> list[MapEntry]:
        return [entry async for entry in map_image(node, header)]

    entries = asyncio.run(_with_image(file, run, force_share=force_share))
    if as_json:
        show.json([entry.to_json() for entry in entries])
        return
    for entry in entries:
        if entry.depth:
            state, where = "unallocated", "see the backing file"
        else:
            state = "zeroes" if entry.zero else "compressed" if entry.compressed else "data"
            where = "here" if entry.present else "nowhere"
        at = f" at {entry.offset}" if entry.offset is not None else ""
        click.echo(f"{entry.start:>16} +{entry.length:<16} {state:11} {where}{at}")


async def _with_image(
    path: str,
    use: Callable[[FileNode, Header], Awaitable[T]],
    *,
    force_share: bool,
    read_only: bool = True,
) -> T:
    node = FileNode.open(path, read_only=read_only, lock=not force_share)
    try:
        return await use(node, await read_header(node))
    finally:
        await node.close()


async def _size_of(path: str, image_format: str) -> int:
    """The virtual size of an image, without what it stands on."""

    async def size(_: FileNode, header: Header) -> int:
        return header.size

    if image_format == "qcow2":
        return await _with_image(path, size, force_share=True)
    node = FileNode.open(path, read_only=True, lock=False)
    await node.close()
    return node.size


def _print_members(members: dict[str, object], indent: str = "") -> None:
    for key, value in members.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{key}:")
            _print_members(value, indent + "    ")
        elif isinstance(value, list):
            click.echo(f"{indent}{key}: {len(value)}")
            for item in value:
                click.echo(f"{indent}    {item}")
        elif key.endswith("size") and isinstance(value, int):
            click.echo(f"{indent}{key}: {show.size(value)} ({value} bytes)")
        else:
            click.echo(f"{indent}{key}: {value}")
