"""The `replnbd` command as a user runs it, and what it did to the files around it."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peers.process import PeerError

REPLNBD = (sys.executable, "-m", "replnbd")


class Done(NamedTuple):
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


def run_replnbd(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    timeout_s: float = 30.0,
) -> Done:
    """Run `replnbd ARGUMENTS` to its end; `env` is added to ours, `prefix` is a command
    that runs it, as setpriv does."""
    try:
        done = subprocess.run(
            [*prefix, *REPLNBD, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as exc:
        said = f"{exc.stdout!r} {exc.stderr!r}"
        raise PeerError(f"replnbd {arguments}: not within {timeout_s:g} s: {said}") from None
    return Done(done.returncode, done.stdout, done.stderr)


def refusal(done: Done, *, status: int = 1) -> str:
    """The one line on stderr with which a command failed: PeerError if there is more or less,
    or anything on stdout, or another exit status."""
    lines = done.stderr.splitlines()
    if done.status != status or done.stdout or len(lines) != 1:
        raise PeerError(f"expected exit status {status} and one line on stderr, got {done}")
    return lines[0]


def fingerprints(folder: Path) -> dict[str, str]:
    """Every name below `folder`, with type, mode and, of regular files, a digest of all bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        kind = f"{stat.filemode(mode)}"
        if stat.S_ISREG(mode):
            kind += f" {hashlib.sha256(path.read_bytes()).hexdigest()}"
        found[str(path.relative_to(folder))] = kind
    return found
