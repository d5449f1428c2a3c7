"""Two CPU-minutes of the fuzzer, and every conversation that it or a person has found to matter.

A failure shows its seed and what was sent; `scripts/fuzz --seed` repeats it, for longer.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus_files import load_all
from fuzz_check import check_answers, check_disk
from fuzz_core import TARGETS, handshake
from fuzz_live import Arena
from fuzz_run import fuzz_core, fuzz_live
from fuzz_sessions import Ending, Script
from nbd_model import Meaning
from peers import PeerError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CORPUS = load_all()
LIVE_SHARDS, LIVE_CPU_S = 4, 22.0
CORE_CPU_S = 10.0


def fresh_seed() -> int:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return seed


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("shard", range(LIVE_SHARDS))
def test_a_daemon_answers_any_clients_as_the_model_does(short_dir: Path, shard: int) -> None:
    counts = fuzz_live(fresh_seed(), LIVE_CPU_S, short_dir)
    print(counts)
    assert counts.sessions > 100
    assert counts.requests > 500


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_core_answers_any_bytes_as_the_model_does(target: str) -> None:
    counts = fuzz_core(target, fresh_seed(), CORE_CPU_S)
    print(counts)
    assert counts.inputs > 500


@pytest.mark.interop
@pytest.mark.slow
def test_the_door_says_what_was_done_and_which_seeds_repeat_it() -> None:
    argv = [sys.executable, str(SCRIPTS / "fuzz.py"), "--minutes", "0.05", "--seed", "7"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "seeds 7 to 7"
    assert lines[-1] == "no finding"
    assert [line.split(":")[0] for line in lines[1:-1]] == ["live", "memory", *TARGETS]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with Arena(tmp_path_factory.mktemp("a"), 1) as arena:
        yield arena
        arena.finish()


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("ending", Ending)
@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_against_a_daemon(arena: Arena, name: str, ending: Ending) -> None:
    sent = CORPUS[name]
    for cuts in ((), tuple(range(1, min(len(sent), 400), 7))):
        arena.play([Script(name, sent, cuts, frozenset(cuts[::3]), ending)])


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_against_the_core(name: str) -> None:
    """The first byte says with how much of TLS, and in which pieces."""
    for how in range(256):
        handshake(bytes([how]) + CORPUS[name])


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_export_name", "list_with_data", "past_the_end"])
def test_the_fuzzer_finds_a_wrong_byte_wherever_it_is(arena: Arena, name: str) -> None:
    """As well as one too many, and one too few."""
    disk = bytes(arena.disks["d"])
    client, meaning = arena.converse(Script(name, CORPUS[name], (), frozenset(), Ending.FIN))
    good = bytes(client.received)
    assert is_right(good, meaning, disk)
    texts = [b"LIST takes no data", b"STRUCTURED_REPLY takes no data"]
    free = {good.find(text) + at for text in texts if text in good for at in range(len(text))}
    for at in sorted(set(range(len(good))) - free):
        wrong = bytearray(good)
        wrong[at] ^= 1
        assert not is_right(bytes(wrong), meaning, disk), f"byte {at} may be anything"
        assert not is_right(good[:at], meaning, disk)
    assert not is_right(good + b"\0", meaning, disk)
    assert meaning.session is not None
    check_disk(meaning.session, check_answers(good, meaning), arena.disks["d"])


def is_right(received: bytes, meaning: Meaning, disk: bytes) -> bool:
    assert meaning.session is not None
    try:
        answers = check_answers(received, meaning)
        check_disk(meaning.session, answers, bytearray(disk))
    except (PeerError, struct.error, UnicodeDecodeError):
        return False
    return True
