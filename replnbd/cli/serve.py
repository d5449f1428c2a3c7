"""replnbd serve, primary and secondary: run a daemon in the foreground."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from replnbd.block import is_nbd_uri, parse_nbd_uri
from replnbd.daemon import (
    Config,
    DiskConfig,
    ServerConfig,
    TlsConfig,
    check_config,
    load_config,
    run,
    set_up_logging,
)
from replnbd.daemon.config import DEFAULT_LISTEN, default_control

log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is told on stderr, one line each.",
)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@log_level
def serve(config: Path, log_level: str) -> None:
    """Run the daemon from a configuration.

    CONFIG is a TOML file. The daemon stays in the foreground until SIGTERM, SIGINT or QMP 'quit'.
    """
    loaded = load_config(config)
    set_up_logging(log_level)
    run(loaded)


image_format = click.option(
    "--format", "image_format", type=click.Choice(["raw", "qcow2"]),
    help="Format of DISK.  [default: qcow2 if its name ends so, else raw]",
)  # fmt: skip


def listening(command: Callable[..., None]) -> Callable[..., None]:
    """The options of [server] and [tls]."""
    pem: dict[str, Any] = {"type": click.Path(), "metavar": "PEM"}
    options = [
        click.option(
            "--listen", multiple=True, metavar="URI", default=[DEFAULT_LISTEN], show_default=True,
            help="NBD URI to listen on; may be repeated.",
        ),
        click.option("--tls-certificate", help="For listeners with nbds://.", **pem),
        click.option("--tls-key", help="Its key, unless in one file.", **pem),
        click.option(
            "--tls-client-ca",
            help="Clients must have a certificate that this authority signed.", **pem,
        ),
        click.option(
            "--tls-psk", type=click.Path(), metavar="FILE", help="Users and their shared keys."
        ),
        click.option("--control", type=click.Path(), help="Path of the QMP socket."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("disk", type=click.Path())
@click.option(
    "--name", help="Export that the primary writes.  [default: DISK's name, without suffix]"
)
@click.option("--top-id", help="Export of the standby's view.  [default: NAME-top]")
@image_format
@click.option("--hidden", help="Hidden overlay, made when missing.  [default: DISK.hidden.qcow2]")
@click.option("--active", help="Active overlay, made when missing.  [default: DISK.active.qcow2]")
@click.option(
    "--durability", type=click.Choice(["process", "power"]), default="process", show_default=True,
    help="power: the view survives a power failure, too.",
)  # fmt: skip
@listening
@click.option("--start", is_flag=True, help="Start replication at once.")
@log_level
def secondary(
    disk: str,
    name: str | None,
    top_id: str | None,
    image_format: str | None,
    hidden: str | None,
    active: str | None,
    durability: Literal["process", "power"],
    start: bool,
    log_level: str,
    **listening: Any,  # noqa: ANN401
) -> None:
    """Run the daemon for one secondary disk.

    DISK is a file, or what another server has, by its NBD URI. All else is said by options;
    relative paths are from the working directory.
    """
    if not name:
        remote = is_nbd_uri(disk)
        name = parse_nbd_uri(disk).export if remote else Path(disk).name.partition(".")[0]
    table = DiskConfig(
        name=name,
        mode="secondary",
        top_id=top_id or f"{name}-top",
        secondary=disk,
        format=image_format,  # type: ignore[arg-type]
        hidden=hidden,
        active=active,
        durability=durability,
    )
    _run(table, log_level, start=start, **listening)


def _run(
    table: DiskConfig,
    log_level: str,
    *,
    start: bool,
    listen: tuple[str, ...],
    tls_certificate: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
    tls_psk: str | None,
    control: str | None,
) -> None:
    """The daemon for one disk, with the options of `listening`."""
    server = ServerConfig(listen=list(listen), control=control or default_control())
    files = (tls_certificate, tls_key, tls_client_ca, tls_psk)
    tls = TlsConfig(**dict(zip(TlsConfig.__struct_fields__, files, strict=True)))
    config = check_config(
        Config(server=server, disk=[table], tls=tls if any(files) else None), Path(os.getcwd())
    )
    set_up_logging(log_level)
    run(config, start=start)


@click.command()
@click.argument("disk", type=click.Path())
@click.option("--to", metavar="URI", required=True, help="The standby's disk: nbd://HOST/NAME.")
@click.option("--name", help="Export that its users write.  [default: DISK's name, without suffix]")
@image_format
@click.option("--sync", is_flag=True, help="A write is done when the standby has it.")
@click.option("--history", help="What the standby lacks is kept there.  [default: DISK.history]")
@listening
@click.option("--no-start", is_flag=True, help="Send nothing until 'replnbd start'.")
@log_level
def primary(
    disk: str,
    to: str,
    name: str | None,
    image_format: str | None,
    sync: bool,
    history: str | None,
    no_start: bool,
    log_level: str,
    **listening: Any,  # noqa: ANN401
) -> None:
    """Run the daemon for one primary disk.

    What is written to it is sent to the standby, which gets everything that it lacks first. All is
    said by options; relative paths are from the working directory.
    """
    table = DiskConfig(
        name=name or Path(disk).name.partition(".")[0],
        mode="primary",
        disk=disk,
        to=to,
        format=image_format,  # type: ignore[arg-type]
        sync=sync,
        history=history,
    )
    _run(table, log_level, start=not no_start, **listening)


COMMANDS = (serve, primary, secondary)
