"""Advantages, corrections and weights a second time: plain Python loops from the papers' formulas, for tests to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def advantages(groups: Sequence[Sequence[float]], kind: str) -> list[list[float]]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def std(values: Sequence[float]) -> float:
        m = mean(values)
        return math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1)) + 1e-6

    step = [float(r) for group in groups for r in group]
    found = []
    for group in groups:
        row = []
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i]
            if kind == "reinforce_pp":
                row.append((r - mean(step)) / (std(step) if len(step) > 1 else 1.0))
            elif not others:
                row.append(0.0)
            elif kind == "rloo":
                row.append(r - mean(others))
            else:
                scale = {"grpo": lambda g=group: std(g), "dr_grpo": lambda: 1.0, "batch_std": lambda: std(step)}[kind]()
                row.append((r - mean(group)) / scale)
        found.append(row)
    return found


def kl(gap: Any, estimator: str, exp: Any = math.exp) -> Any:
    """Of one token; gap = log p_ref - log p."""
    return {"k1": lambda: -gap, "k2": lambda: gap * gap / 2, "k3": lambda: exp(gap) - gap - 1}[estimator]()


def correction(gaps: Sequence[float], algo: Any) -> list[float]:
    """A factor for each trained token of a sequence; gaps = log p_old - log p_rollout."""
    ratios, product = [math.exp(g) for g in gaps], math.exp(sum(gaps))
    low, high = algo.correction_low, algo.correction_high
    geo = algo.correction_geo or (0.999, 1.001)
    if algo.correction_veto is not None and ratios and min(ratios) < algo.correction_veto:
        return [0.0] * len(gaps)
    if algo.correction in ("geo", "geo_tis") and ratios and not geo[0] <= product ** (1 / len(ratios)) <= geo[1]:
        return [0.0] * len(gaps)
    factor = {
        "none": lambda r: 1.0,
        "tis": lambda r: min(r, high),
        "seq_tis": lambda r: min(product, high),
        "mis": lambda r: r if low <= r <= high else 0.0,
        "geo": lambda r: 1.0,
        "geo_tis": lambda r: min(r, high),
    }[algo.correction]
    return [factor(r) for r in ratios]


def aggregation(lengths: Sequence[int], groups: Sequence[int], loss_agg: str, max_response_tokens: int) -> list[float]:
    """What a trained token of each sequence counts; lengths = trained tokens."""
    used = [i for i, n in enumerate(lengths) if n]
    prompts = {groups[i] for i in used}
    found = []
    for i, n in enumerate(lengths):
        of_prompt = sum(lengths[j] for j in used if groups[j] == groups[i])
        found.append(
            {
                "token_mean": lambda: 1 / sum(lengths),
                "seq_mean_token_mean": lambda n=n: 1 / (len(used) * n),
                "seq_mean_token_sum_norm": lambda: 1 / (len(used) * max_response_tokens),
                "prompt_mean": lambda m=of_prompt: 1 / (len(prompts) * m),
            }[loss_agg]()
            if n
            else 0.0
        )
    return found
