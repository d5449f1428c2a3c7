"""A source's messages count within its newest session."""

from __future__ import annotations

import errno

import pytest

from replnbd.replication import PeerNode
from replnbd.replication.lineage import Claim, Lineage, Plan
from replnbd.replication.peer import Begin, End, Enter, PeerState, encode

LINEAGE = Lineage("1" * 32)


class Standby:
    """In the place of a disk."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def peer_state(self) -> PeerState:
        return PeerState(
            name="d", size=512, stage="none", fenced=False, syncing=False, claim=Claim()
        )

    async def enter(self) -> None:
        self.calls.append("enter")

    async def begin_sync(self, claim: Claim, plan: Plan) -> None:
        self.calls.append("begin")

    async def end_sync(self, lineage: Lineage, failed: int | None) -> None:
        self.calls.append("end")


async def test_what_a_network_held_back_of_an_earlier_session_is_refused() -> None:
    standby = Standby()
    node = PeerNode("x-replnbd/d", standby)
    claim = Claim(LINEAGE, "pair")
    for session in "1", "2":
        await node.pwrite(0, encode(Enter(session=session)))
        await node.pwrite(0, encode(Begin(claim=claim, plan=Plan.FULL, session=session)))
    for stale in End(lineage=LINEAGE, session="1"), Begin(claim=claim, plan=Plan.FULL, session="1"):
        with pytest.raises(OSError, match="another session") as caught:
            await node.pwrite(0, encode(stale))
        assert caught.value.errno == errno.EPERM
    await node.pwrite(0, encode(End(lineage=LINEAGE, session="2")))
    assert standby.calls == ["enter", "begin", "enter", "begin", "end"]
