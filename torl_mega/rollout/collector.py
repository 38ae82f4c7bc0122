"""Collects from live servers: next prompts, episodes, rewards, record, samples. Implements `Collector`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torl_mega.config import Config
from torl_mega.data.prompts import PromptSource
from torl_mega.rollout.benchmark_table import write_report
from torl_mega.rollout.episode import Episode, sampling_seed
from torl_mega.rollout.evaluate import Benchmark, score
from torl_mega.rollout.recorder import write_step
from torl_mega.rollout.samples import make_samples
from torl_mega.rollout.scheduler import EpisodeScheduler, lost_trajectories
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.run.folder import RunFolder
from torl_mega.types import CollectedGroups, StepBatch

EVAL_STEP = "eval"


@dataclass(slots=True)
class LiveCollector:
    """See `Collector`. A step that fails or is dropped leaves the prompt cursor where it was."""

    config: Config
    folder: RunFolder
    prompts: PromptSource
    benchmarks: Sequence[Benchmark]
    episode: Episode
    scheduler: EpisodeScheduler
    expect_version: Callable[[int], None]  # tells the generator which weights its answers must come from
    counters: Callable[[], Mapping[str, int]]  # the clients' fault counters, since start

    def collect(self, step: int) -> StepBatch:
        settings = self.config.rollout
        self.expect_version(step)
        cursor, before = self.prompts.state(), dict(self.counters())
        try:
            prompts = self.prompts.next(math.ceil(settings.prompts_per_step * settings.oversample))
            seed = sampling_seed(self.config.seed, "step", step, 0)
            collected = self.scheduler.collect(
                self.episode, prompts, group_size=settings.group_size, seed=seed, keep=settings.prompts_per_step
            )
        except BaseException:
            self.prompts.restore(cursor)  # a dropped step is collected again with the same prompts
            raise
        kept = {id(group.prompt) for group in collected.groups}
        self.prompts.put_back([prompt for prompt in prompts if id(prompt) not in kept])
        samples = make_samples(collected.groups, self.config.algo)
        if self.config.logging.trajectories:
            write_step(self.folder.trajectories, step, collected.groups, [s.advantage for s in samples])
        return StepBatch(tuple(samples), self._metrics(collected, before))

    def evaluate(self, step: int) -> Mapping[str, float]:
        settings = self.config.eval
        self.expect_version(step)
        if not self.benchmarks:
            return {}
        collected = self.scheduler.collect(
            dataclasses.replace(
                self.episode, settings=dataclasses.replace(self.episode.settings, temperature=settings.temperature)
            ),
            [prompt for benchmark in self.benchmarks for prompt in benchmark.prompts],
            group_size=settings.samples_per_problem,
            seed=sampling_seed(self.config.seed, EVAL_STEP, 0, 0),
        )
        report = score(
            self.benchmarks,
            collected,
            temperature=settings.temperature,
            samples_per_problem=settings.samples_per_problem,
            max_tool_calls=self.config.rollout.max_tool_calls,
        )
        write_report(self.folder.evaluations, f"step_{step:05d}", report, collected)
        return report.metrics()

    def state(self) -> Mapping[str, Any]:
        return {"prompts": self.prompts.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.prompts.restore(state["prompts"])

    def _metrics(self, collected: CollectedGroups, before: Mapping[str, int]) -> dict[str, float]:
        faults = dict(collected.faults)
        for name, count in self.counters().items():
            if count > before.get(name, 0):
                faults[name] = faults.get(name, 0) + count - before.get(name, 0)
        wanted = self.config.rollout.prompts_per_step * self.config.rollout.group_size
        tokens = sum(int(np.sum(t.loss_mask)) for g in collected.groups for t in g.trajectories)
        return {
            **rollout_metrics(collected, max_tool_calls=self.config.rollout.max_tool_calls),
            **{f"faults/{name}": count for name, count in sorted(faults.items())},
            "fault_rate": lost_trajectories(faults) / wanted,
            "num_sampled_tokens": tokens,
            "rollout_tokens_per_s": tokens / max(collected.wall_s, 1e-9),
        }
