"""How things look as plain lines, and as JSON; on a terminal: terminal.py."""

from __future__ import annotations

import json as json_module
import time
from typing import Any

import click

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


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
    """The answer of `x-replnbd-status`: a line for the group, and one a disk."""
    if line := group_line(answer):
        click.echo(line)
    fields_of = _primary_fields if answer["role"] == "primary" else _standby_fields
    for disk in answer["disks"]:
        fields = fields_of(disk)
        if failures := failures_of(disk):
            fields["failed requests"] = failures
        if disk["job"] is not None:
            fields["job"] = job_line(disk["job"])
        if disk["error"] is not None:
            fields["error"] = disk["error"]
        click.echo(f"{disk['name']}: " + "; ".join(f"{k} {v}" for k, v in fields.items()))


def _standby_fields(disk: dict[str, Any]) -> dict[str, str]:
    fields = {
        "stage": disk["stage"] + (" (fenced)" if disk["fenced"] else ""),
        "checkpoint": checkpoint_of(disk),
        "hidden": size(disk["hidden-bytes"]),
        "active": size(disk["active-bytes"]),
        "primary wrote": size(disk["primary-bytes-written"]),
        "standby wrote": size(disk["standby-bytes-written"]),
        "primary clients": clients_of(disk, "primary"),
        "standby clients": clients_of(disk, "standby"),
    }
    if note := peer_note(disk):
        fields["peer"] = note
    return fields


def _primary_fields(disk: dict[str, Any]) -> dict[str, str]:
    return {
        "stage": disk["stage"],
        "standby": link_line(disk["link"]),
        "sent": size(disk["link"]["sent-bytes"]),
        "on the way": size(disk["link"]["queued-bytes"]),
        "behind": size(disk["link"]["behind-bytes"]),
        "written": size(disk["bytes-written"]),
        "clients": clients_of(disk),
    }


def link_line(link: dict[str, Any]) -> str:
    """Whether there is a way to a standby, and if not, why."""
    line = str(link["state"])
    if link["to"] is not None:
        line += f" ({link['to']})"
    return line if link["reason"] is None else f"{line}: {link['reason']}"


def peer_note(disk: dict[str, Any]) -> str:
    """What there is to say of a standby's disk and its peer; "" if there is nothing."""
    if disk["link"] is not None and disk["link"]["state"] != "off":
        return link_line(disk["link"])
    if disk["refused"] is not None:
        return f"refused: {disk['refused']}"
    return "being synchronised" if disk["syncing"] else ""


def group_line(answer: dict[str, Any]) -> str:
    """What is the same for all disks; "" if there is nothing."""
    if answer["role"] == "primary":
        return ""
    line = f"group: generation {answer['generation']}"
    if answer["recovered-from"] is not None:
        line += f"; recovered from {answer['recovered-from']}"
    if answer["suspended"] is not None:
        line += f"; suspended: {answer['suspended']}"
    return line


def jobs(listed: list[dict[str, Any]]) -> None:
    """The answer of `query-jobs`."""
    if not listed:
        click.echo("no jobs")
    for job in listed:
        click.echo(job_line(job) + (f": {job['error']}" if "error" in job else ""))


def checkpoint_of(disk: dict[str, Any]) -> str:
    """The count of the last checkpoint, and its age."""
    if disk["checkpoint-time"] is None:
        return "none"
    age_s = max(0.0, time.time() - disk["checkpoint-time"])
    return f"{disk['checkpoints']} ({age_s:.0f} s ago)"


def clients_of(disk: dict[str, Any], side: str = "") -> str:
    """How many clients a side has, and of how many it may have."""
    key = f"{side}-connections" if side else "connections"
    count, most = disk[key], disk[f"{key}-max"]
    return f"{count}" if most is None else f"{count} of {most}"


def failures_of(disk: dict[str, Any]) -> str:
    """Of which side how many requests have failed; "" if none."""
    if disk["mode"] == "primary":
        return str(disk["errors"] or "")
    sides = ((side, disk[f"{side}-errors"]) for side in ("primary", "standby"))
    return ", ".join(f"{side} {count}" for side, count in sides if count)


def job_line(job: dict[str, Any]) -> str:
    """A job and its progress."""
    done, total = job["current-progress"], job["total-progress"]
    if job["type"] == "backup":
        return f"{job['id']} {job['status']}, {size(done)} saved"
    percent = 100 * done // total if total else 100
    return f"{job['id']} {job['status']}, {min(percent, 100)} % of {size(max(done, total))}"
