"""The doors open: quickstart, bench, examples, and what the README promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from replnbd.cli import cli
from replnbd.control.registry import COMMANDS
from replnbd.daemon import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def run(command: list[str], tmp_path: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a script of ours with its temporary files in `tmp_path`."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def in_setup_sh(text: str) -> subprocess.CompletedProcess[str]:
    """Run shell text with the functions of scripts/setup.sh, as an ordinary user would."""
    script = f"set -euo pipefail; . scripts/setup.sh; id() {{ echo 1000; }}; {text}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.interop
@pytest.mark.slow
def test_the_quickstart_shows_the_main_job_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run([sys.executable, "-B", "scripts/quickstart.py"], tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("    ok: ") == 12
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_in_one_line_for_who_cannot_install_them() -> None:
    done = in_setup_sh("need_programs bash:bash no-such-a:package-a no-such-b:package-b")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "apt-get install --no-install-recommends package-a package-b" in done.stderr


def test_a_kernel_that_cannot_be_had_is_named_in_one_line(tmp_path: Path) -> None:
    # Nothing is installed, nothing is unpacked, and there is no list of packages either.
    alone = f"cd {tmp_path}; compgen() {{ false; }}; apt-cache() {{ false; }}; "
    done = in_setup_sh(alone + "need_guest_kernel")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "apt-get install linux-image-cloud-amd64" in done.stderr


def test_a_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    # Only the old one can be found.
    lookup = f'command() {{ [ "$2" = python3 ] && echo {old}; }}; python3() {{ {old} "$@"; }}; '
    done = in_setup_sh(lookup + "find_python")
    assert done.returncode == 1
    assert "needs Python 3.11 or newer (found: Python 3.9.2)" in done.stderr


def test_the_example_configuration_is_valid() -> None:
    config = load_config(ROOT / "examples" / "replnbd.toml")
    assert [disk.name for disk in config.disk] == ["colo0"]


def test_the_configuration_in_the_readme_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path / "standby.toml"
    path.write_text(blocks[0])
    assert load_config(path).disk[0].top_id == "top0"


def test_the_readme_names_every_command() -> None:
    missing = [name for name in cli.commands if f"`replnbd {name}" not in README]
    missing += [name for name in COMMANDS if f"`{name}`" not in README]
    # Every session begins with it; no table need say so.
    assert missing == [] or missing == ["qmp_capabilities"]
