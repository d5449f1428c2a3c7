"""Whether a request may reach a node: the one gate between a peer's numbers and the block layer."""

from __future__ import annotations

from typing import NamedTuple

from replnbd.nbd import constants as c
from replnbd.nbd.transmission import Request

# "It also SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly documented
# as applicable to the given request." FUA is "valid for all commands".
_FLAGS_ALLOWED: dict[int, int] = {
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE | c.CMD_FLAG_PAYLOAD_LEN,
}
# Flags that an export must have offered before a command may have them.
_OFFERED_BY = {
    c.CMD_FLAG_FUA: c.FLAG_SEND_FUA,
    c.CMD_FLAG_DF: c.FLAG_SEND_DF,
    c.CMD_FLAG_FAST_ZERO: c.FLAG_SEND_FAST_ZERO,
    c.CMD_FLAG_PAYLOAD_LEN: c.FLAG_BLOCK_STATUS_PAYLOAD,
}
_CHANGES_DATA = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))
_HAS_PAYLOAD = frozenset((c.CMD_READ, c.CMD_WRITE))
# "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more
# sectors beyond the size of the device"; of a read or a trim, NBD_EINVAL.
_PAST_END_ERROR = {c.CMD_WRITE: c.ENOSPC, c.CMD_WRITE_ZEROES: c.ENOSPC}


class Refusal(NamedTuple):
    """Why a request is answered without a node: the error of the wire, and a text for people."""

    error: int
    text: str


class RequestRules:
    """What one connection may ask for, as negotiated: a client is held to what it was told."""

    def __init__(
        self, size: int, transmission_flags: int, *, extended: bool = False, contexts: int = 0
    ) -> None:
        """`contexts`: how many metadata contexts were selected."""
        self._size = size
        self._read_only = bool(transmission_flags & c.FLAG_READ_ONLY)
        self._contexts = contexts
        withheld = 0
        for flag, offered_by in _OFFERED_BY.items():
            if not transmission_flags & offered_by:
                withheld |= flag
        self._allowed = {command: flags & ~withheld for command, flags in _FLAGS_ALLOWED.items()}
        if not transmission_flags & c.TransmissionFlag.SEND_CACHE:
            del self._allowed[c.CMD_CACHE]
        # "With extended headers, the flag MUST be set for NBD_CMD_WRITE".
        self._write_flags = c.CMD_FLAG_PAYLOAD_LEN if extended else 0
        self._allowed[c.CMD_WRITE] |= self._write_flags

    def refusal(self, request: Request) -> Refusal | None:
        """What answers this request, or None if a node may have it.

        A request of length 0 is valid within the export (the caller answers it without a node),
        but for BLOCK_STATUS. One whose payload has a form of its own is looked at once more when
        that is there. DISC is not asked about: there is nobody left to tell.
        """
        flags, command, _, offset, length = request
        name = c.command_name(command)
        allowed = self._allowed.get(command)
        if allowed is None:
            return Refusal(c.EINVAL, f"{name} is not known here")
        # Permission first: a client of a read-only export shall read EPERM, whatever else is wrong.
        if command in _CHANGES_DATA and self._read_only:
            return Refusal(c.EPERM, f"{name} on a read-only export")
        if flags & ~allowed:
            return Refusal(c.EINVAL, f"{name} with flags {flags & ~allowed:#x}")
        if command == c.CMD_FLUSH:
            # "For a flush request, length and offset are reserved, and MUST be set to all-zero."
            if offset or length:
                return Refusal(c.EINVAL, "FLUSH with an offset or a length")
            return None
        if command == c.CMD_WRITE and self._write_flags & ~flags:
            return Refusal(c.EINVAL, "WRITE without PAYLOAD_LEN")
        if length > c.PAYLOAD_BYTES_MAX and command in _HAS_PAYLOAD:
            text = f"{name} of {length} bytes, more than {c.PAYLOAD_BYTES_MAX}"
            return Refusal(c.EINVAL, text)
        if command == c.CMD_BLOCK_STATUS:
            return self._status_refusal(flags, offset, length)
        return self._range_refusal(command, offset, length)

    def _status_refusal(self, flags: int, offset: int, length: int) -> Refusal | None:
        if not self._contexts:
            return Refusal(c.EINVAL, "BLOCK_STATUS without a metadata context")
        if flags & c.CMD_FLAG_PAYLOAD_LEN:
            count, rest = divmod(length - 8, 4)  # "The payload form MUST occupy 8 + n*4 bytes"
            if rest or not 0 < count <= self._contexts:
                return Refusal(c.EINVAL, f"BLOCK_STATUS with a payload of {length} bytes")
            return None
        return self.effect_refusal(offset, length)

    def effect_refusal(self, offset: int, length: int) -> Refusal | None:
        """`refusal` for the effect length of a BLOCK_STATUS."""
        if not length:
            return Refusal(c.EINVAL, "BLOCK_STATUS of no bytes")
        return self._range_refusal(c.CMD_BLOCK_STATUS, offset, length)

    def _range_refusal(self, command: int, offset: int, length: int) -> Refusal | None:
        if offset + length <= self._size:
            return None
        text = f"{c.command_name(command)} at {offset} of {length} bytes ends past {self._size}"
        return Refusal(_PAST_END_ERROR.get(command, c.EINVAL), text)


class NothingAllowed(RequestRules):
    """For a connection that is to end: "The error value issued in respect of these requests and
    any subsequently received requests SHOULD be NBD_ESHUTDOWN"."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def refusal(self, request: Request) -> Refusal:
        return Refusal(c.ESHUTDOWN, self._reason)
