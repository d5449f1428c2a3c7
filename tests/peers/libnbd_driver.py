"""The far side of peers/libnbd.py: runs under the system's Python, which has libnbd's module `nbd`.

    python3 -I libnbd_driver.py SOCKET

Takes one connection, and on it calls as (number of an object, name, arguments); "new" makes one.
A name is a function of this file, which works on an nbd.NBD (libnbd's people call it h), or a
method of nbd.NBD itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from multiprocessing.connection import Listener
from typing import Any

nbd: Any = importlib.import_module("nbd")  # which a type checker cannot know

KINDS = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}


def read_chunks(
    h: Any, length: int, offset: int, flags: int
) -> tuple[bytes, list[tuple[int, int, str]]]:
    """pread_structured: the bytes, and each chunk as (offset, length, kind), as they came."""
    chunks = []

    def chunk(data: bytes, at: int, kind: int, error: Any) -> int:
        chunks.append((at, len(data), KINDS[kind]))
        return 0

    return bytes(h.pread_structured(length, offset, chunk, flags)), chunks


def extents(h: Any, length: int, offset: int, flags: int) -> dict[str, list[tuple[int, int]]]:
    """block_status: (length, status flags) of each extent, by context."""
    found: dict[str, list[tuple[int, int]]] = {}

    def extent(context: str, at: int, entries: list[int], error: Any) -> int:
        assert at == offset, (context, at)
        assert context not in found, context
        found[context] = list(zip(entries[::2], entries[1::2], strict=True))
        return 0

    h.block_status(length, offset, extent, flags)
    return found


def exports(h: Any) -> list[tuple[str, str]]:
    """opt_list: names and descriptions."""
    found: list[tuple[str, str]] = []

    def export(name: str, description: str) -> int:
        found.append((name, description))
        return 0

    count = h.opt_list(export)
    assert count == len(found)
    return found


def listed_contexts(h: Any) -> list[str]:
    """opt_list_meta_context: what the queries (add_meta_context) match."""
    found: list[str] = []

    def context(name: str) -> int:
        found.append(name)
        return 0

    count = h.opt_list_meta_context(context)
    assert count == len(found)
    return found


def pipeline(h: Any, commands: list[tuple[str, Any, int, int]]) -> list[Any]:
    """Commands as (verb, data or length, offset, flags), all of them issued before any reply is
    looked at. Of each: the bytes of a pread, None of another, or (errno, text)."""
    results: list[Any] = [None] * len(commands)
    waiting: dict[int, tuple[int, Any]] = {}
    for number, (verb, what, offset, flags) in enumerate(commands):
        issue: Callable[..., int] = getattr(h, f"aio_{verb}")
        buffer = None
        if verb == "pread":
            buffer = nbd.Buffer(what)
            cookie = issue(buffer, offset, flags=flags)
        elif verb == "pwrite":
            buffer = nbd.Buffer.from_bytearray(bytearray(what))
            cookie = issue(buffer, offset, flags=flags)
        elif verb == "flush":
            cookie = issue(flags=flags)
        else:
            cookie = issue(what, offset, flags=flags)
        waiting[cookie] = (number, buffer if verb == "pread" else None)
    while waiting:
        cookie = h.aio_peek_command_completed()
        if not cookie:
            h.poll(-1)
            continue
        number, buffer = waiting.pop(cookie)
        try:
            assert h.aio_command_completed(cookie)
            if buffer is not None:
                results[number] = bytes(buffer.to_bytearray())
        except nbd.Error as exc:
            results[number] = (exc.errnum, exc.string)
    return results


def record_messages(h: Any) -> list[str]:
    """From now on, keep what libnbd's debug log says that the server said of errors."""
    messages: list[str] = []

    def debug(context: str, message: str) -> int:
        if "message" in message:
            messages.append(message)
        return 0

    h.set_debug_callback(debug)
    h.set_debug(True)
    return messages


def serve(path: str) -> None:
    """Answer calls until the other side hangs up."""
    objects: list[Any] = []
    messages: list[list[str]] = []
    with Listener(path, "AF_UNIX") as listener, listener.accept() as connection:
        while True:
            try:
                number, name, arguments = connection.recv()
            except EOFError:
                return
            try:
                if name == "new":
                    objects.append(nbd.NBD())
                    messages.append(record_messages(objects[-1]))
                    answer: Any = len(objects) - 1
                elif name == "messages":
                    answer = messages[number]
                elif name in COMMANDS:
                    answer = COMMANDS[name](objects[number], *arguments)
                else:
                    answer = getattr(objects[number], name)(*arguments)
                    answer = bytes(answer) if isinstance(answer, bytearray) else answer
                connection.send((True, answer))
            except nbd.Error as exc:
                connection.send((False, (exc.errnum, exc.string)))


COMMANDS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (read_chunks, extents, exports, listed_contexts, pipeline)
}

if __name__ == "__main__":
    serve(sys.argv[1])
