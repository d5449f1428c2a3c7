"""The guest that the kernel's client is tested in does what it is told, whatever ends meanwhile."""

from __future__ import annotations

import pytest
from peers import Guest

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def test_what_commands_leave_behind_may_end_at_any_time(guest: Guest) -> None:
    """A line that was half read when such a process ended was lost, and with it the test's time."""
    for _ in range(3):
        guest.run("for i in $(seq 40); do (usleep $((i * 20000)) &); done")
        for number in range(40):
            said = f"{number} of a line that takes the guest some time to read".ljust(120, ".")
            assert guest.run(f"echo {said}") == f"{said}\n"
