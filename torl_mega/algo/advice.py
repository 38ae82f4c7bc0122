"""Settings of `algo` that are allowed, work, and are hardly ever what was meant: said at the start and by `torl plan`."""

from __future__ import annotations

import logging

from torl_mega.config import AlgoConfig

log = logging.getLogger(__name__)
WIDE_FOR_A_SEQUENCE = 0.05  # GSPO's own clips are 3e-4 and 4e-4 (2507.18071 §5.1)


def advice(algo: AlgoConfig) -> list[str]:
    """One line for each: what is set, what it does, what to take instead."""
    found = []
    if algo.loss == "gspo":
        if max(algo.clip_low, algo.clip_high) > WIDE_FOR_A_SEQUENCE:
            found.append(
                f"algo.loss = gspo with algo.clip_low = {algo.clip_low:g} and algo.clip_high = {algo.clip_high:g} clips nothing: "
                "the mean ratio of a sequence stays near 1; take 0.0003 and 0.0004"
            )
        if algo.loss_agg != "seq_mean_token_mean":
            found.append(
                f"algo.loss = gspo with algo.loss_agg = {algo.loss_agg} is not GSPO's objective, in which sequences count alike; "
                "take seq_mean_token_mean"
            )
    if algo.loss == "cispo":
        if algo.clip_low < 1:
            found.append(
                f"algo.loss = cispo with algo.clip_low = {algo.clip_low:g} lifts weights below {1 - algo.clip_low:g} to it; CISPO "
                "bounds them from above alone: take algo.clip_low = 1"
            )
        if algo.dual_clip is not None:
            found.append("algo.dual_clip does nothing with algo.loss = cispo, whose weights end at 1 + algo.clip_high")
    if algo.kl_coef and algo.kl_in == "reward" and algo.advantage == "grpo":
        found.append(
            "algo.kl_in = reward with algo.advantage = grpo: where all answers of a group earn the same, the group's std makes any "
            "difference in KL a full advantage, however small algo.kl_coef is; take dr_grpo, rloo or batch_std"
        )
    return found


def warn_of_settings(algo: AlgoConfig) -> None:
    for line in advice(algo):
        log.warning("%s", line)
