"""TLS for NBD clients: credentials from files, and whether a server is who it should be.

X.509: the server's certificate must be signed by an authority that we trust, and be for the name
that we connect to (a server on a unix socket has none, unless the URI gives it one). PSK: the
server has the key that we have; it needs Python 3.13.
"""

from __future__ import annotations

import binascii
import errno
import getpass
import os
import ssl

from replnbd.block.nbd_uri import NbdTarget
from replnbd.errors import ConfigError

PSK_AVAILABLE = hasattr(ssl.SSLContext, "set_psk_client_callback")

_FILE_BYTES_MAX = 1 << 20
_PSK_BYTES_MAX = 256  # OpenSSL's PSK_MAX_PSK_LEN

# For TLS 1.2. By name, because "PSK" stands for suites without encryption, too.
_PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256"


def client_context(target: NbdTarget) -> ssl.SSLContext:
    """For one session with `target`; files are read each time, so that renewed ones count.

    Raises ConfigError, in one line, if its credentials cannot be used.
    """
    assert target.tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = target.verify_peer and target.peer_name is not None
    if not target.verify_peer:
        context.verify_mode = ssl.CERT_NONE
    if target.psk_file is not None:
        _load_key(context, target)
    elif target.certificates is None:
        context.load_default_certs()
    else:
        _load_certificates(context, target, target.certificates)
    return context


def check_server(target: NbdTarget, server: ssl.SSLObject) -> None:
    """After TLS has begun: with a key, that it was used. OpenSSL goes on without it when the server
    shows a certificate instead. OSError."""
    if target.psk_file is None:
        return
    suite = server.cipher() or ("", "", 0)
    if "PSK" not in suite[0] and not server.session_reused:  # OpenSSL's word for it, in TLS 1.3
        raise OSError(errno.EACCES, "the server does not prove that it has the key")


def _load_certificates(context: ssl.SSLContext, target: NbdTarget, directory: str) -> None:
    def path(name: str) -> str:
        return os.path.join(directory, name)

    authority = path("ca-cert.pem")
    if target.verify_peer or os.path.exists(authority):
        try:
            context.load_verify_locations(authority)
        except OSError as exc:  # ssl.SSLError is one
            raise _unusable(target, authority, exc) from exc
    certificate, key = path("client-cert.pem"), path("client-key.pem")
    there = [os.path.exists(certificate), os.path.exists(key)]
    if not any(there):
        return
    if not all(there):
        missing = key if there[0] else certificate
        raise ConfigError(f"cannot connect to {target}: there is no {missing}")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as exc:
        raise _unusable(target, f"{certificate} with {key}", exc) from exc


def _load_key(context: ssl.SSLContext, target: NbdTarget) -> None:
    if not PSK_AVAILABLE:
        raise ConfigError(
            f"cannot connect to {target}: this Python has no TLS-PSK; it needs 3.13 or later"
        )
    user = target.user or getpass.getuser()
    identity = (user, _read_key(target, user))
    # Who has our key is whom we want, whatever it is called: it shows no certificate.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(_PSK_CIPHERS)
    context.set_psk_client_callback(lambda hint: identity)  # type: ignore[attr-defined]


def _read_key(target: NbdTarget, user: str) -> bytes:
    path = target.psk_file
    assert path is not None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(_FILE_BYTES_MAX).splitlines()
    except OSError as exc:
        raise _unusable(target, path, exc) from exc
    for line in lines:
        name, _, digits = line.strip().rpartition(":")
        if name != user:
            continue
        try:
            key = binascii.unhexlify(digits)
        except ValueError:
            key = b""
        if not 0 < len(key) <= _PSK_BYTES_MAX:
            raise ConfigError(f"cannot connect to {target}: {path} has no usable key of '{user}'")
        return key
    raise ConfigError(f"cannot connect to {target}: {path} has no key of user '{user}'")


def _unusable(target: NbdTarget, what: str, exc: OSError | ValueError) -> ConfigError:
    if isinstance(exc, ssl.SSLError):
        why = (exc.reason or "not valid PEM").replace("_", " ").lower()
    else:
        why = getattr(exc, "strerror", None) or str(exc)
    return ConfigError(f"cannot connect to {target}: cannot use {what}: {why}")


def _no_password() -> str:
    # Without this, OpenSSL asks at the terminal.
    raise ValueError("the key is encrypted, and nobody is there to type a password")
