"""The exceptions replnbd raises, apart from OSError.

    ReplnbdError                 everything below; its text is one line fit for a user
    |-- ConfigError              a configuration, an option or a command-line value is wrong
    |-- ImageError               bytes on disk that are no image we can trust
    |   `-- ImageUnsupportedError   a valid image that uses a feature replnbd does not have
    |-- ProtocolError            the peer broke the NBD protocol; its connection must end
    |-- StateError               the command does not fit the present state (stage, job status)
    `-- ControlError             a QMP command failed; carries the QMP error class

I/O on a block node fails with OSError, whose errno says what the client is told
(replnbd.nbd.constants maps it to an NBD error). Anything else that escapes is our own bug.
"""


class ReplnbdError(Exception):
    """Base class: the message is one line that says what is wrong, where, and what to do."""


class ConfigError(ReplnbdError):
    """A configuration file, option or argument is wrong; names file, table and key."""


class ImageError(ReplnbdError):
    """An image's bytes are malformed; names the file, the field and its value."""


class ImageUnsupportedError(ImageError):
    """The image is well-formed but needs a feature that replnbd does not have."""


class ProtocolError(ReplnbdError):
    """The peer sent bytes that leave the stream beyond repair: close the connection."""


class StateError(ReplnbdError):
    """The command does not fit the present state; where QEMU has a text for it, it is QEMU's."""


class ControlError(ReplnbdError):
    """A QMP command failed. `error_class` is one of the classes of QMP (qapi/error.json)."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class
