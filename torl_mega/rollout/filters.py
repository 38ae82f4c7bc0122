"""Which trajectories are trained on. Options beyond the paper; all off by default."""

from __future__ import annotations

from torl_mega.config import AlgoConfig
from torl_mega.rollout.code_block import last_code_block
from torl_mega.types import StopReason, Trajectory


def is_trained(trajectory: Trajectory, config: AlgoConfig) -> bool:
    if config.mask_truncated and trajectory.stop_reason is StopReason.LENGTH:
        return False
    return not (config.void_turns == "mask" and has_void_turn(trajectory))


def has_void_turn(trajectory: Trajectory) -> bool:
    """A turn with neither a complete code block nor a boxed answer (SimpleTIR, arXiv 2509.02479 §3.2)."""
    return any(last_code_block(turn.text) is None and "\\boxed{" not in turn.text for turn in trajectory.turns)
