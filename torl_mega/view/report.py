"""`torl report`: one or several runs as one static page of charts and tables, as Markdown, and as a picture.

Contract: the page is one file that runs no script and fetches nothing; the same rows give the same bytes. Lines are means over
the last steps (the page says how many), what they are means of lies faintly below them; evaluations are never averaged.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from torl_mega.errors import DataError
from torl_mega.run import paper
from torl_mega.run.files import write_text
from torl_mega.view.charts import (
    Line,
    Reference,
    XAxis,
    columns,
    line_chart,
    place,
    short,
    stacked_area,
    stacked_bars,
    swatch,
    value_at,
)
from torl_mega.view.panels import Panel, constant, sections
from torl_mega.view.run_data import Axis, Run, Scale, benchmarks, last, mean, read_runs, scale, smoothed, window_for
from torl_mega.view.spans import visible
from torl_mega.view.tables import PHASES, Table, tables, to_markdown
from torl_mega.view.templates import environment, style

MOST_RAW = 6  # runs up to which the steps themselves are drawn below their means
MOST_AREAS = 4  # runs for which the phases are also drawn over time
NUM_ROWS = 12  # of the table below a chart


@dataclass(frozen=True, slots=True)
class Options:
    """How runs are shown."""

    axis: Axis = "step"
    window: int | None = None  # steps that a line averages over; None = the paper's 16 where a run is long enough
    size: paper.Size | None = None  # of the paper's model whose end points are drawn


AS_STEPS = Options()


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    href: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with the numbers below it."""

    title: str
    meaning: str
    svg: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    figures: tuple[Figure, ...]
    still: str  # what did not move, with its value


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    options: Options = AS_STEPS,
    png: Path | None = None,
    markdown: Path | None = None,
    as_json: bool = False,
) -> int:
    """Writes the page (default: `RUN/report.html` of the first run) and, where asked for, a picture and Markdown (`-`: to the
    terminal). Returns 0. Raises DataError with one line."""
    if not folders:
        raise DataError("torl report needs a run folder, e.g. runs/quickstart")
    if options.window is not None and options.window < 1:
        raise DataError(f"--smooth {options.window}: a mean is over one step or more; 1 draws the steps themselves")
    if png is not None and png.suffix.lower() != ".png":
        raise DataError(f"--png {png} does not end in .png; name a picture such as report.png")
    runs = read_runs(folders)
    x = scale(runs, options.axis)
    target = out or folders[0] / "report.html"
    with _writing(target):
        write_text(target, report_page(runs, x, options, target.parent))
    written = {"html": str(target)}
    if png is not None:
        from torl_mega.view.picture import write_png  # matplotlib: heavy

        with _writing(png):
            write_png(png, runs, x)
        written["png"] = str(png)
    text = to_markdown(tables(runs, size=options.size)) if markdown is not None else ""
    if markdown is not None and str(markdown) != "-":
        with _writing(markdown):
            write_text(markdown, text)
        written["markdown"] = str(markdown)
    elif markdown is not None and as_json:
        written["markdown"] = text
    elif markdown is not None:
        print(text)
        return 0
    print(json.dumps(written) if as_json else "\n".join(written.values()))
    return 0


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DataError(
            f"{target} cannot be written: {exc.strerror}; choose another --out, --png or --markdown"
        ) from None


def report_page(runs: Sequence[Run], x: Scale, options: Options, beside: Path) -> str:
    """The page's HTML. `beside`: the folder it will lie in, from which links to pages of `torl view` count."""
    window = window_for(runs, options.window)
    points = paper.end_points(options.size, benchmarks(runs)) if options.size else {}
    drawn = [_section(title, panels, runs, x, window, points, beside) for title, panels in sections(runs)]
    names = [run.name for run in runs]
    title = ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more runs"
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            legend=[(run, Markup(swatch(i)), _viewer(run, beside)) for i, run in enumerate(runs)],
            tables=tables(runs, size=options.size),
            sections=[section for section in drawn if section.figures or section.still],
            other=_other(runs),
            window=window,
            raw=len(runs) <= MOST_RAW,
            x_label=x.label,
            paper=f"{paper.OURS[options.size]} ({paper.SOURCE})" if options.size else "",
            **style("report.css.j2"),
        )
    )


