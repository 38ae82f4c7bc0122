"""Prompts in, scored groups out: every trajectory is a task of its own, with no barrier between them.

One asyncio loop drives all of them. A trajectory that meets a fault is started again once; if that fails too it is
counted, logged and left out. Contract: `collect` returns only whole trajectories, each exactly once. With `keep` it
returns as soon as that many groups are complete and cuts the others off.
Not covered: sampling while the trainer updates (see `max_staleness`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from torl_mega.errors import GenerationError, StaleServers
from torl_mega.interfaces import RewardFn
from torl_mega.rollout.episode import Episode, SandboxFault
from torl_mega.types import GraderStatus, Group, Prompt, Reward, Rollout, Trajectory

log = logging.getLogger(__name__)

ATTEMPTS = 2


@dataclass(slots=True)
class AsyncCollector:
    """`run` executes a coroutine on the loop that the episode's clients belong to."""

    reward_fn: RewardFn
    run: Callable[[Coroutine[Any, Any, Rollout]], Rollout]
    max_concurrency: int
    deadline_s: float
    progress: Callable[[int, int], None] | None = None  # (finished, total) trajectories
    _faults: Counter[str] = field(default_factory=Counter)

    def collect(
        self, episode: Episode, prompts: Sequence[Prompt], *, group_size: int, seed: int, keep: int | None = None
    ) -> Rollout:
        """`group_size` attempts at each prompt, of which the first `keep` complete groups are returned (None: all of them),
        in the order of `prompts`. `seed` must differ between steps."""
        return self.run(self.collect_async(episode, prompts, group_size, seed, keep))

    async def collect_async(
        self, episode: Episode, prompts: Sequence[Prompt], group_size: int, seed: int, keep: int | None = None
    ) -> Rollout:
        start, total, finished = time.monotonic(), len(prompts) * group_size, 0
        keep = len(prompts) if keep is None else keep
        self._faults = Counter()
        slots = asyncio.Semaphore(self.max_concurrency)
        open_in_group = [group_size] * len(prompts)

        async def one(number: int, index: int) -> tuple[Trajectory, Reward] | None:
            nonlocal finished
            async with slots:
                scored = await self._attempt(episode, prompts[number], index, seed)
            finished += 1
            open_in_group[number] -= 1
            if self.progress:
                self.progress(finished, total)
            if open_in_group.count(0) == keep < len(prompts):
                for late in (task for group in groups for task in group if not task.done()):
                    if late is not asyncio.current_task():
                        late.cancel()
            return scored

        try:
            async with asyncio.TaskGroup() as tasks:
                groups = [[tasks.create_task(one(n, i)) for i in range(group_size)] for n in range(len(prompts))]
        except BaseExceptionGroup as failed:
            stale = failed.subgroup(StaleServers)
            if stale is None:
                raise
            raise StaleServers(str(stale.exceptions[0])) from None  # nothing can be sampled before a weight sync
        whole = [n for n, group in enumerate(groups) if not any(task.cancelled() for task in group)][:keep]
        done = {n: [scored for task in groups[n] if (scored := task.result())] for n in whole}
        return Rollout(
            groups=tuple(_group(prompts[n], scored) for n, scored in done.items()),
            faults=dict(self._faults),
            wall_s=time.monotonic() - start,
        )

    async def _attempt(
        self, episode: Episode, prompt: Prompt, index: int, seed: int
    ) -> tuple[Trajectory, Reward] | None:
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(self.deadline_s):
                    trajectory = await episode.run(prompt, index, seed=seed)
                    reward = await self.reward_fn.score(trajectory)
            except StaleServers:
                raise
            except (GenerationError, SandboxFault, TimeoutError) as exc:
                kind = "deadline" if isinstance(exc, TimeoutError) else type(exc).__name__
                self._faults[f"{kind}_retry" if attempt + 1 < ATTEMPTS else f"{kind}_lost"] += 1
                log.warning("%s, sample %d: %s: %s", prompt.problem.problem_id, index, kind, exc)
                continue
            if reward.status is GraderStatus.FAULT:
                self._faults["grader_lost"] += 1
                return None
            if reward.status is GraderStatus.TIMEOUT:
                self._faults["grader_timeout"] += 1
            return trajectory, reward
        return None


def lost_trajectories(faults: dict[str, int]) -> int:
    """Trajectories that were left out, among the fault counts of a rollout."""
    return sum(count for kind, count in faults.items() if kind.endswith("_lost"))


def _group(prompt: Prompt, scored: Sequence[tuple[Trajectory, Reward]]) -> Group:
    return Group(prompt, tuple(t for t, _ in scored), tuple(r for _, r in scored))
