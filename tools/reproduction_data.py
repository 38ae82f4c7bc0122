"""The runs of the paper in small as data: docs/reproduction/*.json, one file each, and what they were run with.

Contract: a file says what its run did, not what was asked for when it was collected: `recipe` is the run's own config without what
changes nothing that is learned, `versions` are the run's own. `command` compares the recipe with the arm's file as it is today,
so that a run of other settings shows them.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate import interval, run_name

from torl_mega.config_file import load_config
from torl_mega.run.folder import FREE, FREE_PARTS, flatten

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]  # by arm, by seed

ROOT = Path(__file__).resolve().parents[1]
# what a run may go on with otherwise, but is not the same with
ALSO_COMPARED = set(
    """
    num_steps eval.data eval.max_problems eval.samples_per_problem eval.temperature sandbox.wall_s sandbox.cpu_s sandbox.memory_mb
    """.split()
)


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    seeds: int  # how many are wanted
    needs_tools: bool = False  # names something of tools/


ARMS: dict[str, Arm] = {
    "torl": Arm("ToRL, C = 1", 5),
    "no_tool": Arm("RL without a tool, C = 0", 5),
    "c2": Arm("ToRL, C = 2", 3),
    "code_error": Arm("C = 1, −0.5 for a program that does not run", 3),
    "plus": Arm("C = 1, conf/plus.yaml's options", 3),
    "noise": Arm("control: the tool answers noise", 3, needs_tools=True),
    "lot": Arm("control: rewards by lot", 3, needs_tools=True),
    "observations": Arm("control: observations trained on", 3),
}
FAST = {"torl": 3, "no_tool": 3}  # of `make reproduce-fast`


def conf_of(arm: str) -> str:
    return f"conf/paper_small/{arm}.yaml"


def read(folder: Path) -> Runs:
    """Every run that is there, also of an arm that is no longer wanted: that one is left out."""
    found: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if run["arm"] in found:
            found[run["arm"]].append(run)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in found.items()}


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted name, what a run learns from: a config without names, folders and how it is run."""
    return {
        name: value
        for name, value in flatten(dict(config)).items()
        if name in ALSO_COMPARED or (name.split(".")[0] not in FREE and name not in FREE_PARTS and name != "seed")
    }


@functools.cache
def _recipe_today(arm: str) -> dict[str, Any]:
    return recipe_of(load_config(ROOT / conf_of(arm)).model_dump(mode="json"))


def other_settings(run: Run) -> list[str]:
    """As overrides, what the run was made with that its file does not say today."""
    today = _recipe_today(run["arm"])
    differing = {k: v for k, v in run["recipe"].items() if k in today and today[k] != v}
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in differing.items()]


def command(run: Run) -> str:
    """What makes this run again; N stands for the seed."""
    arm = run["arm"]
    words = ["PYTHONPATH=tools"] if ARMS[arm].needs_tools else []
    name = run_name(arm, 0).removesuffix("0") + "N"
    return " ".join([*words, "torl train", conf_of(arm), "seed=N", f"name={name}", *other_settings(run)])


def minutes(run: Run) -> float:
    return run["wall_s"] / 60


def accuracies(runs: Sequence[Run], when: str, family: str | None = None) -> list[float]:
    """Of each run's evaluation, of one family or as the mean of all."""
    name = f"{family}/accuracy" if family else "accuracy"
    return [run["eval"][when][name] for run in runs if name in run["eval"][when]]


def shown(values: Sequence[float], form: str) -> str:
    """Mean ± half of the 95 % interval (Student's t); – of nothing, and no interval of one value."""
    if not values:
        return "–"
    mean, half = interval(values)
    return form.format(mean) + (f" ± {form.format(half).lstrip('+')}" if len(values) > 1 else "")


def percent(values: Sequence[float]) -> str:
    return shown([100 * v for v in values], "{:.1f}")


def ends(run: Run, curve: str) -> tuple[float, float]:
    """Means of the first and of the last five steps."""
    values = run["curves"][curve]
    return statistics.fmean(values[:5]), statistics.fmean(values[-5:])
