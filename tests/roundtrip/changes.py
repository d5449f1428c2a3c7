"""How a pair's hosts change sides: failovers, with the old source dead, cut off or there; what each
says of the other afterwards; and the way back into step."""

from __future__ import annotations

import time
from enum import StrEnum

from guest_model import Content, check_equal
from host import Host
from pair import PATIENCE_S, Pair
from peers import PeerError, wait_until

OUTDATED = "is outdated"
SPLIT_BRAIN = "split brain"


class Old(StrEnum):
    """What becomes of the old source at a failover."""

    DEAD = "dead"
    CUT_OFF = "cut off"
    """And idle."""
    ALONE = "alone"
    """Cut off, and its users write on."""
    THERE = "there"
    """It can reach the target all the time."""


class Takeover:
    """A failover of a pair that is running, and what is known after it."""

    def __init__(self, pair: Pair, to: str, old: Old) -> None:
        self.pair = pair
        self.to = to
        self.old = old
        self.was = pair.source
        """The old source."""
        self.truth: list[Content] = []
        """What the old source has."""
        self.reasons: tuple[str, ...] = ()
        """How the old source may be refused."""

    def run(self, *, kill_in_commit: bool = False) -> None:
        """The target takes over, and has the truth from then on."""
        pair = self.pair
        pair.note(f"failover to {self.to}, old source {self.old}, kill {kill_in_commit}")
        self._part()
        before = [pair.target.status(number)["history"] for number in range(pair.count)]
        taken = self._expected()
        try:
            pair.target.failover(self.to)
        except PeerError as exc:
            # It was cut off amid a synchronisation: the latest is no state to go on from.
            if self.to != "latest" or "is being synchronised" not in str(exc):
                raise
            pair.note("  to standby")
            self.to = "standby"
            taken = self._expected()
            pair.target.failover(self.to)
        if kill_in_commit:
            pair.target.kill()
            pair.target.start()
        wait_until(pair.target.committed, "the commit", timeout_s=PATIENCE_S)
        if self.old is Old.THERE:
            pair.stop_guests()
            pair.guests = []
        self._change_sides(taken)
        for number in range(pair.count):
            after = pair.source.status(number)["history"]
            assert after["generation"] != before[number]["generation"]
            assert after["role"] == "primary"

    def _part(self) -> None:
        """From the old source, as it is asked for."""
        pair = self.pair
        self.reasons = (OUTDATED,)
        if self.old is Old.DEAD:
            pair.source.kill()
            pair.guests_ended()
            self.reasons = (OUTDATED, SPLIT_BRAIN)
        elif self.old is Old.THERE:
            # What was on its way when the target took over is lost: its users believe it is safe.
            self.reasons = (OUTDATED, SPLIT_BRAIN)
        elif self.old is Old.CUT_OFF:
            pair.stop_guests()
            pair.wait_in_step()
            pair.refuse(pair.target)
            pair.wait_links(lambda link: link["state"] == "connecting", "the cut")
        else:
            pair.refuse(pair.target)
            pair.wait_links(lambda link: link["state"] == "connecting", "the cut")
            pair.run_for(3)
            if self.wrote_all():
                self.reasons = (SPLIT_BRAIN,)
            pair.stop_guests()

    def wrote_all(self) -> bool:
        """Whether all disks have been written since the cut; flushes do not count."""
        return all(
            self.pair.source.link(number)["behind-bytes"] for number in range(self.pair.count)
        )

    def _expected(self) -> list[bytes | bytearray] | None:
        """What the target's disks will be; None: what its primary writes until then."""
        pair = self.pair
        if self.to == "standby":
            return [view.data for view in pair.views]
        if self.to == "checkpoint":
            return list(pair.checkpoints)
        if self.old is Old.THERE:
            return None
        wait_until(
            lambda: (
                not any(
                    pair.target.status(number)["primary-connections"]
                    for number in range(pair.count)
                )
            ),
            "the old source's connections to end",
        )
        found: list[bytes | bytearray] = [pair.target.read(disk.name) for disk in pair.target.disks]
        if self.old is Old.CUT_OFF:
            for number, data in enumerate(found):
                check_equal(data, pair.contents[number].data, "the latest")
        return found

    def _change_sides(self, taken: list[bytes | bytearray] | None) -> None:
        pair = self.pair
        pair.source, pair.target = pair.target, pair.source
        self.truth, pair.contents = pair.contents, []
        for number, disk in enumerate(pair.source.disks):
            found = pair.source.read(pair.source.user_export(number))
            if taken is not None:
                check_equal(found, taken[number], f"{disk.name} after the failover")
            pair.contents.append(Content(bytes(found)))
        pair.views, pair.checkpoints = [], []

    # Section: meeting again

    def meet_old(self) -> str:
        """The network is well again: the old source is refused, and both sides say why; returns
        that. Nothing of either side has changed."""
        pair, was = self.pair, self.was
        pair.heal()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            links = [was.link(number) for number in range(pair.count)]
            told = [pair.source.status(number)["refused"] for number in range(pair.count)]
            reasons = [link["reason"] for link in links]
            if all(link["state"] == "refused" for link in links) and told == reasons:
                break
            assert time.monotonic() < deadline, f"not refused: {links}; told: {told}"
            time.sleep(0.01)
        reason = ""
        for link in links:
            assert any(each in str(link["reason"]) for each in self.reasons), (link, self.reasons)
            if SPLIT_BRAIN in str(link["reason"]):
                reason = SPLIT_BRAIN
        self.check_old()
        return reason or OUTDATED

    def check_old(self) -> None:
        """Nobody has overwritten what the old source has."""
        for number, truth in enumerate(self.truth):
            export = self.was.user_export(number)
            truth.settle(self.was.read(export), f"the old source's {export}")

    def drop_new(self) -> None:
        """The operator's choice: the side that has taken over is the standby again, and what it has
        taken on alone is dropped."""
        pair = self.pair
        pair.note("the new source is dropped")
        pair.stop_guests()
        pair.source, pair.target = self.was, pair.source
        pair.contents = self.truth
        pair.target.qmp.execute("x-replnbd-reset")
        pair.wait_in_step()

    def follow(self, *, live: bool) -> None:
        """The old source becomes the target: `live`, or by another start of it."""
        pair, was = self.pair, self.was
        pair.note(f"the old source follows, live {live}, mode {was.mode}")
        if was.alive and was.role == "secondary":
            if not live:
                was.kill()
                was.start()
            self._reset_old()
        elif was.alive and live:
            was.qmp.execute("x-replnbd-demote")
        else:
            was.kill()
            was.start("secondary")
            if was.status()["fenced"]:
                self._reset_old()
        self.replicate()

    def _reset_old(self) -> None:
        """With which it gives up what it took on alone, unasked."""
        self.was.qmp.execute("x-replnbd-reset")
        self.reasons = (OUTDATED, SPLIT_BRAIN)

    def replicate(self) -> None:
        """The new source sends to the old one, which is a standby's side now."""
        pair = self.pair
        if pair.source.role == "primary":
            pair.source.begin()
            return self._resolve()
        for number, (disk, theirs) in enumerate(
            zip(pair.source.disks, pair.target.disks, strict=True)
        ):
            to = pair.target.proxy.uri(theirs.name)
            pair.source.qmp.execute("x-replnbd-replicate", {"to": to, "device": disk.name})
            assert pair.source.link(number)["to"] == to
        return self._resolve()

    def _resolve(self) -> None:
        """If it is a split brain, that is said, and it is the old source that is dropped."""
        pair, was = self.pair, self.was
        deadline = time.monotonic() + PATIENCE_S
        while True:
            links = pair.links()
            split = [SPLIT_BRAIN in str(link["reason"]) for link in links]
            if any(split) and all(
                is_split or link["state"] in ("syncing", "live")
                for is_split, link in zip(split, links, strict=True)
            ):
                break
            if all(link["state"] in ("syncing", "live") for link in links):
                assert self.reasons != (SPLIT_BRAIN,), links
                return
            assert time.monotonic() < deadline, links
            time.sleep(0.01)
        assert SPLIT_BRAIN in self.reasons, links
        for number, is_split in enumerate(split):
            if is_split:
                name = was.disks[number].name
                # With what was under way when it died, or without.
                self.truth[number].settle(was.read(name), f"{name}, not overwritten")
        pair.note("split brain: the old source is reset")
        was.qmp.execute("x-replnbd-reset")
        pair.wait_links(lambda link: link["state"] in ("syncing", "live"), "the reset to help")


def other(pair: Pair, host: Host) -> Host:
    """Of the two."""
    return pair.b if host is pair.a else pair.a
