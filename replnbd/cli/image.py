"""replnbd image: images without a daemon."""

from __future__ import annotations

import re
from typing import TypeVar

import click

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


@click.group()
def image() -> None:
    """Create, look into and check qcow2 images."""
