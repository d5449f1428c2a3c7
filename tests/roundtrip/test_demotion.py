"""A host that is configured as the primary, becomes the standby, and takes over again."""

from __future__ import annotations

from pathlib import Path

import pytest
from changes import Old, Takeover
from pair import Pair

pytestmark = pytest.mark.slow


@pytest.fixture
def demoted(short_dir: Path) -> Pair:
    """A pair whose target is the old primary, demoted while it ran, and started."""
    pair = Pair(short_dir, 3, size=32 << 20)
    try:
        pair.source.begin()
        pair.begin()
        takeover = Takeover(pair, "standby", Old.CUT_OFF)
        takeover.run()
        takeover.meet_old()
        takeover.follow(live=True)
        pair.begin()
        assert (pair.target.mode, pair.target.role) == ("primary", "secondary")
    except BaseException:
        pair.close()
        raise
    return pair


def fill_view(pair: Pair) -> None:
    """So that there is something to commit."""
    (disk,), (view,) = pair.target.disks, pair.views
    with pair.target.connect(disk.top) as client:
        for at in range(0, view.size, 1 << 20):
            data = pair.rng.randbytes(1 << 20)
            client.pwrite(at, data)
            view.apply((at, data))


def test_killed_in_the_commit_it_goes_on_with_the_commit(demoted: Pair) -> None:
    with demoted as pair:
        fill_view(pair)
        Takeover(pair, "standby", Old.DEAD).run(kill_in_commit=True)


def test_once_it_has_taken_over_it_is_the_primary_again_and_can_be_demoted_again(
    demoted: Pair,
) -> None:
    with demoted as pair:
        takeover = Takeover(pair, "standby", Old.CUT_OFF)
        takeover.run()
        was, new = pair.target, pair.source
        new.quit()
        new.start()
        assert new.role == "primary"
        pair.settle_source()
        was.qmp.execute("x-replnbd-reset")
        pair.heal()
        new.begin()
        pair.compare()
        pair.begin()
        takeover = Takeover(pair, "standby", Old.CUT_OFF)
        takeover.run()
        takeover.meet_old()
        takeover.follow(live=True)
        pair.compare()
