"""The RL loop. It sees Protocols only; every rank runs it.

    weights ─► collect (rank 0, shared) ─► old log-probs ─► (forward_backward, optim_step)* ─► weights ─► log, eval, save

What each stage waits for: `collect` for the weights of its policy version in every server; the update for the samples;
the next `collect` for a verified sync. A step that was collected but not saved is collected again after a restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np

from torl_mega.algo.correction import mismatch
from torl_mega.errors import Preempted, ServerLost, StaleServers, WeightSyncError
from torl_mega.interfaces import Collector, RunLog, Share, Trainer, Turns, WeightSink
from torl_mega.types import TrainSample

SAMPLING_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loop:
    """One run's parts and the numbers that pace it."""

    trainer: Trainer
    sink: WeightSink
    collector: Collector
    share: Share
    turns: Turns
    log: RunLog
    check_guards: Callable[[int, Mapping[str, float]], None]
    save: Callable[[int], None]  # (steps done) -> checkpoint
    stop_requested: Callable[[], bool]
    num_steps: int
    num_mini_batches: int
    eval_every: int  # 0 = only before and after
    save_every: int  # 0 = only at the end
    # keeps what the trainer found before its update
    record: Callable[[int, Sequence[TrainSample]], None] = lambda step, samples: None

    def run(self, start: int, *, evaluate_first: bool) -> bool:
        """Runs the steps from `start` on; the servers hold version `start`. Returns True when the run is complete, False
        when it was told to stop and saved."""
        done = start
        try:
            if evaluate_first:
                self._evaluate(start)
            while done < self.num_steps:
                metrics = self._step(done)
                self.log.step(done, metrics)
                self.check_guards(done, metrics)
                done += 1
                last = done == self.num_steps
                if last or due(done, self.eval_every):
                    self._evaluate(done)
                stop = self.share(self.stop_requested)
                if last or stop or due(done, self.save_every):
                    self._save(done)
                if stop and not last:
                    return False
        except Preempted:  # the step that was being collected is dropped
            self._save(done)
            return False
        return True

    def _step(self, step: int) -> dict[str, float]:
        times: dict[str, float] = {}
        with _timed(times, "rollout_s"):
            batch = self._on_rank0(lambda: self.collector.collect(step), version=step)
        with _timed(times, "train_s"):
            self.turns.train()
            train_samples = self.trainer.old_logprobs(batch.samples)
            self.record(step, train_samples)
            updates = [
                {**self.trainer.forward_backward(mini), **self.trainer.optim_step()}
                for mini in split_mini_batches(train_samples, self.num_mini_batches)
            ]
        with _timed(times, "sync_s"):
            sync = self.sync(step + 1)
        return {
            **batch.metrics,
            **_combine(updates),
            **mismatch(train_samples),
            **{f"sync/{name}": value for name, value in sync.items()},
            **times,
            "step_s": sum(times.values()),
        }

    def _save(self, done: int) -> None:
        self.turns.save()
        self.save(done)

    def _evaluate(self, done: int) -> None:
        self.log.evaluation(done, self._on_rank0(lambda: self.collector.evaluate(done), version=done))

    def _on_rank0(self, sample: Callable[[], T], *, version: int) -> T:
        """Runs `sample` on rank 0 and shares the result. On StaleServers (restarted servers hold the checkpoint's weights)
        syncs and tries again."""
        for _ in range(SAMPLING_TRIES - 1):
            self.turns.sample()
            try:
                return self.share(sample)
            except StaleServers:
                self.sync(version)
        self.turns.sample()
        return self.share(sample)

    def sync(self, version: int) -> Mapping[str, float]:
        """Sends the weights as policy version `version`, a second time when a server died over the first while others live.
        Raises WeightSyncError on every rank."""
        report, failure = self._try_sync(version)
        if self.share(partial(_must_repeat, failure)):
            report, failure = self._try_sync(version)
            self.share(partial(_raise_if, failure))
        return report

    def _try_sync(self, version: int) -> tuple[Mapping[str, float], WeightSyncError | None]:
        """The sink's report, or the failure, which only the rank that sends knows of."""
        self.turns.sync()
        try:
            return self.sink.update(self.trainer.weights(), version=version), None
        except WeightSyncError as exc:
            return {}, exc


def _must_repeat(failure: WeightSyncError | None) -> bool:
    if failure is not None and not isinstance(failure, ServerLost):
        raise failure
    return failure is not None


def _raise_if(failure: WeightSyncError | None) -> None:
    if failure is not None:
        raise failure


def due(done: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `done` steps."""
    return every > 0 and done % every == 0


def split_mini_batches(items: Sequence[T], num_mini_batches: int) -> list[list[T]]:
    """Consecutive mini-batches, as equal as the count allows (faults can leave a step short)."""
    bounds = np.linspace(0, len(items), num_mini_batches + 1).round().astype(int)
    return [list(items[a:b]) for a, b in pairwise(bounds) if b > a]


def _combine(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the updates of a step; maximum or number where the name says so."""
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update.get(name, 0.0) for update in updates]
        combined[name] = max(values) if name.endswith("_max") else sum(values)
        if not name.endswith("_max") and not name.startswith("faults/"):
            combined[name] /= len(updates)
    return combined


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    times[name] = time.monotonic() - start
