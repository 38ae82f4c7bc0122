"""Estimators of KL(policy || reference) from one sampled token, and the limits that keep exp() of a log-ratio finite.

gap = log p_ref - log p (joschu.net/blog/kl-approx.html), both of the sampled token:

    k1  -gap                 unbiased, its gradient is zero on average: useful in the reward
    k2  gap^2 / 2            biased low variance; its gradient is that of the KL
    k3  exp(gap) - gap - 1   unbiased, never negative, GRPO's and the default
"""

from __future__ import annotations

from typing import Any, Literal

LOG_RATIO_LIMIT = 20.0
"""|log-ratio| before exp(): e^20 is 4.8e8, far beyond any use, and far below what overflows (verl's value)."""
KL_LIMIT = 10.0
"""k3 of one token: reached at a gap of 2.6 and at one of -11 (ToRL's core_algos.py clamps there too)."""


def kl_estimate(gap: Any, estimator: Literal["k1", "k2", "k3"], module: Any) -> Any:
    """Per token, of a numpy array or a torch tensor; `module` is `numpy` or `torch`."""
    gap = gap.clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return 0.5 * gap * gap
    return (module.expm1(gap) - gap).clip(None, KL_LIMIT)
