"""QEMU's own replication filter is the judge of replnbd.

The same random sequence runs through QEMU, through replnbd, and through a model of each. An
operation's outcome (bytes, NBD error, QMP answer) must be one that the world's model foretold;
the two worlds must agree but where a Difference says otherwise; and the secondary disks must be
identical at the end. The seed is the test's parameter: `-k 'seed7]'` runs one again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle_check import Checked
from oracle_model import DIFFERENCES
from oracle_ops import Generator, Setup
from oracle_worlds import QemuWorld, ReplnbdWorld
from peers import qemu_img

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SEEDS = range(24)
OPERATIONS = 300


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
def test_qemu_does_what_the_model_says(seed: int, short_dir: Path) -> None:
    """The judge is judged first: without it, a model that is wrong could pass a replnbd that is
    wrong in the same way."""
    setup = Setup.from_seed(seed)
    with QemuWorld(setup, short_dir) as world:
        checked = Checked(world)
        for op in Generator(setup, fenced=False).sequence(OPERATIONS):
            checked.run(op)
        checked.finish()


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
def test_replnbd_does_what_qemu_does(seed: int, short_dir: Path) -> None:
    setup = Setup.from_seed(seed)
    print(f"seed {seed}: {setup}")
    folders = short_dir / "q", short_dir / "r"
    for folder in folders:
        folder.mkdir()
    with QemuWorld(setup, folders[0]) as judge, ReplnbdWorld(setup, folders[1]) as subject:
        qemu = Checked(judge)
        replnbd = Checked(subject)
        for op in Generator(setup, fenced=True).sequence(OPERATIONS):
            stage = judge.stage
            outcomes = qemu.run(op), replnbd.run(op)
            assert judge.stage is subject.stage
            if outcomes[0] != outcomes[1]:
                excuses = [entry for entry, shows in DIFFERENCES.items() if shows(op, stage)]
                assert excuses, f"{stage}: {op}: QEMU {outcomes[0]}, replnbd {outcomes[1]}"
        qemu.finish()
        replnbd.finish()
        for ours, theirs in zip(replnbd.model.disks, qemu.model.disks, strict=True):
            assert ours.secondary == theirs.secondary
        for disk in subject.disks:
            for overlay in (disk.hidden, disk.active):
                qemu_img("check", "-f", "qcow2", overlay)
