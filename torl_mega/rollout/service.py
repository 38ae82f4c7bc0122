"""Rank 0's half of a step: next prompts, collect, score, record, turn into samples. Implements `Rollouts`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torl_mega.config import Config
from torl_mega.data.prompts import PromptSource
from torl_mega.rollout.collector import AsyncCollector, lost_trajectories
from torl_mega.rollout.episode import Episode, sampling_seed
from torl_mega.rollout.filters import has_signal, pass_rate, resample_on_correct
from torl_mega.rollout.recorder import write_step
from torl_mega.rollout.refill import collect_with_signal
from torl_mega.rollout.samples import make_samples
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import Prompt, Rollout, StepBatch

EVAL_STEP = "eval"


@dataclass(slots=True)
class RolloutService:
    config: Config
    prompts: PromptSource
    episode: Episode
    collector: AsyncCollector
    run_evaluation: Callable[[Callable[..., Rollout], int], Mapping[str, float]]
    trajectories_dir: Path
    expect_version: Callable[[int], None]  # tells the generator which weights its answers must come from
    counters: Callable[[], Mapping[str, int]]  # the clients' fault counters, since start

    def collect(self, step: int) -> StepBatch:
        settings = self.config.rollout
        self.expect_version(step)
        cursor, before = self.prompts.state(), dict(self.counters())
        refill = self.config.algo.zero_signal == "refill"
        try:
            found = collect_with_signal(
                lambda wanted, number: self._attempt(step, wanted, number),
                lambda group: not refill or has_signal(group, self.config.algo),
                wanted=settings.prompts_per_step,
                most_rounds=1 + settings.refill_rounds if refill else 1,
            )
        except BaseException:
            self.prompts.restore(cursor)  # a dropped step is collected again with the same prompts
            raise
        groups = [resample_on_correct(group, settings.group_size) for group in found.kept]
        samples = make_samples(groups, self.config.algo)
        if self.config.logging.trajectories:
            write_step(self.trajectories_dir, step, groups, [s.advantage for s in samples])
        metrics = self._metrics(found.everything, before)
        if refill:
            metrics |= {
                "refill_rounds": found.num_rounds - 1,
                "refilled_groups": len(found.everything.groups) - len(found.kept),
            }
        return StepBatch(tuple(samples), metrics)

    def _attempt(self, step: int, wanted: int, number: int) -> Rollout:
        """`wanted` groups of the next prompts, in the `number`-th collection of a step; prompts that were cut off go back."""
        settings, retire_above = self.config.rollout, self.config.data.retire_above
        prompts = self.prompts.next(math.ceil(wanted * settings.oversample))
        rollout = self.collector.collect(
            self.episode,
            prompts,
            group_size=settings.attempts_per_prompt or settings.group_size,
            seed=sampling_seed(self.config.seed, "step", step, number),
            keep=wanted,
        )
        kept = {id(group.prompt) for group in rollout.groups}
        self.prompts.put_back([prompt for prompt in prompts if id(prompt) not in kept])
        if retire_above is not None:
            self.prompts.retire([g.prompt.problem.problem_id for g in rollout.groups if pass_rate(g) >= retire_above])
        return rollout

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.expect_version(step)
        return self.run_evaluation(self._collect_for_evaluation, step)

    def state(self) -> Mapping[str, Any]:
        return {"prompts": self.prompts.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.prompts.restore(state["prompts"])

    def _collect_for_evaluation(
        self, prompts: Sequence[Prompt], *, temperature: float, samples_per_prompt: int, top_p: float | None = None
    ) -> Rollout:
        usual = self.episode.settings
        settings = dataclasses.replace(usual, temperature=temperature, top_p=usual.top_p if top_p is None else top_p)
        episode = dataclasses.replace(self.episode, settings=settings)
        seed = sampling_seed(self.config.seed, EVAL_STEP, 0, 0)
        return self.collector.collect(episode, prompts, group_size=samples_per_prompt, seed=seed)

    def _metrics(self, rollout: Rollout, before: Mapping[str, int]) -> dict[str, float]:
        faults = dict(rollout.faults)
        for name, count in self.counters().items():
            if count > before.get(name, 0):
                faults[name] = faults.get(name, 0) + count - before.get(name, 0)
        settings = self.config.rollout
        num_groups = max(settings.prompts_per_step, len(rollout.groups))
        wanted = num_groups * (settings.attempts_per_prompt or settings.group_size)
        tokens = sum(int(np.sum(t.loss_mask)) for g in rollout.groups for t in g.trajectories)
        return {
            **rollout_metrics(rollout, max_tool_calls=self.config.rollout.max_tool_calls),
            **{f"faults/{name}": count for name, count in sorted(faults.items())},
            "fault_rate": lost_trajectories(faults) / wanted,
            "num_sampled_tokens": tokens,
            "rollout_tokens_per_s": tokens / max(rollout.wall_s, 1e-9),
        }
