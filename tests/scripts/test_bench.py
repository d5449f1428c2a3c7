"""scripts/bench measures what it says, and says what is wrong in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--repeat", "1", "--runtime", "0.2", "--size", "16"]


def bench(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run scripts/bench in `directory`, with its temporary files there."""
    environment = os.environ | {"TMPDIR": str(directory), "VIRTUAL_ENV": sys.prefix}
    command = [str(ROOT / "scripts" / "bench"), *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("cell", ["primary first touch 4k@32", "standby read 4k@32 tcp"])
def test_a_cell_is_measured_on_both_servers(tmp_path: Path, cell: str) -> None:
    outputs = ["--json", "figures.json", "--chart", "chart.svg", "--markdown", "table.md"]
    done = bench(*SMALL, "--cell", cell, *outputs, directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["cells"]) == [cell]
    servers, ratio = figures["cells"][cell]["servers"], figures["cells"][cell]["ratio"]
    assert {"qemu", "replnbd", "floor", "wire"} <= set(servers)
    assert all(len(server["requests-per-s"]) == 1 for server in servers.values())
    assert ratio["qemu"] == servers["replnbd"]["median"] / servers["qemu"]["median"]
    assert [bar["what"] for bar in figures["bars"]] == [cell, f"{cell}: p99", f"{cell}: CPU"]
    assert "of 3 bars met" in done.stdout
    # Where a rate misses its bar, the run shows what the request's time was spent on.
    missed = [bar["what"] for bar in figures["bars"][:1] if not bar["met"]]
    assert [row["cell"] for row in figures["profile"]] == missed
    for row in figures["profile"]:
        assert row["CPU µs"] == pytest.approx(row["wire"] + row["calls"] + row["rest"])
    state, load = re.fullmatch(r"(.+) (4k@.+)", cell).groups()  # type: ignore[union-attr]
    assert (tmp_path / "table.md").read_text().splitlines() == [
        f"| times QEMU's requests/s | {load} |",
        "| --- | ---: |",
        f"| {state} | {ratio['qemu']:.1f} |",
    ]
    assert f">{cell}</text>" in (tmp_path / "chart.svg").read_text()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"figures.json", "chart.svg", "table.md"}


@pytest.mark.interop
@pytest.mark.slow
def test_a_plain_export_is_measured_next_to_other_servers(tmp_path: Path) -> None:
    done = bench(*SMALL, "--section", "plain", "--json", "-", directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert list(cells) == ["plain read 4k@32", "plain write 4k@32"]
    for cell in cells.values():
        assert set(cell["servers"]) == {"qemu-nbd", "nbdkit", "replnbd", "floor", "wire"}


@pytest.mark.interop
@pytest.mark.slow
def test_the_durabilities_are_measured_side_by_side(tmp_path: Path) -> None:
    done = bench(*SMALL, "--section", "durability", "--json", "-", directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads(done.stdout)["durability"]}
    assert {"primary first touch 4k@32", "checkpoint after nothing"} <= set(rows)
    assert all(row["process"] > 0 and row["power"] > 0 for row in rows.values())


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize(("section", "figure"), [("start", "start s"), ("failover", "committed s")])
def test_events_are_measured_on_both_servers(tmp_path: Path, section: str, figure: str) -> None:
    options = [*SMALL, "--quick", "--section", section, "--json", "-"]
    done = bench(*options, directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["server"]: row for row in json.loads(done.stdout)[section]}
    assert set(rows) == {"qemu", "replnbd"}
    assert all(row[figure] > 0 for row in rows.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.interop
@pytest.mark.slow
def test_a_checkpoint_is_measured_with_a_client_at_work(tmp_path: Path) -> None:
    options = [*SMALL, "--quick", "--section", "checkpoint", "--server", "replnbd", "--json", "-"]
    done = bench(*options, directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["checkpoint"]
    assert [row["MiB dirty"] for row in rows] == [0, 64, 256]
    assert all(row["command ms"] > 0 and row["aborts"] == 0 for row in rows)


@pytest.mark.interop
@pytest.mark.slow
def test_what_has_one_server_is_measured(tmp_path: Path) -> None:
    sections = ["--section", "recovery", "--section", "slow-disk"]
    done = bench(*SMALL, "--quick", *sections, "--json", "-", directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert [row["clusters"] for row in figures["recovery"]] == [5_000]
    assert all(row["recovery s"] > 0 for row in figures["recovery"])
    requests = {row["request"] for row in figures["slow-disk"]}
    assert requests == {"read", "write", "flush", "QMP"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cell", "nothing*"], "no cell matches nothing*: see --list"),
        (["--repeat", "0"], "argument --repeat: invalid positive value: '0'"),
        (["--runtime", "-1"], "--runtime must be positive"),
        (["--directory", "missing"], "--directory: missing is not a directory"),
        (["--chart", "chart.gif"], "argument --chart: chart.gif ends neither in .svg nor in .png"),
        (["--section", "nothing"], "argument --section: invalid choice: 'nothing'"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = bench(*arguments, directory=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    _usage, error = done.stderr.splitlines()
    assert error.startswith(f"scripts/bench: error: {complaint}")


def test_the_cells_can_be_listed(tmp_path: Path) -> None:
    done = bench("--list", "--cell", "standby read*", directory=tmp_path)
    assert done.stdout.splitlines()[:2] == ["standby read 4k@1", "standby read 4k@32"]
