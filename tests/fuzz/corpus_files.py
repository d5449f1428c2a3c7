"""The corpus: conversations that matter, one in a file, as hexadecimal digits that people can read.

# what this is about                a comment, to the end of the line
0000 0003  # client flags           bytes, with spaces anywhere
494841 * 33                         the same, so many times
"""

from __future__ import annotations

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def load(path: Path) -> bytes:
    """What a client sends after the greeting."""
    sent = b""
    for line in path.read_text().splitlines():
        digits, _, count = line.partition("#")[0].partition("*")
        sent += bytes.fromhex(digits) * int(count or 1)
    return sent


def load_all() -> dict[str, bytes]:
    """All of them, by name."""
    return {path.stem: load(path) for path in sorted(CORPUS.glob("*.hex"))}
