"""Command lines that are wrong: exit code 2 and one line that says what and where help is."""

from __future__ import annotations

import pytest
from peers import refusal, run_replnbd

WRONG: dict[str, tuple[str, str]] = {
    # Command line: who complains, and of what. The wording is click's.
    "nonsense": ("replnbd", "'nonsense'"),
    "--bogus": ("replnbd", "--bogus"),
    "serve": ("replnbd serve", "'CONFIG'"),
    "serve a b": ("replnbd serve", "unexpected extra argument (b)"),
    "serve a --log-level loud": ("replnbd serve", "'loud' is not one of 'debug', 'info'"),
    "secondary": ("replnbd secondary", "'DISK'"),
    "secondary d.raw --format vmdk": ("replnbd secondary", "'vmdk' is not one of 'raw', 'qcow2'"),
    "start now": ("replnbd start", "unexpected extra argument (now)"),
    "status --interval soon": ("replnbd status", "'soon' is not a valid float"),
    **{
        f"status --watch --interval {value}": (
            "replnbd status",
            f"Invalid value for '--interval': {value} is not in the range 0.1 to 86400.",
        )
        for value in ("0.0", "-1.0", "nan", "inf", "1000000.0")
    },
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_is_told_in_one_line(line: str) -> None:
    told = refusal(run_replnbd(*line.split()), status=2)
    command, complaint = WRONG[line]
    assert told.startswith(f"{command}: ")
    assert complaint in told
    assert told.endswith(f" (see '{command} --help')")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--help",), "Usage: replnbd [OPTIONS] COMMAND [ARGS]..."),
        (("-h",), "Usage: replnbd [OPTIONS] COMMAND [ARGS]..."),
        (("status", "-h"), "Usage: replnbd status [OPTIONS]"),
        (("--version",), "replnbd, version "),
    ],
    ids=" ".join,
)
def test_help_and_version_are_answers(arguments: tuple[str, ...], line: str) -> None:
    done = run_replnbd(*arguments)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith(line)


def test_no_command_is_wrong_usage_and_shows_the_help() -> None:
    done = run_replnbd()
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: replnbd [OPTIONS] COMMAND [ARGS]...\n")
