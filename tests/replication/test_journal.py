"""The journal's file: a record is there whole or not at all, and the newest whole one counts."""

from __future__ import annotations

import random

import pytest

from replnbd.block import MemoryNode
from replnbd.errors import ImageError
from replnbd.filters import FaultNode
from replnbd.replication import DiskRecord, FailoverTarget, FileStamp, Journal, Record, Stage
from replnbd.replication.journal import Layer
from replnbd.replication.record_file import SLOT_BYTES


def record(number: int, disks: int = 2) -> Record:
    """One that no other number gives."""
    rng = random.Random(number)
    return Record(
        generation=f"{number:032x}",
        boot="boot",
        files={"d/hidden": FileStamp(number, rng.getrandbits(60))} if number % 2 else None,
        torn=rng.random() < 0.5,
        disks=[
            DiskRecord(
                name=f'd{index} "ü\\',
                top_id=f"t{index}",
                size=rng.getrandbits(60),
                stage=rng.choice(list(Stage)),
                promoted=rng.random() < 0.5,
                target=rng.choice(list(FailoverTarget)),
                lost=rng.choice([None, "power"]),
                error=rng.choice([None, "I/O error"]),
                checkpoint_count=rng.getrandbits(40),
                checkpoint_time=rng.choice([None, rng.random() * 2e9]),
                emptying=rng.sample(list(Layer), rng.randrange(3)),
            )
            for index in range(disks)
        ],
    )


async def loaded(data: bytes | bytearray) -> Record | None:
    """What a journal with these bytes says."""
    file = MemoryNode(len(data))
    file.data[:] = data
    return await Journal(file).load()


async def written(count: int) -> MemoryNode:
    """A journal with so many records."""
    file = MemoryNode()
    journal = Journal(file)
    assert await journal.load() is None
    for number in range(count):
        await journal.write(record(number), durable=True)
    return file


async def test_the_newest_record_is_found_again() -> None:
    file = MemoryNode()
    journal = Journal(file)
    for number in range(9):
        await journal.write(record(number), durable=number % 2 == 0)
        assert await loaded(file.data) == record(number)
        if number == 4:
            journal = Journal(file)
            assert await journal.load() == record(4)


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_a_store_that_is_cut_short_leaves_the_record_before_it(count: int) -> None:
    """At every byte, for torn ends and for torn beginnings."""
    before = bytes((await written(count)).data)
    after = bytes((await written(count + 1)).data)
    before += bytes(len(after) - len(before))
    changed = [place for place in range(len(after)) if before[place] != after[place]]
    first, end = changed[0], changed[-1] + 1
    old, new = record(count - 1), record(count)
    for cut in range(first, end + 1):
        torn = after[:cut] + before[cut:]
        assert await loaded(torn) == (new if cut == end else old)
        torn = before[:cut] + after[cut:]
        assert await loaded(torn) == (new if cut == first else old)


async def test_records_that_are_not_durable_leave_the_last_durable_one() -> None:
    """A power failure may have torn every one of them."""
    file = await written(3)
    journal = Journal(file)
    await journal.load()
    durable = bytes(file.data)
    for number in range(10, 15):
        await journal.write(record(number), durable=False)
        assert await loaded(file.data) == record(number)
    torn = bytearray(file.data)
    for slot in (2, 3):
        torn[slot * SLOT_BYTES + 40] ^= 1
    assert await loaded(torn) == record(2)
    assert bytes(file.data[: len(durable)]) == durable
    await journal.write(record(20), durable=True)
    assert await loaded(file.data) == record(20)


async def test_the_first_record_can_be_cut_short_as_well() -> None:
    whole = bytes((await written(1)).data)
    for cut in range(len(whole)):
        assert await loaded(whole[:cut] + bytes(2 * SLOT_BYTES - cut)) is None


@pytest.mark.parametrize("seed", range(3))
async def test_no_flipped_bit_passes_for_a_record(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    good = bytes((await written(4)).data)  # the newest is in the slot 1
    length = int.from_bytes(good[SLOT_BYTES + 12 : SLOT_BYTES + 16], "big")
    end = SLOT_BYTES + 56 + length  # behind it may be what is left of a longer one
    for _ in range(400):
        bad = bytearray(good)
        place = rng.randrange(SLOT_BYTES, end)
        bad[place] ^= 1 << rng.randrange(8)
        assert await loaded(bad) == record(2)
        bad[rng.randrange(56)] ^= 1 << rng.randrange(8)
        with pytest.raises(ImageError, match="no record in it is whole: the journal is damaged"):
            await loaded(bad)


@pytest.mark.parametrize("junk", [b"\xff", b"QFI\xfb", b"replnbdJ"])
async def test_what_is_no_journal_is_refused(junk: bytes) -> None:
    with pytest.raises(ImageError, match="the journal is damaged"):
        await loaded(junk * (2 * SLOT_BYTES // len(junk)))


async def test_a_record_that_does_not_fit_changes_nothing() -> None:
    file = await written(3)
    journal = Journal(file)
    await journal.load()
    before = bytes(file.data)
    with pytest.raises(ImageError, match=r"a record of \d+ bytes, more than 65480"):
        await journal.write(record(3, disks=400), durable=True)
    assert file.data == before
    await journal.write(record(3), durable=True)
    assert await loaded(file.data) == record(3)


@pytest.mark.parametrize("operation", ["pwrite", "flush"])
async def test_a_store_that_fails_is_followed_by_one_to_the_same_place(operation: str) -> None:
    """It may be there all the same: the other slot has the last record that is sure."""
    file = await written(3)
    fault = FaultNode("fault", file)
    journal = Journal(fault)
    await journal.load()
    fault.fail(operation, times=1)
    with pytest.raises(OSError, match="injected"):
        await journal.write(record(7), durable=True)
    assert await loaded(file.data) == record(2 if operation == "pwrite" else 7)
    other = bytes(file.data[:SLOT_BYTES])  # of record 2
    await journal.write(record(8), durable=True)
    assert await loaded(file.data) == record(8)
    assert file.data[:SLOT_BYTES] == other
