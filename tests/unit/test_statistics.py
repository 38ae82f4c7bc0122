"""Figure 5's quantities on trajectories written by hand, each number worked out on paper."""

from __future__ import annotations

import pytest

from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import (
    CollectedGroups,
    ExecutionStatus,
    GraderStatus,
    Group,
    Problem,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

PROMPT = Prompt(Problem("s/0", "1+1", "2", "s"), (1, 2))
CODE = "think\n```python\nprint(2)\n```\n```output"


def turn(text: str, tokens: int, status: ExecutionStatus | None = None, observation: int = 0) -> Turn:
    call = None if status is None else ToolCall("print(2)\n", status, 0, "\n2\n```\n", 0.1)
    return Turn(tuple(range(tokens)), (0.0,) * tokens, (0,) * tokens, text, call, tuple(range(observation)))


def attempt(index: int, *turns: Turn, stop: StopReason = StopReason.EOS) -> Trajectory:
    return Trajectory(PROMPT, index, turns, stop)


def reward(correct: bool, status: GraderStatus = GraderStatus.OK, **parts: float) -> Reward:
    parts = {"answer": 1.0 if correct else -1.0, **parts}
    return Reward(sum(parts.values()), correct, status, "2" if correct else None, parts)


@pytest.fixture
def rollout() -> CollectedGroups:
    """Six responses in three groups: code that works, code that fails then works, code written but never called, no code,
    an answer before its code, and a truncated one."""
    works = attempt(0, turn(CODE, 10, ExecutionStatus.OK, 3), turn("so \\boxed{2}", 5))
    fails_then_works = attempt(
        1, turn(CODE, 10, ExecutionStatus.ERROR, 3), turn(CODE, 10, ExecutionStatus.OK, 3), turn("\\boxed{3}", 4)
    )
    never_called = attempt(0, turn("```python\nprint(2)\n```\n so \\boxed{2}", 20))
    no_code = attempt(1, turn("it is \\boxed{2}", 8))
    answer_first = attempt(
        0, turn("\\boxed{2} let me check\n" + CODE, 12, ExecutionStatus.TIMEOUT_WALL, 3), turn("yes", 2)
    )
    truncated = attempt(1, turn("hm", 100), stop=StopReason.LENGTH)
    groups = (
        Group(PROMPT, (works, fails_then_works), (reward(True), reward(False, code_error=-0.5))),
        Group(PROMPT, (never_called, no_code), (reward(True), reward(True))),
        Group(PROMPT, (answer_first, truncated), (reward(True), reward(False, GraderStatus.NO_ANSWER))),
    )
    return CollectedGroups(groups, {}, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 4 / 6),
        ("reward", (1 - 1.5 + 1 + 1 + 1 - 1) / 6),
        ("code_ratio", 4 / 6),  # all but no_code and truncated
        ("executed_code_ratio", 4 / 5),  # of five pieces, never_called's did not run
        ("executed_response_ratio", 3 / 4),  # never_called wrote code that did not run
        ("pass_ratio", 2 / 4),  # OK, ERROR, OK, TIMEOUT
        ("pass_ratio_correct", 1 / 2),  # works: OK; answer_first: TIMEOUT
        ("pass_ratio_incorrect", 1 / 2),  # fails_then_works: ERROR, OK
        ("code_before_answer_ratio", 4 / 5),  # answer_first's comes after its box
        ("code_first_response_ratio", 2 / 3),  # works, fails_then_works; answer_first is the other way round
        ("tool_calls", 4 / 6),
        ("tool_calls_at_limit_ratio", 1 / 6),  # C = 2: fails_then_works alone
        ("void_turn_ratio", 2 / 6),  # answer_first's "yes", truncated's "hm"
        ("response_length", (18 + 30 + 20 + 8 + 17 + 100) / 6),
        ("response_length_max", 100),
        ("turns", (2 + 3 + 1 + 1 + 2 + 1) / 6),
        ("truncated_ratio", 1 / 6),
        ("no_answer_ratio", 1 / 6),
        ("grader_timeout_ratio", 0.0),
        ("group_zero_signal_ratio", 1 / 3),  # the second group: both 1.0
        ("execution/error", 1 / 4),
        ("execution/timeout_wall", 1 / 4),
        ("execution/memory", 0.0),
        ("reward/answer", (1 - 1 + 1 + 1 + 1 - 1) / 6),
        ("reward/code_error", -0.5 / 6),
    ],
)
def test_the_quantities(rollout: CollectedGroups, name: str, value: float) -> None:
    assert rollout_metrics(rollout, max_tool_calls=2)[name] == pytest.approx(value)


def test_an_empty_rollout_has_the_same_names_at_zero(rollout: CollectedGroups) -> None:
    empty = rollout_metrics(CollectedGroups((), {}, 0.0), max_tool_calls=1)
    assert set(empty) == {n for n in rollout_metrics(rollout, max_tool_calls=1) if not n.startswith("reward/")}
    assert set(empty.values()) == {0.0}


def test_pieces_of_code_are_counted_one_by_one() -> None:
    """C = 1: of three pieces one runs, and two stand before the box; a box in code is none."""
    boxed_in_code = "```python\nprint('\\\\boxed{1}')\n```\n"
    after = turn(boxed_in_code + "so \\boxed{2}\n" + boxed_in_code, 30)
    scored = [(attempt(0, turn(CODE, 10, ExecutionStatus.OK, 3), after), reward(True))]
    m = rollout_metrics(CollectedGroups((Group(PROMPT, *zip(*scored, strict=True)),), {}, 1.0), max_tool_calls=1)
    assert m["executed_code_ratio"] == pytest.approx(1 / 3)
    assert m["code_before_answer_ratio"] == pytest.approx(2 / 3)
    assert (m["executed_response_ratio"], m["code_first_response_ratio"]) == (1.0, 1.0)


def test_a_call_without_code_is_no_program() -> None:
    bare = Turn((1,), (0.0,), (0,), "```output", ToolCall("", ExecutionStatus.ERROR, None, "\nnone\n```\n", 0.0), (1,))
    group = Group(PROMPT, (attempt(0, bare, turn("\\boxed{2}", 2)),), (reward(True),))
    m = rollout_metrics(CollectedGroups((group,), {}, 1.0), max_tool_calls=1)
    assert [m[n] for n in ("code_ratio", "executed_code_ratio", "pass_ratio", "execution/error")] == [0.0] * 4
    assert m["tool_calls"] == 1.0


def test_without_tool_calls_nothing_is_at_the_limit(rollout: CollectedGroups) -> None:
    assert rollout_metrics(rollout, max_tool_calls=0)["tool_calls_at_limit_ratio"] == 0.0
