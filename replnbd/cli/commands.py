"""The commands that speak to a running daemon over its control socket."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from replnbd.cli import show
from replnbd.control import ControlClient
from replnbd.daemon.config import default_control
from replnbd.errors import StateError

control = click.option(
    "--control",
    type=click.Path(),
    default=default_control,
    show_default="$REPLNBD_CONTROL, or replnbd/qmp.sock in the run directory",
    help="Path of the daemon's QMP socket.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_POLL_S = 0.2
_INTERVAL_RANGE_S = (0.1, 86400)


def _check_interval(ctx: click.Context, param: click.Parameter, seconds: float) -> float:
    """What FloatRange does, but for NaN, which it lets through."""
    low, high = _INTERVAL_RANGE_S
    if not low <= seconds <= high:
        raise click.BadParameter(f"{seconds} is not in the range {low} to {high}.")
    return seconds


@click.command()
@control
@click.option("--wait", is_flag=True, help="On a primary: until the standby is in step.")
def start(control: str, wait: bool) -> None:
    """Start replication.

    On a standby, with a first checkpoint. On a primary: what the standby lacks is copied in the
    background, and what is written is sent.
    """
    with ControlClient(control) as client:
        disks = client.execute("x-replnbd-status")["disks"]
        if not wait or any(disk["stage"] != "running" for disk in disks):
            client.execute("xen-set-replication", enable=True, primary=_is_primary(client))
        _check_running(client)
        if wait:
            _wait_in_step(client)
        _say_stages(client)


@click.command()
@control
def checkpoint(control: str) -> None:
    """Move the standby's view on to now.

    On all disks; what the standby wrote since the last checkpoint is dropped. On a side that sends
    its writes: until all of them have arrived. Exit code 1 if there is no way there.
    """
    with ControlClient(control) as client:
        client.execute("xen-colo-do-checkpoint")
        status = client.execute("x-replnbd-status")
    disks = status["disks"]
    sending = status["role"] == "primary" or any(map(_sends, disks))
    for disk in disks:
        result = _arrival_of(disk) if sending else f"checkpoint {disk['checkpoints']}"
        click.echo(f"{disk['name']}: {disk['stage']}, {result}")
    lost = [disk for disk in disks if sending and _link_state(disk) != "live"]
    if lost:
        what = "; ".join(f"'{disk['name']}': {_link_line(disk)}" for disk in lost)
        raise StateError(f"what was written is not at the standby: {what}")


@click.command()
@control
def stop(control: str) -> None:
    """Stop replication.

    On a standby: each disk is the primary's latest then, and both overlays are empty. On a primary:
    nothing is sent any more.
    """
    with ControlClient(control) as client:
        client.execute("xen-set-replication", enable=False, primary=_is_primary(client))
        _say_stages(client)


@click.command()
@control
@click.option("--to", required=True, metavar="URI", help="The standby's disk: nbd://HOST/NAME.")
@click.option("--disk", help="Which disk, if there are several.")
@click.option("--wait", is_flag=True, help="Until the standby is in step.")
def replicate(control: str, to: str, disk: str | None, wait: bool) -> None:
    """Send a disk that has taken over to a standby.

    After a failover: only what differs is copied if that is the old primary. From then on it is
    sent what is written, also after a restart.
    """
    with ControlClient(control) as client:
        device = {} if disk is None else {"device": disk}
        client.execute("x-replnbd-replicate", to=to, **device)
        if wait:
            _wait_in_step(client)
        _say_stages(client)


@click.command()
@control
def verify(control: str) -> None:
    """Compare a primary's disks with their standbys.

    By digests, while both are in use; what differs is copied again. Exit code 1 if something did,
    or if they could not be compared. So does a standby that has taken over and replicates.
    """
    with ControlClient(control) as client:
        client.execute("x-replnbd-verify")
        with _bars("verify") as bars:
            while jobs := _verify_jobs(client):
                bars([{"name": job["id"], "job": job} for job in jobs])
                time.sleep(_POLL_S)
        disks = client.execute("x-replnbd-status")["disks"]
    results = {disk["name"]: disk["link"]["verified"] for disk in disks if _sends(disk)}
    for name, result in results.items():
        click.echo(f"{name}: {result}")
    if any(str(result).endswith("differed") for result in results.values()):
        raise StateError("not equal to the standby's; what differed is copied again")
    if set(results.values()) != {"equal"}:
        raise StateError("not all has been compared")


@click.command()
@control
def demote(control: str) -> None:
    """Make a primary the standby of the one that has taken over.

    Its clients are disconnected, its disks become the standby's, with the view NAME-top. For good:
    also after a restart.
    """
    with ControlClient(control) as client:
        client.execute("x-replnbd-demote")
        _say_stages(client)


@click.command()
@control
@click.option("--wait", is_flag=True, help="Wait until all is committed, with a progress bar.")
@click.option(
    "--to", "target", type=click.Choice(["standby", "checkpoint", "latest"]),
    help="What becomes the disk: the standby's view (the default), the last checkpoint without the"
    " standby's own writes, or what the primary wrote last.",
)  # fmt: skip
def failover(control: str, wait: bool, target: str | None) -> None:
    """Make the standby's view the disk.

    On all disks, and the primary is fenced: its connections end, new ones are refused.

    The view can be used all the while; the commit goes on in the background. After a failed
    commit, the same command tries it again.
    """
    with ControlClient(control) as client:
        if _is_primary(client):  # the daemon does as QEMU: it would stop
            raise StateError("a primary cannot take over: say so to its standby, or 'stop' here")
        to = {} if target is None else {"x-replnbd-to": target}
        client.execute("xen-set-replication", enable=False, primary=False, failover=True, **to)
        _check_taken_over(client)
        if wait:
            _wait_for_commit(client)
        _say_stages(client)


@click.command()
@control
@click.option("--force", is_flag=True, help="Even if overlays hold data that is in no disk.")
def reset(control: str, force: bool) -> None:
    """Make ready for replication again.

    Back to stage 'none', with empty overlays and no fence.
    """
    with ControlClient(control) as client:
        client.execute("x-replnbd-reset", force=force)
        _say_stages(client)


@click.command()
@control
@as_json
@click.option("--watch", is_flag=True, help="Redraw in place, until interrupted.")
@click.option(
    "--interval", type=float, default=1.0, callback=_check_interval, help="Seconds, with --watch."
)
def status(control: str, as_json: bool, watch: bool, interval: float) -> None:
    """Show every disk.

    Its stage, its checkpoint, what the overlays hold, and who is connected.
    """
    with ControlClient(control) as client:

        def ask() -> dict[str, Any]:
            answer: dict[str, Any] = client.execute("x-replnbd-status")
            return answer

        on_terminal = sys.stdout.isatty() and not as_json
        if on_terminal:
            from replnbd.cli import terminal
        try:
            if watch and on_terminal:
                terminal.watch_status(ask, interval)
            while True:
                answer = ask()
                if as_json:
                    show.json(answer, indent=None if watch else 2)
                elif on_terminal:
                    terminal.status(answer)
                else:
                    show.status(answer)
                if not watch:
                    return
                time.sleep(interval)
        except KeyboardInterrupt:
            return


@click.command()
@control
@as_json
def jobs(control: str, as_json: bool) -> None:
    """List the jobs and their progress."""
    with ControlClient(control) as client:
        listed = client.execute("query-jobs")
    show.json(listed) if as_json else show.jobs(listed)


def _sends(disk: dict[str, Any]) -> bool:
    """Whether what is written to it is to go to a standby."""
    return _link_state(disk) != "off"


def _link_state(disk: dict[str, Any]) -> str:
    return "off" if disk["link"] is None else str(disk["link"]["state"])


def _link_line(disk: dict[str, Any]) -> str:
    return "off" if disk["link"] is None else show.link_line(disk["link"])


def _arrival_of(disk: dict[str, Any]) -> str:
    state = _link_state(disk)
    return "all has arrived" if state == "live" else f"not at the standby ({state})"


def _is_primary(client: ControlClient) -> bool:
    return bool(client.execute("x-replnbd-status")["role"] == "primary")


def _check_taken_over(client: ControlClient) -> None:
    """StateError if the command was ignored, as QEMU does, where it is not one already."""
    for disk in client.execute("x-replnbd-status")["disks"]:
        if not disk["fenced"]:
            raise StateError(
                f"'{disk['name']}' was stopped, and has no view to take over: 'reset' and 'start'"
                " come first"
            )


def _check_running(client: ControlClient) -> None:
    """The same, where replication has been stopped."""
    for disk in client.execute("x-replnbd-status")["disks"]:
        if disk["stage"] == "running" or _sends(disk):
            continue
        if disk.get("fenced"):
            raise StateError(f"'{disk['name']}' has taken over: 'replicate' sends it to a standby")
        raise StateError(f"'{disk['name']}' was stopped: 'reset' comes first")


def _say_stages(client: ControlClient) -> None:
    for disk in client.execute("x-replnbd-status")["disks"]:
        click.echo(f"{disk['name']}: {disk['stage']}")


def _verify_jobs(client: ControlClient) -> list[dict[str, Any]]:
    return [job for job in client.execute("query-jobs") if job["id"].startswith("verify-")]


@contextmanager
def _bars(what: str) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Draw how far the jobs of disks are, where there is a terminal."""
    if not sys.stdout.isatty():
        yield lambda _: None
        return
    from replnbd.cli.terminal import JobBars

    with JobBars(what) as bars:
        yield bars.update


