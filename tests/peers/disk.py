"""The files of one replicated disk, and qemu-img to make and read them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from peers.process import PeerError

DiskFormat = Literal["raw", "qcow2"]


def qemu_img(*arguments: str | Path, statuses: tuple[int, ...] = (0,)) -> str:
    """Run qemu-img; its output, or PeerError with what it said if it ends with another status."""
    argv = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode not in statuses:
        said = f"{done.stdout}{done.stderr}"
        raise PeerError(f"$ {' '.join(argv)}\nexit status {done.returncode}\n{said}")
    return done.stdout


def make_image(path: Path, format_: DiskFormat, content: bytes | bytearray) -> None:
    """A disk image with `content`."""
    raw = path if format_ == "raw" else path.with_name(path.name + ".raw")
    raw.write_bytes(content)
    if format_ != "raw":
        qemu_img("convert", "-f", "raw", "-O", format_, raw, path)
        raw.unlink()


def read_image(path: Path, format_: DiskFormat) -> bytes:
    """The bytes a guest would see on an image that nobody has open."""
    if format_ == "raw":
        return path.read_bytes()
    raw = path.with_name(path.name + ".raw")
    qemu_img("convert", "-f", format_, "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


@dataclass(frozen=True)
class Disk:
    """Export `name`: the secondary disk, which the primary writes; `top_id`: the standby's view."""

    name: str
    top_id: str
    secondary: Path
    hidden: Path
    active: Path
    format: DiskFormat

    @classmethod
    def create(
        cls, folder: Path, name: str, top_id: str, content: bytes, format_: DiskFormat = "raw"
    ) -> Self:
        """Make the secondary disk with `content`; the overlays are left to the peer."""
        secondary = folder / f"{name}.{format_}"
        make_image(secondary, format_, content)
        hidden, active = (folder / f"{name}.{role}.qcow2" for role in ("hidden", "active"))
        return cls(name, top_id, secondary, hidden, active, format_)

    def content(self) -> bytes:
        """The secondary disk's bytes, when nobody has it open."""
        return read_image(self.secondary, self.format)
