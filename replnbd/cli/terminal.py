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
    for heading in ("disk", "stage", "checkpoint", "hidden", "active"):
        table.add_column(heading)
    table.add_column("written: primary / standby")
    table.add_column("clients: primary / standby")
    table.add_column("job / error")
    for disk in answer["disks"]:
        stage = disk["stage"]
        style = _STAGE_STYLES.get(stage, "")
        shown = f"[{style}]{stage}[/{style}]" if style else stage
        notes = [escape(show.job_line(disk["job"]))] if disk["job"] is not None else []
        if failures := show.failures_of(disk):
            notes.append(f"[red]failed requests: {failures}[/red]")
        if disk["error"] is not None:
            notes.append(f"[red]{escape(disk['error'])}[/red]")
        table.add_row(
            escape(f"{disk['name']} / {disk['top-id']}"),
            shown + ("\n[yellow]fenced[/yellow]" if disk["fenced"] else ""),
            show.checkpoint_of(disk),
            show.size(disk["hidden-bytes"]),
            show.size(disk["active-bytes"]),
            " / ".join(show.size(disk[f"{side}-bytes-written"]) for side in ("primary", "standby")),
            f"{show.clients_of(disk, 'primary')} / {show.clients_of(disk, 'standby')}",
            "\n".join(notes),
        )
    return table


class CommitBars:
    """A progress bar for the commit of each disk."""

    def __init__(self) -> None:
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
                self._rows[name] = self._bars.add_task(f"commit {name}", total=None)
            if job is not None:
                done, total = job["current-progress"], job["total-progress"]
                self._bars.update(self._rows[name], completed=done, total=max(done, total))