@contextmanager
def _going_on() -> Iterator[None]:
    """Say that what is waited for goes on, if the user interrupts that."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("the daemon goes on with it: see 'replnbd status'", err=True)
        raise


def _wait_in_step(client: ControlClient) -> None:
    """Until the standby of every disk that has one is in step; StateError if one is refused. Why
    one is not there is said, once."""
    told: set[str] = set()
    with _bars("sync") as bars, _going_on():
        while True:
            disks = client.execute("x-replnbd-status")["disks"]
            bars(disks)
            links = [disk["link"] for disk in disks if disk["link"] is not None]
            refused = [link for link in links if link["state"] == "refused"]
            if refused:
                raise StateError(f"{refused[0]['to']}: {refused[0]['reason']}")
            if all(link["state"] in ("live", "off") for link in links):
                return
            for link in links:
                if link["reason"] is not None and link["reason"] not in told:
                    told.add(link["reason"])
                    click.echo(f"waiting for {link['to']}: {link['reason']}", err=True)
            time.sleep(_POLL_S)


def _wait_for_commit(client: ControlClient) -> None:
    """Until no disk is in stage *failover*; StateError if one has failed."""
    with _bars("commit") as bars, _going_on():
        while True:
            disks = client.execute("x-replnbd-status")["disks"]
            bars(disks)
            if all(disk["stage"] != "failover" for disk in disks):
                break
            time.sleep(_POLL_S)
    failed = [disk for disk in disks if disk["stage"] == "failover-failed"]
    if failed:
        what = "; ".join(f"'{disk['name']}': {disk['error']}" for disk in failed)
        raise StateError(f"the commit failed: {what}; 'replnbd failover' tries it again")


COMMANDS = (
    start, checkpoint, stop, failover, replicate, demote, verify, reset, status, jobs,
)  # fmt: skip
