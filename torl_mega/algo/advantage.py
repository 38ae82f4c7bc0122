"""Advantages: pure functions of the rewards of a step. [G] = one group, all attempts at one prompt.

Every kind is (r - baseline) / scale; they differ in what baseline and scale are taken over:

    grpo          group mean / group std            DeepSeekMath 2402.03300 eq. 3, as in verl
    dr_grpo       group mean / 1                    2503.20783
    rloo          mean of the others / 1            2402.14740 eq. 8; (G / (G - 1)) times dr_grpo
    batch_std     group mean / std over the step    2508.08221; TRL's scale_rewards = "batch"
    reinforce_pp  step mean / std over the step     REINFORCE++ 2501.03262, one baseline for all prompts

A std over the step is that of its trajectories' rewards. ScaleRL (2510.13786) takes the advantages' instead, verl's REINFORCE++
that of tokens.

Stds are unbiased and get 1e-6 added. A group of one has no baseline but itself: zero, except for `reinforce_pp`, whose
baseline does not need a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from torl_mega.algo.kl import kl_estimate
from torl_mega.config import AdvantageKind, AlgoConfig
from torl_mega.types import TrainSample

STD_EPS = 1e-6  # verl core_algos.compute_grpo_outcome_advantage


def step_advantages(groups: Sequence[np.ndarray], kind: AdvantageKind) -> list[np.ndarray]:
    """One advantage per trajectory, shared by all of its tokens; the rewards of each group of the step in, [G] each."""
    rewards = np.concatenate([np.zeros(0), *groups])
    step_std = float(rewards.std(ddof=1)) + STD_EPS if rewards.size > 1 else 1.0
    if kind == "reinforce_pp":
        return [(rewards_G - rewards.mean()) / step_std for rewards_G in groups]
    return [_group_advantages(rewards_G.astype(np.float64), kind, step_std) for rewards_G in groups]


def _group_advantages(rewards_G: np.ndarray, kind: AdvantageKind, step_std: float) -> np.ndarray:
    size = rewards_G.size
    # by comparison, not by the centred values: the mean of equal rewards may differ from them in its last bit
    if size < 2 or (rewards_G == rewards_G[0]).all():
        return np.zeros(size)
    centred = rewards_G - rewards_G.mean()
    if kind == "grpo":
        return centred / (rewards_G.std(ddof=1) + STD_EPS)
    return {"dr_grpo": centred, "rloo": centred * size / (size - 1), "batch_std": centred / step_std}[kind]


def bounded_penalty(advantage: float, penalty: float, bound: float) -> float:
    """The advantage with a penalty (<= 0) that takes at most the share `bound` of its size.

    Inside the reward a small penalty is blown up by the group's std: of {1, ..., 1, 0.95} the costly answer gets -3.75.
    Here a correct answer's advantage keeps its sign (ASPO 2508.19201, AdaTIR 2601.14696) and a group in which all
    answers are alike stays without signal.
    """
    return advantage + max(penalty, -bound * abs(advantage))


def charge_kl(batch: Sequence[TrainSample], config: AlgoConfig) -> list[TrainSample]:
    """The samples of a step with `kl_coef` times the summed KL of each taken off its reward (`algo.kl_in: reward`).

    What was added to advantages besides (penalties) stays: the advantage moves by the difference that the KL makes. A sample
    without trained tokens has no KL of its own, yet a part in the baseline: it is charged what those of its group are on average,
    so that masking an answer moves no other's advantage.
    """
    numbers = np.array([b.sample.group for b in batch])
    members = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    rewards = np.array([b.sample.reward for b in batch], np.float64)
    charged = rewards - config.kl_coef * _kl_of_each(batch, members, config)
    moved = np.zeros(len(batch))
    for values, sign in ((charged, 1.0), (rewards, -1.0)):
        for where, advantages in zip(
            members, step_advantages([values[m] for m in members], config.advantage), strict=True
        ):
            moved[where] += sign * advantages
    return [
        dataclasses.replace(b, sample=dataclasses.replace(b.sample, advantage=b.sample.advantage + float(m)))
        for b, m in zip(batch, moved, strict=True)
    ]


def _kl_of_each(batch: Sequence[TrainSample], members: Sequence[np.ndarray], config: AlgoConfig) -> np.ndarray:
    """[samples of the step] the summed KL; of a sample without trained tokens its group's mean, or the step's if none has any."""
    trained = np.array([b.sample.loss_mask.any() for b in batch])
    kl = np.array([_summed_kl(b, config) for b in batch])
    for where in members:
        known = where[trained[where]] if trained[where].any() else np.flatnonzero(trained)
        kl[where[~trained[where]]] = kl[known].mean() if known.size else 0.0
    return kl


def _summed_kl(item: TrainSample, config: AlgoConfig) -> float:
    assert item.ref_logprobs is not None
    assert item.old_logprobs is not None
    gap = (item.ref_logprobs - item.old_logprobs)[item.sample.loss_mask].astype(np.float64)
    return float(kl_estimate(gap, config.kl_estimator, np).sum())
