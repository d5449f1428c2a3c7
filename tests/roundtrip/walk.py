"""A random walk of a pair: one seed, one life, with faults amid all that it does."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from changes import SPLIT_BRAIN, Old, Takeover
from faults import FAULTS, NETWORK, SLOW, amid_sync, none, reach
from host import QUEUE_BYTES
from pair import GRANULE, Pair
from peers import wait_until
from peers.disk import DiskFormat


def make_pair(folder: Path, seed: int) -> Pair:
    """What a seed's pair is like."""
    rng = random.Random(seed)
    sectors = rng.randint(16384, 40960)
    if rng.random() < 0.5:
        sectors -= sectors % 128
    if rng.random() < 0.05:
        sectors = 131072
    format_: DiskFormat = rng.choice(["raw", "raw", "qcow2"])
    return Pair(
        folder,
        seed,
        disks=rng.choice([1, 1, 2]),
        size=sectors * 512,
        format_=format_,
        sync=rng.random() < 0.3,
        queue_bytes=rng.choice([QUEUE_BYTES, QUEUE_BYTES, 1 << 20, 200_000]),
    )


class Walk:
    """Of `steps` steps. `trace` in its pair says what it did."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.pair = make_pair(folder, seed)
        self.rng = random.Random(seed ^ 0x5EED)

    def run(self, steps: int) -> None:
        """AssertionError where something is not as it must be."""
        pair = self.pair
        with pair:
            try:
                self._first_sync()
                for _ in range(steps):
                    step = self.rng.choice(self.steps())
                    pair.note(step.__name__)
                    step(self)
                pair.stop_guests()
            except BaseException as exc:
                trace = "; ".join(pair.trace)
                raise AssertionError(f"{type(exc).__name__}: {exc}\n[{trace}]") from exc
            finally:
                pair.check_logs()

    def _first_sync(self) -> None:
        pair = self.pair
        if self.rng.random() < 0.7:
            pair.start_guests()
        pair.source.begin()
        amid_sync(pair, *self._parts())
        pair.start_guests()
        pair.compare()

    def _parts(self) -> list[float]:
        """When there are faults in a synchronisation."""
        return sorted(self.rng.random() for _ in range(self.rng.choice([0, 1, 1, 2])))

    def steps(self) -> list[Step]:
        """What may come next, as often as it is likely."""
        steps: list[Step] = [Walk.load, Walk.resync, Walk.calm_resync, *[Walk.fault] * 3]
        steps += [Walk.pause, Walk.verify]
        if not self.pair.started:
            return [*steps, *[Walk.begin] * 3]
        return [*steps, Walk.write_view, *[Walk.checkpoint] * 2, *[Walk.fail_over] * 3]

    # Section: steps

    def load(self) -> None:
        """Writes, and nothing else."""
        self.pair.run_for(self.rng.randint(10, 150))
        self.pair.compare()

    def begin(self) -> None:
        """The target's first checkpoint."""
        self.pair.begin()
        self.pair.write_views()

    def write_view(self) -> None:
        """The standby's own writes."""
        self.pair.write_views()
        self.pair.check_views()

    def checkpoint(self) -> None:
        """While the guests stand still, or not."""
        if self.rng.random() < 0.5:
            self.pair.checkpoint()
        else:
            self.pair.run_for(5)
            self.pair.checkpoint_under_load()
        if self.rng.random() < 0.5:
            self.pair.write_views()

    def fault(self) -> None:
        """One, or some in a row, under load; then, mostly, they are in step again."""
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            self.pair.run_for(self.rng.randint(0, 40))
            fault = self.rng.choice(FAULTS)
            self.pair.note(f"  {fault.__name__}")
            fault(self.pair)
            self.pair.check_views()
        self.pair.run_for(self.rng.randint(0, 20))
        if self.rng.random() < 0.8:
            self.pair.heal()
            self.pair.compare()

    def resync(self) -> None:
        """A break, in which the guests go on; then a synchronisation with faults in its midst."""
        pair = self.pair
        pair.heal()
        pair.start_guests()
        pair.refuse(pair.target)
        pair.run_for(self.rng.randint(5, 80))
        if self.rng.random() < 0.3:
            self.rng.choice([pair.kill_source, pair.kill_target, pair.restart_source])()
        pair.start_guests()
        pair.check_views()
        pair.heal()
        amid_sync(pair, *self._parts())
        pair.check_views()
        pair.start_guests()
        pair.compare()

    def calm_resync(self) -> None:
        """A resync sends what differs, and nothing else."""
        pair = self.pair
        pair.heal()
        pair.start_guests()
        pair.compare()
        pair.refuse(pair.target)
        pair.run_for(self.rng.randint(1, 20))
        with pair.quiet():
            pair.wait_links(lambda link: link["state"] != "live", "the cut")
            differing = [self._differing(number) for number in range(pair.count)]
            before = [link["copied-bytes"] for link in pair.links()]
            pair.heal()
            pair.wait_in_step()
            for number, link in enumerate(pair.links()):
                copied = link["copied-bytes"] - before[number]
                assert copied <= differing[number] * GRANULE, (copied, differing[number])
        pair.compare()

    def pause(self) -> None:
        """By command: nothing is sent for a while."""
        pair = self.pair
        pair.heal()
        pair.start_guests()
        if pair.source.role == "primary":
            pair.source.qmp.execute("xen-set-replication", {"enable": False, "primary": True})
            pair.run_for(self.rng.randint(0, 40))
            if self.rng.random() < 0.3:
                self.rng.choice([pair.kill_source, pair.restart_source])()
            pair.start_guests()
            pair.check_views()
            pair.source.qmp.execute("x-replnbd-reset")
            pair.source.begin()
        else:
            pair.restart_links()
        amid_sync(pair, *self._parts())
        pair.start_guests()
        pair.compare()

    def verify(self) -> None:
        """Two that are in step are equal, also while guests write."""
        pair = self.pair
        pair.heal()
        pair.network.spare()  # a cut that a fault has planned ends a comparison
        pair.start_guests()
        pair.compare()
        if pair.source.role != "primary":
            return
        for link in self._verified():  # a guest may be faster than the network all the time
            assert re.fullmatch(r"equal|\d+ bytes could not be compared", link["verified"]), link
        with pair.quiet():
            pair.wait_in_step()
            assert {link["verified"] for link in self._verified()} == {"equal"}, pair.links()

    def _verified(self) -> list[dict[str, Any]]:
        """The links, once both sides have been compared."""
        wait_until(self._verify_begins, "a moment in step")
        self.pair.wait_links(lambda link: link["verified"] is not None, "the comparison")
        return self.pair.links()

    def _verify_begins(self) -> bool:
        # A guest that writes more than the network takes puts it out of step, for a moment.
        answer = self.pair.source.qmp.answer("x-replnbd-verify")
        assert answer.ok or "is not in step" in (answer.desc or ""), answer
        return answer.ok

    def _differing(self, number: int) -> int:
        mine = self.pair.contents[number].data
        theirs = self.pair.target.read(self.pair.target.disks[number].name)
        return sum(
            mine[at : at + GRANULE] != theirs[at : at + GRANULE]
            for at in range(0, len(mine), GRANULE)
        )

    def fail_over(self) -> None:
        """The target takes over; the two meet again; one of them follows."""
        pair, rng = self.pair, self.rng
        pair.heal()
        pair.start_guests()
        pair.compare()
        pair.run_for(rng.randint(0, 40))
        if rng.random() < 0.5:
            pair.write_views()
        to = rng.choice(["standby", "standby", "checkpoint", "latest"])
        old = rng.choice(list(Old))
        if to == "latest" or old is Old.CUT_OFF:
            with pair.quiet():
                pair.wait_in_step()
        elif rng.random() < 0.5:
            self._amid_resync()
        takeover = Takeover(pair, to, old)
        takeover.run(kill_in_commit=rng.random() < 0.3)
        pair.start_guests()
        pair.run_for(rng.randint(0, 20))
        if old is not Old.DEAD:
            split = takeover.meet_old() == SPLIT_BRAIN
            if split and rng.random() < 0.4:
                takeover.drop_new()
                pair.start_guests()
                return pair.compare()
        elif rng.random() < 0.4:
            takeover.was.start()  # as it was: it finds out
            split = takeover.meet_old() == SPLIT_BRAIN
        else:
            pair.heal()
        takeover.follow(live=rng.random() < 0.6)
        amid_sync(pair, *self._parts())
        pair.start_guests()
        return pair.compare()

    def _amid_resync(self) -> None:
        """The target is being brought up to date, and the network is as it is."""
        pair = self.pair
        pair.refuse(pair.target)
        pair.run_for(self.rng.randint(5, 60))
        pair.heal()
        pair.network.limit(SLOW)
        reach(pair, self.rng.random())
        fault = self.rng.choice([*NETWORK, none])
        pair.note(f"  amid a resync, {fault.__name__}")
        fault(pair)


Step = Callable[[Walk], None]
