"""From scored groups to training sequences: advantages, filters, masks, flat arrays. No engine, no I/O.

The filters are options beyond the paper, all off by default.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torl_mega.algo.advantage import group_advantages
from torl_mega.config import AlgoConfig
from torl_mega.rollout.python_tool import last_code_block
from torl_mega.types import Group, Sample, StopReason, Trajectory


def make_samples(groups: Sequence[Group], config: AlgoConfig) -> list[Sample]:
    """One Sample per trajectory, in group order. A filtered trajectory keeps its place (and its part in the group's
    baseline) with an all-False loss mask, so batch sizes do not move."""
    samples: list[Sample] = []
    for group in groups:
        rewards_G = np.array([r.value for r in group.rewards], np.float64)
        advantages_G = group_advantages(rewards_G, config.advantage)
        for trajectory, advantage in zip(group.trajectories, advantages_G, strict=True):
            samples.append(_sample(trajectory, float(advantage), trained=is_trained(trajectory, config)))
    return samples


def is_trained(trajectory: Trajectory, config: AlgoConfig) -> bool:
    """Whether the options of `algo` leave the trajectory's tokens in the loss."""
    if config.mask_truncated and trajectory.stop_reason is StopReason.LENGTH:
        return False
    return not (config.void_turns == "mask" and has_void_turn(trajectory))


def has_void_turn(trajectory: Trajectory) -> bool:
    """Whether a turn has neither a complete code block nor a boxed answer (SimpleTIR, arXiv 2509.02479 §3.2)."""
    return any(last_code_block(turn.text) is None and "\\boxed{" not in turn.text for turn in trajectory.turns)


def _sample(trajectory: Trajectory, advantage: float, *, trained: bool) -> Sample:
    prompt = trajectory.prompt.token_ids
    response, mask = trajectory.response_ids, trajectory.loss_mask
    num_prompt = len(prompt)
    loss_mask = np.zeros(num_prompt + len(response), bool)
    loss_mask[num_prompt:] = mask if trained else False
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
    )
