"""The reward of a trajectory: its last box against the gold answer, or a function of the user's, plus the shaping options.
Implements `RewardFn`.

Each shaping summand is zero or negative and bounded. `RewardConfig` refuses settings whose sum could bring a correct answer
down to the middle between correct and wrong, so no combination of them ever flips the sign of correct against wrong.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from torl_mega.config import RewardConfig
from torl_mega.errors import ConfigError
from torl_mega.reward.extract import extract_answer
from torl_mega.reward.grader import Grader, Verdict
from torl_mega.reward.own import to_text
from torl_mega.types import ExecutionStatus, GraderStatus, Reward, Trajectory

log = logging.getLogger(__name__)

_STATUS = {
    Verdict.RIGHT: GraderStatus.OK,
    Verdict.WRONG: GraderStatus.OK,
    Verdict.TIMEOUT: GraderStatus.TIMEOUT,
    Verdict.FAULT: GraderStatus.FAULT,
}


class _Graded:
    """A reward whose judgement comes from the grader process; what it shares with the others is the shaping."""

    def __init__(self, config: RewardConfig, *, max_response_tokens: int | None = None) -> None:
        """`max_response_tokens` is needed only for `reward.overlong`."""
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._grader = Grader(
            config.grader_workers,
            config.grader_timeout_s,
            memory_mb=config.grader_memory_mb,
            checker=config.checker,
            function=config.function,
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

    async def is_readable(self, gold: str) -> bool:
        """Whether the grader can compare an answer with this gold, within its limits."""
        return await self._grader.judge(gold) == Verdict.RIGHT

    def _shaping(self, trajectory: Trajectory, *, has_answer: bool) -> Mapping[str, float]:
        return shaping_parts(
            trajectory, self._config, has_answer=has_answer, max_response_tokens=self._max_response_tokens
        )


class AnswerReward(_Graded):
    """`reward.correct` or `reward.wrong` by answer plus the shaping options, each under its name in `Reward.parts`.

    A hanging answer is wrong with status TIMEOUT; where the grader failed twice the status is FAULT and the caller
    leaves the trajectory out.
    """

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
        parts |= self._shaping(trajectory, has_answer=extracted is not None)
        return Reward(value=sum(parts.values()), correct=correct, status=status, extracted=extracted, parts=parts)


class FunctionReward(_Graded):
    """The parts that `reward.function` returns (own.py) plus the shaping options.

    Where the function raises, returns what is no reward, or takes longer than `reward.grader_timeout_s`, the status is FAULT:
    counted as `reward_failed` or `reward_timeout`, said in the log, and the caller leaves the trajectory out.
    """

    async def score(self, trajectory: Trajectory) -> Reward:
        config, extracted = self._config, extract_answer([turn.text for turn in trajectory.turns])
        found = await self._grader.judge(to_text(trajectory))
        if not isinstance(found, dict) or "error" in found:
            why = f"took longer than {config.grader_timeout_s:g} s" if found == Verdict.TIMEOUT else "was lost"
            why = found["error"] if isinstance(found, dict) else why
            self.counters["reward_timeout" if found == Verdict.TIMEOUT else "reward_failed"] += 1
            log.warning("%s: reward.function = %s: %s", trajectory.prompt.problem.problem_id, config.function, why)
            return Reward(0.0, correct=False, status=GraderStatus.FAULT, extracted=extracted, parts={})
        own, correct = found["parts"], found["correct"]
        if correct is None:
            correct = sum(own.values()) > (config.correct + config.wrong) / 2
        parts = {**own, **self._shaping(trajectory, has_answer=extracted is not None)}
        return Reward(sum(parts.values()), correct=correct, status=GraderStatus.OK, extracted=extracted, parts=parts)


def make_reward(config: RewardConfig, *, max_response_tokens: int) -> AnswerReward | FunctionReward:
    """The reward of this config."""
    kind = FunctionReward if config.function else AnswerReward
    return kind(config, max_response_tokens=max_response_tokens)


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
        parts["tool_cost"] = tool_cost(len(trajectory.programs), config.tool_cost, floor=config.tool_cost_floor)
    if config.format_error:
        parts["format_error"] = 0.0 if has_answer else config.format_error
    return parts


def code_error(trajectory: Trajectory, penalty: float) -> float:
    """`penalty` once when any program that ran ended in anything but OK (ToRL, arXiv 2503.23383 §2.3: -0.5)."""
    return penalty if any(c.status is not ExecutionStatus.OK for c in trajectory.programs) else 0.0


def overlong(length: int, penalty: float, *, limit: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 up to limit - buffer tokens, then linear to `penalty`."""
    over = length - (limit - buffer)
    return penalty * min(max(over / buffer, 0.0), 1.0)


def tool_cost(num_programs: int, cost: float, *, floor: float) -> float:
    """`cost` for every program that ran, never below `floor`."""
    return max(cost * num_programs, floor)
