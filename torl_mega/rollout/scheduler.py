"""Runs episodes side by side: every trajectory is an asyncio task of its own, with no barrier between them.

    prompts x group_size ─► (at most max_concurrency at once) Episode.run ─► RewardFn.score ─► CollectedGroups

Contract: `collect` returns only whole trajectories, each exactly once. A trajectory that meets a fault is started again
once; if that fails too it is counted, logged and left out. With `keep` the collection ends as soon as that many groups are
complete, and the others are cancelled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from torl_mega.errors import GenerationError, StaleServers, ToolFault
from torl_mega.interfaces import RewardFn
from torl_mega.rollout.episode import Episode
from torl_mega.run.progress import Progress
from torl_mega.types import CollectedGroups, GraderStatus, Group, Prompt, Reward, Trajectory

log = logging.getLogger(__name__)

ATTEMPTS = 2


@dataclass(slots=True)
class EpisodeScheduler:
    """`run` executes a coroutine on the loop that the episode's clients belong to."""

    reward_fn: RewardFn
    run: Callable[[Coroutine[Any, Any, CollectedGroups]], CollectedGroups]
    max_concurrency: int  # trajectories
    deadline_s: float  # of one attempt at a trajectory, scoring included
    progress: Progress = field(default_factory=Progress)
    _faults: Counter[str] = field(default_factory=Counter)

    def collect(
        self, episode: Episode, prompts: Sequence[Prompt], *, group_size: int, seed: int, keep: int | None = None
    ) -> CollectedGroups:
        """`group_size` attempts at each prompt, of which the first `keep` complete groups are returned (None: all of them),
        in the order of `prompts`. `seed` must differ between steps. Raises StaleServers when only a weight sync can help."""
        return self.run(self.collect_async(episode, prompts, group_size, seed, keep))

    async def collect_async(
        self, episode: Episode, prompts: Sequence[Prompt], group_size: int, seed: int, keep: int | None = None
    ) -> CollectedGroups:
        """`collect` for callers that are on the loop already."""
        start = time.monotonic()
        keep = len(prompts) if keep is None else keep
        self._faults = Counter()
        slots = asyncio.Semaphore(self.max_concurrency)
        open_in_group = [group_size] * len(prompts)

        async def one(number: int, index: int) -> tuple[Trajectory, Reward] | None:
            async with slots:
                scored = await self._attempt(episode, prompts[number], index, seed)
            open_in_group[number] -= 1
            tell(sum(scored[0].loss_mask) if scored else 0)
            if open_in_group.count(0) == keep < len(prompts):
                for late in (task for group in groups for task in group if not task.done()):
                    if late is not asyncio.current_task():
                        late.cancel()
            return scored

        try:
            with self.progress.sampling(len(prompts) * group_size) as tell:
                async with asyncio.TaskGroup() as tasks:
                    groups = [[tasks.create_task(one(n, i)) for i in range(group_size)] for n in range(len(prompts))]
        except BaseExceptionGroup as failed:
            stale = failed.subgroup(StaleServers)
            if stale is None:
                raise
            raise StaleServers(str(stale.exceptions[0])) from None
        whole = [n for n, group in enumerate(groups) if not any(task.cancelled() for task in group)][:keep]
        done = {n: [scored for task in groups[n] if (scored := task.result())] for n in whole}
        return CollectedGroups(
            groups=tuple(_group(prompts[n], scored) for n, scored in done.items()),
            faults=dict(self._faults),
            wall_s=time.monotonic() - start,
        )

    async def _attempt(
        self, episode: Episode, prompt: Prompt, index: int, seed: int
    ) -> tuple[Trajectory, Reward] | None:
        """One scored trajectory, or None when it is lost to faults."""
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(self.deadline_s):
                    trajectory = await episode.run(prompt, index, seed=seed)
                    ended = time.monotonic()
                    reward = await self.reward_fn.score(trajectory)
                    times = (*trajectory.times, time.monotonic() - ended)
            except StaleServers:
                raise  # a GenerationError that another attempt cannot mend
            except (GenerationError, ToolFault, TimeoutError) as exc:
                kind = "deadline" if isinstance(exc, TimeoutError) else type(exc).__name__
                self._faults[f"{kind}_retry" if attempt + 1 < ATTEMPTS else f"{kind}_lost"] += 1
                log.warning("%s, sample %d: %s: %s", prompt.problem.problem_id, index, kind, exc)
                continue
            if reward.status is GraderStatus.FAULT:
                self._faults["grader_lost"] += 1
                return None
            if reward.status is GraderStatus.TIMEOUT:
                self._faults["grader_timeout"] += 1
            return dataclasses.replace(trajectory, times=times), reward
        return None


def lost_trajectories(faults: dict[str, int]) -> int:
    """How many trajectories were left out, by the fault counts of a collection."""
    return sum(count for kind, count in faults.items() if kind.endswith("_lost"))


def _group(prompt: Prompt, scored: Sequence[tuple[Trajectory, Reward]]) -> Group:
    return Group(prompt, tuple(t for t, _ in scored), tuple(r for _, r in scored))
