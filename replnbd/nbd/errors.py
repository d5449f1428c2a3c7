"""Which errno becomes which error of the protocol: one table, for every command."""

from __future__ import annotations

import errno

from replnbd.nbd import constants as c

# "It also SHOULD map the EDQUOT and EFBIG errors to NBD_ENOSPC." What refuses a writer is EPERM.
# NBD_EOVERFLOW has no use here: it "SHOULD NOT" be sent but for an unfragmented structured read,
# and those go up to the largest payload.
_WIRE_ERRORS: dict[int, int] = {
    errno.EPERM: c.EPERM,
    errno.EACCES: c.EPERM,
    errno.EROFS: c.EPERM,
    errno.EIO: c.EIO,
    errno.ENOMEM: c.ENOMEM,
    errno.EINVAL: c.EINVAL,
    errno.ENOSPC: c.ENOSPC,
    errno.EDQUOT: c.ENOSPC,
    errno.EFBIG: c.ENOSPC,
    errno.ESHUTDOWN: c.ESHUTDOWN,
}


def wire_error(error: OSError, flags: int = 0) -> int:
    """The error to send for `error`; log `error` first, for this says less. `flags`: the request's.

    An errno the protocol has no word for is an I/O error. NBD_ENOTSUP belongs to FAST_ZERO alone
    ("The server SHOULD NOT return NBD_ENOTSUP except ...").
    """
    if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP) and flags & c.CMD_FLAG_FAST_ZERO:
        return c.ENOTSUP
    return _WIRE_ERRORS.get(error.errno or errno.EIO, c.EIO)


_KNOWN_ERRORS = frozenset(int(error) for error in c.WireError)


def error_number(error: int) -> int:
    """The errno of an error that a server sent: they are called the same, and so they are.

    "The client SHOULD treat an unexpected error value as if it had been NBD_EINVAL": 0, too.
    """
    return error if error in _KNOWN_ERRORS else errno.EINVAL


assert all(getattr(errno, error.name) == error for error in c.WireError)
