"""The same random commands through libnbd to replnbd and to qemu-nbd with the same bytes: every
result, every byte and every extent must be the same. What is left out, and why, is in COMMANDS."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from interop_support import KIB, assert_same
from libnbd_support import (
    BASE,
    DEPTH,
    EXPORTS,
    NAME,
    REPLIES,
    SIZE,
    TOP,
    QemuNbd,
    Served,
    write_sparse,
)
from map_support import SUBCLUSTER, as_states
from peers import qemu_img
from peers.libnbd import Command
from peers.nbd_wire import DF, FUA

pytestmark = [pytest.mark.interop, pytest.mark.slow]

COUNT = 150
CLUSTER = 64 * KIB

FLAGS = {"pread": [0, DF], "pwrite": [0, FUA], "zero": [0, FUA], "trim": [0, FUA], "cache": [0]}
"""Not NO_HOLE: replnbd and QEMU provide its space in different ways, and the map shows which. Not
FAST_ZERO: which zeroes are fast is every server's own business."""

COMMANDS = {
    # A raw file: everything, at any offset and of any length.
    NAME: {"pread": 1, "pwrite": 1, "zero": 1, "trim": 1, "cache": 1},
    # Overlays. Zeroes that end within a subcluster: QEMU looks whether the rest of it is zero, too,
    # and then calls all of it a hole; replnbd stores it. Trims: QEMU does whole clusters, and
    # leaves what is around them as it was, where replnbd promises zeroes. No CACHE: qemu-nbd 7.2
    # dies of it (an assertion) where it reaches from a subcluster that is allocated to others.
    TOP: {"pread": 1, "pwrite": 1, "zero": SUBCLUSTER, "trim": CLUSTER},
}
"""What is sent to each export, and its alignment."""


def random_command(rng: random.Random, export: str, replies: str) -> Command:
    """One of COMMANDS."""
    verb, alignment = rng.choice(list(COMMANDS[export].items()))
    offset = rng.randrange(SIZE) // alignment * alignment
    length = rng.randint(1, rng.choice([512, 5000, 100_000]))
    length = min(length + -length % alignment, SIZE - offset)
    flags = rng.choice(FLAGS[verb]) if replies == "structured" or verb != "pread" else 0
    return verb, rng.randbytes(length) if verb == "pwrite" else length, offset, flags


def twin(served: Served, export: str) -> tuple[Path, str]:
    """An image with the same bytes in the same layers, and its format."""
    base = served.folder / f"{export}.base"
    write_sparse(base, served.twin.primary)
    if export == NAME:
        return base, "raw"
    hidden, active = (served.folder / f"{export}.{layer}" for layer in ("hidden", "active"))
    create = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on"]  # as replnbd makes them
    qemu_img(*create, "-b", base, "-F", "raw", hidden)
    qemu_img(*create, "-b", hidden, "-F", "qcow2", active)
    return active, "qcow2"


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("replies", REPLIES)
def test_the_same_commands_have_the_same_results_bytes_and_extents(
    served: Served, export: str, replies: str
) -> None:
    served.restore(NAME)
    served.checkpoint()
    model = served.model(export)
    image, format_ = twin(served, export)
    with QemuNbd(served.folder, image, export, f"--format={format_}") as qemu:
        ours, theirs = (
            served.libnbd.connect(
                uri, structured=replies == "structured", contexts=[BASE, DEPTH], strict=False
            )
            for uri in (served.uri(export), qemu.uri)
        )
        for number in range(COUNT):
            command = random_command(served.rng, export, replies)
            (result,), (expected,) = ours.pipeline([command]), theirs.pipeline([command])
            assert result == expected, f"command {number}: {command[0::2]}"
        content = theirs.pread(SIZE, 0)
        assert_same(ours.pread(SIZE, 0), content, export)
        model[:] = content
        if replies == "structured":
            ours_status, theirs_status = ours.block_status(SIZE, 0), theirs.block_status(SIZE, 0)
            for context in (BASE, DEPTH):
                if (export, context) != (NAME, DEPTH):  # a raw disk has one layer
                    expected = as_states(theirs_status[context])
                    assert as_states(ours_status[context]) == expected, context
        ours.close()
        theirs.close()
