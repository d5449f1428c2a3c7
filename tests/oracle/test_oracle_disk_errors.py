"""Failing disks, in QEMU and in replnbd alike: a commit that fails, a hidden overlay that is full.

The errors are real ones: a limit on the peer's file size (EFBIG) that comes and goes while it runs.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from oracle_check import Checked
from oracle_model import Difference
from oracle_ops import CLUSTER, Op, Setup, Side, Stage, Verb, small_io
from oracle_worlds import QemuWorld, ReplnbdWorld, World
from peers import NbdReplyError

pytestmark = [pytest.mark.interop, pytest.mark.slow]

WORLDS = [pytest.param(QemuWorld, id="qemu"), pytest.param(ReplnbdWorld, id="replnbd")]
WorldClass = type[QemuWorld] | type[ReplnbdWorld]

SIZE = 32 << 20
FILE_SIZE_LIMIT = SIZE // 2
"""The upper half of the secondary disk cannot be written; the overlays' files stay well below."""


def run_until_failed(checked: Checked, chooser: random.Random) -> None:
    """Start, requests of both sides around a checkpoint, and a failover whose commit fails."""
    world = checked.world
    checked.run(Op(Verb.START))
    for index in range(60):
        checked.run(small_io(chooser, SIZE, (Side.PRIMARY, Side.STANDBY)))
        if index == 20:
            checked.run(Op(Verb.CHECKPOINT))
    checked.run(Op(Verb.WRITE, 0, Side.STANDBY, SIZE - CLUSTER - 100, 200, salt=1))
    world.peer.process.limit_file_size(FILE_SIZE_LIMIT)
    checked.run(Op(Verb.FAILOVER))
    world.peer.wait_for_commit()
    world.peer.process.limit_file_size(None)
    world.stage = Stage.FAILED
    checked.model.disks[0].commit_failed()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world_class", WORLDS)
def test_after_a_failed_commit_the_view_holds_and_takes_writes(
    world_class: WorldClass, seed: int, short_dir: Path
) -> None:
    """Stage failover-failed: writes go to the active overlay where an overlay has the range, else
    to the secondary disk. QEMU stays there for ever; replnbd's failover tries again, and ends."""
    print(f"seed {seed}")
    chooser = random.Random(seed)
    setup = Setup(seed, (SIZE,), ("raw",))
    with world_class(setup, short_dir) as world:
        checked = Checked(world)
        run_until_failed(checked, chooser)
        commands = (Verb.STATUS, Verb.CHECKPOINT, Verb.START, Verb.START_AS_PRIMARY, Verb.STOP)
        for _ in range(40):
            checked.run(small_io(chooser, SIZE, (Side.STANDBY,)))
            checked.run(Op(chooser.choice((*commands, Verb.COMPARE))))
        # Where the overlays end: a write of which both halves have a different target.
        checked.run(Op(Verb.WRITE, 0, Side.STANDBY, SIZE - CLUSTER - 300, CLUSTER, salt=2))
        checked.run(Op(Verb.COMPARE))
        if Difference.FENCE in world.differences:
            checked.run(Op(Verb.FENCED))
        checked.run(Op(Verb.FAILOVER))
        if Difference.FAILOVER_ERRORS not in world.differences:
            for verb in (Verb.STATUS, Verb.COMPARE):
                checked.run(Op(verb))
            return
        checked.run(Op(Verb.SETTLE))
        for verb in (Verb.STATUS, Verb.COMPARE):
            checked.run(Op(verb))
        checked.finish()


@pytest.mark.parametrize("world_class", WORLDS)
def test_a_full_hidden_overlay_fails_the_primarys_write_and_nothing_else(
    world_class: WorldClass, short_dir: Path
) -> None:
    """No old data saved, no write: ENOSPC, the secondary disk untouched, the view right, no error
    in the status; what is saved already can be overwritten, and a checkpoint makes room."""
    size = 64 * CLUSTER
    setup = Setup(0, (size,), ("raw",))
    content = setup.content(0)
    with world_class(setup, short_dir) as world:
        primary, standby = world.clients[0, Side.PRIMARY], world.clients[0, Side.STANDBY]
        assert world.run(Op(Verb.START)).kind == "return"
        # The overlay's file holds every cluster of the disk and metadata: too much by the latter.
        world.peer.process.limit_file_size(size)
        expected = bytearray(content)
        refused = fill(world, expected)
        assert 0 < len(refused) < 32
        assert primary.pread(0, size) == expected
        assert standby.pread(0, size) == content
        primary.pwrite(5 * CLUSTER, b"again" * 100)
        expected[5 * CLUSTER : 5 * CLUSTER + 500] = b"again" * 100
        assert standby.pread(0, size) == content
        assert world.run(Op(Verb.STATUS)).value == {"error": False}
        assert world.run(Op(Verb.CHECKPOINT)).value == {}
        assert standby.pread(0, size) == expected
        primary.pwrite(refused[0] * CLUSTER, b"now" * 100)
        assert standby.pread(0, size) == expected
        expected[refused[0] * CLUSTER : refused[0] * CLUSTER + 300] = b"now" * 100
        assert world.finish() == [expected]


def fill(world: World, expected: bytearray) -> list[int]:
    """Overwrite every cluster through NAME; `expected` follows. The clusters that were refused."""
    refused = []
    for cluster in range(len(expected) // CLUSTER):
        data = random.Random(cluster).randbytes(CLUSTER)
        try:
            world.clients[0, Side.PRIMARY].pwrite(cluster * CLUSTER, data)
        except NbdReplyError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            refused.append(cluster)
        else:
            expected[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data
    return refused
