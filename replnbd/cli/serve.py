"""replnbd serve and replnbd secondary: run a daemon in the foreground."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

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


@click.command()
@click.argument("disk", type=click.Path())
@click.option(
    "--name", help="Export that the primary writes.  [default: DISK's name, without suffix]"
)
@click.option("--top-id", help="Export of the standby's view.  [default: NAME-top]")
@click.option(
    "--format", "image_format", type=click.Choice(["raw", "qcow2"]),
    help="Format of DISK.  [default: qcow2 if its name ends so, else raw]",
)  # fmt: skip
@click.option("--hidden", help="Hidden overlay, made when missing.  [default: DISK.hidden.qcow2]")
@click.option("--active", help="Active overlay, made when missing.  [default: DISK.active.qcow2]")
@click.option(
    "--durability", type=click.Choice(["process", "power"]), default="process", show_default=True,
    help="power: the view survives a power failure, too.",
)  # fmt: skip
@click.option(
    "--listen", multiple=True, metavar="URI", default=[DEFAULT_LISTEN], show_default=True,
    help="NBD URI to listen on; may be repeated.",
)  # fmt: skip
@click.option(
    "--tls-certificate", type=click.Path(), metavar="PEM", help="For listeners with nbds://."
)
@click.option("--tls-key", type=click.Path(), metavar="PEM", help="Its key, unless in one file.")
@click.option(
    "--tls-client-ca", type=click.Path(), metavar="PEM",
    help="Clients must have a certificate that this authority signed.",
)  # fmt: skip
@click.option("--tls-psk", type=click.Path(), metavar="FILE", help="Users and their shared keys.")
@click.option("--control", type=click.Path(), help="Path of the QMP socket.")
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
    listen: tuple[str, ...],
    tls_certificate: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
    tls_psk: str | None,
    control: str | None,
    start: bool,
    log_level: str,
) -> None:
    """Run the daemon for one secondary disk.

    All is said by options; relative paths are from the working directory.
    """
    name = name or Path(disk).name.partition(".")[0]
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
    server = ServerConfig(listen=list(listen), control=control or default_control())
    files = (tls_certificate, tls_key, tls_client_ca, tls_psk)
    tls = TlsConfig(**dict(zip(TlsConfig.__struct_fields__, files, strict=True)))
    config = check_config(
        Config(server=server, disk=[table], tls=tls if any(files) else None), Path(os.getcwd())
    )
    set_up_logging(log_level)
    run(config, start=start)


COMMANDS = (serve, secondary)
