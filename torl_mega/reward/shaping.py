"""The summands of a reward besides the answer's own. Pure functions; each is zero or negative and bounded.

`RewardConfig` refuses settings whose sum could bring a correct answer down to the middle between correct and wrong, so
no combination of them ever flips the sign of correct against wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from torl_mega.config import RewardConfig
from torl_mega.errors import ConfigError
from torl_mega.types import ExecutionStatus, Trajectory


def shaping_parts(
    trajectory: Trajectory, config: RewardConfig, *, has_answer: bool, max_response_tokens: int | None
) -> Mapping[str, float]:
    """Every option that is on, by name, also where it comes to 0.0, so that its mean over a step is the mean over all."""
    parts: dict[str, float] = {}
    if config.code_error:
        parts["code_error"] = code_error(trajectory, config.code_error)
    if config.overlong:
        if max_response_tokens is None:
            raise ConfigError("reward.overlong is on, but the reward was built without rollout.max_response_tokens")
        length = len(trajectory.response_ids)
        parts["overlong"] = overlong(
            length, config.overlong, limit=max_response_tokens, buffer=config.overlong_buffer_tokens
        )
    if config.tool_cost:
        parts["tool_cost"] = tool_cost(len(trajectory.tool_calls), config.tool_cost, floor=config.tool_cost_floor)
    if config.format_error:
        parts["format_error"] = 0.0 if has_answer else config.format_error
    return parts


def code_error(trajectory: Trajectory, penalty: float) -> float:
    """`penalty` once when any program that ran ended in anything but OK (ToRL, arXiv 2503.23383 §2.3: -0.5)."""
    return penalty if any(c.status is not ExecutionStatus.OK for c in trajectory.tool_calls) else 0.0


def overlong(length: int, penalty: float, *, limit: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 up to limit - buffer tokens, then linear to `penalty`."""
    over = length - (limit - buffer)
    return penalty * min(max(over / buffer, 0.0), 1.0)


def tool_cost(num_calls: int, cost: float, *, floor: float) -> float:
    """`cost` for every call, never below `floor`."""
    return max(cost * num_calls, floor)
