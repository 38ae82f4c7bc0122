"""A run's metrics: metrics.jsonl (one row a step, evaluation or first sync), trackers, one console line a step.

metrics.jsonl is the single source of what happened; `summary.json` and `torl report` are computed from it. On resume
the rows of steps that will be repeated are dropped. Only rank 0 holds a `RunMetrics`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torl_mega.errors import DataError
from torl_mega.run.files import write_text
from torl_mega.run.trackers import Trackers

Row = dict[str, Any]


class RunMetrics:
    """Implements `RunLog` on rank 0. `resume_at`: the step that comes next."""

    def __init__(self, folder: Path, *, num_steps: int, resume_at: int, trackers: Trackers | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self._num_steps = num_steps
        self.rows = [r for r in read_rows(self.path) if _survives(r, resume_at)]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))
        self._trackers = trackers or Trackers()
        self._trackers.catch_up(self.rows, resume_at)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"kind": "train", "step": step, **metrics})
        print(console_line(step, self._num_steps, metrics), flush=True)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            self._write({"kind": "eval", "step": step, **metrics})
            print(f"eval after {step} steps: {_shown(metrics, EVAL_LINE)}", flush=True)

    def first_sync(self, step: int, report: Mapping[str, float]) -> None:
        """The sync before the first step of a process; those of the steps are in the steps' rows."""
        self._write({"kind": "sync", "step": step, **{f"sync/{name}": value for name, value in report.items()}})

    def evaluated_steps(self) -> set[int]:
        """After how many steps an evaluation was logged."""
        return {r["step"] for r in self.rows if r["kind"] == "eval"}

    def close(self) -> None:
        last = max((r["step"] for r in self.rows if r["kind"] == "train"), default=-1)
        self._trackers.close(complete=last + 1 >= self._num_steps)

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self._trackers.row(row)


LINE = {"accuracy": "acc {:.3f}", "code_ratio": "code {:.2f}", "pass_ratio": "pass {:.2f}", "reward": "reward {:+.2f}"}
LINE |= {"response_length": "len {:.0f}", "grad_norm": "|g| {:.2f}", "max_abs_logprob_diff": "dlogp {:.0e}"}
LINE |= {"rollout_s": "rollout {:.1f}s", "train_s": "train {:.1f}s", "sync_s": "sync {:.1f}s"}
TEXT_LINE = {
    "loss": "loss {:.4f}",
    "grad_norm": "|g| {:.2f}",
    "lr": "lr {:.1e}",
    "num_tokens": "tokens {:.0f}",
    "step_s": "{:.2f}s",
}
EVAL_LINE = {"accuracy": "accuracy {:.3f}", "code_ratio": "code ratio {:.3f}", "pass_ratio": "pass ratio {:.3f}"}


def console_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """What a step prints; `step` counts from 0."""
    return f"step {step + 1:>4}/{num_steps}  {_shown(metrics, LINE if 'accuracy' in metrics else TEXT_LINE)}"


def _shown(metrics: Mapping[str, float], line: Mapping[str, str]) -> str:
    """The metrics that `line` names, each in its format; one that is absent is a dash."""
    return "  ".join(
        text.format(metrics[name]) if name in metrics else text.partition("{")[0] + "-" for name, text in line.items()
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a half-written last line (a killed run) is left out. Raises DataError for another broken one."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as exc:
            if number < len(lines):
                raise DataError(f"{path}:{number} is not a row of metrics ({exc.msg}); take that line out") from None
    return rows


def summarize(rows: Sequence[Row], *, config_hash: str, wall_s: float) -> dict[str, Any]:
    """summary.json of a run. `wall_s`: of the last process; the parts beside it are sums over all steps."""
    steps, evals = [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "eval"]
    last = steps[-1] if steps else {}
    faults: dict[str, float] = {}
    for row in steps:
        for name, value in row.items():
            if name.startswith("faults/"):
                faults[name.removeprefix("faults/")] = faults.get(name.removeprefix("faults/"), 0) + value
    parts = {part: sum(r[f"{part}_s"] for r in steps) for part in ("rollout", "train", "sync")}
    return {
        "config_hash": config_hash,
        "steps": len(steps),
        "eval": {"before": _measures(evals[0]) if evals else {}, "after": _measures(evals[-1]) if evals else {}},
        "train": {name: last.get(name) for name in ("accuracy", "code_ratio", "pass_ratio", "reward")},
        "mismatch": {
            "max_abs_logprob_diff": max((r["max_abs_logprob_diff"] for r in steps), default=0.0),
            "k3": max((r["k3"] for r in steps), default=0.0),
        },
        "weight_sync": {
            "num_syncs": sum("sync/num_servers" in r for r in rows),
            "num_verified": sum("sync/verify_s" in r for r in rows),  # reported only once every tensor was compared
        },
        "faults": faults,
        "wall_s": {**parts, "total": wall_s},
    }


def _measures(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ("kind", "step")}


def _survives(row: Row, resume_at: int) -> bool:
    return row["step"] < resume_at if row["kind"] == "train" else row["step"] <= resume_at
