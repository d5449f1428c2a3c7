"""What a death of either side means, phase by phase: kill -9 of source or target, at a moment that
is chosen and not met by chance. After each all bytes of both disks are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from changes import SPLIT_BRAIN, Old, Takeover
from faults import SLOW, kill_both, kill_source, kill_target, reach
from guest_model import check_equal
from pair import Pair
from peers import PeerError, wait_until

pytestmark = pytest.mark.slow
SIZE = (4 << 20) + 512

Death = Callable[[Pair], None]
deaths = pytest.mark.parametrize("death", [kill_source, kill_target, kill_both])


@pytest.fixture
def pair(short_dir: Path) -> Iterator[Pair]:
    """Two daemons that do not know each other yet."""
    with Pair(short_dir, 7, size=SIZE) as pair:
        yield pair
        pair.stop_guests()
        pair.check_logs()


def begin(pair: Pair) -> None:
    """In step, and started, under load."""
    pair.source.begin()
    pair.begin()
    pair.start_guests()
    pair.run_for(10)


def break_and_resync(pair: Pair) -> None:
    """The target lacks something, and slowly gets it."""
    pair.refuse(pair.target)
    pair.run_for(60)
    pair.heal()
    pair.network.limit(SLOW // 8)


@deaths
def test_while_the_link_connects(pair: Pair, death: Death) -> None:
    pair.network.silence()
    pair.source.begin()
    pair.run_for(10)
    death(pair)
    pair.heal()
    pair.compare()


@deaths
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_amid_the_first_synchronisation(pair: Pair, death: Death, part: float) -> None:
    pair.network.limit(SLOW // 4)
    pair.source.begin()
    pair.start_guests()
    reach(pair, part)
    death(pair)
    pair.heal()
    pair.start_guests()
    pair.compare()


@deaths
def test_under_load(pair: Pair, death: Death) -> None:
    begin(pair)
    pair.write_views()
    death(pair)
    pair.check_views()
    pair.run_for(10)
    pair.compare()


@deaths
def test_amid_a_resynchronisation(pair: Pair, death: Death) -> None:
    begin(pair)
    pair.write_views()
    break_and_resync(pair)
    reach(pair, 0.3)
    death(pair)
    pair.check_views()
    pair.heal()
    pair.start_guests()
    pair.compare()


@deaths
def test_as_a_synchronisation_ends(pair: Pair, death: Death) -> None:
    begin(pair)
    break_and_resync(pair)
    pair.heal()
    pair.wait_links(lambda link: not link["behind-bytes"], "all to be copied")
    death(pair)
    pair.start_guests()
    pair.compare()


@pytest.mark.parametrize("to", ["standby", "checkpoint", "latest"])
@pytest.mark.parametrize("old", list(Old))
def test_a_failover_and_the_way_back(pair: Pair, to: str, old: Old) -> None:
    begin(pair)
    pair.write_views()
    takeover = Takeover(pair, to, old)
    with pair.quiet():
        pair.wait_in_step()
    takeover.run()
    pair.run_for(10)
    if old is not Old.DEAD:
        takeover.meet_old()
    takeover.follow(live=True)
    pair.compare()


def test_a_target_that_dies_in_its_failover(pair: Pair) -> None:
    begin(pair)
    pair.write_views()
    takeover = Takeover(pair, "standby", Old.DEAD)
    takeover.run(kill_in_commit=True)
    pair.heal()
    takeover.follow(live=False)
    pair.compare()


def test_a_target_that_takes_over_amid_a_resynchronisation(pair: Pair) -> None:
    begin(pair)
    pair.checkpoint()
    pair.write_views()
    break_and_resync(pair)
    reach(pair, 0.3)
    with pytest.raises(PeerError, match="is being synchronised"):
        pair.target.failover("latest")
    takeover = Takeover(pair, "standby", Old.ALONE)
    takeover.run()
    assert takeover.meet_old() == SPLIT_BRAIN
    takeover.follow(live=True)
    pair.compare()


@deaths
def test_amid_a_failback(pair: Pair, death: Death) -> None:
    begin(pair)
    takeover = Takeover(pair, "checkpoint", Old.CUT_OFF)
    takeover.run()
    pair.run_for(60)
    takeover.meet_old()
    pair.network.limit(SLOW // 8)
    takeover.follow(live=True)
    reach(pair, 0.2)
    death(pair)
    pair.heal()
    pair.start_guests()
    pair.compare()


@pytest.mark.parametrize("drop_new", [False, True])
def test_a_split_brain_is_the_operators_to_end(pair: Pair, drop_new: bool) -> None:
    begin(pair)
    takeover = Takeover(pair, "standby", Old.ALONE)
    takeover.run()
    pair.run_for(10)
    assert takeover.meet_old() == SPLIT_BRAIN
    if drop_new:
        takeover.drop_new()
    else:
        takeover.follow(live=True)
    pair.start_guests()
    pair.compare()


def test_a_demotion_under_load_is_a_split_brain_and_loses_nothing(pair: Pair) -> None:
    begin(pair)
    takeover = Takeover(pair, "standby", Old.CUT_OFF)
    takeover.run()
    old, new = pair.target, pair.source
    pair.source, pair.contents, truth = old, takeover.truth, pair.contents
    pair.start_guests()
    pair.run_for(10)
    for guest in pair.guests:
        guest.expects_shutdown = True
    old.qmp.execute("x-replnbd-demote")
    pair.guests_ended()
    for number, content in enumerate(pair.contents):
        name = old.disks[number].name
        content.settle(old.read(name), f"{name} after its demotion")
    pair.source, pair.contents = new, truth
    takeover.reasons = (SPLIT_BRAIN,)
    pair.heal()
    takeover.replicate()
    pair.start_guests()
    pair.compare()


def test_a_reset_while_the_old_source_is_brought_up_to_date_keeps_the_new_one(pair: Pair) -> None:
    begin(pair)
    takeover = Takeover(pair, "standby", Old.CUT_OFF)
    takeover.run()
    pair.run_for(60)
    takeover.meet_old()
    pair.network.limit(SLOW // 8)
    takeover.follow(live=True)
    reach(pair, 0.2)
    pair.stop_guests()
    pair.source.qmp.execute("x-replnbd-reset")
    for number, disk in enumerate(pair.source.disks):
        check_equal(pair.source.read(disk.name), pair.contents[number].data, disk.name)
    # Neither is a source now, and only one of them has a disk that is what one was.
    pair.heal()
    pair.source.begin()
    pair.source.failover("latest")
    wait_until(pair.source.committed, "the commit")
    takeover.reasons = ("",)
    takeover.replicate()
    pair.start_guests()
    pair.compare()
