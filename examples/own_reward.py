"""A reward of your own: right or wrong, and a little for a short answer.

    PYTHONPATH=examples torl train examples/own_reward.yaml

Called in a killable process as (trajectory, problem); returns a number or named parts, which appear as reward/<part> in the
metrics. `correct` says what counts as right in accuracy; it is no part of the sum.
"""

from torl_mega.reward.extract import extract_answer
from torl_mega.types import Problem, Trajectory


def short_and_right(trajectory: Trajectory, problem: Problem) -> dict[str, float | bool]:
    answer = extract_answer([turn.text for turn in trajectory.turns])
    right = answer is not None and answer.strip() == problem.answer
    return {
        "right": 1.0 if right else -1.0,
        "short": 0.1 if len(trajectory.response_ids) < 64 else 0.0,
        "correct": right,
    }
