"""A small Linux guest: the kernel's own NBD client, and a shell that a test gives commands to."""

from __future__ import annotations

import base64
import itertools
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from peers.guest_image import build_initramfs, find_kernel
from peers.nbd_client import connect
from peers.process import PeerError, Process

QEMU = "qemu-system-x86_64"
HOST = "10.0.2.2"
"""The host's loopback, as QEMU's user network shows it to the guest."""

HANGS_S = 120.0
"""A command that has not ended by then hangs, and so does a boot: 4 s where nothing else runs."""

COMMAND_BYTES_MAX = 4000
"""The guest's terminal takes lines of 4095 bytes (N_TTY_BUF_SIZE)."""

RECEIVE_BYTES = 65536
FILE_CHUNK_BYTES = 2048


class Guest:
    """A running guest. `/dev/vda` is `source`, read-only: bytes that the test knows.

    The console goes to the log, which every failure quotes. In the guest are busybox and the
    programs of `guest_image.PROGRAMS`; NBD devices are /dev/nbd0 to nbd15.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        kernel, initramfs, shell = find_kernel(), folder / "initramfs", folder / "guest.shell"
        build_initramfs(kernel, initramfs)
        argv = [QEMU, "-M", "pc", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256"]
        argv += ["-nodefaults", "-display", "none", "-no-reboot"]
        argv += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        argv += ["-append", "console=ttyS0 panic=-1"]  # a panic ends QEMU
        # QEMU waits for us on the second serial port before the guest may say anything there.
        argv += ["-chardev", f"socket,id=shell,path={shell},server=on,wait=on"]
        argv += ["-serial", "stdio", "-serial", "chardev:shell"]
        argv += ["-netdev", "user,id=network,ipv6=off"]
        argv += ["-device", "virtio-net-pci,netdev=network,romfile="]
        argv += ["-drive", f"if=virtio,format=raw,readonly=on,file={source}"]
        self.process = Process(argv, log=folder / "guest.log")
        self._marks = itertools.count()
        self._received = b""
        self._shell: socket.socket | None = None
        try:
            self._shell = self.process.reach(lambda: connect(shell))
            self._read_until(f"READY-{next(self._marks)}", "boot", HANGS_S)
        except BaseException:
            self.close()
            raise

    def run(self, command: str, *, status: int = 0, timeout_s: float = HANGS_S) -> str:
        """Run a line of shell (`sh -e`); what it printed, stderr too. PeerError, with that and the
        guest's console, when it ends with another status or not in time."""
        mark = f"DONE-{next(self._marks)}"
        line = f"{mark} {command}\n".encode()
        assert line.count(b"\n") == 1, command
        assert len(line) <= COMMAND_BYTES_MAX, command
        assert self._shell is not None
        try:
            self._shell.sendall(line)
        except OSError as exc:
            raise PeerError(self.process.failure(f"guest$ {command}: {exc}")) from None
        ended, output = self._read_until(mark, command, timeout_s)
        if ended != status:
            said = f"guest$ {command}\nexit status {ended}, expected {status}\n{output}"
            raise PeerError(self.process.failure(said))
        return output

    def write_file(self, path: str, content: bytes) -> None:
        """Make a small file in the guest."""
        self.run(f": >{path}")
        for at in range(0, len(content), FILE_CHUNK_BYTES):
            chunk = base64.b64encode(content[at : at + FILE_CHUNK_BYTES]).decode()
            self.run(f"echo {chunk} | base64 -d >>{path}")

    def _read_until(self, mark: str, command: str, timeout_s: float) -> tuple[int, str]:
        """The status on the line that begins with `mark`, and all that came before it."""
        assert self._shell is not None
        deadline = time.monotonic() + timeout_s
        opening = f"\n{mark} ".encode()
        while opening not in self._received or not self._received.endswith(b"\n"):
            self._shell.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._shell.recv(RECEIVE_BYTES)
            except TimeoutError:
                data = b""
            except OSError as exc:
                raise PeerError(self.process.failure(f"guest$ {command}: {exc}")) from None
            if not data:
                said = self._received.decode(errors="replace")
                what = f"guest$ {command}\nno end within {timeout_s:g} s\n{said}"
                raise PeerError(self.process.failure(what))
            self._received += data
        output, _, status = self._received.rpartition(opening)
        self._received = b""
        return int(status), output.decode(errors="replace")

    def close(self) -> None:
        """Pull the plug: nothing of a guest is worth keeping."""
        if self._shell is not None:
            self._shell.close()
        self.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
