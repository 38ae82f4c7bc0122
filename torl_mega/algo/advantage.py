"""Group-relative advantages: pure functions of the rewards of one group. [G] = group size."""

from __future__ import annotations

from typing import Literal

import numpy as np

STD_EPS = 1e-6  # verl core_algos.compute_grpo_outcome_advantage


def group_advantages(rewards_G: np.ndarray, kind: Literal["grpo", "dr_grpo"]) -> np.ndarray:
    """One advantage per trajectory, shared by all of its tokens.

    `grpo`: (r - mean) / (std + 1e-6) with the unbiased std (DeepSeekMath 2402.03300 eq. 3, as in verl);
    `dr_grpo`: r - mean (2503.20783). A group of one has no baseline but itself: zero.
    """
    if rewards_G.size < 2:
        return np.zeros_like(rewards_G, dtype=np.float64)
    centred = rewards_G.astype(np.float64) - rewards_G.mean()
    if kind == "dr_grpo":
        return centred
    return centred / (rewards_G.std(ddof=1) + STD_EPS)
