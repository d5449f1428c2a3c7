"""The export x-replnbd/NAME towards a peer that says anything: an error with a text, and nothing
has changed; and what a standby makes of messages that come out of order."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from replication_support import Layout, build

from replnbd.block import MemoryNode, read_bytes
from replnbd.block.digest import GRANULE
from replnbd.errors import ConfigError, StateError
from replnbd.events import EventBus
from replnbd.filters import FaultNode
from replnbd.jobs import JobRegistry
from replnbd.replication import Group, History, PeerNode, Role
from replnbd.replication.lineage import ANCESTORS_MAX, Claim, Lineage, Plan
from replnbd.replication.peer import NODE_BYTES, Begin, End, decode_state, encode

SIZE = 4 * GRANULE

SOURCE = Claim(Lineage("source"), "pair")
BEGIN = Begin(claim=SOURCE, plan=Plan.FULL)
END = End(lineage=Lineage("source"))


class Standby:
    """A group of one disk, its history in memory, and its export for peers."""

    def __init__(self) -> None:
        self.file = MemoryNode(name="history")
        self.fault = FaultNode("history", self.file)
        self.events = EventBus()
        self.made: Callable[[], Awaitable[History]] = self._make

    async def _make(self) -> History:
        return await History.open(self.fault, SIZE, "boot", Role.STANDBY)

    async def start(self) -> Standby:
        built = await build("d", Layout(size=SIZE), self.events, JobRegistry())
        self.disk = built.disk
        self.disk.peer._make_history = lambda: self.made()
        self.group = Group([self.disk])
        await self.group.open()
        self.node = PeerNode("x-replnbd/d", self.disk.peer)
        return self

    async def say(self, message: bytes | Begin | End) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        await self.node.pwrite(0, data)

    @property
    def state(self) -> bytes:
        """All that a message could change."""
        history = self.disk.peer.history
        record = b"" if history is None else msgspec.json.encode(history.record)
        return record + bytes(self.file.data) + encode(self.disk.peer.peer_state())


def said(**members: object) -> bytes:
    return json.dumps(members).encode()


CLAIM = {"lineage": {"generation": "g"}, "pair": "p"}

HOSTILE = {
    "nothing": b"",
    "zeroes": bytes(4096),
    "garbage": bytes(range(256)) * 16,
    "no UTF-8": b'{"say":"\xff\xfe"}',
    "no UTF-8 in a name": b'{"say":"end","lineage":{"generation":"\xff"}}',
    "half a surrogate": b'{"say":"end","lineage":{"generation":"\\ud800"}}',
    "truncated": encode(BEGIN).rstrip(b"\0")[:-1],
    "trailing": encode(END).rstrip(b"\0") + b"x",
    "two messages": encode(END).rstrip(b"\0") * 2,
    "no object": b"[]",
    "a number": b"1e400",
    "brackets": b"[" * NODE_BYTES,
    "braces": b'{"a":' * (NODE_BYTES // 5),
    "deep in a member nobody knows": b'{"say":"begin","x":' + b"[" * 60_000,
    "deep and closed": b'{"say":"end","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "deep in a claim": b'{"say":"begin","claim":' + b'{"lineage":' * 5000,
    "no kind": said(claim=CLAIM, plan="full"),
    "another kind": said(say="reset", force=True),
    "a kind of another type": said(say=7),
    "no claim": said(say="begin", plan="full"),
    "another plan": said(say="begin", claim=CLAIM, plan="overwrite"),
    "a claim with more": said(say="begin", claim={**CLAIM, "force": True}, plan="full"),
    "a lineage with more": said(say="end", lineage={"generation": "g", "x": 1}),
    "a pair of another type": said(say="begin", claim={"pair": 1}, plan="full"),
    "an empty generation": said(say="end", lineage={"generation": ""}),
    "an empty pair": said(say="begin", claim={**CLAIM, "pair": ""}, plan="full"),
    "a long generation": said(say="end", lineage={"generation": "g" * 60_000}),
    "a long pair": said(say="begin", claim={**CLAIM, "pair": "p" * 60_000}, plan="full"),
    "a long session": said(say="enter", session="s" * 60_000),
    "many ancestors": said(
        say="end", lineage={"generation": "g", "ancestors": ["a"] * (ANCESTORS_MAX + 1)}
    ),
    "null": said(say="end", lineage=None),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
async def test_what_is_no_message_is_refused_and_changes_nothing(what: str, begun: bool) -> None:
    standby = await Standby().start()
    if begun:
        await standby.say(BEGIN)
    before = standby.state
    with pytest.raises(OSError, match="not a message of replnbd: ") as caught:
        await standby.say(HOSTILE[what])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.strerror is not None
    assert len(caught.value.strerror) < 300
    assert "\n" not in caught.value.strerror
    assert standby.state == before


async def test_a_message_begins_at_the_beginning() -> None:
    standby = await Standby().start()
    for offset in (1, 512, NODE_BYTES - 4096):
        with pytest.raises(OSError, match=f"not {offset}") as caught:
            await standby.node.pwrite(offset, encode(BEGIN))
        assert caught.value.errno == errno.EINVAL
    for operation in (standby.node.write_zeroes, standby.node.discard):
        with pytest.raises(OSError, match="only messages"):
            await operation(0, 4096)
    assert standby.disk.peer.history is None


async def test_the_state_can_be_read_in_any_pieces() -> None:
    standby = await Standby().start()
    whole = bytes(await read_bytes(standby.node, 0, NODE_BYTES))
    state = decode_state(whole)
    assert (state.name, state.size, state.syncing) == ("d", SIZE, False)
    pieces = [bytes(await read_bytes(standby.node, at, 7)) for at in range(0, 210, 7)]
    assert b"".join(pieces) == whole[:210]
    assert bytes(await read_bytes(standby.node, NODE_BYTES - 5, 5)) == bytes(5)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_state_that_is_none_is_told_in_one_line(what: str) -> None:
    with pytest.raises(ValueError, match="the peer's state cannot be read: ") as caught:
        decode_state(HOSTILE[what])
    assert "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


# Section: order


async def refused(standby: Standby, message: Begin | End, text: str) -> None:
    before = standby.state
    with pytest.raises(OSError, match=text) as caught:
        await standby.say(message)
    assert caught.value.errno == errno.EPERM
    assert standby.state == before


async def test_an_end_without_a_begin_is_refused() -> None:
    standby = await Standby().start()
    await refused(standby, END, "no synchronisation of 'd' has begun")
    await standby.say(BEGIN)
    await standby.say(END)
    assert standby.disk.peer.claim == SOURCE
    await refused(standby, END, "no synchronisation of 'd' has begun")


async def test_an_end_of_another_source_is_refused() -> None:
    """It would make the disk a copy of what it is not."""
    standby = await Standby().start()
    await standby.say(BEGIN)
    await refused(standby, End(lineage=Lineage("stranger", ("x",))), "another source's")
    await standby.say(End(lineage=Lineage("next", ("source",))))  # it went on alone meanwhile
    assert standby.disk.peer.claim.lineage == Lineage("next", ("source",))


async def test_an_end_of_before_a_restart_is_refused() -> None:
    """What came between the two processes, nobody knows here: the source begins anew."""
    standby = await Standby().start()
    await standby.say(BEGIN)
    history = standby.disk.peer.history
    assert history is not None
    again = Standby()
    again.file = standby.file
    again.fault = FaultNode("history", again.file)
    await again.start()
    again.disk.peer.history = await again._make()
    assert again.disk.peer.syncing
    await refused(again, END, "no synchronisation")
    await again.say(Begin(claim=SOURCE, plan=Plan.INCREMENTAL))
    await again.say(END)
    assert not again.disk.peer.syncing


@pytest.mark.parametrize(
    ("claim", "plan", "text"),
    [
        (Claim(Lineage("source"), None), Plan.FULL, "another disk"),
        (Claim(Lineage("source"), "other"), Plan.INCREMENTAL, "another disk"),
        (Claim(None, "pair"), Plan.FULL, "a copy of another one"),
        (Claim(Lineage("stranger"), "pair"), Plan.INCREMENTAL, "a copy of another one"),
        (Claim(Lineage("old"), "pair"), Plan.FULL, "a copy of another one"),
    ],
)
async def test_who_must_not_overwrite_it_is_told_why(claim: Claim, plan: Plan, text: str) -> None:
    standby = await Standby().start()
    await standby.say(BEGIN)
    await standby.say(END)
    await refused(standby, Begin(claim=claim, plan=plan), text)
    assert not standby.disk.peer.syncing
    assert standby.disk.peer.refused is not None
    await standby.say(BEGIN)
    assert standby.disk.peer.refused is None


async def test_a_disk_that_has_taken_over_refuses_its_primary() -> None:
    standby = await Standby().start()
    await standby.say(BEGIN)
    await standby.say(END)
    await standby.group.start()
    await standby.group.failover()
    await standby.group.wait_committed()
    await refused(standby, BEGIN, "the standby has taken over")
    await refused(standby, END, "no synchronisation")


async def test_a_begin_that_waits_for_a_failover_is_refused_by_it() -> None:
    standby = await Standby().start()
    await standby.say(BEGIN)
    await standby.say(END)
    await standby.group.start()
    async with standby.disk.drained():
        failover = asyncio.ensure_future(standby.group.failover())
        await asyncio.sleep(0.01)
        saying = asyncio.ensure_future(standby.say(BEGIN))
        await asyncio.sleep(0.01)
        assert not saying.done()
    await failover
    with pytest.raises(OSError, match="taken over"):
        await saying
    assert not standby.disk.peer.syncing


async def test_a_failing_history_is_told_and_nothing_has_begun() -> None:
    standby = await Standby().start()
    await standby.say(BEGIN)
    await standby.say(END)
    standby.fault.fail("pwrite", errno.ENOSPC)
    for message in (BEGIN,):
        with pytest.raises(OSError, match="history of 'd'") as caught:
            await standby.say(message)
        assert caught.value.errno == errno.EPERM
    assert not standby.disk.peer.syncing
    standby.fault.heal()
    await standby.say(BEGIN)
    await standby.say(END)


async def test_a_history_that_cannot_be_made_is_no_bug() -> None:
    standby = await Standby().start()

    async def fail() -> History:
        raise ConfigError("cannot create d.history: Read-only file system")

    standby.made = fail
    with pytest.raises(OSError, match="history of 'd': cannot create"):
        await standby.say(BEGIN)


async def test_commands_that_need_a_moment_of_the_primary_wait_for_the_end() -> None:
    standby = await Standby().start()
    await standby.say(BEGIN)
    with pytest.raises(Exception, match="is being synchronised"):
        await standby.group.start()
    await standby.say(END)
    await standby.group.start()
    await standby.say(Begin(claim=SOURCE, plan=Plan.INCREMENTAL))
    for command in (standby.group.checkpoint, standby.group.stop):
        with pytest.raises(Exception, match="is being synchronised"):
            await command()
    await standby.say(END)
    await standby.group.checkpoint()


async def fail_a_write(standby: Standby) -> None:
    """Of the primary's; later ones do not."""
    gate = standby.disk.primary
    good = gate.target
    gate.target = bad = FaultNode("full", good)
    bad.fail("pwrite", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        await gate.pwrite(0, b"x" * 512)
    gate.target = good


async def test_an_end_that_knows_nothing_of_a_failed_write_is_refused() -> None:
    standby = await Standby().start()
    await standby.say(BEGIN)
    known = decode_state(await read_bytes(standby.node, 0, NODE_BYTES)).failed
    await fail_a_write(standby)
    end = End(lineage=Lineage("source"), failed=known)
    await refused(standby, end, "a write to 'd' has failed meanwhile")
    assert standby.disk.peer.syncing
    await standby.say(End(lineage=Lineage("source"), failed=known + 1))
    standby.disk.peer.check_in_step("a failover")


async def test_a_copy_that_is_nobodys_any_more_is_not_waited_for() -> None:
    """A QEMU that says nothing of what has failed repeats it, and that is all there is to know."""
    standby = await Standby().start()
    await standby.say(BEGIN)
    await standby.say(END)
    await fail_a_write(standby)
    with pytest.raises(StateError, match="being synchronised"):
        await standby.group.start()
    await standby.group.reset(force=True)
    await fail_a_write(standby)
    await standby.group.start()
    await fail_a_write(standby)
    await standby.group.checkpoint()
    await standby.group.stop()
