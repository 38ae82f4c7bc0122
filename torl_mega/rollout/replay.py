"""Training from recorded trajectories: no server, no sandbox, no sampling. Implements `Collector`.

Step s trains on what step s of the recorded run collected, with rewards and advantages computed anew, so a change of
the algorithm can be tried on the same data, and a resumed run can be compared bit for bit with an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torl_mega.config import Config
from torl_mega.errors import DataError
from torl_mega.layout import ModelShape, describe_model, read_hf_config
from torl_mega.rollout.recorder import parse_rows, read_groups, read_rows, step_path
from torl_mega.rollout.samples import make_samples
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import CollectedGroups, StepBatch, Trajectory


def check_recording(config: Config) -> None:
    """Raises DataError when the run at `rollout.replay` lacks a step that is asked for, or its first line is none."""
    folder = Path(str(config.rollout.replay)) / "trajectories"
    missing = [s for s in range(config.num_steps) if not step_path(folder, s).exists()]
    if missing:
        raise DataError(
            f"rollout.replay = {config.rollout.replay!r} has no {step_path(folder, missing[0]).name}, "
            f"num_steps is {config.num_steps}; record more steps or lower num_steps"
        )
    first = step_path(folder, 0)
    next(parse_rows(first, read_rows(first)), None)


def check_routes(trajectory: Trajectory, shape: ModelShape, path: Path) -> None:
    """Raises DataError for an attempt whose recorded experts are not those of this model for these tokens."""
    assert shape.experts is not None
    known, end = 0, len(trajectory.prompt.token_ids)
    for number, turn in enumerate(trajectory.turns):
        end += len(turn.token_ids)
        wanted, routes = (end - 1 - known, shape.num_layers, shape.experts.top_k), turn.routes
        if routes is None:
            found = "none"
        elif routes.shape != wanted:
            found = str(list(routes.shape))
        elif routes.size and not (routes.min() >= 0 and routes.max() < shape.experts.count):
            found = f"numbers {routes.min()} to {routes.max()}"
        elif (np.diff(np.sort(routes)) == 0).any():
            found = "one of them twice"
        else:
            known, end = end - 1, end + len(turn.observation_ids)
            continue
        raise DataError(
            f"{path}: attempt {trajectory.sample_index} at {trajectory.prompt.problem.problem_id}, turn {number}: "
            f"algo.router_replay = rollout wants {list(wanted)} different ones of {shape.experts.count} experts recorded, found "
            f"{found}; replay a run of this model that was recorded with that setting, or take router_replay off or old"
        )


class ReplayCollector:
    """Raises DataError when the recorded run at `rollout.replay` lacks a step."""

    def __init__(self, config: Config) -> None:
        assert config.rollout.replay is not None
        self._config = config
        self._folder = Path(config.rollout.replay) / "trajectories"
        check_recording(config)
        self._shape = describe_model(read_hf_config(config.model.path))

    def collect(self, step: int) -> StepBatch:
        path = step_path(self._folder, step)
        groups = read_groups(path)
        if self._config.algo.router_replay == "rollout":
            for trajectory in (t for group in groups for t in group.trajectories):
                check_routes(trajectory, self._shape, path)
        samples = make_samples(groups, self._config.algo)
        metrics = rollout_metrics(CollectedGroups(groups, {}, 0.0), max_tool_calls=self._config.rollout.max_tool_calls)
        return StepBatch(tuple(samples), {**metrics, "fault_rate": 0.0})

    def evaluate(self, step: int) -> Mapping[str, float]:
        return {}

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
