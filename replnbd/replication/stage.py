"""The stages of replication and every way from one to the next.

All transitions live here, as data; this file knows no disks. A pair of stage and command that is
in neither table is an error, with the text that QEMU's filter gives for it.
"""

from __future__ import annotations

from enum import StrEnum

from replnbd.errors import StateError


class Stage(StrEnum):
    """Where a disk stands (block/replication.c, ReplicationStage)."""

    NONE = "none"
    """Not started: the standby's export answers EIO, the primary's can be written (sync)."""
    RUNNING = "running"
    """The primary's writes arrive; the standby sees the last checkpoint and its own writes."""
    FAILOVER = "failover"
    """The standby has taken over; what the overlays hold is committed in the background."""
    FAILOVER_FAILED = "failover-failed"
    """As above, but the commit failed or was cancelled; `failover` tries it again."""
    DONE = "done"
    """Stopped, or committed: nothing more to do until `reset`."""


class Command(StrEnum):
    """What asks for a transition: four commands, and how a commit ended."""

    START = "start"
    CHECKPOINT = "checkpoint"
    STOP = "stop"
    FAILOVER = "failover"
    RESET = "reset"
    COMMITTED = "committed"
    COMMIT_FAILED = "commit-failed"


TRANSITIONS: dict[tuple[Stage, Command], Stage] = {
    (Stage.NONE, Command.START): Stage.RUNNING,
    (Stage.RUNNING, Command.CHECKPOINT): Stage.RUNNING,
    (Stage.RUNNING, Command.STOP): Stage.DONE,
    (Stage.RUNNING, Command.FAILOVER): Stage.FAILOVER,
    (Stage.FAILOVER, Command.COMMITTED): Stage.DONE,
    (Stage.FAILOVER, Command.COMMIT_FAILED): Stage.FAILOVER_FAILED,
    (Stage.FAILOVER_FAILED, Command.FAILOVER): Stage.FAILOVER,
    (Stage.FAILOVER_FAILED, Command.RESET): Stage.NONE,
    (Stage.DONE, Command.RESET): Stage.NONE,
    (Stage.NONE, Command.RESET): Stage.NONE,
}

# A manager that drives both hosts alike goes on sending these after a failover: no error.
IGNORED: frozenset[tuple[Stage, Command]] = frozenset(
    (stage, command)
    for stage in (Stage.FAILOVER, Stage.DONE)
    for command in (Command.START, Command.CHECKPOINT, Command.STOP, Command.FAILOVER)
)

NOT_RUNNING = "Block replication is not running"
RUNNING_OR_DONE = "Block replication is running or done"
BACKUP_CANCELLED = "Backup job was cancelled unexpectedly"
IO_ERROR = "I/O error occurred"

_REFUSALS = {
    Command.START: RUNNING_OR_DONE,
    Command.CHECKPOINT: BACKUP_CANCELLED,
    Command.STOP: NOT_RUNNING,
    Command.FAILOVER: NOT_RUNNING,
}


def next_stage(stage: Stage, command: Command) -> Stage | None:
    """Where `command` leads from `stage`; None if it is to be ignored.

    Raises StateError with QEMU's text where QEMU has one.
    """
    if (stage, command) in IGNORED:
        return None
    try:
        return TRANSITIONS[stage, command]
    except KeyError:
        text = _REFUSALS.get(command)
        if text is None:
            text = f"'{command.value}' is not possible in stage '{stage.value}'"
        raise StateError(text) from None
