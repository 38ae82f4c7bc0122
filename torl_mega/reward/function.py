"""The reward of a trajectory: its last box against the gold answer, plus the shaping options. Implements `RewardFn`.

Each shaping summand is zero or negative and bounded. `RewardConfig` refuses settings whose sum could bring a correct answer
down to the middle between correct and wrong, so no combination of them ever flips the sign of correct against wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torl_mega.config import RewardConfig
from torl_mega.errors import ConfigError
from torl_mega.reward.extract import extract_answer
from torl_mega.reward.grader import Grader, Verdict
from torl_mega.types import ExecutionStatus, GraderStatus, Reward, Trajectory

_STATUS = {
    Verdict.RIGHT: GraderStatus.OK,
    Verdict.WRONG: GraderStatus.OK,
    Verdict.TIMEOUT: GraderStatus.TIMEOUT,
    Verdict.FAULT: GraderStatus.FAULT,
}


class AnswerReward:
    """`reward.correct` or `reward.wrong` by answer plus the shaping options, each under its name in `Reward.parts`.

    A hanging answer is wrong with status TIMEOUT; where the grader failed twice the status is FAULT and the caller
    leaves the trajectory out. `max_response_tokens` is needed only for `reward.overlong`.
    """

    def __init__(self, config: RewardConfig, *, max_response_tokens: int | None = None) -> None:
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._grader = Grader(
            config.grader_workers, config.grader_timeout_s, memory_mb=config.grader_memory_mb, checker=config.checker
        )

    @property
    def counters(self) -> Counter[str]:
        """The grader's faults since start, by kind."""
        return self._grader.counters

    async def start(self) -> None:
        """Starts the grader process; `score` does so by itself when this was not called."""
        await self._grader.start()

    async def close(self) -> None:
        """Ends the grader process and everything below it."""
        await self._grader.close()

    async def score(self, trajectory: Trajectory) -> Reward:
        config = self._config
        extracted = extract_answer([turn.text for turn in trajectory.turns])
        if extracted is None:
            correct, status = False, GraderStatus.NO_ANSWER
        else:
            problem = trajectory.prompt.problem
            verdict = await self._grader.check(extracted, problem.answer, problem.problem)
            correct, status = verdict is Verdict.RIGHT, _STATUS[verdict]
        parts = {"answer": config.correct if correct else config.wrong}
        parts |= shaping_parts(
            trajectory, config, has_answer=extracted is not None, max_response_tokens=self._max_response_tokens
        )
        return Reward(value=sum(parts.values()), correct=correct, status=status, extracted=extracted, parts=parts)


def shaping_parts(
    trajectory: Trajectory, config: RewardConfig, *, has_answer: bool, max_response_tokens: int | None
) -> Mapping[str, float]:
    """The summands besides the answer's own: every option that is on, by name, also where it comes to 0.0, so that its mean
    over a step is the mean over all trajectories."""
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
