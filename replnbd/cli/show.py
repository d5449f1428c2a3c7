"""How things look: tables on a terminal, plain lines elsewhere, JSON when asked."""

from __future__ import annotations

import json as json_module
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STAGE_STYLES = {"running": "green", "failover": "yellow", "failover-failed": "bold red"}


def json(value: object, indent: int | None = 2) -> None:
    """Print a value as JSON."""
    click.echo(json_module.dumps(value, indent=indent))


def size(count: int) -> str:
    """Bytes for people: "512 B", "1.5 MiB"."""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def status(answer: dict[str, Any]) -> None:
    """The answer of `x-replnbd-status`: a table, or one line a disk where nobody looks."""
    if sys.stdout.isatty():
        Console().print(status_table(answer))
        return
    for disk in answer["disks"]:
        fields = {
            "stage": disk["stage"] + (" (fenced)" if disk["fenced"] else ""),
            "checkpoint": _checkpoint(disk),
            "hidden": size(disk["hidden-bytes"]),
            "active": size(disk["active-bytes"]),
            "primary wrote": size(disk["primary-bytes-written"]),
            "standby wrote": size(disk["standby-bytes-written"]),
            "primary clients": disk["primary-connections"],
            "standby clients": disk["standby-connections"],
        }
        if failed := _failed(disk):
            fields["failed requests"] = failed
        if disk["job"] is not None:
            fields["job"] = _job(disk["job"])
        if disk["error"] is not None:
            fields["error"] = disk["error"]
        click.echo(f"{disk['name']}: " + "; ".join(f"{k} {v}" for k, v in fields.items()))


def status_table(answer: dict[str, Any]) -> Table:
    """The same as a table; the writes and the overlays count since the last checkpoint."""
    table = Table(title=escape(f"replnbd {answer['version']}: {', '.join(answer['listen'])}"))
    for heading in ("disk", "stage", "checkpoint", "hidden", "active"):
        table.add_column(heading)
    table.add_column("written: primary / standby")
    table.add_column("clients: primary / standby")
    table.add_column("job / error")
    for disk in answer["disks"]:
        stage = disk["stage"]
        style = _STAGE_STYLES.get(stage, "")
        shown = f"[{style}]{stage}[/{style}]" if style else stage
        notes = [escape(_job(disk["job"]))] if disk["job"] is not None else []
        if failed := _failed(disk):
            notes.append(f"[red]failed requests: {failed}[/red]")
        if disk["error"] is not None:
            notes.append(f"[red]{escape(disk['error'])}[/red]")
        table.add_row(
            escape(f"{disk['name']} / {disk['top-id']}"),
            shown + ("\n[yellow]fenced[/yellow]" if disk["fenced"] else ""),
            _checkpoint(disk),
            size(disk["hidden-bytes"]),
            size(disk["active-bytes"]),
            f"{size(disk['primary-bytes-written'])} / {size(disk['standby-bytes-written'])}",
            f"{disk['primary-connections']} / {disk['standby-connections']}",
            "\n".join(notes),
        )
    return table


def jobs(listed: list[dict[str, Any]]) -> None:
    """The answer of `query-jobs`."""
    if not listed:
        click.echo("no jobs")
    for job in listed:
        click.echo(_job(job) + (f": {job['error']}" if "error" in job else ""))


def _checkpoint(disk: dict[str, Any]) -> str:
    if disk["checkpoint-time"] is None:
        return "none"
    age_s = max(0.0, time.time() - disk["checkpoint-time"])
    return f"{disk['checkpoints']} ({age_s:.0f} s ago)"


def _failed(disk: dict[str, Any]) -> str:
    """Of which side how many requests have failed; "" if none."""
    sides = ((side, disk[f"{side}-errors"]) for side in ("primary", "standby"))
    return ", ".join(f"{side} {count}" for side, count in sides if count)


def _job(job: dict[str, Any]) -> str:
    done, total = job["current-progress"], job["total-progress"]
    if job["type"] == "backup":
        return f"{job['id']} {job['status']}, {size(done)} saved"
    percent = 100 * done // total if total else 100
    return f"{job['id']} {job['status']}, {min(percent, 100)} % of {size(max(done, total))}"
