"""What runs left on disk, as numbers to compare: rows, axes, means, differences of their configs, versions.

Contract: everything comes from metrics.jsonl, summary.json, config.json and versions.json of a run's folder; a value that is not
a finite number is no point. A metric at step s belongs to the weights after s steps, on every axis: the axes `tokens` and `time`
count what was sampled or spent in the steps before s.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from torl_mega.errors import DataError
from torl_mega.run.metrics import Row, read_rows
from torl_mega.view.spans import visible

Axis = Literal["step", "tokens", "time"]
COST = {"tokens": "num_sampled_tokens", "time": "step_s"}
NOT_COMPARED = ("name", "runs_dir")
PAPER_WINDOW = 16  # steps; figure 1 of the paper is a "16-step moving" mean


Series = list[tuple[float, float]]  # (step, value), in order


@dataclass(frozen=True, slots=True)
class Run:
    """What one run logged."""

    key: str  # A, B, …: the run's label inside charts
    name: str
    folder: Path
    train: Mapping[str, Series]  # metric -> its points in the training steps
    evals: Mapping[str, Series]  # the same for the evaluations
    summary: dict[str, Any]
    config: dict[str, Any]  # a.b -> value
    versions: tuple[dict[str, Any], ...]  # one for each change of machine or packages

    @property
    def num_steps(self) -> int:
        return len(self.train.get("step", ()))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in order, each with a name of its own. Raises DataError."""
    names = [folder.resolve().name for folder in folders]
    twice = {name for name, count in Counter(names).items() if count > 1}
    shown = [str(folder) if name in twice else name for folder, name in zip(folders, names, strict=True)]
    return [read_run(folder, key_of(i), name) for i, (folder, name) in enumerate(zip(folders, shown, strict=True))]


def read_run(folder: Path, key: str = "A", name: str | None = None) -> Run:
    """Raises DataError when the folder has no metrics."""
    rows = read_rows(folder / "metrics.jsonl")
    kept = {
        kind: tuple(r for r in rows if isinstance(r, dict) and r.get("kind") == kind and is_number(r.get("step")))
        for kind in ("train", "eval")
    }
    if not kept["train"] and not kept["eval"]:
        there = (folder / "metrics.jsonl").is_file()
        what = "holds no rows of a run" if there else "is not there"
        raise DataError(f"{folder / 'metrics.jsonl'} {what}; give a run's folder, such as runs/quickstart")
    config, versions = _json(folder / "config.json"), _json(folder / "versions.json")
    written = config.get("config") if isinstance(config, dict) else None
    summary = _json(folder / "summary.json")  # none: the run has not ended
    return Run(
        key,
        visible(name or folder.resolve().name),
        folder,
        by_metric(kept["train"]),
        by_metric(kept["eval"]),
        summary if isinstance(summary, dict) else {},
        dict(flatten(written)) if isinstance(written, dict) else {},
        tuple(v for v in versions if isinstance(v, dict)) if isinstance(versions, list) else (),
    )


def key_of(index: int) -> str:
    """A … Z, AA …"""
    return key_of(index // 26 - 1) + key_of(index % 26) if index >= 26 else chr(ord("A") + index)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def by_metric(rows: Sequence[Row]) -> dict[str, Series]:
    """The points of every metric, `step` itself among them, which every row has."""
    found: dict[str, Series] = {}
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            if is_number(value):
                found.setdefault(name, []).append((step, value))
    return found


def last(points: Series) -> float | None:
    return points[-1][1] if points else None


def mean(points: Series) -> float | None:
    return sum(value for _, value in points) / len(points) if points else None


def smoothed(points: Series, window: int) -> Series:
    """The mean of each point and the up to `window - 1` before it."""
    total, out = 0.0, []
    for i, (x, value) in enumerate(points):
        total += value - (points[i - window][1] if i >= window else 0.0)
        out.append((x, total / min(i + 1, window)))
    return out


def window_for(runs: Sequence[Run], asked: int | None) -> int:
    """Steps that a line is averaged over: as asked, or the paper's where a run is four times as long, or one."""
    longest = max(run.num_steps for run in runs)
    return asked if asked is not None else PAPER_WINDOW if longest >= 4 * PAPER_WINDOW else 1


@dataclass(frozen=True, slots=True)
class Scale:
    """Turns a step of a run into its place on the x axis."""

    label: str
    word: str  # before a place on the axis: step 5
    steps: Mapping[str, list[float]]  # run key -> steps, ascending; empty for the axis `step`
    before: Mapping[str, list[float]]  # run key -> what was spent before each of them, and after the last

    def x(self, run: Run, step: float) -> float:
        if not self.before:
            return step
        return self.before[run.key][bisect_left(self.steps[run.key], step)]


def scale(runs: Sequence[Run], axis: Axis) -> Scale:
    """Raises DataError when a run does not have what the axis counts."""
    if axis == "step":
        return Scale("RL steps", "step", {}, {})
    steps: dict[str, list[float]] = {}
    before: dict[str, list[float]] = {}
    for run in runs:
        costs = run.train.get(COST[axis], [])
        if len(costs) < run.num_steps:
            raise DataError(f"--x {axis}: {run.name} did not log {COST[axis]} in every step; take --x step")
        steps[run.key] = [step for step, _ in costs]
        before[run.key] = [0.0]
        for _, cost in costs:
            before[run.key].append(before[run.key][-1] + cost)
    if axis == "tokens":
        return Scale("sampled tokens", "tokens", steps, before)
    longest = max(spent[-1] for spent in before.values())
    unit, seconds = next(
        u for u in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 3 * u[1] or u[1] == 1
    )
    return Scale(
        f"{unit} in steps, evaluations left out", unit, steps, {k: [s / seconds for s in v] for k, v in before.items()}
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Setting -> its value in each run, for the settings in which two of them differ; a dash where a run knows none."""
    known = [run for run in runs if run.config]
    names = list(dict.fromkeys(name for run in known for name in run.config))
    compared = [n for n in names if n not in NOT_COMPARED and not n.startswith("logging.")]
    return {
        name: [visible(_shown(run.config, name)) for run in runs]
        for name in compared
        if len({_shown(run.config, name) for run in known}) > 1
    }


def _shown(config: Mapping[str, Any], name: str) -> str:
    if name not in config:
        return "–"
    value = config[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def benchmarks(runs: Sequence[Run]) -> list[str]:
    """Names of the benchmarks that a run was evaluated on, in the order in which the runs have them."""
    found = [k.removesuffix("/accuracy") for run in runs for k in run.evals if k.endswith("/accuracy")]
    return list(dict.fromkeys(found))


def faults(run: Run) -> dict[str, float]:
    """Fault -> how often it happened in the steps that count."""
    names = sorted(name for name in run.train if name.startswith("faults/"))
    return {visible(n.removeprefix("faults/")): sum(v for _, v in run.train[n]) for n in names}


def versions_of(run: Run) -> dict[str, str]:
    """What was recorded of machine and packages, each with its later values after an arrow."""
    merged: dict[str, list[str]] = {}
    for record in run.versions:
        for name, value in flatten(record):
            if name != "from_step" and str(value) not in merged.setdefault(name, [])[-1:]:
                merged[name].append(str(value))
    return {visible(name): visible(" → ".join(values)) for name, values in merged.items()}
