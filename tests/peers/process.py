"""Child processes that never outlive their test, and waiting with a deadline."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class PeerError(AssertionError):
    """A peer did not start, died, broke its protocol or missed a deadline."""


def wait_until(
    condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0, interval_s: float = 0.005
) -> None:
    """Poll until `condition()` holds; PeerError naming `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise PeerError(f"{what}: not within {timeout_s:g} s")
        time.sleep(interval_s)


def _prepare_child() -> None:
    # A test run that is killed with SIGKILL runs no fixture: the kernel ends its peers instead.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # For limit_file_size: a write beyond it must fail with EFBIG, not end the process.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


class Process:
    """A running program; stdout and stderr go to `log`, which every failure quotes."""

    def __init__(self, argv: Sequence[str], *, log: Path, cwd: Path | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                preexec_fn=_prepare_child,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not exited yet."""
        return self._popen.poll() is None

    def reach(self, connect: Callable[[], T], *, timeout_s: float = 30.0) -> T:
        """What `connect` returns, once the program listens; PeerError with the log when it dies
        first, or does not listen in time."""
        # A socket's name is there before it listens, so nothing but connecting tells.
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return connect()
            except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as exc:
                # Reset: it listened, and died, or dropped us while it was still starting.
                if not self.running or time.monotonic() > deadline:
                    raise PeerError(self.failure(f"does not listen: {exc}")) from None
            time.sleep(0.005)

    def failure(self, what: str) -> str:
        """`what` with the command line, the exit status and the end of the log."""
        text = self.log.read_text(errors="replace")[-4000:].strip()
        status = self._popen.poll()
        return f"{what}\n$ {' '.join(self.argv)}\nexit status {status}\n{text}"

    @property
    def resident_bytes(self) -> int:
        """Memory in use."""
        return self._status_kib("VmRSS") * 1024

    @property
    def peak_bytes(self) -> int:
        """The most memory that was in use since the start, or the last `reset_peak`."""
        return self._status_kib("VmHWM") * 1024

    def reset_peak(self) -> None:
        """Begin to measure `peak_bytes` anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def descriptors(self) -> int:
        """How many file descriptors are open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def cpu_s(self) -> float:
        """CPU time used so far, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status_kib(self, key: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
        raise PeerError(self.failure(f"no {key}: it has ended"))

    def limit_file_size(self, size: int | None) -> None:
        """Make every write at or beyond `size` bytes of any file fail with EFBIG (None: no more).

        An injected disk error for any program, without privileges: RLIMIT_FSIZE of its process.
        """
        soft = resource.RLIM_INFINITY if size is None else size
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    def terminate(self, *, timeout_s: float = 10.0) -> int:
        """SIGTERM, and the exit status; PeerError when it does not end in time."""
        self._popen.terminate()
        return self.wait(timeout_s=timeout_s)

    def wait(self, *, timeout_s: float = 10.0) -> int:
        """The exit status, once it ended by itself."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise PeerError(self.failure(f"still running after {timeout_s:g} s")) from None

    def kill(self) -> None:
        """SIGKILL, and wait; nothing happens when it is gone already."""
        self._popen.kill()
        self._popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
