"""Credentials that cannot be used are refused in one line that says which, and why."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from tls_wire import Pki
from tls_wire import pki as pki

from replnbd.errors import ConfigError
from replnbd.server import Tls, TlsFiles

USER_NOBODY = 65534
GOOD_KEY = "00112233445566778899aabbccddeeff"
NO_PEM = {
    "empty": b"",
    "random": bytes(range(256)) * 4,
    "text": b"-----BEGIN NOTHING-----\nAAAA\n-----END NOTHING-----\n",
}
BROKEN_PEM = {
    "not base64": b"-----BEGIN {}-----\n!!!!\n-----END {}-----\n",
    "not DER": b"-----BEGIN {}-----\nAAAA\n-----END {}-----\n",
    "half": b"-----BEGIN {}-----\nMIIBszCCAVmgAwIBAgIUE5+8\n",
}
ROLES = ["certificate", "key", "client-ca"]
WHAT = {"certificate": "certificate", "key": "private key", "client-ca": "certificate"}


def refusal(files: TlsFiles) -> str:
    """The one line."""
    with pytest.raises(ConfigError) as caught:
        Tls(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_file(pki: Pki, role: str, path: Path) -> TlsFiles:
    """Good files, but for one."""
    good = {
        "certificate": str(pki.server.certificate),
        "key": str(pki.server.key),
        "client_ca": str(pki.authority.certificate),
    }
    return TlsFiles(**(good | {role.replace("-", "_"): str(path)}))


@contextlib.contextmanager
def an_ordinary_user() -> Iterator[None]:
    """For whom permissions count."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(USER_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("role", [*ROLES, "psk"])
