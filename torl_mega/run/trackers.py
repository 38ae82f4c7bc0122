"""What a run tells TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl.

    row of metrics.jsonl ─► grouped ─► each tracker (tracker_board, tracker_wandb, tracker_mlflow)

Contract: metrics.jsonl comes first and never depends on a tracker. A tracker that fails is said once, counted in trackers.json,
left alone after three failures in a row, and never ends a run; one whose library or server is missing when a run begins does,
in one line. A run that goes on continues the same tracker's run; what was told before is not told again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torl_mega.config import Config, LoggingConfig
from torl_mega.errors import ConfigError
from torl_mega.run.files import write_json

Row = dict[str, Any]
Samples = Callable[[str, int, int], Sequence[tuple[str, str]]]  # (kind, step, at most) -> (title, transcript)

TOOLS = frozenset(
    """
    code_ratio executed_code_ratio executed_response_ratio pass_ratio pass_ratio_correct pass_ratio_incorrect
    code_before_answer_ratio code_first_response_ratio tool_calls tool_calls_at_limit_ratio void_turn_ratio
    """.split()
)
ROLLOUT = frozenset(
    """
    reward accuracy response_length response_length_max turns truncated_ratio no_answer_ratio grader_timeout_ratio
    group_zero_signal_ratio fault_rate num_sampled_tokens rollout_tokens_per_s
    """.split()
)
MOST_FAILURES = 3  # in a row, after which a tracker is left alone
MODULES = {"wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """One tracker's run. Any method may raise anything."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` steps, under `group/name`."""
        ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self, *, complete: bool) -> None: ...


