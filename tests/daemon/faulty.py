"""Runs a replnbd whose system calls fail: python faulty.py FOLDER COMMAND... (REPLNBD's words).

While FOLDER has a file NAME.CALL, the call (pwrite, preadv, fdatasync, fallocate, ...) on the file
NAME fails with the errno whose name is in it; "SHORT" makes a write store one byte, and fail then.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replnbd.block import file
from replnbd.cli import main

CALLS = ("pwrite", "pwritev", "preadv", "fdatasync", "ftruncate")


class FaultyCalls:
    """In the place of `os`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        return self.faulty(name, call) if name in CALLS else call

    def faulty(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, and its fault if it has one."""

        def checked(fd: int, *args: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{fd}")
            fault = self._folder / f"{os.path.basename(path)}.{name}"
            try:
                cause = fault.read_text()
            except FileNotFoundError:
                return call(fd, *args)
            if cause == "SHORT":
                if len(args[0]) > 1:
                    return call(fd, memoryview(args[0])[:1], *args[1:])
                cause = "ENOSPC"
            code = getattr(errno, cause)
            raise OSError(code, os.strerror(code))

        return checked


if __name__ == "__main__":
    calls = FaultyCalls(Path(sys.argv[1]))
    vars(file)["os"] = calls
    vars(file)["_fallocate"] = calls.faulty("fallocate", file._fallocate)
    sys.argv = ["replnbd", *sys.argv[sys.argv.index("serve") :]]
    main()
