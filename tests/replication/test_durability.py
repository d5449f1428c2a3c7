"""Durability "power": what is durable before what, and what a file that cannot be synced costs.

That a view survives is shown in tests/daemon/test_power.py; here are the single rules.
"""

from __future__ import annotations

import errno
import random

import pytest
from replication_support import Built, Layout, build

from replnbd.block import read_bytes
from replnbd.errors import StateError
from replnbd.events import EventBus
from replnbd.filters import CopyBeforeWrite
from replnbd.jobs import JobRegistry
from replnbd.replication import Durability, Group, Stage

SIZE = 1 << 20


async def running(*, suspends: bool = False) -> tuple[Group, Built, bytes]:
    """A disk in stage running, and what it shows."""
    content = random.Random(1).randbytes(SIZE)
    layout = Layout(durability=Durability.POWER, suspends=suspends)
    built = await build("d", layout, EventBus(), JobRegistry(), content)
    group = Group([built.disk])
    await group.start()
    return group, built, content


async def test_a_hidden_overlay_that_cannot_be_flushed_keeps_the_disk_as_it_is() -> None:
    """Not even a second try overwrites what may not be saved durably; what is goes on."""
    group, built, content = await running()
    primary, standby, hidden = built.disk.primary, built.disk.standby, built.overlay_faults[0]
    await primary.pwrite(0, b"A" * 4096)
    disk = b"A" * 4096 + content[4096:]
    for skip in (0, 1):  # before the entry, and after it
        for _ in range(2):
            hidden.fail("flush", skip=skip)
            for operation in (
                primary.pwrite(65536, b"B" * 4096),
                primary.write_zeroes(65536, 4096),
                primary.discard(65536, 4096),
            ):
                with pytest.raises(OSError, match="injected"):
                    await operation
            hidden.heal()
            hidden.fail("flush")
            with pytest.raises(OSError, match="injected"):
                await primary.pwrite(65536 + 2048, b"C" * 2048)
            await primary.pwrite(1024, b"saved before")
            disk = disk[:1024] + b"saved before" + disk[1036:]
            assert await read_bytes(built.disk.secondary, 0, SIZE) == disk
            assert await read_bytes(standby, 0, SIZE) == content
            hidden.heal()
    await primary.pwrite(65536, b"D" * 4096)
    assert await read_bytes(standby, 0, SIZE) == content
    disk = disk[:65536] + b"D" * 4096 + disk[69632:]
    assert await read_bytes(built.disk.secondary, 0, SIZE) == disk
    await group.checkpoint()
    assert await read_bytes(standby, 0, SIZE) == disk
    await group.close()


async def test_what_was_saved_of_a_write_that_failed_is_flushed_before_it_counts() -> None:
    """Two clusters: the first one is saved, and the second one finds no room."""
    group, built, content = await running()
    primary, hidden = built.disk.primary, built.overlay_faults[0]
    copy = primary.target
    assert isinstance(copy, CopyBeforeWrite)
    await primary.pwrite(3 * 65536, b"x" * 4096)  # so that they are no neighbours
    await primary.pwrite(65536 + 4096, b"y" * 4096)
    disk = bytearray(await read_bytes(built.disk.secondary, 0, SIZE))
    hidden.fail("pwrite", errno.ENOSPC, skip=2)  # data and entry of the first one
    with pytest.raises(OSError, match="injected"):
        await primary.pwrite(0, b"z" * 2 * 65536)
    hidden.heal()
    assert copy._doubtful == [(0, 65536 + 4096)]
    hidden.fail("flush")
    with pytest.raises(OSError, match="injected"):
        await primary.pwrite(0, b"w" * 512)
    hidden.heal()
    for _ in range(50):  # where nothing is saved, nothing is in doubt
        hidden.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="injected"):
            await primary.pwrite(10 * 65536, b"z" * 4096)
        hidden.heal()
    assert len(copy._doubtful) == 1
    assert await read_bytes(built.disk.secondary, 0, SIZE) == disk
    await primary.pwrite(0, b"z" * 2 * 65536)
    assert copy._doubtful == []
    disk[: 2 * 65536] = b"z" * 2 * 65536
    assert await read_bytes(built.disk.secondary, 0, SIZE) == disk
    assert await read_bytes(built.disk.standby, 0, SIZE) == content
    await group.close()


async def test_a_disk_that_cannot_be_flushed_gets_no_checkpoint() -> None:
    group, built, content = await running()
    await built.disk.primary.pwrite(0, b"new")
    for skip in (0, 1):  # before anybody waits, and then
        built.secondary_fault.fail("flush", errno.EIO, skip=skip)
        with pytest.raises(StateError, match=r"^Failed to flush secondary-fault: "):
            await group.checkpoint()
        assert group.error() is not None
        assert await read_bytes(built.disk.standby, 0, SIZE) == content
        built.secondary_fault.heal()
    await group.checkpoint()
    assert group.error() is None
    assert await read_bytes(built.disk.standby, 0, 3) == b"new"
    await group.close()


async def test_a_disk_that_cannot_be_flushed_is_not_started() -> None:
    built = await build("d", Layout(durability=Durability.POWER), EventBus(), JobRegistry())
    group = Group([built.disk])
    built.secondary_fault.fail("flush", errno.EIO)
    with pytest.raises(StateError, match=r"^Failed to flush "):
        await group.start()
    assert built.disk.stage is Stage.NONE
    built.secondary_fault.heal()
    await group.start()
    await group.close()


async def test_a_first_touch_takes_two_flushes_and_a_rewrite_none() -> None:
    group, built, content = await running(suspends=True)
    await built.disk.primary.pwrite(0, b"w" * 4096)  # makes the table, too
    flushes = 0
    flush = built.files[1].flush

    async def counted() -> None:
        nonlocal flushes
        flushes += 1
        await flush()

    built.files[1].flush = counted  # type: ignore[method-assign]
    await built.disk.primary.pwrite(65536, b"x" * 70000)
    assert flushes == 2
    await built.disk.primary.pwrite(65536, b"y" * 70000)
    await built.disk.standby.pwrite(65536, b"z" * 70000)
    assert flushes == 2
    view = content[:65536] + b"z" * 70000 + content[135536:]
    assert await read_bytes(built.disk.standby, 0, SIZE) == view
    await group.close()
