"""TLS for NBD: credentials from files, and who a client is.

X.509: a certificate and its key; with a client CA, clients must show a certificate that it signed.
PSK: a file of lines USER:HEX-KEY, as GnuTLS's psktool writes; it needs Python 3.13.
Both: a client with a key needs no certificate.
"""

from __future__ import annotations

import binascii
import os
import ssl
import stat
from dataclasses import dataclass
from typing import Any

from replnbd.errors import ConfigError
from replnbd.server.farewell import Farewell

PSK_AVAILABLE = hasattr(ssl.SSLContext, "set_psk_server_callback")
INTERNAL_ERROR = bytes.fromhex("15030300020250")
"""The alert that says: it is not your fault."""

_CERTIFICATE, _PRIVATE_KEY = b"CERTIFICATE-----", b"PRIVATE KEY-----"
_FILE_BYTES_MAX = 1 << 20  # more than all of the world's authorities

_PSK_BYTES_MAX = 256  # OpenSSL's PSK_MAX_PSK_LEN

# For TLS 1.2. By name, because "PSK" stands for suites without encryption, too.
_PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256"
_CERTIFICATE_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

# In TLS 1.3 a key needs a suite with SHA-256. With a certificate at hand, OpenSSL prefers others,
# which leave the key unused, and Python cannot tell it to do otherwise.
_VERSION_WITH_BOTH = ssl.TLSVersion.TLSv1_2


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files, and of the PSK file. `key` may be in the file of `certificate`."""

    certificate: str | None = None
    key: str | None = None
    client_ca: str | None = None
    psk: str | None = None


@dataclass(slots=True)
class _Claim:
    """Whose key a client says it has; unless there are keys `alone`, TLS may go on without it."""

    alone: bool
    user: str | None = None
    known: bool = False


class _Context(ssl.SSLContext):
    """For one client. A loop that sees a TLS handshake fail drops the connection, and with it the
    alert that would have told the client why: this one sends it first."""

    claim: _Claim | None = None
    fd = -1
    """Of the client's socket."""
    farewell: Farewell | None = None
    _outgoing: ssl.MemoryBIO

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        self._outgoing = outgoing
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    def send_alert(self) -> None:
        """What the failed handshake had to say."""
        if alert := self._outgoing.read():
            self.farewell = Farewell(self.fd, alert)


class _SslObject(ssl.SSLObject):
    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            context = self.context
            assert isinstance(context, _Context)
            context.send_alert()
            raise


