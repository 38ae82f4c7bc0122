"""The tables of a report, each written twice: into the page, and as Markdown for a pull request or a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torl_mega.run import paper
from torl_mega.view.run_data import Run, benchmarks, differences, faults, is_number, last, mean, versions_of
from torl_mega.view.spans import visible

PHASES = {"rollout": "rollout_s", "train": "train_s", "sync": "sync_s"}
LAST = 10  # steps whose mean stands for the end of a run


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` hold a cell a column; a cell without a value is a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(runs: Sequence[Run], *, size: paper.Size | None) -> list[Table]:
    """What there is to say about the runs, empty tables left out."""
    every = [results(runs), config_table(runs), benchmark_table(runs, size), tool_table(runs), fault_table(runs)]
    return [table for table in [*every, version_table(runs)] if table.rows]


def results(runs: Sequence[Run]) -> Table:
    columns = ("", "run", "steps", "accuracy before", "after", "code ratio after", "tokens a response", "wall time")
    columns += ("log-prob difference", "syncs verified")
    return Table(
        "Results", columns, tuple(_result(run) for run in runs), f"Before and after: evaluations; {_last_note()}."
    )


def _last_note() -> str:
    return f"tokens a response: mean over the last {LAST} training steps"


def _result(run: Run) -> tuple[str, ...]:
    before, after = ({name: points[i][1] for name, points in run.evals.items()} for i in (0, -1))
    sync, wall = run.summary.get("weight_sync", {}), run.summary.get("wall_s", {})
    worst = max((v for _, v in run.train.get("max_abs_logprob_diff", ())), default=None)
    spent = wall.get("total") if isinstance(wall, dict) else None
    syncs = [sync.get(n) if isinstance(sync, dict) else None for n in ("num_verified", "num_syncs")]
    return (
        run.key,
        run.name,
        str(run.num_steps),
        number(before.get("accuracy")),
        number(after.get("accuracy")),
        number(after.get("code_ratio")),
        number(mean(run.train.get("response_length", [])[-LAST:]), "{:.0f}"),
        number(spent, "{:.0f} s"),
        number(worst, "{:.1e}"),
        f"{number(syncs[0], '{:.0f}')} of {number(syncs[1], '{:.0f}')}" if all(map(is_number, syncs)) else "–",
    )


def config_table(runs: Sequence[Run]) -> Table:
    different = differences(runs)
    rows = tuple((name, *values) for name, values in different.items())
    unknown = [run.key for run in runs if not run.config]
    note = "Settings with the same value everywhere, names, folders and logging are left out."
    note += f" No config was found for {', '.join(unknown)}." if unknown else ""
    return Table("Settings that differ", ("setting", *(run.key for run in runs)), rows, note)


def benchmark_table(runs: Sequence[Run], size: paper.Size | None) -> Table:
    """The last evaluation of each run; the paper's rows of Table 3 below where one of its benchmarks was evaluated."""
    found = benchmarks(runs)
    extra = [name for name in found if name not in paper.BENCHMARKS]
    beside = len(extra) < len(found) or size is not None
    names = [*(paper.BENCHMARKS if beside else ()), *extra]
    rows = [_score(f"{run.key} {run.name}", _last_scores(run, names), names) for run in runs if found and run.evals]
    if beside:
        for each in (size,) if size else ("1.5b", "7b"):
            rows += [_score(f"{model} (paper)", paper.row(each, model), names) for model in paper.TABLE_3[each]]
    note = "Accuracy in %, last evaluation; avg is the mean of a row's benchmarks."
    note += f" Rows of the paper: {paper.SOURCE}, Table 3, greedy, one tool call." if beside else ""
    return Table("Benchmarks", ("", *(visible(n) for n in names), "avg"), tuple(rows), note)


def _last_scores(run: Run, names: Sequence[str]) -> dict[str, float]:
    values = {name: last(run.evals.get(f"{name}/accuracy", [])) for name in names}
    return {name: 100 * value for name, value in values.items() if value is not None}


def _score(label: str, row: Mapping[str, float], names: Sequence[str]) -> tuple[str, ...]:
    cells = [number(row.get(name), "{:.1f}") for name in names]
    return (label, *cells, number(paper.mean(row) if row else None, "{:.1f}"))


def tool_table(runs: Sequence[Run]) -> Table:
    """Calls and how they ended, and tool by tool where there are several, as means over the last steps."""
    names = dict.fromkeys(k for run in runs for k in run.train)
    ends = [n for n in names if n.startswith("execution/")]
    tools = [n for n in names if n.startswith("tool/")]
    chosen = [*(n for n in ("tool_calls", "code_ratio", "pass_ratio") if n in names), *ends, *tools]
    chosen = [n for n in chosen if n not in ends or any(v for run in runs for _, v in run.train.get(n, [])[-LAST:])]
    titles = tuple(visible(n.removeprefix("execution/").removeprefix("tool/").replace("_", " ")) for n in chosen)
    rows = tuple(
        (run.key, run.name, *(number(mean(run.train.get(n, [])[-LAST:])) for n in chosen)) for run in runs if run.train
    )
    note = f"Mean over the last {LAST} steps; ends of programs as shares of those that ran, those that never happened left out."
    return Table("Tools", ("", "run", *titles), rows if chosen else (), note)


def fault_table(runs: Sequence[Run]) -> Table:
    """How often each fault happened; restarts, infrastructure errors and skipped updates are among them."""
    counted = [faults(run) for run in runs]
    names = sorted({name for found in counted for name in found})
    titles = tuple(name.replace("_", " ") for name in names)
    rows = tuple(
        (
            run.key,
            run.name,
            number(mean(run.train.get("fault_rate", [])), "{:.2%}"),
            *(f"{found.get(n, 0):.0f}" for n in names),
        )
        for run, found in zip(runs, counted, strict=True)
        if run.train
    )
    return Table(
        "Faults, counted",
        ("", "run", "trajectories lost", *titles),
        rows,
        "" if names else "No other fault was logged.",
    )


def version_table(runs: Sequence[Run]) -> Table:
    known = [versions_of(run) for run in runs]
    names = list(dict.fromkeys(name for found in known for name in found))
    rows = tuple((name, *(found.get(name, "–") for found in known)) for name in names)
    note = "As recorded when each process began; an arrow stands between what a run began with and went on with."
    return Table("Machine and versions", ("", *(run.key for run in runs)), rows, note)


def number(value: object, form: str = "{:.3f}") -> str:
    return form.format(value) if is_number(value) else "–"


def to_markdown(every: Sequence[Table]) -> str:
    """The tables as GitHub and Pandoc read them."""
    return "\n".join(line for table in every for line in _markdown(table))


def _markdown(table: Table) -> list[str]:
    head = [_row(table.columns), "|---" * len(table.columns) + "|"]
    note = [_plain(table.note), ""] if table.note else []
    return [f"### {table.title}", "", *head, *(_row(row) for row in table.rows), "", *note]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Text that is no Markdown, no HTML and one line."""
    for mark in "\\|`*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("\n", " ").replace("\r", " ")
