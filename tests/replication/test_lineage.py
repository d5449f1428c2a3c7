"""Which disk may be overwritten with which: the table, and disks that step, sync and give up at
random, whose every byte of history is known: nothing is overwritten that only the target has."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from replnbd.replication.lineage import (
    ANCESTORS_MAX,
    OUTDATED,
    SPLIT_BRAIN,
    STRANGERS,
    Claim,
    Lineage,
    Plan,
    new_name,
    plan,
)

A = Lineage("a")
AB = Lineage("b", ("a",))
AC = Lineage("c", ("a",))
ABD = Lineage("d", ("b", "a"))

TABLE = [
    # source, its pair, target, its pair, plan
    (None, None, None, None, Plan.FULL),
    (A, None, None, None, Plan.FULL),
    (A, "p", None, None, Plan.FULL),
    (A, "p", None, "p", Plan.INCREMENTAL),
    (A, "p", A, "p", Plan.INCREMENTAL),
    (A, "p", A, "q", Plan.FULL),
    (A, "p", A, None, Plan.FULL),
    (A, None, A, "p", Plan.FULL),
    (A, None, A, None, Plan.FULL),
    (AB, "p", A, "p", Plan.INCREMENTAL),
    (ABD, "p", A, "p", Plan.INCREMENTAL),
    (ABD, "p", AB, "q", Plan.FULL),
    (A, "p", AB, "p", OUTDATED),
    (A, "p", ABD, "p", OUTDATED),
    (AB, "p", AC, "p", SPLIT_BRAIN),
    (ABD, "p", AC, "q", SPLIT_BRAIN),
    (AC, "p", ABD, "p", SPLIT_BRAIN),
    (A, "p", Lineage("x"), "p", STRANGERS),
    (AB, "p", Lineage("x", ("y",)), None, STRANGERS),
    (None, None, A, None, STRANGERS),
    (None, "p", A, "p", STRANGERS),
]


@pytest.mark.parametrize(("source", "source_pair", "target", "target_pair", "expected"), TABLE)
def test_the_table(
    source: Lineage | None,
    source_pair: str | None,
    target: Lineage | None,
    target_pair: str | None,
    expected: Plan | str,
) -> None:
    assert plan(Claim(source, source_pair), Claim(target, target_pair)) == expected


def test_a_step_and_the_way_back() -> None:
    lineage = Lineage("0")
    for number in range(1, 4):
        lineage = lineage.step(str(number))
    assert lineage == Lineage("3", ("2", "1", "0"))
    assert lineage.back_to("1") == Lineage("1", ("0",))
    assert lineage.back_to("3") == lineage
    assert lineage.back_to("x") is None


def test_ancestors_are_as_many_as_a_message_has_room_for() -> None:
    lineage = Lineage(new_name())
    names = [lineage.generation]
    for _ in range(2 * ANCESTORS_MAX):
        lineage = lineage.step()
        names.append(lineage.generation)
    assert len(lineage.ancestors) == ANCESTORS_MAX
    assert lineage.ancestors == tuple(names[-2 : -2 - ANCESTORS_MAX : -1])
    assert plan(Claim(lineage), Claim(Lineage(names[-1 - ANCESTORS_MAX]))) is Plan.FULL
    assert plan(Claim(lineage), Claim(Lineage(names[0]))) == STRANGERS


@dataclass
class Disk:
    """`written`: by name, all that was ever written to what it holds now; `own`: what of it no
    other disk was ever in step with, and its owner has not given up."""

    claim: Claim = field(default_factory=Claim)
    common: str | None = None
    written: frozenset[int] = frozenset()
    own: set[int] = field(default_factory=set)

    def go_on_alone(self, write: int) -> None:
        """As History does: a generation that may be the peer's is left before the first write."""
        lineage = self.claim.lineage
        if lineage is not None and lineage.generation == self.common:
            self.claim = Claim(lineage.step(), self.claim.pair)
        self.written |= {write}
        self.own.add(write)

    def give_up(self) -> None:
        """`History.retract`."""
        lineage = self.claim.lineage
        if lineage is not None:
            lineage = None if self.common is None else lineage.back_to(self.common)
        self.claim = Claim(lineage, self.claim.pair)
        self.own.clear()


@pytest.mark.parametrize("seed", range(60))
def test_no_plan_overwrites_what_only_the_target_has(seed: int) -> None:
    """Two or three disks, each of them the source of any other at any time."""
    print("seed", seed)
    rng = random.Random(seed)
    disks = [Disk() for _ in range(rng.choice([2, 3]))]
    synced = refused = 0
    for step in range(300):
        source, target = rng.sample(disks, 2)
        action = rng.choice(["write", "sync", "sync", "cut", "give up"])
        if action == "write" and source.claim.lineage is not None:
            source.go_on_alone(step)
        elif action == "give up" and rng.random() < 0.2:
            source.give_up()
        elif action in ("sync", "cut"):
            decided = plan(source.claim, target.claim)
            if not isinstance(decided, Plan):
                refused += 1
                # The other way round it may be: but for a split brain, and strangers.
                assert plan(target.claim, source.claim) != decided or decided != OUTDATED
                continue
            if target.claim.lineage is not None:
                lost = target.own - source.written
                assert not lost, (source, target, lost)
            if decided is Plan.FULL:
                lineage = source.claim.lineage or Lineage(new_name())
                source.claim = Claim(lineage, new_name())
            target.claim = Claim(target.claim.lineage, source.claim.pair)
            if action == "cut":
                continue  # begun, and never ended: it is what it was, and torn
            synced += 1
            lineage = source.claim.lineage or Lineage(new_name())
            source.claim = target.claim = Claim(lineage, source.claim.pair)
            source.common = target.common = lineage.generation
            target.written = source.written
            source.own.clear()
            target.own.clear()
    assert synced > 10
    assert refused > 0 or len(disks) == 2
