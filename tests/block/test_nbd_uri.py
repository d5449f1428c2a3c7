"""NBD URIs, as a client reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replnbd.block import NbdTarget, is_nbd_uri, parse_nbd_uri
from replnbd.errors import ConfigError

SOCKET = "/run/nbd.sock"

# The first six are those of doc/uri.md.
NAMES = {
    "nbd://example.com/disk": "disk",
    "nbd+unix:///disk?socket=sock": "disk",
    "nbd://example.com/": "",
    "nbd://example.com": "",
    "nbd://example.com//disk": "/disk",
    "nbd://example.com/hello%20world": "hello world",
    "nbd://example.com/a/b%2Fc": "a/b/c",
    "nbd://example.com/%C3%A4+1": "ä+1",
    "nbd://example.com/ä": "ä",
    "nbd://example.com/a%3Fb%23c": "a?b#c",
    "NBD://example.com/Disk": "Disk",
}


@pytest.mark.parametrize("uri", NAMES)
def test_an_exports_name_is_what_follows_the_first_slash(uri: str) -> None:
    assert parse_nbd_uri(uri).export == NAMES[uri]
    assert is_nbd_uri(uri)


GOOD = {
    "nbd://": NbdTarget("nbd://", "", "localhost", 10809),
    "nbd://host": NbdTarget("nbd://host", "", "host", 10809),
    "nbd://host:1/x": NbdTarget("nbd://host:1/x", "x", "host", 1),
    "nbd://[::1]:2/": NbdTarget("nbd://[::1]:2/", "", "::1", 2),
    "nbd://[::1]": NbdTarget("nbd://[::1]", "", "::1", 10809),
    "nbd+unix:///?socket=a%20b+c": NbdTarget(
        "nbd+unix:///?socket=a%20b+c", "", path="a b+c"
    ),
    "nbd+unix:///?socket=%00hidden": NbdTarget(
        "nbd+unix:///?socket=%00hidden", "", path="\0hidden"
    ),
    "nbds://h/e?tls-certificates=/p%2Fx&tls-hostname=n&tls-verify-peer=0&tls-type=x509": NbdTarget(
        "nbds://h/e?tls-certificates=/p%2Fx&tls-hostname=n&tls-verify-peer=0&tls-type=x509",
        "e", "h", tls=True, certificates="/p/x", tls_hostname="n", verify_peer=False,
    ),
    "nbds+unix://me@/?socket=s&tls-psk-file=keys&tls-type=psk": NbdTarget(
        "nbds+unix://me@/?socket=s&tls-psk-file=keys&tls-type=psk",
        path="s", tls=True, psk_file="keys", user="me",
    ),
}  # fmt: skip


@pytest.mark.parametrize("uri", GOOD)
def test_a_uri_is_a_target(uri: str) -> None:
    assert parse_nbd_uri(uri) == GOOD[uri]
    assert str(parse_nbd_uri(uri)) == uri


def test_a_servers_name_is_the_hosts_or_as_told() -> None:
    assert parse_nbd_uri("nbds://host").peer_name == "host"
    assert parse_nbd_uri("nbds://host?tls-hostname=name").peer_name == "name"
    assert parse_nbd_uri(f"nbds+unix:///?socket={SOCKET}").peer_name is None


BAD = {
    "disk.raw": "it must begin with",
    "http://host": "it must begin with",
    "nbd+vsock://1": "it must begin with",
    "nbd:host/disk": "two slashes",
    "nbd://host:0x1": "(?i)port",
    "nbd://host:99999": "(?i)port",
    "nbd://[::1": "",
    "nbd://h/#x": "fragment",
    "nbd://h/#": "fragment",
    "nbd://h/%ff": "utf-8",
    "nbd://h/%00": "NUL",
    "nbd://h/" + "x" * 4097: "4096",
    "nbd://h/a b": "percent-encoded",
    "nbd://h/a\nb": "percent-encoded",
    "nbd://h?socket=/x": "socket",
    "nbd://h?what=1": "unknown parameter 'what'",
    "nbd://h?what": "no value",
    "nbd+unix:///": "needs a socket",
    "nbd+unix:///?socket=": "needs a socket",
    "nbd+unix:///?socket=a&socket=b": "twice",
    "nbd+unix://host/?socket=a": "no host",
    "nbd+unix://:1/?socket=a": "no host",
    "nbd+unix:///?socket=a%00b": "107",
    "nbd+unix:///?socket=" + "x" * 108: "107",
    "nbd://u:p@h": "password",
    "nbd://me@h": "nbds",
    "nbd://h?tls-certificates=/x": "nbds",
    "nbds://h?tls-certificates=": "empty",
    "nbds://h?tls-certificates=%00": "NUL",
    "nbds://h?tls-certificates=a&tls-psk-file=b": "exclude",
    "nbds://h?tls-verify-peer=2": "0 or 1",
    "nbds://h?tls-type=anon": "tls-type",
    "nbds://h?tls-type=psk": "tls-type",
    "nbds://h?tls-psk-file=x&tls-type=x509": "tls-type",
}


@pytest.mark.parametrize("uri", BAD)
def test_a_bad_uri_is_refused_in_one_line_that_names_it(uri: str) -> None:
    with pytest.raises(ConfigError, match=BAD[uri] or None) as caught:
        parse_nbd_uri(uri)
    text = str(caught.value)
    assert text.isprintable()
    assert (uri if uri.isprintable() else repr(uri)) in text


@pytest.mark.parametrize(
    "path", ["disk.raw", "nbd", "nbd:host", "/nbd://x", "nbdx://h", "", "file://x"]
)
def test_a_path_is_no_uri(path: str) -> None:
    assert not is_nbd_uri(path)


@given(st.text(alphabet="nbds+unix:/@?&=%#[]0123456789tlspkfilocket-ä \0\n", max_size=60))
def test_any_text_is_a_target_or_an_error(text: str) -> None:
    try:
        target = parse_nbd_uri(f"nbd{text}")
    except ConfigError:
        return
    assert (target.host is None) != (target.path is None)
