"""Random walks: whatever happens to two hosts, in whatever order, no acknowledged byte is lost, and
nothing that anybody still needs is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from walk import Walk

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(20))
def test_a_walk(short_dir: Path, seed: int) -> None:
    Walk(short_dir, seed).run(3)