def grouped(row: Row) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl under `group/name`: train, rollout, tools, eval, time or sync."""
    numbers = {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
    if row["kind"] == "eval":
        return {f"eval/{name}": value for name, value in numbers.items()}
    if row["kind"] == "sync":
        return {f"sync/first/{name.removeprefix('sync/')}": value for name, value in numbers.items()}
    return {_tag(name): value for name, value in numbers.items()}


def _tag(name: str) -> str:
    """Under its group. `reward` cannot be both a number and a folder of its parts: MLflow keeps files."""
    if name.startswith("reward/"):
        return f"rollout/reward_parts/{name.removeprefix('reward/')}"
    return f"{_group(name)}{name}"


def _group(name: str) -> str:
    first = name.partition("/")[0]
    if first == "sync":
        return ""
    if name in TOOLS or first in ("execution", "tool"):
        return "tools/"
    if name in ROLLOUT or first == "faults":
        return "rollout/"
    return "time/" if name.endswith("_s") else "train/"


def hyperparameters(config: Config) -> dict[str, str | float | bool]:
    """What decides what a run learns, flat: a.b -> value."""
    tree = config.model_dump(mode="json")
    chosen = ("seed", "num_steps", "model", "data", "rollout", "reward", "algo", "optim", "trainer")
    return dict(_leaves({name: tree[name] for name in chosen}, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str | float | bool]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str | int | float | bool) else json.dumps(value)


def check_installed(logging: LoggingConfig) -> None:
    """Raises ConfigError when a tracker is asked for whose library is not there."""
    for name, module in MODULES.items():
        if getattr(logging, name) is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"logging.{name} needs the library {name}, which is not installed: pip install -e '.[{name}]', or take "
                f"logging.{name}=null"
            )


@dataclass(slots=True)
class _Known:
    """What trackers.json keeps of one tracker."""

    id: str | None = None
    told: dict[str, int] | None = None  # kind of row -> last step told
    missed: int = 0  # rows and texts that were not taken


class Guarded:
    """A tracker that cannot hurt the run, and does not hear a step twice."""

    def __init__(
        self, name: str, tracker: Tracker | None, known: _Known, keep: Callable[[], None], *, repeats: bool
    ) -> None:
        self.name = name
        self.known = known
        self._tracker = tracker
        self._keep = keep
        self._repeats = repeats  # takes back by itself what will be repeated
        self._failures = 0
        self._said = False

    def row(self, row: Row) -> None:
        told = self.known.told = self.known.told or {}
        if not self._repeats and row["step"] <= told.get(row["kind"], -1):
            return
        if self._try(lambda tracker: tracker.log(row["step"], grouped(row))):
            told[row["kind"]] = row["step"]
            self._keep()

    def text(self, step: int, name: str, text: str) -> None:
        self._try(lambda tracker: tracker.text(step, name, text))

    def close(self, *, complete: bool) -> None:
        self._failures = min(self._failures, MOST_FAILURES - 1)
        self._try(lambda tracker: tracker.close(complete=complete))
        self._keep()
        if self.known.missed:
            print(
                f"logging.{self.name} missed {self.known.missed} entries; metrics.jsonl has them all", file=sys.stderr
            )

    def catch_up(self, row: Row, resume_at: int) -> None:
        """Of rows from before this process: those that it took back, or was never told."""
        if not self._repeats or row["step"] >= resume_at:
            self.row(row)

    def heard(self, kind: str, step: int) -> bool:
        """Whether it was told this row already and would not take it again."""
        return not self._repeats and step <= (self.known.told or {}).get(kind, -1)

    def failed(self, exc: BaseException) -> None:
        self.known.missed += 1
        self._failures += 1
        if not self._said:
            self._said = True
            what = " ".join(str(exc).split())[:300] or type(exc).__name__
            print(
                f"logging.{self.name} fails ({what}); the run goes on, metrics.jsonl has it all",
                file=sys.stderr,
                flush=True,
            )
        self._keep()

    def _try(self, act: Callable[[Tracker], None]) -> bool:
        if self._tracker is None or self._failures >= MOST_FAILURES:
            self.known.missed += 1
            return False
        try:
            act(self._tracker)
        except Exception as exc:  # the boundary that this class is: whatever a library raises is counted and said
            self.failed(exc)
            return False
        self._failures = 0
        return True


class Trackers:
    """All trackers of a run. `samples` gives transcripts to show; `every` is how many steps lie between those of training."""

    def __init__(
        self, each: Sequence[Guarded] = (), samples: Samples | None = None, *, most: int = 0, every: int = 1
    ) -> None:
        self._each = each
        self._samples = samples
        self._most = most
        self._every = every

    def row(self, row: Row) -> None:
        kind, step = row["kind"], row["step"]
        fresh = [tracker for tracker in self._each if not tracker.heard(kind, step)]
        for tracker in fresh:
            tracker.row(row)
        due = self._most > 0 and (kind == "eval" or (kind == "train" and step % self._every == 0))
        if fresh and due and self._samples is not None:
            for name, text in self._samples(kind, step, self._most):
                for tracker in fresh:
                    tracker.text(step, f"{'eval' if kind == 'eval' else 'rollout'}/{name}", text)

    def catch_up(self, rows: Sequence[Row], resume_at: int) -> None:
        """Tells what each tracker lacks of the rows that a run goes on from."""
        for tracker in self._each:
            for row in rows:
                tracker.catch_up(row, resume_at)

    def close(self, *, complete: bool) -> None:
        for tracker in self._each:
            tracker.close(complete=complete)


def open_trackers(config: Config, folder: Path, *, resume_at: int, samples: Samples | None = None) -> Trackers:
    """The trackers that `config.logging` asks for. Raises ConfigError for one that cannot begin; one that began earlier and
    cannot go on is left out and said."""
    logging = config.logging
    check_installed(logging)
    path = folder / "trackers.json"
    known = _read(path)

    def keep() -> None:
        write_json(path, {n: {"id": k.id, "told": k.told or {}, "missed": k.missed} for n, k in sorted(known.items())})

    each = []
    for name, opened in _wanted(config, folder, resume_at):
        mine = known.setdefault(name, _Known())
        began = mine.id is not None
        try:
            tracker, mine.id = opened(mine.id)
            each.append(Guarded(name, tracker, mine, keep, repeats=name == "tensorboard"))
        except Exception as exc:  # a tracker's library raises what it likes
            if not began:
                what = " ".join(str(exc).split())[:300] or type(exc).__name__
                raise ConfigError(f"logging.{name} cannot begin: {what}; mend it or take {_without(name)}") from None
            each.append(Guarded(name, None, mine, keep, repeats=False))
            each[-1].failed(exc)
    if each:
        keep()
    return Trackers(each, samples, most=logging.samples, every=logging.samples_every_steps)


def _without(name: str) -> str:
    more = {"tensorboard": "logging.tensorboard=false", "wandb": "logging.wandb=null, or logging.wandb.mode=offline"}
    return more.get(name, f"logging.{name}=null")


Opened = Callable[[str | None], tuple[Tracker, str]]  # (id of an earlier process, or None) -> (tracker, its id)


def _wanted(config: Config, folder: Path, resume_at: int) -> Iterable[tuple[str, Opened]]:
    logging, settings = config.logging, hyperparameters(config)
    if logging.tensorboard:
        from torl_mega.run.tracker_board import Board

        yield "tensorboard", lambda _: (Board(folder / "tensorboard", settings, resume_at=resume_at), "tensorboard")
    if (wandb := logging.wandb) is not None:
        from torl_mega.run.tracker_wandb import open_wandb

        yield "wandb", lambda run_id: open_wandb(wandb, folder, config.name, settings, run_id)
    if (mlflow := logging.mlflow) is not None:
        from torl_mega.run.tracker_mlflow import open_mlflow

        yield "mlflow", lambda run_id: open_mlflow(mlflow, folder, config.name, settings, run_id)


def _read(path: Path) -> dict[str, _Known]:
    try:
        return {
            name: _Known(k["id"], dict(k["told"]), int(k["missed"])) for name, k in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none were opened yet, or the file was damaged: new runs begin there
