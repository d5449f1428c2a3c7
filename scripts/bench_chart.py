"""The chart: how many times QEMU's requests per second replnbd serves, cell by cell.

An SVG that reads on light and on dark pages: no background, and greys between both.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from bench_bars import median, ratio
from bench_cells import Results
from matplotlib.figure import Figure

INK = "#808890"
GROUPS = {  # what a cell's name begins with: the colour of its bar
    "standby read": "#3b82c4",
    "standby mixed": "#8a63c9",
    "standby rewrite": "#2f9e77",
    "standby first touch": "#c98a1b",
    "primary rewrite": "#4d9a3a",
    "primary first touch": "#d0643c",
}


def draw(results: Results, path: Path) -> None:
    """Write the chart of the cells that both servers ran; the suffix says SVG or PNG."""
    both = {"qemu", "replnbd"}
    cells = sorted(
        (cell for cell, servers in results.items() if both <= set(servers)), key=group_of
    )
    if not cells:
        raise SystemExit("no chart: no cell was measured on both qemu and replnbd")
    ratios = [ratio(results[cell], "qemu") for cell in cells]
    # Text as text: a tenth of the size, and it can be searched. A fixed salt: the same chart twice
    # is the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "replnbd", "font.size": 9})
    figure = Figure(figsize=(8, 0.9 + 0.24 * len(cells)), layout="tight")
    axes = figure.add_subplot()
    colours = [list(GROUPS.values())[group_of(cell)] for cell in cells]
    places = range(len(cells))
    axes.barh(places, ratios, color=colours, height=0.72)
    for place, cell, figure_ in zip(places, cells, ratios, strict=True):
        rate = median(results[cell]["replnbd"])
        text = f" {figure_:.1f}x   {rate:,.0f}/s"
        axes.text(figure_, place, text, va="center", color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(0, max(ratios) * 1.25)
    axes.set_yticks(places, cells)
    axes.invert_yaxis()
    axes.set_title("requests/s, times QEMU's replication filter (1x: the line)", color=INK)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, transparent=True, metadata={"Date": None} if is_svg(path) else None)


def group_of(cell: str) -> int:
    """The place of a cell's group, from the top."""
    return next(place for place, name in enumerate(GROUPS) if cell.startswith(name))


def is_svg(path: Path) -> bool:
    """Whether the chart is to be an SVG."""
    return path.suffix == ".svg"
