"""From scored groups to training sequences: advantages, masks, flat arrays. No engine, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torl_mega.algo.advantage import bounded_penalty, step_advantages
from torl_mega.config import AlgoConfig
from torl_mega.errors import DataError
from torl_mega.rollout.filters import has_signal, is_trained, own_reward
from torl_mega.types import Group, Sample, Trajectory


def make_samples(groups: Sequence[Group], config: AlgoConfig) -> list[Sample]:
    """One Sample per trajectory, in group order. A filtered trajectory, or one of a group without signal that is dropped,
    keeps its place (and its part in the baseline) with an all-False loss mask, so batch sizes do not move."""
    samples: list[Sample] = []
    rewards = [np.array([own_reward(r, config) for r in group.rewards], np.float64) for group in groups]
    advantages = step_advantages(rewards, config.advantage)
    for number, (group, advantages_G) in enumerate(zip(groups, advantages, strict=True)):
        counts = _counts(group, advantages_G, config)
        for index, (trajectory, reward) in enumerate(zip(group.trajectories, group.rewards, strict=True)):
            own = float(rewards[number][index])
            advantage = bounded_penalty(float(advantages_G[index]), reward.value - own, config.penalty_bound)
            trained = counts and is_trained(trajectory, config)
            mask = np.array(trajectory.loss_mask, bool) | config.train_on_observations
            routes = _routes(trajectory) if config.router_replay == "rollout" else None
            samples.append(_sample(trajectory, advantage, own, number, mask=mask & trained, routes=routes))
    return samples


def _counts(group: Group, advantages_G: np.ndarray, config: AlgoConfig) -> bool:
    """Whether the group is trained on at all (`algo.zero_signal`)."""
    # what a refill would have replaced teaches no more once its rounds are used up
    if config.zero_signal == "refill":
        return has_signal(group, config)
    return config.zero_signal == "keep" or bool(advantages_G.any())


def _routes(trajectory: Trajectory) -> np.ndarray:
    """Raises DataError for a recording without them."""
    routes = trajectory.routes
    if routes is None:
        raise DataError(
            f"algo.router_replay = rollout, but no experts are recorded for {trajectory.prompt.problem.problem_id}; record the "
            "run with that setting, or take off or old"
        )
    return routes


def _sample(
    trajectory: Trajectory,
    advantage: float,
    reward: float,
    group: int,
    *,
    mask: np.ndarray,
    routes: np.ndarray | None,
) -> Sample:
    prompt = trajectory.prompt.token_ids
    response = trajectory.response_ids
    num_prompt = len(prompt)
    loss_mask = np.zeros(num_prompt + len(response), bool)
    loss_mask[num_prompt:] = mask
    logprobs = np.zeros(loss_mask.size, np.float32)
    logprobs[num_prompt:] = trajectory.rollout_logprobs
    versions = np.full(loss_mask.size, -1, np.int32)
    versions[num_prompt:] = trajectory.policy_versions
    return Sample(
        token_ids=np.array((*prompt, *response), np.int64),
        loss_mask=loss_mask,
        rollout_logprobs=logprobs,
        policy_versions=versions,
        advantage=advantage,
        group=group,
        reward=reward,
        routes=routes,
    )
