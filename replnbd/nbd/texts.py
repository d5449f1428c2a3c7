"""Texts for people, as they go over the wire."""

from __future__ import annotations

from replnbd.nbd import constants as c


def wire_text(text: str) -> bytes:
    """UTF-8 of legal length, without half a character; what cannot be encoded (of a path, maybe) is
    a question mark."""
    whole = text.encode(errors="replace")
    if len(whole) <= c.NAME_BYTES_MAX:
        return whole
    return whole[: c.NAME_BYTES_MAX].decode(errors="ignore").encode()
