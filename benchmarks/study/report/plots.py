"""One style for every plot: light, labelled, the same colour for the same thing. Imports matplotlib.

SVG without dates and with fixed ids, so that equal results give equal files.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

STYLE: Any = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.family": "DejaVu Sans",
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e3e6ea", "grid.linewidth": 0.8, "axes.edgecolor": "#9aa2ac",
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    "legend.frameon": False, "legend.fontsize": 8.5, "svg.hashsalt": "manta", "svg.fonttype": "path",
}  # fmt: skip

COLOURS = {
    "trace": "#1b6ca8", "shared prompt": "#e08e0b", "chat": "#2a9d5c", "agents": "#b4436c", "random": "#7a8594",
}  # fmt: skip
CHOICES = ("#1b6ca8", "#e08e0b", "#2a9d5c", "#b4436c", "#7a8594", "#6a51a3")
SHADES = ("#dfe8f0", "#b9cfe2", "#8fb3d3", "#6496c1", "#3d78ad", "#235c93", "#113f6d")


def styled() -> AbstractContextManager[object]:
    """Within it everything is drawn in the one style."""
    return mpl.rc_context(STYLE)


def figure(columns: int = 1, rows: int = 1, *, width: float = 10.0, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    made = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasSVG(made)
    panels = made.subplots(rows, columns, squeeze=False)
    return made, list(panels.flat)


def save(made: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], *, digits: int | None = None) -> None:
    """Vertical bars side by side for each group; a missing value leaves a gap. digits: numbers on top of the bars."""
    width = 0.8 / max(1, len(series))
    for at, (name, values) in enumerate(series.items()):
        places = [group + (at - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [0.0 if value is None else value for value in values]
        drawn = axes.bar(places, heights, width * 0.92, label=name, color=CHOICES[at % len(CHOICES)])
        if digits is not None:
            texts = ["" if value is None else f"{value:.{digits}f}" for value in values]
            axes.bar_label(drawn, texts, fontsize=7.5, padding=1.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(visible=False, axis="x")


def stacked(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """Horizontal bars of shares that add up to 100%, the first group on top."""
    left = [0.0] * len(groups)
    for (name, values), colour in zip(series.items(), colours, strict=False):
        axes.barh(range(len(groups)), values, 0.66, left=left, label=name, color=colour)
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")


def below(axes: Axes, columns: int) -> None:
    """The legend under the panel, out of the way of the data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, handlelength=1.4, columnspacing=1.2)


def block_axis(axes: Axes, blocks: Sequence[int]) -> None:
    """Block sizes on a logarithmic axis, each with its number."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(blocks), [str(block) for block in blocks])
    axes.minorticks_off()
