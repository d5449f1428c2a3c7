"""libnbd itself, from its Python module, which belongs to the system's Python and not to ours.

    with LibnbdProcess(folder) as process:
        client = process.connect(uri, contexts=["base:allocation"])
        client.pwrite(b"data", 4096, CMD_FLAG_FUA)

A process of the system's Python holds any number of connections; the order of arguments is
libnbd's own.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from multiprocessing.connection import Client
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from peers.process import PeerError, Process

PYTHON = "/usr/bin/python3"
TIMEOUT_S = 60.0
"""How long one call may take."""

Command = tuple[str, bytes | int, int, int]
"""(verb, data or length, offset, flags)."""


class LibnbdError(OSError):
    """A call of libnbd failed; `text` is libnbd's."""

    def __init__(self, error: int, text: str) -> None:
        name = errno.errorcode.get(error, "no errno")
        super().__init__(error, f"{name}: {text}")
        self.text = text


class ReadChunk(NamedTuple):
    """A call of pread_structured's chunk callback."""

    offset: int
    length: int
    kind: Literal["data", "hole", "error"]


class LibnbdProcess:
    """The system's Python with libnbd."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libnbd"
        driver = Path(__file__).with_name("libnbd_driver.py")
        self._process = Process([PYTHON, "-I", str(driver), str(path)], log=folder / "libnbd.log")
        try:
            self._connection = self._process.reach(lambda: Client(str(path), "AF_UNIX"))
        except BaseException:
            self._process.kill()
            raise

    def call(self, number: int, name: str, *arguments: Any) -> Any:
        """A function of the driver, or a method of its nbd.NBD `number`. LibnbdError when it
        raises nbd.Error, PeerError for anything else that goes wrong."""
        self._connection.send((number, name, arguments))
        try:
            if not self._connection.poll(TIMEOUT_S):
                raise PeerError(self._process.failure(f"{name}: not within {TIMEOUT_S:g} s"))
            fine, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.wait()
            raise PeerError(self._process.failure(f"{name}: libnbd's process died")) from None
        if not fine:
            raise LibnbdError(*answer)
        return answer

    def new(self) -> Libnbd:
        """A connection that is not made yet."""
        return Libnbd(self, self.call(-1, "new"))

    def connect(
        self,
        uri: str,
        *,
        structured: bool = True,
        contexts: Sequence[str] = (),
        strict: bool = True,
        options: bool = False,
    ) -> Libnbd:
        """A connection. `contexts`: what to ask for. `strict`: libnbd itself refuses what is wrong.
        `options`: stay in option haggling, for calls of opt_info, opt_go, and so on."""
        client = self.new()
        client.call("set_request_structured_replies", structured)
        for context in contexts:
            client.call("add_meta_context", context)
        if not strict:
            client.call("set_strict_mode", 0)
        client.call("set_opt_mode", options)
        client.call("connect_uri", uri)
        return client

    def close(self) -> None:
        """End the process, and with it its connections."""
        self._connection.close()
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Libnbd:
    """One nbd.NBD. `call` has all of its methods; those with callbacks or much use have a method
    here."""

    def __init__(self, process: LibnbdProcess, number: int) -> None:
        self._process = process
        self._number = number

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of nbd.NBD."""
        return self._process.call(self._number, name, *arguments)

    @property
    def size(self) -> int:
        """Of the export."""
        return int(self.call("get_size"))

    @property
    def server_messages(self) -> list[str]:
        """What the server has said with its errors so far, as libnbd's debug log has it."""
        return [str(text) for text in self.call("messages")]

    def pread(self, length: int, offset: int, flags: int = 0) -> bytes:
        """The bytes of a range."""
        return bytes(self.call("pread", length, offset, flags))

    def read_chunks(
        self, length: int, offset: int, flags: int = 0
    ) -> tuple[bytes, list[ReadChunk]]:
        """pread_structured: the bytes, and the chunks in the order they came."""
        data, chunks = self.call("read_chunks", length, offset, flags)
        return data, [ReadChunk(*chunk) for chunk in chunks]

    def pwrite(self, data: bytes, offset: int, flags: int = 0) -> None:
        """Write."""
        self.call("pwrite", data, offset, flags)

    def zero(self, length: int, offset: int, flags: int = 0) -> None:
        """WRITE_ZEROES."""
        self.call("zero", length, offset, flags)

    def trim(self, length: int, offset: int, flags: int = 0) -> None:
        """TRIM."""
        self.call("trim", length, offset, flags)

    def cache(self, length: int, offset: int, flags: int = 0) -> None:
        """CACHE."""
        self.call("cache", length, offset, flags)

    def flush(self, flags: int = 0) -> None:
        """FLUSH."""
        self.call("flush", flags)

    def block_status(
        self, length: int, offset: int, flags: int = 0
    ) -> dict[str, list[tuple[int, int]]]:
        """(length, status flags) of each extent, by context."""
        found: dict[str, list[tuple[int, int]]] = self.call("extents", length, offset, flags)
        return found

    def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Commands that are all on their way before any reply is looked at; of each the bytes of a
        pread, None of another, or (errno, text)."""
        return list(self.call("pipeline", list(commands)))

    def exports(self) -> list[tuple[str, str]]:
        """opt_list: names and descriptions."""
        return list(self.call("exports"))

    def listed_contexts(self) -> list[str]:
        """opt_list_meta_context: what the queries that were added match."""
        return list(self.call("listed_contexts"))

    def close(self) -> None:
        """An orderly end: DISC, and wait until the server has closed."""
        self.call("shutdown")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.close()
