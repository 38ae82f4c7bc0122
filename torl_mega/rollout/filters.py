"""Which trajectories are trained on, and which attempts make a group. Options beyond the paper; all off by default."""

from __future__ import annotations

from torl_mega.config import SHAPING, AlgoConfig
from torl_mega.rollout.python_tool import STOP, last_code_block
from torl_mega.types import ExecutionStatus, Group, Reward, StopReason, Trajectory, Turn


def is_trained(trajectory: Trajectory, config: AlgoConfig) -> bool:
    if config.mask_truncated and trajectory.stop_reason is StopReason.LENGTH:
        return False
    return not (config.void_turns == "mask" and has_void_turn(trajectory))


def has_signal(group: Group, config: AlgoConfig) -> bool:
    """Whether the answers that are trained on differ in what they earn (DAPO filters by accuracy, 2503.14476 eq. 11): penalties
    are no signal, also where they act in the reward, and masked answers are none."""
    scored = zip(group.trajectories, group.rewards, strict=True)
    return len({answers_reward(reward) for trajectory, reward in scored if is_trained(trajectory, config)}) > 1


def pass_rate(group: Group) -> float:
    return sum(reward.correct for reward in group.rewards) / max(len(group.rewards), 1)


def own_reward(reward: Reward, config: AlgoConfig) -> float:
    """What the advantage is computed from: everything, or the answer's part alone where penalties act on advantages."""
    return reward.value if config.penalties == "reward" else answers_reward(reward)


def answers_reward(reward: Reward) -> float:
    """Without the penalties: `reward.correct`, `reward.wrong`, or what the user's function gave."""
    own = [value for name, value in reward.parts.items() if name not in SHAPING]
    return sum(own) if own else reward.value


def resample_on_correct(group: Group, size: int) -> Group:
    """`size` of the group's attempts (GRPO-RoC, rStar2 arXiv 2508.20722 §3.2): correct and wrong ones in their shares but at
    least two of either where there are; of the correct ones the cleanest, of the wrong ones the first, so that the policy
    still sees every kind of failure. The order of attempts stays."""
    right = sorted(
        (i for i, r in enumerate(group.rewards) if r.correct), key=lambda i: roughness(group.trajectories[i])
    )
    wrong = [i for i, r in enumerate(group.rewards) if not r.correct]
    if len(right) + len(wrong) <= size:
        return group
    least = min(2, size // 2)
    fewest = max(min(least, len(wrong)), size - len(right))
    most = min(size - min(least, len(right)), len(wrong))
    num_wrong = min(max(round(len(wrong) * size / len(group.rewards)), fewest), most)
    kept = sorted([*right[: size - num_wrong], *wrong[:num_wrong]])
    return Group(group.prompt, tuple(group.trajectories[i] for i in kept), tuple(group.rewards[i] for i in kept))


def roughness(trajectory: Trajectory) -> float:
    """Share of its calls that failed (0.5 without any) plus further boxes per turn (1 without a box)."""
    calls = trajectory.tool_calls
    failed = sum(call.status is not ExecutionStatus.OK for call in calls) / len(calls) if calls else 0.5
    boxes = sum(turn.text.count("\\boxed{") for turn in trajectory.turns)
    return failed + (min((boxes - 1) / len(trajectory.turns), 1.0) if boxes else 1.0)


def has_void_turn(trajectory: Trajectory) -> bool:
    """A turn with neither a complete code block, a call in another form, nor a boxed answer (SimpleTIR, arXiv 2509.02479 §3.2)."""
    return any(
        last_code_block(turn.text) is None and not _calls_otherwise(turn) and "\\boxed{" not in turn.text
        for turn in trajectory.turns
    )


def _calls_otherwise(turn: Turn) -> bool:
    """Made a call that is no ```python block; a block of an earlier turn that is run again is none of this turn."""
    return any(call.code and (call.tool != "python" or not turn.text.endswith(STOP)) for call in turn.tool_calls)
