"""Limits that stop a run before it wastes a night: each names what went over and what to look at."""

from __future__ import annotations

from collections.abc import Mapping

from torl_mega.config import GuardsConfig
from torl_mega.errors import GuardError

WATCHED = {
    "max_fault_rate": ("fault_rate", "see faults/* in metrics.jsonl and the logs of servers and sandbox"),
    "max_logprob_diff": ("max_abs_logprob_diff", "server and trainer compute different log-probs for the same tokens"),
}


def check_guards(step: int, metrics: Mapping[str, float], config: GuardsConfig) -> None:
    """Raises GuardError for the first limit that the step's metrics exceed."""
    for setting, (metric, remedy) in WATCHED.items():
        limit = getattr(config, setting)
        if limit is not None and metrics.get(metric, 0.0) > limit:
            raise GuardError(
                f"step {step}: {metric} = {metrics[metric]:.4g} is above guards.{setting} = {limit}; {remedy}"
            )
