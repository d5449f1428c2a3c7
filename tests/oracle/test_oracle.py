"""QEMU's own replication filter is the judge of replnbd.

The same random sequence runs through QEMU, through replnbd, and through a model of each. An
operation's outcome (bytes, NBD error, QMP answer) must be one that the world's model foretold;
the two worlds must agree but where a Difference says otherwise; and the secondary disks must be
identical at the end. The seed is the test's parameter: `-k 'seed7]'` runs one again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle_model import DIFFERENCES, QEMU, REPLNBD, Model
from oracle_ops import Generator, Op, Outcome, Setup
from oracle_worlds import QemuWorld, ReplnbdWorld, World
from peers import qemu_img

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SEEDS = range(24)
OPERATIONS = 300
HISTORY = 12
"""Operations that a failure shows."""


class Checked:
    """A world beside its model."""

    def __init__(self, name: str, world: World, model: Model) -> None:
        self.name = name
        self.world = world
        self.model = model
        self.history: list[str] = []

    def run(self, op: Op) -> Outcome:
        """Do the operation in the world and in the model; the outcome must be foretold."""
        self.history.append(f"{self.world.stage}: {op}")
        expected = self.model.apply(op)
        outcome = self.world.run(op)
        if outcome not in expected:
            pytest.fail(self.complaint(outcome, expected), pytrace=False)
        return outcome

    def complaint(self, outcome: Outcome, expected: list[Outcome]) -> str:
        """What happened, what was right, and what came before."""
        lines = [f"{self.name}: seed {self.world.setup.seed}, {self.world.setup}"]
        lines += [f"got      {outcome}"]
        lines += [f"expected {right}" for right in expected]
        lines += [where_bytes_differ(outcome.value, right.value) for right in expected]
        lines += [f"after operation {len(self.history)}:", *self.history[-HISTORY:]]
        return "\n".join(lines)

    def finish(self) -> None:
        """End the world in order; its secondary disks must hold what the model's do."""
        for index, content in enumerate(self.world.finish()):
            right = bytes(self.model.disks[index].secondary)
            assert content == right, (
                f"{self.name}: secondary disk {index}: {where_bytes_differ(content, right)}"
            )


def where_bytes_differ(one: object, other: object) -> str:
    """First and last different byte of two strings of bytes; empty for anything else."""
    if not (isinstance(one, bytes) and isinstance(other, bytes)):
        return ""
    if len(one) != len(other):
        return f"{len(one)} bytes against {len(other)}"
    wrong = [index for index in range(len(one)) if one[index] != other[index]]
    if not wrong:
        return "the same bytes"
    return f"{len(wrong)} bytes differ, from {wrong[0]} to {wrong[-1]}"


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
def test_qemu_does_what_the_model_says(seed: int, short_dir: Path) -> None:
    """The judge is judged first: without it, a model that is wrong could pass a replnbd that is
    wrong in the same way."""
    setup = Setup.from_seed(seed)
    with QemuWorld(setup, short_dir) as world:
        checked = Checked("QEMU", world, Model(setup, QEMU))
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
        qemu = Checked("QEMU", judge, Model(setup, QEMU))
        replnbd = Checked("replnbd", subject, Model(setup, REPLNBD))
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
