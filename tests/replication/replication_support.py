"""Standby disks over memory, whose file operations suspend when a test wants them to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from replnbd.block import BlockNode, MemoryNode
from replnbd.events import EventBus
from replnbd.filters import DelayNode, FaultNode
from replnbd.jobs import JobRegistry
from replnbd.qcow2 import create_qcow2, open_qcow2
from replnbd.replication import Durability, StandbyDisk


@dataclass
class Layout:
    """What the images of a disk are like."""

    size: int = 1 << 20
    secondary_format: str = "raw"
    cluster_size: int = 65536
    extended_l2: bool = True
    durability: Durability = Durability.PROCESS
    suspends: bool = False

    @classmethod
    def draw(cls, rng: random.Random, size: int) -> Layout:
        """One of the many that users have."""
        cluster_size = rng.choice([512, 4096, 16384, 65536, 131072])
        return cls(
            size=size,
            secondary_format=rng.choice(["raw", "qcow2"]),
            cluster_size=cluster_size,
            extended_l2=cluster_size >= 16384 and rng.random() < 0.6,
            durability=rng.choice(list(Durability)),
            suspends=rng.random() < 0.5,
        )


@dataclass
class Built:
    """A disk and the faults that can be put into its files."""

    disk: StandbyDisk
    secondary_fault: FaultNode
    overlay_faults: tuple[FaultNode, FaultNode]
    files: tuple[MemoryNode, MemoryNode, MemoryNode]


async def build(
    name: str, layout: Layout, bus: EventBus, jobs: JobRegistry, content: bytes = b""
) -> Built:
    """A disk in stage none. `content`: the first bytes of the secondary disk."""
    files = (MemoryNode(name="secondary"), MemoryNode(name="hidden"), MemoryNode(name="active"))
    if layout.secondary_format == "qcow2":
        await create_qcow2(files[0], layout.size)
    else:
        await files[0].truncate(layout.size)
    for file in files[1:]:
        await create_qcow2(
            file,
            layout.size,
            cluster_size=layout.cluster_size,
            extended_l2=layout.extended_l2,
            backing_file="below",
            backing_format="raw",
        )
    faults = tuple(FaultNode(f"{file.name}-fault", file) for file in files)
    slow = [DelayNode(f"{fault.name}-slow", fault) for fault in faults]
    below: Sequence[BlockNode] = slow if layout.suspends else faults
    secondary = below[0]
    if layout.secondary_format == "qcow2":
        secondary = await open_qcow2(below[0], name=f"{name}-secondary", power_safe=True)
    if content:
        await secondary.pwrite(0, content)
    power = layout.durability is Durability.POWER
    hidden = await open_qcow2(below[1], backing=secondary, name=f"{name}-hidden", power_safe=power)
    active = await open_qcow2(below[2], backing=hidden, name=f"{name}-active", power_safe=power)
    disk = StandbyDisk(
        name, f"{name}-top", secondary=secondary, hidden=hidden, active=active,
        durability=layout.durability, bus=bus, jobs=jobs,
    )  # fmt: skip
    return Built(disk, faults[0], (faults[1], faults[2]), files)
