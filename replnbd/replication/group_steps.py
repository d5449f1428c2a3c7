"""What the group's commands are made of, where it needs no group: checks, records, flushes, and how
an error is told."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from replnbd.errors import StateError
from replnbd.jobs import Job
from replnbd.replication.disk import StandbyDisk
from replnbd.replication.journal import DiskRecord, Durability, FailoverTarget, Layer
from replnbd.replication.stage import Command, Stage

log = logging.getLogger(__name__)

# The numbers of QEMU's ReplicationMode, which its error text shows.
_MODES = {"primary": 0, "secondary": 1}


def check_mode(mode: str, given: str) -> None:
    """StateError, in QEMU's words, if a command is not for the mode of a disk."""
    if given != mode:
        raise StateError(
            f"The parameter mode's value is invalid, needs {_MODES[mode]}, but got {_MODES[given]}"
        )


def new_generation() -> str:
    """One that nobody else has."""
    return secrets.token_hex(16)


def intended(
    disk: StandbyDisk,
    command: Command,
    layers: Sequence[Layer],
    target: FailoverTarget | None,
) -> DiskRecord:
    """What a disk is once `command` has happened."""
    record = disk.record()
    stage = disk.next_stage(command)
    assert stage is not None
    record.stage = stage
    record.emptying = list(layers)
    record.error = record.lost = None
    if command in (Command.START, Command.CHECKPOINT):
        record.checkpoint_count += 1
        record.checkpoint_time = time.time()
    elif command is Command.FAILOVER:
        assert target is not None
        record.promoted, record.target = True, target
    elif command is Command.RESET:
        record.promoted, record.target = False, FailoverTarget.STANDBY
        record.checkpoint_count, record.checkpoint_time = 0, None
    return record


async def flush_checkpoint(disks: Sequence[StandbyDisk]) -> None:
    """Make durable what a checkpoint shows, on all disks whose view is to survive a power failure.
    StateError; then the disk that failed has it as its `error`."""

    async def flush(disk: StandbyDisk) -> None:
        with told(disk, f"flush {disk.secondary.name}"):
            await disk.secondary.flush()

    power = [disk for disk in disks if disk.durability is Durability.POWER]
    if not power:
        return
    for failure in await asyncio.gather(*map(flush, power), return_exceptions=True):
        if failure is not None:
            raise failure


@contextmanager
def told(disk: StandbyDisk, what: str) -> Iterator[None]:
    """An OSError within the block becomes a StateError, which the disk's `error` keeps."""
    try:
        yield
    except OSError as exc:
        disk.error = f"Failed to {what}: {exc.strerror}"
        raise StateError(disk.error) from exc


async def ended(jobs: Sequence[Job | None]) -> None:
    """Until all of these have ended."""
    for job in jobs:
        if job is not None:
            await job.wait()


async def begin_taking_over(disks: Sequence[StandbyDisk], generation: str) -> None:
    """What a failover needs of the histories, before anything has happened; but for those disks
    where one has begun before. StateError, and then nothing has changed."""
    try:
        for disk in disks:
            if disk.stage is not Stage.FAILOVER_FAILED:
                with told(disk, f"write the history of {disk.secondary.name}"):
                    await disk.peer.before_failover(disk.overlays, generation)
    except StateError:
        await take_back(disks)
        raise


async def take_back(disks: Sequence[StandbyDisk]) -> None:
    """It has not happened after all."""
    for disk in disks:
        if disk.stage is not Stage.FAILOVER_FAILED:
            try:
                await disk.peer.failover_failed()
            except OSError as exc:
                # The next process does, by the journal.
                log.warning("the history of '%s': %s", disk.name, exc.strerror)


async def begin_reset(disks: Sequence[StandbyDisk], *, forget: bool) -> None:
    """What a reset needs of the histories, before anything has happened. StateError."""
    try:
        for disk in disks:
            with told(disk, f"write the history of {disk.secondary.name}"):
                await disk.peer.before_reset(forget=forget)
    except StateError:
        await end_reset(disks, happened=False)
        raise


async def end_reset(disks: Sequence[StandbyDisk], *, happened: bool) -> None:
    """It has happened, or has not after all."""
    for disk in disks:
        try:
            await disk.peer.end_reset(happened=happened)
        except OSError as exc:
            # The next source that begins does, or the next process, by the journal.
            log.warning("the history of '%s': %s", disk.name, exc.strerror)


@asynccontextmanager
async def not_sending(disks: Sequence[StandbyDisk]) -> AsyncIterator[None]:
    """Nothing is sent any more; if the block fails, all goes on. Around a drain: a link does not
    end while its job waits for a request, which waits for the drain."""
    sending = [disk for disk in disks if disk.peer.sending]
    for disk in sending:
        await disk.peer.stop_sending()
    try:
        yield
    except BaseException:
        for disk in sending:
            disk.peer.resume()
        raise


async def end_taking_over(disks: Sequence[StandbyDisk]) -> None:
    """It has happened."""
    for disk in disks:
        try:
            await disk.peer.taken_over()
        except OSError as exc:
            log.warning("the history of '%s': %s", disk.name, exc.strerror)  # as above
