"""What the server tells the handshake: which exports there are, for whom, and what TLS is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class TlsMode(Enum):
    """What a listener makes of TLS (proto.md, "Server-side requirements")."""

    OFF = "off"
    """NOTLS."""
    ON = "on"
    """SELECTIVETLS: who wants it gets it; exports with an allow-list need it."""
    REQUIRE = "require"
    """FORCEDTLS: nothing but STARTTLS and ABORT before it."""


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """What is known of a client: whether TLS runs, and the names its certificate (or key) gives."""

    secure: bool = False
    names: frozenset[str] = frozenset()

    def __str__(self) -> str:
        names = ", ".join(repr(name) for name in sorted(self.names))
        return names or "clients without a certificate"


@dataclass(frozen=True, slots=True)
class ExportOffer:
    """What the handshake says of an export, to one client."""

    name: str
    description: str
    size: int
    transmission_flags: int
    refusal: str | None = None
    """Why this client may not use it now; such an export is not listed."""
    needs_tls: bool = False
    """Nothing is said of it before TLS runs."""
    contexts: tuple[str, ...] = ()
    """Names of the metadata contexts it has; an id is a position here, from 1 on."""
    writers: str | None = None
    """The context by which those are known who may write; None: everybody may."""


class ExportDirectory(Protocol):
    """Where the handshake looks exports up, at the moment it is asked."""

    def offers(self, client: ClientIdentity) -> Iterable[ExportOffer]:
        """All exports that are listed, in their order."""

    def offer(self, name: str, client: ClientIdentity) -> ExportOffer | None:
        """The export of that name, if there is one; "" is the default export."""
