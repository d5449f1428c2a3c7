"""Companions: the links of a group's disks, which are in step together or not at all.

A standby that has one disk as it is now, and another as it was an hour ago, has neither a
checkpoint nor anything to fail over to. So a link whose copy lacks nothing is *ready*; and only
while all are ready, the targets are told that they are in step.
"""

from __future__ import annotations

from typing import Protocol


class Companion(Protocol):
    """A link."""

    def nudge(self) -> None:
        """Another one has become ready, or is not any more."""


class Companions:
    """Of those links that have been started."""

    def __init__(self) -> None:
        self._ready: dict[Companion, bool] = {}

    def join(self, link: Companion) -> None:
        """It is started, and not ready."""
        self._ready[link] = False
        self._nudge_others(link)

    def leave(self, link: Companion) -> None:
        """It is stopped: nobody waits for it any more."""
        if self._ready.pop(link, None) is not None:
            self._nudge_others(link)

    def tell(self, link: Companion, *, ready: bool) -> None:
        """Whether its copy lacks nothing."""
        if self._ready.get(link, ready) is not ready:
            self._ready[link] = ready
            self._nudge_others(link)

    def others_ready(self, link: Companion) -> bool:
        """Whether the copies of all others lack nothing; of one that has not joined, yes."""
        others = [ready for other, ready in self._ready.items() if other is not link]
        return all(others) or link not in self._ready

    def _nudge_others(self, link: Companion) -> None:
        for other in self._ready:
            if other is not link:
                other.nudge()
