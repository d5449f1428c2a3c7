"""Lineage: whose data a disk has, and so which disk may be overwritten with which.

A *generation* is a random name of what a disk holds. It changes when a disk goes on alone: a
standby by a failover, a primary by its first write that the standby cannot have. What it was before
is an *ancestor*. A copy that is in step has its source's generation. So, of two disks:

    the target has no generation            it never was anybody's copy: all is copied
    the target's is the source's, or one    the target has nothing that the source never had:
    of its ancestors                        what differs is copied
    the source's is one of the target's     the target went on alone: it is the source that is
    ancestors                               outdated
    both have an ancestor in common         both went on alone: split brain
    none of all that                        they do not belong together

A *pair* is the name of one source with one target, since all of one was copied to the other. The
marks of both sides are relative to it: where they have the same pair, what is marked on either side
is all that can differ, and else everything is compared.

This file knows no disks and no network: both sides decide by it, and agree.
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Annotated

import msgspec

ANCESTORS_MAX = 64
"""A disk that has changed sides more often since it last met its peer is a stranger to it."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
"""Of a generation, a pair or a session; a peer's may be anything, so it is bounded."""


class Plan(StrEnum):
    """What a synchronisation has to do."""

    FULL = "full"
    """Compare everything."""
    INCREMENTAL = "incremental"
    """Compare what either side has marked."""


class Lineage(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """A generation and its ancestors, newest first."""

    generation: Name
    ancestors: Annotated[tuple[Name, ...], msgspec.Meta(max_length=ANCESTORS_MAX)] = ()

    def step(self, generation: str | None = None) -> Lineage:
        """What it is after going on alone."""
        ancestors = (self.generation, *self.ancestors)[:ANCESTORS_MAX]
        return Lineage(generation or new_name(), ancestors)

    def back_to(self, generation: str) -> Lineage | None:
        """What it was at an ancestor; None if that is none of its."""
        names = (self.generation, *self.ancestors)
        if generation not in names:
            return None
        at = names.index(generation)
        return Lineage(generation, names[at + 1 :])


class Claim(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """What a side says of its disk; without a lineage it never had a peer."""

    lineage: Lineage | None = None
    pair: Name | None = None


OUTDATED = (
    "the standby has taken over, and its primary is outdated: 'replnbd demote' on the primary's"
    " side makes that the new standby"
)
SPLIT_BRAIN = (
    "split brain: both sides have taken writes since they were in step last: on the side whose"
    " writes are to be dropped, 'replnbd demote' if it is a primary, and then 'replnbd reset'"
)
TWO_PRIMARIES = (
    "the target is a primary itself: 'replnbd demote' there makes it a standby, and on this side"
    " this one"
)
STRANGERS = (
    "the standby's disk is a copy of another one: 'replnbd reset --force' there, in stage none,"
    " makes it forget that, and then it is overwritten"
)


NO_ACCOUNT = (
    "there was a replnbd, and what is there now does not answer as one: 'replnbd reset --force', in"
    " stage none, makes this disk forget that, and then everything there is overwritten"
)


def plan(source: Claim, target: Claim) -> Plan | str:
    """How `target` can be made a copy of `source`; or, as a text, why it must not be."""
    if target.lineage is not None:
        refusal = _refusal(source.lineage, target.lineage)
        if refusal is not None:
            return refusal
    same_pair = source.pair is not None and source.pair == target.pair
    return Plan.INCREMENTAL if same_pair else Plan.FULL


def _refusal(source: Lineage | None, target: Lineage) -> str | None:
    if source is None:
        return STRANGERS
    if target.generation in (source.generation, *source.ancestors):
        return None
    if source.generation in target.ancestors:
        return OUTDATED
    if set(source.ancestors) & set(target.ancestors):
        return SPLIT_BRAIN
    return STRANGERS


def new_name() -> str:
    """One that nobody else has: 32 hexadecimal digits."""
    return secrets.token_hex(16)
