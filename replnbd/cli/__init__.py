"""The command line: doors for people; each command is a thin client of the daemon or its socket.

    serve.py      serve, secondary: run a daemon in the foreground
    commands.py   start, checkpoint, stop, failover, reset, status, jobs: over the control socket
    image.py      image create, info, check, map: images without a daemon
    show.py       how things look as plain lines and as JSON
    terminal.py   and on a terminal: tables, and things that move

Laws. Exit code 0: done; 1: failed, with one line on stderr that says what and what to do; 2: the
command line itself was wrong. Never a traceback but for a bug of ours. `--json` wherever
something is listed.
"""

from __future__ import annotations

import os
import sys

import click

from replnbd.cli import commands, image, serve
from replnbd.errors import ReplnbdError
from replnbd.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="replnbd")
def cli() -> None:
    """Keep a hot standby of a disk over plain NBD.

    The primary writes the disk NAME through NBD; the standby works on the view TOP-ID, which
    stands still at the last checkpoint. A checkpoint moves the view on, a failover makes it
    the disk.
    """


for command in (*serve.COMMANDS, *commands.COMMANDS, image.image):
    cli.add_command(command)


def main() -> None:
    """Entry point of the `replnbd` command."""
    try:
        cli.main(prog_name="replnbd", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        sys.exit(2)
    except click.UsageError as exc:
        name = exc.ctx.command_path if exc.ctx is not None else "replnbd"
        _fail(f"{name}: {exc.format_message()} (see '{name} --help')", 2)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.Abort:
        _fail("replnbd: interrupted", 1)
    except ReplnbdError as exc:
        _fail(f"replnbd: {exc}", 1)
    except BrokenPipeError:
        # Whoever read our output has seen enough (`replnbd status | head`).
        _drop_output()
        sys.exit(1)
    except OSError as exc:
        _drop_output()
        where = f"{exc.filename}: " if exc.filename else ""
        _fail(f"replnbd: {where}{exc.strerror or exc}", 1)


def _drop_output() -> None:
    """What is still buffered for stdout could not be written: do not try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str, code: int) -> None:
    print(" ".join(text.split()), file=sys.stderr)
    sys.exit(code)
