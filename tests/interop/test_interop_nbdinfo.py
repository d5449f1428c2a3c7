"""nbdinfo on both exports: what it says of them, and its maps after a history, in every form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from interop_support import KIB, MIB, run
from libnbd_support import BASE, BLOCK, CONTEXTS, DEPTH, DIRTY, EXPORTS, NAME, SIZE, TOP, Served
from map_support import Layers, Map

pytestmark = [pytest.mark.interop, pytest.mark.slow]

DESCRIPTIONS = {
    NAME: "secondary disk of colo0: the primary writes here",
    TOP: "the standby's view of colo0",
}
ABILITIES = [
    *("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"),
    *("can_trim", "can_zero"),
]


def described(served: Served, export: str, **differences: Any) -> dict[str, Any]:
    """What nbdinfo must say of an export."""
    return {
        "export-name": export,
        "description": DESCRIPTIONS.get(export, ""),
        "uri": served.uri(export),
        "contexts": CONTEXTS.get(export, CONTEXTS[TOP]),
        "is_rotational": False,
        "is_read_only": False,
        **dict.fromkeys(ABILITIES, True),
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
        "export-size": SIZE,
        "export-size-str": str(SIZE),
        **differences,
    }


# Section: what an export can do


def test_list_describes_both_exports_in_full(served: Served) -> None:
    said = json.loads(run("nbdinfo", "--list", "--json", served.uri("")))
    assert said == {
        "protocol": "newstyle-fixed",
        "TLS": False,
        "structured": True,
        "exports": [described(served, export) for export in EXPORTS],
    }
    text = run("nbdinfo", "--list", served.uri(""))
    for export in EXPORTS:
        assert f'export="{export}":' in text
        assert f"description: {DESCRIPTIONS[export]}" in text


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_alone_is_described_alike(served: Served, export: str) -> None:
    said = json.loads(run("nbdinfo", "--json", "--no-content", served.uri(export)))
    assert said["exports"] == [described(served, export)]
    assert run("nbdinfo", "--size", served.uri(export)) == f"{SIZE}\n"
    assert json.loads(run("nbdinfo", "--size", "--json", served.uri(export))) == SIZE


CAN = {
    "connect": True, "read": True, "write": True, "cache": True, "df": True, "fast-zero": True,
    "flush": True, "fua": True, "multi-conn": True, "trim": True, "zero": True,
    "structured": True,
}  # fmt: skip
READ_ONLY_CAN = CAN | {"write": False, "fast-zero": False, "trim": False, "zero": False}


@pytest.mark.parametrize("export", EXPORTS)
def test_can_and_is_answer_by_the_exit_status(served: Served, export: str) -> None:
    for ability, can in CAN.items():
        run("nbdinfo", "--can", ability, served.uri(export), status=0 if can else 2)
    for quality in ("read-only", "rotational", "tls"):
        run("nbdinfo", "--is", quality, served.uri(export), status=2)
    run("nbdinfo", "--can", "connect", served.uri("nobody"), status=1)


def test_a_read_only_export_says_so(served: Served) -> None:
    add = {"device": TOP, "name": "look", "writable": False}
    served.standby.qmp.execute("nbd-server-add", add)
    said = json.loads(run("nbdinfo", "--json", "--no-content", served.uri("look")))
    cannot = {"can_fast_zero": False, "can_trim": False, "can_zero": False}
    expected = described(served, "look", is_read_only=True, **cannot)
    del expected["description"]  # nobody gave it one
    assert said["exports"] == [expected]
    for ability, can in READ_ONLY_CAN.items():
        run("nbdinfo", "--can", ability, served.uri("look"), status=0 if can else 2)
    run("nbdinfo", "--is", "read-only", served.uri("look"))
    served.standby.qmp.execute("nbd-server-remove", {"name": "look"})


# Section: maps


def nbdinfo_map(served: Served, export: str, context: str) -> Map:
    """What --map says, in both of its forms, whose words must be right, too."""
    words = {
        BASE: {0: "data", 3: "hole,zero"},
        DEPTH: {1: "local", 2: "backing depth 2", 3: "backing depth 3"},
        DIRTY: {0: "clean", 1: "dirty"},
    }[context]
    uri, option = served.uri(export), f"--map={context}"
    found: Map = []
    for each in json.loads(run("nbdinfo", option, "--json", uri)):
        assert each["offset"] == sum(length for length, _ in found)
        assert each["description"] == words[each["type"]]
        found.append((each["length"], each["type"]))
    lines = [line.split(maxsplit=3) for line in run("nbdinfo", option, uri).splitlines()]
    assert [(int(length), int(state)) for _, length, state, _ in lines] == found
    assert [word for *_, word in lines] == [words[state] for _, state in found]

    totals = {each["type"]: each["size"] for each in nbdinfo_totals(uri, option)}
    states = {state for _, state in found}
    assert totals == {each: sum(n for n, state in found if state == each) for each in states}
    return found


def nbdinfo_totals(uri: str, option: str) -> list[dict[str, Any]]:
    """What --totals says."""
    totals: list[dict[str, Any]] = json.loads(run("nbdinfo", option, "--totals", "--json", uri))
    assert sum(each["size"] for each in totals) == SIZE
    return totals


def assert_maps(served: Served, layers: Layers) -> None:
    """All contexts of both exports."""
    assert nbdinfo_map(served, NAME, BASE) == layers.disk_map()
    assert nbdinfo_map(served, NAME, DEPTH) == [(SIZE, 1)]
    assert nbdinfo_map(served, NAME, DIRTY) == layers.dirty_map(layers.hidden)
    assert nbdinfo_map(served, TOP, BASE) == layers.view_map()
    assert nbdinfo_map(served, TOP, DEPTH) == layers.depth_map()
    assert nbdinfo_map(served, TOP, DIRTY) == layers.dirty_map(layers.active)


class Script:
    """A history that is written down: each step changes an export, its bytes and the layers."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.primary, self.standby = (served.connect(export) for export in EXPORTS)
        served.restore(NAME)
        served.checkpoint()
        self.layers = Layers(served.twin.primary)

    def primary_writes(self, offset: int, length: int) -> None:
        data = self.served.rng.randbytes(length)
        self.primary.pwrite(data, offset)
        self.served.twin.primary[offset : offset + length] = data
        self.layers.primary_writes(offset, length)

    def primary_zeroes(self, offset: int, length: int, *, trim: bool = False) -> None:
        (self.primary.trim if trim else self.primary.zero)(length, offset)
        self.served.twin.primary[offset : offset + length] = bytes(length)
        self.layers.primary_zeroes(offset, length)

    def standby_writes(self, offset: int, length: int) -> None:
        data = self.served.rng.randbytes(length)
        self.standby.pwrite(data, offset)
        self.served.twin.view[offset : offset + length] = data
        self.layers.standby_writes(offset, length)

    def standby_zeroes(self, offset: int, length: int, *, trim: bool = False) -> None:
        (self.standby.trim if trim else self.standby.zero)(length, offset)
        self.served.twin.view[offset : offset + length] = bytes(length)
        self.layers.standby_zeroes(offset, length)

    def checkpoint(self) -> None:
        self.served.checkpoint()
        self.layers.checkpoint()

    def close(self) -> None:
        self.primary.close()
        self.standby.close()


