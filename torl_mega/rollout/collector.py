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
from torl_mega.rollout.benchmark_table import policy_of, write_report
from torl_mega.rollout.episode import Episode, sampling_seed
from torl_mega.rollout.evaluate import Benchmark, Sampling, absent_benchmarks, samplings, score
from torl_mega.rollout.filters import has_signal, pass_rate, resample_on_correct
from torl_mega.rollout.recorder import write_step
from torl_mega.rollout.refill import collect_with_signal, together
from torl_mega.rollout.samples import make_samples
from torl_mega.rollout.scheduler import EpisodeScheduler, lost_trajectories
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.run.folder import RunFolder
from torl_mega.run.progress import Progress
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
    progress: Progress = dataclasses.field(default_factory=Progress)
    name: str | None = None  # of an evaluation's results; None: the step's

    def collect(self, step: int) -> StepBatch:
        settings, algo = self.config.rollout, self.config.algo
        self.expect_version(step)
        self.progress.begins("step", step)
        cursor, before = self.prompts.state(), dict(self.counters())
        refill = algo.zero_signal == "refill"
        try:
            found = collect_with_signal(
                lambda wanted, number: self._attempt(step, wanted, number),
                lambda group: not refill or has_signal(group, algo),
                wanted=settings.prompts_per_step,
                most_rounds=1 + settings.refill_rounds if refill else 1,
            )
        except BaseException:
            self.prompts.restore(cursor)  # a dropped step is collected again with the same prompts
            raise
        groups = [resample_on_correct(group, settings.group_size) for group in found.kept]
        samples = make_samples(groups, algo)
        if self.config.logging.trajectories:
            write_step(self.folder.trajectories, step, groups, [s.advantage for s in samples])
        metrics = self._metrics(found.everything, before)
        if refill:
            refilled = len(found.everything.groups) - len(found.kept)
            metrics |= {"refill_rounds": found.num_rounds - 1, "refilled_groups": refilled}
        return StepBatch(tuple(samples), metrics)

    def _attempt(self, step: int, wanted: int, number: int) -> CollectedGroups:
        """`wanted` groups of the next prompts, in the `number`-th collection of a step; prompts that were cut off go back."""
        settings, retire_above = self.config.rollout, self.config.data.retire_above
        prompts = self.prompts.next(math.ceil(wanted * settings.oversample))
        collected = self.scheduler.collect(
            self.episode,
            prompts,
            group_size=settings.attempts_per_prompt or settings.group_size,
            seed=sampling_seed(self.config.seed, "step", step, number),
            keep=wanted,
        )
        kept = {id(group.prompt) for group in collected.groups}
        self.prompts.put_back([prompt for prompt in prompts if id(prompt) not in kept])
        if retire_above is not None:
            self.prompts.retire([g.prompt.problem.problem_id for g in collected.groups if pass_rate(g) >= retire_above])
        return collected

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.expect_version(step)
        self.progress.begins("evaluation", step)
        if not self.benchmarks:
            return {}
        each = samplings(self.config.eval, self.benchmarks)
        collected = together([self._attempt_benchmarks(each, sampling) for sampling in dict.fromkeys(each)])
        report = score(
            self.benchmarks,
            collected,
            each,
            temperature=self.config.eval.temperature,
            max_tool_calls=self.config.rollout.max_tool_calls,
            absent=absent_benchmarks(self.config.eval),
        )
        policy = policy_of(self.config.model.path, step)
        write_report(self.folder.evaluations, self.name or f"step_{step:05d}", report, collected, policy)
        return report.metrics()

    def _attempt_benchmarks(self, each: Sequence[Sampling], sampling: Sampling) -> CollectedGroups:
        """Attempts at the problems of all benchmarks that are sampled like this, at once."""
        usual = self.episode.settings
        top_p = usual.top_p if sampling.top_p is None else sampling.top_p
        settings = dataclasses.replace(usual, temperature=sampling.temperature, top_p=top_p, routes=False)
        return self.scheduler.collect(
            dataclasses.replace(self.episode, settings=settings),
            [p for b, other in zip(self.benchmarks, each, strict=True) if other == sampling for p in b.prompts],
            group_size=sampling.samples_per_problem,
            seed=sampling_seed(self.config.seed, EVAL_STEP, 0, 0),
        )

    def state(self) -> Mapping[str, Any]:
        return {"prompts": self.prompts.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.prompts.restore(state["prompts"])

    def _metrics(self, collected: CollectedGroups, before: Mapping[str, int]) -> dict[str, float]:
        faults = dict(collected.faults)
        for name, count in self.counters().items():
            if count > before.get(name, 0):
                faults[name] = faults.get(name, 0) + count - before.get(name, 0)
        settings = self.config.rollout
        num_groups = max(settings.prompts_per_step, len(collected.groups))
        wanted = num_groups * (settings.attempts_per_prompt or settings.group_size)
        tokens = sum(int(np.sum(t.loss_mask)) for g in collected.groups for t in g.trajectories)
        return {
            **rollout_metrics(collected, max_tool_calls=self.config.rollout.max_tool_calls),
            **{f"faults/{name}": count for name, count in sorted(faults.items())},
            "fault_rate": lost_trajectories(faults) / wanted,
            "num_sampled_tokens": tokens,
            "rollout_tokens_per_s": tokens / max(collected.wall_s, 1e-9),
        }
