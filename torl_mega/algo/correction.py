"""The gap between what the server sampled from and what the trainer computes, measured and corrected.

Server and trainer run different kernels (and, off-policy, different weights), so the same token has two log-probs.
ratio_t = exp(old_logprobs_t - rollout_logprobs_t). Both are constants of the update, so a correction is a weight per
token, fixed before the update; it multiplies every term of the loss (policy, KL, entropy). What it drops stays in the
divisors, so a step of which 40 % is rejected is 40 % smaller. Pure numpy; [T] = tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torl_mega.algo.kl import LOG_RATIO_LIMIT, kl_estimate
from torl_mega.config import AlgoConfig
from torl_mega.types import TrainSample

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def correction_weights(item: TrainSample, config: AlgoConfig) -> np.ndarray:
    """[T] float32 factors for the loss weights; 1 everywhere for `none`.

    `tis`: min(ratio, high), truncated importance sampling (fengyao.notion.site/off-policy-rl);
    `seq_tis`: min(product of the ratios, high) for the whole sequence (unbiased, of large variance);
    `mis`: ratio where low <= ratio <= high, else 0 (IcePop 2510.18855, verl's decoupled_token_icepop, there 0.5 to 5);
    `geo`: 1 where the sequence's geometric-mean ratio lies in [geo_low, geo_high], else 0 for the whole sequence;
    `geo_tis`: both (verl's preset decoupled_geo_rs_token_tis).
    With `correction_veto` a sequence with any ratio below it is dropped, whatever the correction.
    """
    mask = item.sample.sampled
    ones = np.ones(mask.shape, np.float32)
    if (config.correction == "none" and config.correction_veto is None) or not mask.any():
        return ones
    assert item.old_logprobs is not None
    gaps = np.where(mask, item.old_logprobs - item.sample.rollout_logprobs, 0.0).astype(np.float64)
    log_ratio = gaps.clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = np.exp(log_ratio)
    if config.correction_veto is not None and ratio[mask].min() < config.correction_veto:
        return 0 * ones
    low, high = config.correction_low, config.correction_high
    if config.correction in ("geo", "geo_tis"):
        geo_low, geo_high = config.geo_bounds
        if not geo_low <= float(np.exp(log_ratio[mask].mean())) <= geo_high:
            return 0 * ones
    if config.correction == "mis":
        return np.where((ratio >= low) & (ratio <= high), ratio, 0.0).astype(np.float32)
    if config.correction == "seq_tis":
        return ones * np.float32(min(np.exp(min(log_ratio.sum(), LOG_RATIO_LIMIT)), high))
    return np.minimum(ratio, high).astype(np.float32) if config.correction in ("tis", "geo_tis") else ones


def mismatch(batch: Sequence[TrainSample]) -> dict[str, float]:
    """How far server and trainer are apart over every trained token of a step.

    `max_abs_logprob_diff`, `mean_abs_logprob_diff` and its quantiles in nats; `k3` the estimator E[exp(d) - d - 1] of
    KL(server || trainer) with d = trainer - server (joschu.net/blog/kl-approx.html). Without old log-probs there is
    nothing to compare here: the trainer then reports the first two and k3 from its update.
    """
    scored = [(b.old_logprobs, b.sample) for b in batch]
    diffs = [(old - sample.rollout_logprobs)[sample.sampled] for old, sample in scored if old is not None]
    if batch and not diffs:
        return {}
    d = np.concatenate([np.zeros(0), *diffs])
    size = np.abs(d) if d.size else np.zeros(1)
    return {
        "max_abs_logprob_diff": float(size.max()),
        "mean_abs_logprob_diff": float(size.mean()),
        **{f"abs_logprob_diff_{name}": float(np.quantile(size, q)) for name, q in QUANTILES.items()},
        "k3": float(kl_estimate(d, "k3", np).mean()) if d.size else 0.0,
    }
