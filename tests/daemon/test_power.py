"""The power fails, at any system call: what was flushed is there, a view with durability "power" is
what it was, and one with "process" is refused.

The counts here are for every run of the tests; `scripts/soak` has the large ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from power_world import PowerLife

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(40))
def test_a_power_failure_loses_nothing_that_was_promised(seed: int, tmp_path: Path) -> None:
    """One process after the other, on disks of all layouts and both durabilities."""
    print("seed", seed)
    PowerLife(tmp_path, seed).run(10)


def test_the_lives_meet_all_that_they_are_to_test(tmp_path: Path) -> None:
    """Views that survive and views that are lost, and every kind of system call."""
    kept = lost = 0
    kinds: set[str] = set()
    for seed in range(100, 108):
        folder = tmp_path / str(seed)
        folder.mkdir()
        life = PowerLife(folder, seed)
        life.run(10)
        kept, lost = kept + life.kept, lost + life.lost
        kinds |= life.storage.kinds.keys()
    assert kept > 10
    assert lost > 5
    assert kinds >= {
        "write", "write with RWF_DSYNC", "truncate", "punch", "sync", "link", "rename",
    }  # fmt: skip
