"""Curves of runs as a PNG for a document. Contract: the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torl_mega.view.panels import PICTURE, SECTIONS, Panel
from torl_mega.view.run_data import Run, Scale

COLOURS = ("#1f5fae", "#c8551b", "#1a7f4b", "#8a4fbf", "#b3283f", "#0d8295", "#9a6b00", "#c2478f")  # as report.css.j2
DASHES = ("-", "--", ":")
STEADY: Any = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}


def write_png(path: Path, runs: Sequence[Run], scale: Scale) -> None:
    """Accuracy, code ratio and pass ratio side by side, 150 dots an inch, with a shared legend."""
    panels = [p for _, group in SECTIONS for p in group if p.name in PICTURE and p.rows == "train"]
    with matplotlib.rc_context(STEADY):
        figure = Figure(figsize=(3.5 * len(panels), 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, len(panels))
        for column, panel in enumerate(panels):
            axes = figure.add_subplot(grid[0, column])
            _draw(axes, panel, runs, scale)
            axes.set_title(panel.name.replace("_", " "), fontsize=10)
            axes.set_xlabel(scale.label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6) or 1, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run], scale: Scale) -> None:
    for i, run in enumerate(runs):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        points = [(scale.x(run, step), value) for step, value in run.train.get(panel.name, [])]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, dash, color=colour, linewidth=1.6, label=run.name.replace("$", r"\$"))
        marks = [(scale.x(run, step), value) for step, value in run.evals.get(panel.name, [])]
        if marks:  # an empty line that is not clipped would unhinge the layout
            xs, ys = zip(*marks, strict=True)
            axes.plot(xs, ys, "o", color=colour, markersize=5, markerfacecolor="white", zorder=3, clip_on=False)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", color="#e3e0da", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