def _section(
    title: str,
    panels: Sequence[Panel],
    runs: Sequence[Run],
    x: Scale,
    window: int,
    points: dict[str, tuple[str, float]],
    beside: Path,
) -> Section:
    still = {p.title: value for p in panels if p.paper not in points and (value := constant(p, runs)) is not None}
    figures = [_figure(p, runs, x, window, points, beside) for p in panels if p.title not in still]
    phases = _phases(runs, x) if title == "Speed" else []
    return Section(title, (*phases, *figures), ", ".join(f"{name} {short(value)}" for name, value in still.items()))


def _figure(
    panel: Panel, runs: Sequence[Run], x: Scale, window: int, points: dict[str, tuple[str, float]], beside: Path
) -> Figure:
    raw = window > 1 and len(runs) <= MOST_RAW
    lines = [line for i, run in enumerate(runs) if (line := _line(panel, i, run, x, window, raw)).drawn or line.marks]
    references = [Reference(*points[panel.paper])] if panel.paper in points else []
    svg = line_chart(
        panel.title,
        XAxis(x.label, x.word),
        lines,
        log=panel.form == "log",
        share=panel.form == "share",
        references=references,
    )
    rows = []
    for at in columns(lines, NUM_ROWS):
        cells = [Cell(_shown(value_at(n, at)), _step(runs[n.index], x, at, beside)) for n in lines]
        rows.append((Cell(place(at)), *cells))
    return Figure(panel.title, panel.meaning, Markup(svg), (x.word, *(n.key for n in lines)), tuple(rows))


def _line(panel: Panel, index: int, run: Run, x: Scale, window: int, raw: bool) -> Line:
    """Evaluations alone are a line with circles; beside training, circles only."""
    measured = [(x.x(run, s), v) for s, v in panel.of(run)]
    if panel.rows == "eval":
        return Line(index, run.key, measured, marks=measured)
    evals = run.evals.get(panel.name, []) if panel.name in ("accuracy", "code_ratio") else []
    marks = [(x.x(run, s), v) for s, v in evals]
    averaged = smoothed(measured, window)
    return Line(index, run.key, averaged, measured if raw else (), marks)


def _phases(runs: Sequence[Run], x: Scale) -> list[Figure]:
    """Where a step's time goes: a bar a run, and over time for a few."""
    known = [run for run in runs if all(len(run.train.get(name, ())) == run.num_steps > 0 for name in PHASES.values())]
    if not known:
        return []
    names = tuple(PHASES)
    means = [(run.key, [mean(run.train[n]) or 0.0 for n in PHASES.values()]) for run in known]
    rows = tuple((Cell(key), *(Cell(short(v)) for v in values), Cell(short(sum(values)))) for key, values in means)
    head = ("run", *names, "step")
    bars = Markup(stacked_bars("time in a step", names, means))
    figures = [Figure("time in a step (s)", "mean over all steps", bars, head, rows)]
    for run in known if len(known) <= MOST_AREAS else []:
        xs = [x.x(run, step) for step, _ in run.train["step"]]
        parts = [[v for _, v in run.train[n]] for n in PHASES.values()]
        if len(xs) > 1:
            svg = stacked_area("time in a step", XAxis(x.label, x.word), names, xs, parts)
            figures.append(Figure(f"{run.key} · time in a step (s)", run.name, Markup(svg), (), ()))
    return figures


def _other(runs: Sequence[Run]) -> Table | None:
    """The last value of whatever else was logged."""
    charted = {p.name for _, panels in sections(runs) for p in panels}
    names = dict.fromkeys(k for run in runs for k in run.train if k not in charted and k != "step")
    values = {n: [last(run.train.get(n, [])) for run in runs] for n in names}
    rows = tuple((visible(n), *map(_shown, found)) for n, found in values.items())
    return (
        Table("Everything else that was logged", ("metric, last step", *(run.key for run in runs)), rows)
        if rows
        else None
    )


def _shown(value: float | None) -> str:
    return "–" if value is None else short(value)


def _viewer(run: Run, beside: Path) -> str:
    """Relative address of the run's pages of trajectories, empty where there are none."""
    index = run.folder / "view" / "index.html"
    return quote(os.path.relpath(index.resolve(), beside.resolve())) if index.is_file() else ""


def _step(run: Run, x: Scale, at: float, beside: Path) -> str:
    """Address of the trajectories of the step that lies at `at`."""
    page = _viewer(run, beside)
    found = [step for step, _ in run.train.get("step", []) if x.x(run, step) == at] if page else []
    return f"{page}#step={found[0]}" if found else ""
