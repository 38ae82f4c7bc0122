"""The reward of whole trajectories: through the real grader process, with every shaping option and its bound."""

from __future__ import annotations

import asyncio
import dataclasses
from itertools import product

import pytest
from pydantic import ValidationError

from torl_mega.config import RewardConfig
from torl_mega.errors import ConfigError
from torl_mega.reward.function import AnswerReward, overlong, shaping_parts, tool_cost
from torl_mega.types import (
    ExecutionStatus,
    GraderStatus,
    Problem,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)


def config(**changes) -> RewardConfig:
    return RewardConfig.model_validate({"correct": 1.0, "wrong": -1.0, "grader_workers": 1, **changes})


def trajectory(
    *texts: str, gold: str = "4", problem: str = "2+2", calls: tuple[ExecutionStatus, ...] = ()
) -> Trajectory:
    prompt = Prompt(Problem("s/0", problem, gold, "s"), (1,))
    turns = []
    for i, text in enumerate(texts):
        call = ToolCall("x", calls[i], 0, "\n\\boxed{4}\n```\n", 0.0) if i < len(calls) else None
        turns.append(Turn((1, 2, 3), (0.0,) * 3, (0,) * 3, text, call, (7,) if call else ()))
    return Trajectory(prompt, 0, tuple(turns), StopReason.EOS)


def score(trajectories: list[Trajectory], settings: RewardConfig, **more) -> list[Reward]:
    async def run() -> list[Reward]:
        reward = AnswerReward(settings, **more)
        await reward.start()
        try:
            return list(await asyncio.gather(*(reward.score(t) for t in trajectories)))
        finally:
            await reward.close()

    return asyncio.run(run())


def test_plus_one_minus_one_by_the_last_box() -> None:
    right, wrong, none, tool, restated = score(
        [
            trajectory("\\boxed{5} no, \\boxed{4}"),
            trajectory("\\boxed{4} no, \\boxed{5}"),
            trajectory("it is 4"),
            trajectory("```python\nprint('\\boxed{4}')\n```\n```output", "done", calls=(ExecutionStatus.OK,)),
            trajectory("\\boxed{2+2}"),
        ],
        config(),
    )
    assert (right.value, right.correct, right.status, right.extracted) == (1.0, True, GraderStatus.OK, "4")
    assert (wrong.value, wrong.correct, wrong.extracted) == (-1.0, False, "5")
    assert (none.value, none.status, none.extracted) == (-1.0, GraderStatus.NO_ANSWER, None)
    assert (tool.value, tool.status) == (
        -1.0,
        GraderStatus.NO_ANSWER,
    )  # what the tool printed is not the policy's answer
    assert restated.value == -1.0
    assert dict(right.parts) == {"answer": 1.0}


def test_options_are_logged_apart_and_add_up() -> None:
    settings = config(
        code_error=-0.3,
        tool_cost=-0.1,
        tool_cost_floor=-0.15,
        overlong=-0.2,
        overlong_buffer_tokens=4,
        format_error=-0.1,
    )
    failing = (ExecutionStatus.OK, ExecutionStatus.ERROR)
    correct, silent = score(
        [trajectory("a", "b", "\\boxed{4}", calls=failing), trajectory("nothing")], settings, max_response_tokens=13
    )
    # 11 tokens: two of the buffer's four are used
    assert correct.parts == pytest.approx(
        {"answer": 1.0, "code_error": -0.3, "overlong": -0.1, "tool_cost": -0.15, "format_error": 0.0}
    )
    assert correct.value == pytest.approx(sum(correct.parts.values()))
    assert silent.parts == pytest.approx(
        {"answer": -1.0, "code_error": 0.0, "overlong": 0.0, "tool_cost": 0.0, "format_error": -0.1}
    )


def test_a_call_that_ran_nothing_costs_nothing() -> None:
    """A call without a program, or whose arguments could not be read."""
    ran = trajectory("a", "\\boxed{4}", calls=(ExecutionStatus.ERROR,))
    nothing = dataclasses.replace(ran.turns[0], tool_call=ToolCall("", ExecutionStatus.ERROR, None, "no code", 0.0))
    idle = dataclasses.replace(ran, turns=(nothing, *ran.turns[1:]))
    settings = config(code_error=-0.3, tool_cost=-0.1)
    for of, wanted in ((ran, {"code_error": -0.3, "tool_cost": -0.1}), (idle, {"code_error": 0.0, "tool_cost": 0.0})):
        assert shaping_parts(of, settings, has_answer=True, max_response_tokens=None) == wanted


def test_no_allowed_setting_lets_a_correct_answer_fall_to_a_wrong_one() -> None:
    steps = (0.0, -0.2, -0.45, -0.6, -1.2)
    accepted = 0
    for code, long, tool, form in product(steps, repeat=4):
        changes = {
            "code_error": code,
            "overlong": long,
            "tool_cost": tool,
            "tool_cost_floor": tool,
            "format_error": form,
        }
        try:
            settings = config(**changes)
        except ValidationError:
            assert code + long + tool + form <= -1.0
            continue
        accepted += 1
        worst = trajectory(*["\\boxed{4}"] * 9, calls=(ExecutionStatus.ERROR,) * 8)
        penalties = sum(shaping_parts(worst, settings, has_answer=False, max_response_tokens=1).values())
        assert settings.correct + penalties > 0 > settings.wrong
    assert accepted > 20


def test_bounds_of_the_summands() -> None:
    assert [overlong(n, -0.5, limit=100, buffer=20) for n in (0, 80, 90, 100, 400)] == [0.0, 0.0, -0.25, -0.5, -0.5]
    assert [tool_cost(n, -0.1, floor=-0.25) for n in (0, 1, 2, 3, 99)] == pytest.approx([0, -0.1, -0.2, -0.25, -0.25])
    with pytest.raises(ConfigError, match=r"without rollout.max_response_tokens"):
        shaping_parts(trajectory("x"), config(overlong=-0.1), has_answer=True, max_response_tokens=None)
    with pytest.raises(ValidationError, match=r"not above reward.wrong"):
        config(wrong=1.0)
