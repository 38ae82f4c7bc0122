"""The reward of a trajectory: its last box against the gold answer, and the shaping options. Implements `RewardFn`."""

from __future__ import annotations

from collections import Counter

from torl_mega.config import RewardConfig
from torl_mega.reward.extract import extract_answer
from torl_mega.reward.grader import Grader, Verdict
from torl_mega.reward.shaping import shaping_parts
from torl_mega.types import GraderStatus, Reward, Trajectory

_STATUS = {
    Verdict.RIGHT: GraderStatus.OK,
    Verdict.WRONG: GraderStatus.OK,
    Verdict.TIMEOUT: GraderStatus.TIMEOUT,
    Verdict.FAULT: GraderStatus.FAULT,
}


class AnswerReward:
    """`correct` or `wrong` by answer plus the shaping options of the config, each under its name in `Reward.parts`.

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
