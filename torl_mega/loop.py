"""The RL loop, on one page. It sees Protocols only; every rank runs it.

    weights ─► collect (rank 0, shared) ─► old log-probs ─► (forward_backward, optim_step)* ─► weights ─► log, eval, save

What each stage waits for: `collect` for the weights of its policy version in every server; the update for the samples;
the next `collect` for a verified sync. A step that was collected but not saved is collected again after a restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torl_mega.algo.correction import mismatch
from torl_mega.errors import Preempted, ServerLost, StaleServers, WeightSyncError
from torl_mega.interfaces import Rollouts, RunLog, Share, Trainer, WeightSink
from torl_mega.rollout.samples import split_mini_batches
from torl_mega.types import StepBatch

SAMPLING_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loop:
    trainer: Trainer
    sink: WeightSink
    rollouts: Rollouts
    share: Share
    log: RunLog
    check_guards: Callable[[int, Mapping[str, float]], None]
    save: Callable[[int], None]  # (steps done) -> checkpoint
    stop_requested: Callable[[], bool]
    num_steps: int
    num_mini_batches: int
    eval_every: int  # 0 = only before and after
    save_every: int  # 0 = only at the end

    def run(self, start: int, *, evaluate_first: bool) -> bool:
        """Steps `start` to the end, the servers holding version `start`. True when the run is complete, False when it
        was told to stop and saved."""
        done = start
        try:
            if evaluate_first:
                self._evaluate(start)
            while done < self.num_steps:
                metrics = self._step(done)
                self.log.step(done, metrics)
                self.check_guards(done, metrics)
                done += 1
                if done == self.num_steps or due(done, self.eval_every):
                    self._evaluate(done)
                if self.share(self.stop_requested):
                    break
                if done == self.num_steps or due(done, self.save_every):
                    self.save(done)
        except Preempted:
            pass  # what was being collected is dropped
        else:
            if done == self.num_steps:
                return True
        self.save(done)
        return False

    def _step(self, step: int) -> dict[str, float]:
        times: dict[str, float] = {}
        with _timed(times, "rollout_s"):
            batch = self._collect(step)
        with _timed(times, "train_s"):
            train_samples = self.trainer.old_logprobs(batch.samples)
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

    def _collect(self, step: int) -> StepBatch:
        return self._sampled(step, lambda: self.rollouts.collect(step))

    def _sampled(self, version: int, sample: Callable[[], T]) -> T:
        """What rank 0 sampled. Servers that came back from a crash hold other weights: they are sent the policy's."""
        for tries_left in range(SAMPLING_TRIES - 1, -1, -1):
            try:
                return self.share(sample)
            except StaleServers:
                if not tries_left:
                    raise
                self.sync(version)
        raise AssertionError("unreachable")

    def sync(self, version: int) -> Mapping[str, float]:
        """Sends the weights; once more without a server that died in the middle. Errors are raised on every rank."""
        for tries_left in (1, 0):
            failure: WeightSyncError | None = None
            report: Mapping[str, float] = {}
            try:
                report = self.sink.update(self.trainer.weights(), version=version)
            except WeightSyncError as exc:  # on the rank that sends
                failure = exc
            if not self.share(lambda failure=failure, left=tries_left: _try_again(failure, left)):
                break
        return report

    def _evaluate(self, done: int) -> None:
        self.log.evaluation(done, self._sampled(done, lambda: self.rollouts.evaluate(done)))


def _try_again(failure: WeightSyncError | None, tries_left: int) -> bool:
    if failure is None:
        return False
    if isinstance(failure, ServerLost) and tries_left:
        return True
    raise failure


def due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


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
