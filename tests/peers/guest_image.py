"""The kernel and the initramfs of a small Linux guest, made of what Debian's packages bring.

The kernel is Debian's own for virtual machines (linux-image-cloud-amd64): unpacked by scripts/test
into a directory of the checkout, or installed. The initramfs is busybox, the kernel's modules and
the few programs that busybox has no match for, each with the libraries that ldd finds.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peers.process import PeerError

CHECKOUT = Path(__file__).resolve().parents[2]
KERNEL_ROOTS = (CHECKOUT / ".cache" / "guest-kernel", Path("/"))
"""Where `boot` and `lib/modules` are looked for; scripts/test unpacks a kernel into the first."""

MODULES = ("nbd", "virtio_pci", "virtio_net", "virtio_blk")
PROGRAMS = ("nbd-client", "mkfs.ext4", "e2fsck")
SBIN = "/usr/sbin:/sbin"  # a user's PATH may lack them

INIT = Path(__file__).with_name("guest_init.sh")


class Kernel(NamedTuple):
    """A kernel's image, and the directory of its modules."""

    image: Path
    modules: Path


def find_kernel(roots: Sequence[Path] = KERNEL_ROOTS) -> Kernel:
    """The newest kernel of the first root that has one; PeerError when there is none."""
    for root in roots:
        for image in sorted(root.glob("boot/vmlinuz-*-cloud-amd64"), key=_version, reverse=True):
            modules = root / "lib" / "modules" / image.name.removeprefix("vmlinuz-")
            if modules.is_dir():
                return Kernel(image, modules)
    searched = " or ".join(f"{root}/boot" for root in roots)
    raise PeerError(f"no kernel for the guest in {searched}: scripts/test brings one")


def _version(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def load_order(kernel: Kernel, names: Sequence[str] = MODULES) -> list[Path]:
    """The files of modules, each after those that it depends on.

    What is built into the kernel has no file, and needs none. modules.dep would tell the order,
    but the package does not bring it: its installation makes it.
    """
    files = {path.stem.replace("-", "_"): path for path in kernel.modules.rglob("*.ko")}
    builtin = (kernel.modules / "modules.builtin").read_text().splitlines()
    inside = {Path(line).stem.replace("-", "_") for line in builtin}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in inside:
            return
        if name not in files:
            raise PeerError(f"no module {name} in {kernel.modules}")
        if files[name] not in order:
            for needed in _depends(files[name]):
                add(needed)
            order.append(files[name])

    for name in names:
        add(name)
    return order


def _depends(module: Path) -> list[str]:
    # A module's section .modinfo is a list of "key=value\0".
    found = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    return found[1].decode().replace("-", "_").split(",") if found and found[1] else []


def find_program(name: str) -> Path:
    """A program's file; PeerError when it is not installed."""
    found = shutil.which(name) or shutil.which(name, path=SBIN)
    if found is None:
        raise PeerError(f"{name} is not installed: scripts/test brings it")
    return Path(found)


def libraries(program: Path) -> list[Path]:
    """What a program is linked with, its loader included; nothing when it is static."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if done.returncode:
        return []
    return [Path(name) for name in re.findall(r"(?:=> |^\s+)(/\S+)", done.stdout, re.MULTILINE)]


def build_initramfs(kernel: Kernel, path: Path) -> None:
    """Write the initramfs: a cpio archive, not compressed, because that would take longer than
    the guest saves by it."""
    order = load_order(kernel)
    files = {Path("/modules", f"{index:02}-{file.name}"): file for index, file in enumerate(order)}
    files[Path("/init")] = INIT
    for name in ("busybox", *PROGRAMS):
        program = find_program(name)
        files[Path("/bin", name)] = program
        files |= {library: library for library in libraries(program)}
    path.write_bytes(b"".join(_archive(files)))


# Section: the archive (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst)

NEWC_MAGIC = b"070701"
TRAILER = "TRAILER!!!"


def _archive(files: dict[Path, Path]) -> Iterator[bytes]:
    """A cpio archive "newc" of `files`, target: source, and of every directory they are in."""
    folders = {parent for target in files for parent in target.parents} - {Path("/")}
    folders |= {Path("/dev"), Path("/mnt"), Path("/proc"), Path("/sys"), Path("/tmp")}
    for folder in sorted(folders):  # a directory comes before what is in it
        yield _member(str(folder.relative_to("/")), stat.S_IFDIR | 0o755)
    for target, source in files.items():
        yield _member(str(target.relative_to("/")), stat.S_IFREG | 0o755, source.read_bytes())
    yield _member(TRAILER, 0)


def _member(name: str, mode: int, content: bytes = b"") -> bytes:
    """One member: a header of 13 numbers in hexadecimal, the name, the content; the latter two
    are filled up to a multiple of four bytes."""
    ino, uid, gid, mtime, device, check = 0, 0, 0, 0, (0, 0, 0, 0), 0
    links = 1
    name_bytes = name.encode() + b"\0"
    numbers = [ino, mode, uid, gid, links, mtime, len(content), *device, len(name_bytes), check]
    head = NEWC_MAGIC + b"".join(b"%08x" % number for number in numbers) + name_bytes
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
