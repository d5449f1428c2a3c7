"""A world beside its model: each outcome must be one that the model foretold."""

from __future__ import annotations

from oracle_model import Model
from oracle_ops import Op, Outcome
from oracle_worlds import World

HISTORY = 12
"""Operations that a failure shows."""


class OracleError(AssertionError):
    """A world did what its model says is wrong."""


class Checked:
    """A world beside its model."""

    def __init__(self, world: World) -> None:
        self.name = type(world).__name__
        self.world = world
        self.model = Model(world.setup, world.differences)
        self.history: list[str] = []

    def run(self, op: Op) -> Outcome:
        """Do the operation in the world and in the model; the outcome must be foretold."""
        self.history.append(f"{self.world.stage}: {op}")
        expected = self.model.apply(op)
        outcome = self.world.run(op)
        if outcome not in expected:
            raise OracleError(self.complaint(outcome, expected))
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