def test_the_maps_follow_a_history_step_by_step(served: Served) -> None:
    script = Script(served)
    assert_maps(served, script.layers)
    script.primary_writes(1_000_000, 10)
    assert_maps(served, script.layers)
    script.standby_writes(1_001_000, 5000)
    assert_maps(served, script.layers)
    script.standby_zeroes(MIB, 128 * KIB, trim=True)
    script.primary_zeroes(MIB + 64 * KIB, 128 * KIB)
    assert_maps(served, script.layers)
    script.primary_writes(MIB + 100 * KIB + 1, 1)
    script.standby_writes(MIB + 100 * KIB + 1, 1)
    assert_maps(served, script.layers)
    script.checkpoint()
    assert_maps(served, script.layers)
    script.primary_zeroes(0, 4 * MIB, trim=True)
    assert_maps(served, script.layers)
    script.standby_zeroes(0, 2 * MIB)
    script.standby_writes(SIZE - 1, 1)
    assert_maps(served, script.layers)
    script.checkpoint()
    assert_maps(served, script.layers)
    script.close()


def test_the_maps_follow_random_histories(served: Served) -> None:
    rng, script = served.rng, Script(served)
    steps = [script.primary_writes, script.standby_writes]
    zeroes = [script.primary_zeroes, script.standby_zeroes]
    for _ in range(6):
        for _ in range(6):
            offset = rng.randrange(SIZE)
            rng.choice(steps)(offset, min(rng.randint(1, 50_000), SIZE - offset))
            # Not the last, partial block: a file system zeroes that, and keeps it as data.
            offset = rng.randrange(SIZE // BLOCK) * BLOCK
            length = min(rng.randint(1, 32) * BLOCK, SIZE // BLOCK * BLOCK - offset)
            rng.choice(zeroes)(offset, length, trim=rng.random() < 0.5)
        assert_maps(served, script.layers)
        if rng.random() < 0.4:
            script.checkpoint()
            assert_maps(served, script.layers)
    script.close()