class TlsSession:
    """TLS of one client: `context` is for it alone."""

    def __init__(self, context: _Context) -> None:
        self.context = context

    @property
    def farewell(self) -> Farewell | None:
        """What the client was told when the handshake failed; to be awaited."""
        return self.context.farewell

    def names(self, peer: ssl.SSLObject) -> frozenset[str]:
        """Who the client is: the common name and the DNS names of its certificate, or the user of
        its key. Empty if it showed none."""
        claim = self.context.claim
        if claim is not None and claim.user is not None and _key_was_used(peer):
            return frozenset([claim.user])
        certificate: dict[str, Any] = peer.getpeercert() or {}
        names = [
            value
            for part in certificate.get("subject", ())
            for key, value in part
            if key == "commonName"
        ]
        names += [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
        return frozenset(names)

    def describe_failure(self, exc: BaseException) -> str:
        """Why the handshake failed, for the log."""
        claim, reason = self.context.claim, describe_failure(exc)
        if claim is None or not isinstance(exc, ssl.SSLError):
            return reason
        if claim.user is None:
            no_key = f"the client offers no key that we could use ({reason})"
            return no_key if claim.alone else reason
        if not claim.known:
            return f"there is no key of user {claim.user!r}"
        return f"user {claim.user!r} has another key ({reason})"


class Tls:
    """Credentials in files. They are read for each client (0.5 ms), so that a certificate that was
    renewed counts from the next client on. Raises ConfigError, in one line, if they cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._new_context()

    def session(self, fd: int) -> TlsSession:
        """For one more client, whose socket is `fd`. Raises ConfigError."""
        context = self._new_context()
        context.fd = fd
        return TlsSession(context)

    def _new_context(self) -> _Context:
        context = _Context(ssl.PROTOCOL_TLS_SERVER)
        context.sslobject_class = _SslObject
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A ticket is for the context that gave it: nobody can use it.
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        context.num_tickets = 0
        files = self._files
        if files.certificate is not None:
            _load_certificate(context, files.certificate, files.key)
        if files.client_ca is not None:
            _load_client_ca(context, files.client_ca)
        if files.psk is not None:
            _load_keys(context, files.psk, alone=files.certificate is None)
        return context


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    found = _read("certificate", certificate)
    if _CERTIFICATE not in found:
        raise ConfigError(f"[tls] key 'certificate': {certificate} has no certificate in PEM")
    if key is None and _PRIVATE_KEY not in found:
        raise ConfigError(
            f"[tls] key 'certificate': {certificate} has no private key in PEM, and there is no"
            " key 'key'"
        )
    if key is not None and _PRIVATE_KEY not in _read("key", key):
        raise ConfigError(f"[tls] key 'key': {key} has no private key in PEM")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        files = certificate if key is None else f"{certificate} with key {key}"
        raise ConfigError(f"[tls] cannot use certificate {files}: {_why(exc)}") from exc


def _load_client_ca(context: ssl.SSLContext, path: str) -> None:
    if _CERTIFICATE not in _read("client-ca", path):
        raise ConfigError(f"[tls] key 'client-ca': {path} has no certificate in PEM")
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(path)
    except OSError as exc:
        raise ConfigError(f"[tls] key 'client-ca': cannot use {path}: {_why(exc)}") from exc


def _load_keys(context: _Context, path: str, *, alone: bool) -> None:
    keys = _read_keys(path)
    # Nothing of the context may be in the callback: Python would not see that cycle, and keep it.
    claim = context.claim = _Claim(alone)

    def key_of(user: str | None) -> bytes:
        claim.user, claim.known = user, user in keys
        return keys.get(user or "", b"")  # no key: OpenSSL refuses

    context.set_psk_server_callback(key_of)  # type: ignore[attr-defined]
    if alone:
        context.set_ciphers(_PSK_CIPHERS)
    else:
        context.maximum_version = _VERSION_WITH_BOTH
        context.set_ciphers(f"{_PSK_CIPHERS}:{_CERTIFICATE_CIPHERS}")


def _key_was_used(peer: ssl.SSLObject) -> bool:
    """Or else the client only said that it had one."""
    suite = peer.cipher() or ("", "", 0)
    return "PSK" in suite[0] or bool(peer.session_reused)  # OpenSSL's word for it, in TLS 1.3


def describe_failure(exc: BaseException) -> str:
    """Why TLS failed, for the log, as far as the error tells."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the client's certificate was refused: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        reason = _why(exc)
        return f"the client refused: {reason}" if "alert" in reason else reason
    if isinstance(exc, ConnectionError):
        return "the client hung up; it may not trust our certificate"  # GnuTLS's do not say
    return str(exc) or type(exc).__name__


def _read(key: str, path: str) -> bytes:
    try:
        # A FIFO would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"[tls] key '{key}': {path} is no file")
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"[tls] key '{key}': cannot read {path}: {exc.strerror}") from exc
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(f"[tls] key '{key}': {path} is longer than {_FILE_BYTES_MAX} bytes")
    return content


def _read_keys(path: str) -> dict[str, bytes]:
    if not PSK_AVAILABLE:
        raise ConfigError("[tls] key 'psk': this Python has no TLS-PSK; it needs 3.13 or later")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read("psk", path).decode(errors="replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        user, _, digits = text.rpartition(":")
        try:
            key = binascii.unhexlify(digits)
        except ValueError:
            key = b""
        if not (user and 0 < len(key) <= _PSK_BYTES_MAX):
            raise ConfigError(f"[tls] key 'psk': {path}, line {number}: not USER:HEX-KEY")
        keys[user] = key
    if not keys:
        raise ConfigError(f"[tls] key 'psk': {path} has no keys")
    return keys


def _no_password() -> str:
    # Without this, OpenSSL asks at the terminal.
    raise ValueError("the key is encrypted, and nobody is there to type a password")


def _why(exc: OSError | ValueError) -> str:
    if isinstance(exc, ssl.SSLError):
        if "PEM lib" in str(exc):
            return "not valid PEM"
        return (exc.reason or str(exc)).replace("_", " ").lower()
    return getattr(exc, "strerror", None) or str(exc)
