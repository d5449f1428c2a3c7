"""The standby goes on while what the overlays hold is committed, in QEMU and in replnbd alike.

The sequences of test_oracle.py have disks that are committed in an instant. Here there are some
MiB to move, and replnbd's job is slowed down, so that requests meet a commit at work (QEMU's job
is internal: nothing slows it down).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from oracle_check import Checked
from oracle_ops import CLUSTER, Op, Setup, Side, Verb, small_io
from oracle_worlds import QemuWorld, ReplnbdWorld
from peers import DiskFormat

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = (12 << 20) + 33 * 512
COMMIT_BYTES_PER_S = 24 << 20
OPERATIONS = 120


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "world_class",
    [pytest.param(QemuWorld, id="qemu"), pytest.param(ReplnbdWorld, id="replnbd")],
)
def test_reads_and_writes_during_a_commit_are_right_and_so_is_its_result(
    world_class: type[QemuWorld] | type[ReplnbdWorld],
    format_: DiskFormat,
    seed: int,
    short_dir: Path,
) -> None:
    print(f"seed {seed}")
    chooser = random.Random(seed)
    with world_class(Setup(seed, (SIZE,), (format_,)), short_dir) as world:
        checked = Checked(world)
        checked.run(Op(Verb.START))
        checked.run(Op(Verb.BURST, 0, length=SIZE // 2, salt=chooser.getrandbits(32)))
        checked.run(Op(Verb.CHECKPOINT))
        checked.run(Op(Verb.BURST, 0, length=SIZE, salt=chooser.getrandbits(32)))
        # Some more writes of the standby are in flight while the failover begins.
        checked.run(Op(Verb.FAILOVER, 0, length=8 * CLUSTER, salt=chooser.getrandbits(32)))
        if isinstance(world, ReplnbdWorld):
            speed = {"device": "commit-colo0", "speed": COMMIT_BYTES_PER_S}
            world.peer.qmp.execute("block-job-set-speed", speed)
        for index in range(OPERATIONS):
            checked.run(small_io(chooser, SIZE, (Side.STANDBY,)))
            if index % 20 == 0:
                checked.run(Op(Verb.COMPARE))
                checked.run(Op(Verb.STATUS))
        checked.run(Op(Verb.SETTLE))
        checked.run(Op(Verb.COMPARE))
        checked.run(small_io(chooser, SIZE, (Side.STANDBY,)))
        checked.finish()
