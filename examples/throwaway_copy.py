"""Make a writable copy of a disk that costs only what is changed in it, and show what that is.

    python examples/throwaway_copy.py DISK.raw COPY.qcow2

COPY.qcow2 is a qcow2 overlay with DISK.raw as its backing file: give it to QEMU as it is, throw it
away when done. The disk is opened read-only and does not change.
"""

import argparse
import asyncio
import os

import replnbd

MARK = b"changed in the copy alone"


async def copy(disk_path: str, copy_path: str) -> None:
    """Create the overlay, change something in it, and print the map of the result."""
    disk = await replnbd.open_image(disk_path, format="raw", read_only=True)
    try:
        backing = os.path.relpath(disk_path, os.path.dirname(copy_path) or ".")
        await replnbd.create_image(copy_path, disk.size, backing_file=backing, backing_format="raw")
        overlay = await replnbd.open_image(copy_path, format="qcow2", backing=disk)
        try:
            await overlay.pwrite(0, MARK)
            await overlay.flush()
            assert await replnbd.read_bytes(overlay, 0, len(MARK)) == MARK
            offset = 0
            async for extent in replnbd.each_extent(overlay, 0, overlay.size):
                where = ("copy", "disk")[extent.depth]
                state = "zeroes" if extent.zero else "data"
                print(f"{offset:>14} +{extent.length:<14} {state:7} in {where}")
                offset += extent.length
        finally:
            await overlay.close()
    finally:
        await disk.close()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("disk")
    parser.add_argument("copy")
    options = parser.parse_args()
    try:
        asyncio.run(copy(options.disk, options.copy))
    except replnbd.ReplnbdError as exc:
        raise SystemExit(str(exc)) from None


if __name__ == "__main__":
    main()
