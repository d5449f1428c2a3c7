"""What a replicated disk must be, in bytearrays: the judge of the tests in this directory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelDisk:
    """One disk. `granule` is what the active overlay allocates at a time, in bytes: when the
    primary's writes show through (done after a stop), it decides what the standby still sees."""

    size: int
    granule: int
    secondary: bytearray = field(init=False)
    checkpoint: bytearray = field(init=False)
    active: dict[int, bytearray] = field(init=False, default_factory=dict)
    stage: str = field(init=False, default="none")
    promoted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.secondary = bytearray(self.size)
        self.checkpoint = bytearray(self.size)

    def view(self) -> bytearray:
        """All bytes that the standby reads."""
        below = self.secondary if self.stage == "done" else self.checkpoint
        view = bytearray(below)
        for index, part in self.active.items():
            start = index * self.granule
            view[start : start + len(part)] = part
        return view

    def primary_writes(self, offset: int, data: bytes) -> None:
        """The primary's write; only in stages where it is let in."""
        self.secondary[offset : offset + len(data)] = data

    def standby_writes(self, offset: int, data: bytes) -> None:
        """The standby's write; only in stages where it is let in."""
        if self.promoted and self.stage == "done":
            self.secondary[offset : offset + len(data)] = data
            return
        view = self.view()
        view[offset : offset + len(data)] = data
        for index in range(offset // self.granule, (offset + len(data) - 1) // self.granule + 1):
            start = index * self.granule
            self.active[index] = view[start : start + self.granule]

    def take_checkpoint(self) -> None:
        """The view is the secondary disk as it is now."""
        self.checkpoint = bytearray(self.secondary)
        self.active.clear()

    def committed(self) -> None:
        """A failover has ended: the view is the disk."""
        self.secondary = self.view()
        self.active.clear()
        self.stage = "done"
