"""Training from recorded trajectories: no server, no sandbox, no sampling. Implements `Collector`.

Step s trains on what step s of the recorded run collected, with rewards and advantages computed anew, so a change of
the algorithm can be tried on the same data, and a resumed run can be compared bit for bit with an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torl_mega.config import Config
from torl_mega.errors import DataError
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.rollout.samples import make_samples
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import CollectedGroups, StepBatch


class ReplayCollector:
    """Raises DataError when the recorded run at `rollout.replay` lacks a step."""

    def __init__(self, config: Config) -> None:
        assert config.rollout.replay is not None
        self._config = config
        self._folder = Path(config.rollout.replay) / "trajectories"
        missing = [s for s in range(config.num_steps) if not step_path(self._folder, s).exists()]
        if missing:
            raise DataError(
                f"rollout.replay = {config.rollout.replay!r} has no {step_path(self._folder, missing[0]).name}, "
                f"num_steps is {config.num_steps}; record more steps or lower num_steps"
            )

    def collect(self, step: int) -> StepBatch:
        groups = read_groups(step_path(self._folder, step))
        samples = make_samples(groups, self._config.algo)
        metrics = rollout_metrics(CollectedGroups(groups, {}, 0.0), max_tool_calls=self._config.rollout.max_tool_calls)
        return StepBatch(tuple(samples), {**metrics, "fault_rate": 0.0})

    def evaluate(self, step: int) -> Mapping[str, float]:
        return {}

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
