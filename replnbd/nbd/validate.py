"""Whether a request may reach a node: the one gate between a peer's numbers and the block layer."""

from __future__ import annotations

from replnbd.nbd import constants as c

# "It also SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly documented
# as applicable to the given request." FUA is "valid for all commands".
_FLAGS_ALLOWED: dict[int, int] = {
    c.CMD_READ: c.CMD_FLAG_FUA,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_DISC: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
}
_CHANGES_DATA = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))
_HAS_PAYLOAD = frozenset((c.CMD_READ, c.CMD_WRITE))
# "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more
# sectors beyond the size of the device"; of a read or a trim, NBD_EINVAL.
_PAST_END_ERROR = {c.CMD_WRITE: c.ENOSPC, c.CMD_WRITE_ZEROES: c.ENOSPC}


def request_error(
    flags: int, command: int, offset: int, length: int, size: int, transmission_flags: int
) -> int:
    """The error that answers this request, or 0 if a node may have it.

    A request of length 0 is valid within the export (the caller answers it without a node).
    DISC is valid whatever its fields say: there is nobody left to tell.
    """
    allowed = _FLAGS_ALLOWED.get(command)
    if allowed is None:
        return c.EINVAL
    if command == c.CMD_DISC:
        return 0
    if not transmission_flags & c.FLAG_SEND_FAST_ZERO:
        allowed &= ~c.CMD_FLAG_FAST_ZERO
    if not transmission_flags & c.FLAG_SEND_FUA:
        allowed &= ~c.CMD_FLAG_FUA
    # Permission first: a client of a read-only export shall read EPERM, whatever else is wrong.
    if command in _CHANGES_DATA and transmission_flags & c.FLAG_READ_ONLY:
        return c.EPERM
    if flags & ~allowed:
        return c.EINVAL
    if command == c.CMD_FLUSH:
        # "For a flush request, length and offset are reserved, and MUST be set to all-zero."
        return c.EINVAL if offset or length else 0
    if length > c.PAYLOAD_BYTES_MAX and command in _HAS_PAYLOAD:
        return c.EINVAL
    if offset + length > size:
        return _PAST_END_ERROR.get(command, c.EINVAL)
    return 0
