"""What a client remembers of a request until its reply is complete.

A WRITE, a FLUSH and the like need no more than a `Transaction`; a READ, a BLOCK_STATUS, and what
has failed before the last chunk of its reply, a `Progress` as well.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable

from replnbd.errors import ProtocolError
from replnbd.nbd import constants as c
from replnbd.nbd.constants import command_name

Done = Callable[[OSError | None], None]
"""Told once how a request ended: None, or why it failed."""

PIECES_MAX = 4096
"""Of one READ, that do not touch: more are harm, not a disk (a server "SHOULD use chunks with
lengths and offsets as an integer multiple of 512 bytes")."""

ERRORS_MAX = 1024
"""Error chunks in one reply."""


class Coverage:
    """Which bytes of a READ have come: no two chunks may have the same, and all must be there."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def add(self, start: int, end: int) -> None:
        """Count a chunk; ProtocolError if it overlaps another."""
        starts, ends = self._starts, self._ends
        index = bisect_right(starts, start)
        if (index and ends[index - 1] > start) or (index < len(starts) and starts[index] < end):
            raise ProtocolError(f"two chunks of a READ overlap in bytes {start} to {end} of it")
        self.total += end - start
        joins_left = index > 0 and ends[index - 1] == start
        joins_right = index < len(starts) and starts[index] == end
        if joins_left and joins_right:
            ends[index - 1] = ends.pop(index)
            del starts[index]
        elif joins_left:
            ends[index - 1] = end
        elif joins_right:
            starts[index] = start
        else:
            starts.insert(index, start)
            ends.insert(index, end)
            if len(starts) > PIECES_MAX:
                raise ProtocolError(f"a READ in more than {PIECES_MAX} pieces")


class Progress:
    """How far a reply has come. `into`: where a READ's bytes go; None: nobody wants them any more.
    `statuses`: of a BLOCK_STATUS, by context id."""

    __slots__ = ("_coverage", "errors", "failure", "into", "statuses")

    def __init__(
        self,
        into: memoryview | None = None,
        statuses: dict[int, list[tuple[int, int]]] | None = None,
    ) -> None:
        self.into = into
        self.statuses = {} if statuses is None else statuses
        self.failure: OSError | None = None
        self.errors = 0
        self._coverage: Coverage | None = None

    @property
    def untouched(self) -> bool:
        """Nothing has come yet."""
        return self._coverage is None and self.failure is None

    def cover(self, start: int, end: int) -> None:
        """Count a chunk of a READ; ProtocolError if it overlaps another."""
        if self._coverage is None:
            self._coverage = Coverage()
        self._coverage.add(start, end)

    def fail(self, failure: OSError) -> None:
        """An error chunk came; the first one counts."""
        self.failure = self.failure or failure
        self.errors += 1
        if self.errors > ERRORS_MAX:
            raise ProtocolError(f"more than {ERRORS_MAX} errors in one reply")

    def verdict(self, command: int, offset: int, length: int, contexts: int) -> OSError | None:
        """Why a request whose reply is complete has failed. `contexts`: how many are selected."""
        if self.failure is not None:
            return self.failure
        where = f"{command_name(command)} at {offset} of {length} bytes"
        covered = 0 if self._coverage is None else self._coverage.total
        if command == c.CMD_READ and covered != length:
            text = f"{where}: the server sent only {covered} bytes"
            return OSError(errno.EIO, text)
        told = len(self.statuses)
        if command == c.CMD_BLOCK_STATUS and told != contexts:
            text = f"{where}: the server told of {told} contexts, not of {contexts}"
            return OSError(errno.EIO, text)
        return None


Transaction = tuple[int, int, int, int, Done, Progress | None]
"""(command, offset, length, bytes sent, done, progress): a plain tuple, for speed."""
