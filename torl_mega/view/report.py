"""Curves of one or several runs: a static HTML page with pictures inside it, and a PNG for a document.

Contract: everything comes from metrics.jsonl and summary.json; a quantity that a run did not log has no line, a value
that is not a finite number no point. The same rows give the same bytes.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torl_mega.errors import DataError
from torl_mega.run.metrics import Row, read_rows
from torl_mega.view.page import environment, style
from torl_mega.view.spans import visible

COLOURS = ("#1f5fae", "#d1652b", "#1a7f4b", "#8a4fbf", "#b3362b", "#68707d")
STEADY: Any = {
    "svg.hashsalt": "torl",
    "svg.fonttype": "path",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: a metric against steps."""

    title: str
    name: str  # of the metric
    share: bool = False  # in [0, 1]
    log: bool = False


PANELS = (
    Panel("accuracy", "accuracy", share=True),
    Panel("code ratio", "code_ratio", share=True),
    Panel("pass ratio", "pass_ratio", share=True),
    Panel("reward", "reward"),
    Panel("response length (tokens)", "response_length"),
    Panel("gradient norm", "grad_norm"),
    Panel("largest |server − trainer| log-prob", "max_abs_logprob_diff", log=True),
    Panel("entropy", "entropy"),
    Panel("rollout (s)", "rollout_s"),
    Panel("training (s)", "train_s"),
    Panel("weight sync (s)", "sync_s"),
)
PICTURE = PANELS[:3]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run logged."""

    name: str
    train: tuple[Row, ...]
    evals: tuple[Row, ...]
    summary: dict[str, Any]


def read_run(folder: Path) -> Run:
    """Raises DataError when the folder has no metrics."""
    rows = read_rows(folder / "metrics.jsonl")
    kept = {kind: [r for r in rows if isinstance(r, dict) and r.get("kind") == kind] for kind in ("train", "eval")}
    if not kept["train"] and not kept["eval"]:
        there = (folder / "metrics.jsonl").is_file()
        what = "holds no rows of a run" if there else "is not there"
        raise DataError(f"{folder / 'metrics.jsonl'} {what}; give a run's folder, such as runs/quickstart")
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}  # the run has not ended
    return Run(visible(folder.resolve().name), tuple(kept["train"]), tuple(kept["eval"]), summary)


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """(steps, values), both of the same length; the step of a row is the number of steps done before it."""
    points = [(r.get("step"), r.get(name)) for r in rows]
    finite = [(s, v) for s, v in points if _is_number(s) and _is_number(v)]
    return [s for s, _ in finite], [v for _, v in finite]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def report_page(runs: Sequence[Run]) -> str:
    """The page's HTML: a table of the runs and a chart for each metric that one of them logged."""
    panels = [p for p in PANELS if any(series(r.train, p.name)[0] for r in runs)]
    charts = [(p.title, _svg_uri(p, runs)) for p in panels]
    table = [_table_row(run) for run in runs]
    return (
        environment()
        .get_template("report.html.j2")
        .render(title=" and ".join(r.name for r in runs), charts=charts, table=table, columns=list(table[0]), **style())
    )


def write_png(path: Path, runs: Sequence[Run], panels: Sequence[Panel] = PICTURE) -> None:
    """One row of panels, 150 dots an inch, with a shared legend."""
    with matplotlib.rc_context(STEADY):
        figure = Figure(figsize=(3.5 * len(panels), 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, len(panels))
        for column, panel in enumerate(panels):
            axes = figure.add_subplot(grid[0, column])
            _draw(axes, panel, runs)
            axes.set_title(panel.title, fontsize=10)
            axes.set_xlabel("RL steps")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _svg_uri(panel: Panel, runs: Sequence[Run]) -> str:
    """A chart as an image of its own: its ids and styles cannot meet those of another one."""
    with matplotlib.rc_context(STEADY):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, panel, runs)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("RL steps")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        steps, values = series(run.train, panel.name)
        if panel.log:
            steps, values = [s for s, v in zip(steps, values, strict=True) if v > 0], [v for v in values if v > 0]
        if steps:
            axes.plot(steps, values, color=colour, linewidth=1.6, label=run.name.replace("$", r"\$"))
        at, measured = series(run.evals, panel.name) if panel.share else ([], [])
        if at:  # an empty line that is not clipped would unhinge the layout
            axes.plot(at, measured, "o", color=colour, markersize=5, markerfacecolor="white", zorder=3, clip_on=False)
    if panel.log:
        axes.set_yscale("log")
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", color="#e3e0da", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _table_row(run: Run) -> dict[str, str]:
    """The run's results by column title; a dash where one is not known."""
    before, after = (run.evals[0], run.evals[-1]) if run.evals else ({}, {})
    last: Row = run.train[-1] if run.train else {}
    sync, wall = run.summary.get("weight_sync", {}), run.summary.get("wall_s", {})
    worst = max(series(run.train, "max_abs_logprob_diff")[1], default=None)
    return {
        "run": run.name,
        "steps": str(len(run.train)),
        "accuracy before": _number(before.get("accuracy"), "{:.3f}"),
        "accuracy after": _number(after.get("accuracy"), "{:.3f}"),
        "code ratio after": _number(after.get("code_ratio"), "{:.3f}"),
        "accuracy (last step)": _number(last.get("accuracy"), "{:.3f}"),
        "pass ratio (last step)": _number(last.get("pass_ratio"), "{:.3f}"),
        "log-prob difference": _number(worst, "{:.1e}"),
        "syncs verified": f"{_number(sync.get('num_verified'), '{:.0f}')} of {_number(sync.get('num_syncs'), '{:.0f}')}",
        "wall time": _number(wall.get("total"), "{:.0f} s"),
    }


def _number(value: Any, form: str) -> str:
    return form.format(value) if _is_number(value) else "–"
