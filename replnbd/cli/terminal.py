"""What only a terminal shows: tables, and things that move.

Imported only where there is one: rich takes 40 ms of the 250 that a command needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from replnbd.cli import show

_LINK_STYLES = {"off": "dim", "refused": "bold red", "live": "green"}
_STAGE_STYLES = {"running": "green", "failover": "yellow", "failover-failed": "bold red"}


def status(answer: dict[str, Any]) -> None:
    """Print the answer of `x-replnbd-status` as a table."""
    Console().print(status_table(answer))


def watch_status(ask: Callable[[], dict[str, Any]], interval_s: float) -> None:
    """The same, drawn anew in place from what `ask` gives, until interrupted."""
    with Live(status_table(ask()), auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(status_table(ask()), refresh=True)


def status_table(answer: dict[str, Any]) -> Table:
    """The answer of `x-replnbd-status`; overlays and writes count since the last checkpoint."""
    table = Table(title=escape(f"replnbd {answer['version']}: {', '.join(answer['listen'])}"))
    table.caption = escape(show.group_line(answer))
    primary = answer["role"] == "primary"
    for heading in _PRIMARY_HEADINGS if primary else _STANDBY_HEADINGS:
        table.add_column(heading)
    for disk in answer["disks"]:
        cells = _primary_cells(disk) if primary else _standby_cells(disk)
        table.add_row(*cells, "\n".join(_notes(disk)))
    return table


_STANDBY_HEADINGS = (
    "disk", "stage", "checkpoint", "hidden", "active", "written: primary / standby",
    "clients: primary / standby", "job / error",
)  # fmt: skip
_PRIMARY_HEADINGS = (
    "disk", "stage", "standby", "sent", "on the way / behind", "clients", "job / error",
)  # fmt: skip


def _standby_cells(disk: dict[str, Any]) -> list[str]:
    return [
        escape(f"{disk['name']} / {disk['top-id']}"),
        _stage(disk) + ("\n[yellow]fenced[/yellow]" if disk["fenced"] else ""),
        show.checkpoint_of(disk),
        show.size(disk["hidden-bytes"]),
        show.size(disk["active-bytes"]),
        " / ".join(show.size(disk[f"{side}-bytes-written"]) for side in ("primary", "standby")),
        f"{show.clients_of(disk, 'primary')} / {show.clients_of(disk, 'standby')}",
    ]


def _primary_cells(disk: dict[str, Any]) -> list[str]:
    link = disk["link"]
    style = _LINK_STYLES.get(link["state"], "yellow")
    return [
        escape(disk["name"]),
        _stage(disk),
        f"[{style}]{escape(show.link_line(link))}[/{style}]",
        show.size(link["sent-bytes"]),
        " / ".join(show.size(link[f"{which}-bytes"]) for which in ("queued", "behind")),
        show.clients_of(disk),
    ]


def _stage(disk: dict[str, Any]) -> str:
    stage = disk["stage"]
    style = _STAGE_STYLES.get(stage, "")
    return f"[{style}]{stage}[/{style}]" if style else str(stage)


def _notes(disk: dict[str, Any]) -> list[str]:
    notes = [escape(show.job_line(disk["job"]))] if disk["job"] is not None else []
    if disk["mode"] == "secondary" and (note := show.peer_note(disk)):
        notes.append(f"[yellow]{escape(note)}[/yellow]")
    if failures := show.failures_of(disk):
        notes.append(f"[red]failed requests: {failures}[/red]")
    if disk["error"] is not None:
        notes.append(f"[red]{escape(disk['error'])}[/red]")
    return notes


class JobBars:
    """A progress bar for what a job does to each disk, `what`."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),  # a disk may be called "[red]"
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def update(self, disks: list[dict[str, Any]]) -> None:
        """Draw how far they are."""
        for disk in disks:
            name, job = disk["name"], disk["job"]
            if name not in self._rows:
                self._rows[name] = self._bars.add_task(f"{self._what} {name}", total=None)
            if job is not None:
                done, total = job["current-progress"], job["total-progress"]
                self._bars.update(self._rows[name], completed=done, total=max(done, total))
