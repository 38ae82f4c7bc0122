"""The gap between what the server sampled from and what the trainer computes, measured and corrected.

Server and trainer run different kernels (and, off-policy, different weights), so the same token has two log-probs.
ratio_t = exp(old_logprobs_t - rollout_logprobs_t). Both are constants of the update, so a correction is a weight per
token, fixed before the update. Pure numpy; [T] = tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torl_mega.config import AlgoConfig
from torl_mega.types import TrainSample


def correction_weights(item: TrainSample, config: AlgoConfig) -> np.ndarray:
    """[T] float32 factors for the loss weights; 1 everywhere for `none`.

    `tis`: min(ratio, high), truncated importance sampling (fengyao.notion.site/off-policy-rl);
    `mis`: ratio where low <= ratio <= high, else 0, masked importance sampling (IcePop, 2510.18855);
    `geo`: 1 where the sequence's geometric-mean ratio lies in [low, high], else 0 for the whole sequence.
    """
    mask = item.sample.loss_mask
    ones = np.ones(mask.shape, np.float32)
    if config.correction == "none" or not mask.any():
        return ones
    log_ratio = np.where(mask, item.old_logprobs - item.sample.rollout_logprobs, 0.0).astype(np.float64)
    low, high = config.correction_low, config.correction_high
    if config.correction == "geo":
        mean_ratio = float(np.exp(log_ratio[mask].mean()))
        return ones if low <= mean_ratio <= high else np.zeros_like(ones)
    ratio = np.exp(np.clip(log_ratio, -50.0, 50.0))
    if config.correction == "tis":
        return np.minimum(ratio, high).astype(np.float32)
    return np.where((ratio >= low) & (ratio <= high), ratio, 0.0).astype(np.float32)


def mismatch(batch: Sequence[TrainSample]) -> dict[str, float]:
    """How far server and trainer are apart over every sampled token of a step.

    `max_abs_logprob_diff` and `mean_abs_logprob_diff` in nats; `k3` the estimator E[exp(d) - d - 1] of
    KL(server || trainer) with d = trainer - server (joschu.net/blog/kl-approx.html).
    """
    diffs = [(b.old_logprobs - b.sample.rollout_logprobs)[b.sample.loss_mask] for b in batch]
    d = np.concatenate(diffs).astype(np.float64) if diffs else np.zeros(0)
    if d.size == 0:
        return {"max_abs_logprob_diff": 0.0, "mean_abs_logprob_diff": 0.0, "k3": 0.0}
    return {
        "max_abs_logprob_diff": float(np.abs(d).max()),
        "mean_abs_logprob_diff": float(np.abs(d).mean()),
        "k3": float((np.expm1(d) - d).mean()),
    }
