"""Coverage-guided fuzzing of the protocol core, for who has atheris (pip install atheris):

    python tests/fuzz/with_atheris.py TARGET [DIRECTORY] [options of libFuzzer]

TARGET is one of fuzz_core.TARGETS; what libFuzzer finds worth keeping goes to DIRECTORY. The suite
does without: there are wheels for Linux on x86-64 only, of 35 MB, and its compiler elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["replnbd.nbd", "construct"]):
        import replnbd.nbd  # noqa: F401
    from corpus_files import load_all
    from fuzz_core import TARGETS

    name, directories = sys.argv[1], [each for each in sys.argv[2:] if not each.startswith("-")]
    if name == "handshake" and directories:
        for stem, sent in load_all().items():
            Path(directories[0], stem).write_bytes(b"\0" + sent)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
