"""Limits on a step's metrics (config section `guards`): near one the run warns, above it the run stops, and both messages say
where to look."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torl_mega.config import GuardsConfig
from torl_mega.errors import GuardError

log = logging.getLogger(__name__)

WATCHED = {
    "max_fault_rate": ("fault_rate", "see faults/* in metrics.jsonl and the logs of servers and sandbox"),
    "max_logprob_diff": ("max_abs_logprob_diff", "server and trainer compute different log-probs for the same tokens"),
    "max_void_turn_ratio": ("void_turn_ratio", "turns end without code or answer; see them with `torl view`, or mask them "
                            "with algo.void_turns"),
    "max_truncated_ratio": ("truncated_ratio", "responses run out of rollout.max_response_tokens"),
    "max_grader_timeout_ratio": ("grader_timeout_ratio", "answers that hang the grader; see them with `torl view`"),
}  # fmt: skip
DRIFT = (
    "server and trainer drift apart, which collapses runs without another sign: see algo.correction, model.fp32_head"
)


def check_guards(step: int, metrics: Mapping[str, float], config: GuardsConfig) -> None:
    """Raises GuardError for the first limit that the step's metrics exceed; logs a warning for each one they come near."""
    for setting, (metric, remedy) in WATCHED.items():
        limit, value = getattr(config, setting), metrics.get(metric, 0.0)
        if math.isnan(value):
            raise GuardError(f"step {step}: {metric} is not a number; {remedy}")
        if limit is None:
            continue
        if value > limit:
            raise GuardError(f"step {step}: {metric} = {value:.4g} is above guards.{setting} = {limit}; {remedy}")
        if value > config.warn_at * limit:
            log.warning("step %d: %s = %.4g comes near guards.%s = %s; %s", step, metric, value, setting, limit, remedy)
    if not metrics.get("k3", 0.0) <= config.warn_k3:
        log.warning("step %d: k3 = %.3g is above guards.warn_k3 = %g; %s", step, metrics["k3"], config.warn_k3, DRIFT)