def test_what_is_no_readable_file_is_refused(
    pki: Pki, short_dir: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.server.tls.PSK_AVAILABLE", True)
    place = f"[tls] key '{role}': "
    gone = short_dir / "gone"
    said = refusal(with_file(pki, role, gone))
    assert said == f"{place}cannot read {gone}: No such file or directory"
    said = refusal(with_file(pki, role, short_dir))
    assert said in (
        f"{place}cannot read {short_dir}: Is a directory",
        f"{place}{short_dir} is no file",
    )
    pipe = short_dir / "pipe"
    os.mkfifo(pipe)
    assert refusal(with_file(pki, role, pipe)) == f"{place}{pipe} is no file"
    assert refusal(with_file(pki, role, Path("/dev/zero"))) == f"{place}/dev/zero is no file"


@pytest.mark.parametrize("role", [*ROLES, "psk"])
def test_what_may_not_be_read_is_refused(
    short_dir: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.server.tls.PSK_AVAILABLE", True)
    pki, locked = Pki(short_dir / "pki"), short_dir / "locked"
    locked.touch(mode=0)
    pki.server.key.chmod(0o644)
    short_dir.chmod(0o755)
    with an_ordinary_user():
        said = refusal(with_file(pki, role, locked))
    assert said == f"[tls] key '{role}': cannot read {locked}: Permission denied"


@pytest.mark.parametrize("role", [*ROLES, "psk"])
def test_a_file_is_read_whole_or_refused(
    pki: Pki, tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.server.tls.PSK_AVAILABLE", True)
    path = tmp_path / "long"
    path.write_bytes(f"alice:{GOOD_KEY}\n".encode() * 30_000)
    said = refusal(with_file(pki, role, path))
    assert said == f"[tls] key '{role}': {path} is longer than 1048576 bytes"


@pytest.mark.parametrize("content", NO_PEM.values(), ids=NO_PEM)
@pytest.mark.parametrize("role", ROLES)
def test_what_is_not_pem_is_refused(pki: Pki, tmp_path: Path, role: str, content: bytes) -> None:
    path = tmp_path / "x.pem"
    path.write_bytes(content)
    said = refusal(with_file(pki, role, path))
    assert said == f"[tls] key '{role}': {path} has no {WHAT[role]} in PEM"


@pytest.mark.parametrize("content", BROKEN_PEM.values(), ids=BROKEN_PEM)
@pytest.mark.parametrize("role", ROLES)
def test_broken_pem_is_refused(pki: Pki, tmp_path: Path, role: str, content: bytes) -> None:
    path = tmp_path / "x.pem"
    path.write_bytes(content.replace(b"{}", WHAT[role].upper().encode()))
    said = refusal(with_file(pki, role, path))
    certificate, key = pki.server
    assert (
        said
        == {
            "certificate": f"[tls] cannot use certificate {path} with key {key}: not valid PEM",
            "key": f"[tls] cannot use certificate {certificate} with key {path}: not valid PEM",
            "client-ca": f"[tls] key 'client-ca': cannot use {path}: not valid PEM",
        }[role]
    )


def test_certificate_and_key_in_each_others_place_are_refused(pki: Pki) -> None:
    certificate, key = pki.server
    said = refusal(TlsFiles(str(key), str(certificate)))
    assert said == f"[tls] key 'certificate': {key} has no certificate in PEM"
    said = refusal(TlsFiles(str(certificate), str(certificate)))
    assert said == f"[tls] key 'key': {certificate} has no private key in PEM"


def test_the_key_of_another_certificate_is_refused(pki: Pki) -> None:
    certificate, key = str(pki.server.certificate), str(pki.client.key)
    said = refusal(TlsFiles(certificate, key))
    assert said == f"[tls] cannot use certificate {certificate} with key {key}: key values mismatch"


def test_a_certificate_and_its_key_may_be_one_file(pki: Pki, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pki.server.certificate.read_bytes() + pki.server.key.read_bytes())
    Tls(TlsFiles(str(both)))
    certificate = str(pki.server.certificate)
    assert refusal(TlsFiles(certificate)) == (
        f"[tls] key 'certificate': {certificate} has no private key in PEM,"
        " and there is no key 'key'"
    )


@pytest.fixture(params=[PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def locked_key(pki: Pki, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The server's, with a password."""
    key = load_pem_private_key(pki.server.key.read_bytes(), None)
    path = tmp_path / "locked.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, request.param, BestAvailableEncryption(b"secret"))
    )
    return path


def test_a_key_with_a_password_is_refused(pki: Pki, locked_key: Path) -> None:
    certificate = pki.server.certificate
    assert refusal(TlsFiles(str(certificate), str(locked_key))) == (
        f"[tls] cannot use certificate {certificate} with key {locked_key}:"
        " the key is encrypted, and nobody is there to type a password"
    )


@pytest.mark.slow
def test_no_password_is_asked_for_at_a_terminal(pki: Pki, locked_key: Path) -> None:
    terminal, theirs = pty.openpty()
    code = "import sys; from replnbd.server import *; Tls(TlsFiles(*sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pki.server.certificate), str(locked_key)],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # OpenSSL asks at /dev/tty
        text=True,
    )
    try:
        _, said = process.communicate(timeout=20)
        assert "nobody is there to type a password" in said
        os.set_blocking(terminal, False)
        with pytest.raises(BlockingIOError):
            os.read(terminal, 1000)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(theirs)


BAD_LINES = {
    "no colon": "alice",
    "no user": f":{GOOD_KEY}",
    "no key": "alice:",
    "no hex digits": "alice:secret",
    "half a digit": f"alice:{GOOD_KEY}0",
    "a key of 257 bytes": f"alice:{'00' * 257}",
    "two keys": f"alice:{GOOD_KEY} {GOOD_KEY}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_keys_is_refused_by_its_number(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.server.tls.PSK_AVAILABLE", True)
    path = tmp_path / "keys.psk"
    path.write_text(f"# users\n\nbob:{GOOD_KEY}\n{line}\ncarol:{GOOD_KEY}\n")
    said = refusal(TlsFiles(psk=str(path)))
    assert said == f"[tls] key 'psk': {path}, line 4: not USER:HEX-KEY"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# nobody\n"])
def test_a_file_without_keys_is_refused(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.server.tls.PSK_AVAILABLE", True)
    path = tmp_path / "keys.psk"
    path.write_bytes(content)
    assert refusal(TlsFiles(psk=str(path))) == f"[tls] key 'psk': {path} has no keys"


def test_a_file_of_keys_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replnbd.server.tls.PSK_AVAILABLE", True)
    path = tmp_path / "keys.psk"
    path.write_bytes(bytes(range(128, 256)))
    said = refusal(TlsFiles(psk=str(path)))
    assert said == f"[tls] key 'psk': {path}, line 1: not USER:HEX-KEY"
