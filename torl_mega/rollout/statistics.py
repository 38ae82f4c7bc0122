"""Metrics of collected groups: the quantities of the paper's figures 5 and 6, and what else shows how healthy a run is.

Each quantity is defined once, in the docstring of the function that computes it. "Response" is one trajectory's text
without the prompt, "piece of code" a complete ```python block in it (of a chat model that writes calls otherwise: a call that
was made), "program" a piece of code that ran (a `ToolCall` with code; a call without any runs nothing and is none). A share
over nothing (no program ran, no response was wrong) is 0.0; the names are the same for every collection.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from torl_mega.rollout.filters import has_void_turn
from torl_mega.rollout.python_tool import code_spans
from torl_mega.types import CollectedGroups, ExecutionStatus, GraderStatus, Reward, StopReason, Trajectory

Scored = tuple[Trajectory, Reward]


def rollout_metrics(collected: CollectedGroups, *, max_tool_calls: int) -> dict[str, float]:
    """All metrics by name. `max_tool_calls` is C.

    `entropy` is not here: it needs the trainer's distribution and is logged by it.
    """
    scored = [pair for group in collected.groups for pair in zip(group.trajectories, group.rewards, strict=True)]
    return {
        "reward": _mean([reward.value for _, reward in scored]),
        "accuracy": accuracy(scored),
        "code_ratio": code_ratio(scored),
        "executed_code_ratio": executed_code_ratio(scored),
        "executed_response_ratio": executed_response_ratio(scored),
        "pass_ratio": pass_ratio(scored),
        "pass_ratio_correct": pass_ratio([(t, r) for t, r in scored if r.correct]),
        "pass_ratio_incorrect": pass_ratio([(t, r) for t, r in scored if not r.correct]),
        "code_before_answer_ratio": code_before_answer_ratio(scored),
        "code_first_response_ratio": code_first_response_ratio(scored),
        "tool_calls": _mean([len(t.tool_calls) for t, _ in scored]),
        "tool_calls_at_limit_ratio": _share(scored, lambda t, r: len(t.tool_calls) >= max_tool_calls > 0),
        "void_turn_ratio": _share(scored, lambda t, r: has_void_turn(t)),
        "response_length": _mean([len(t.response_ids) for t, _ in scored]),
        "response_length_max": float(max((len(t.response_ids) for t, _ in scored), default=0)),
        "turns": _mean([len(t.turns) for t, _ in scored]),
        "truncated_ratio": _share(scored, lambda t, r: t.stop_reason is StopReason.LENGTH),
        "no_answer_ratio": _share(scored, lambda t, r: r.status is GraderStatus.NO_ANSWER),
        "grader_timeout_ratio": _share(scored, lambda t, r: r.status is GraderStatus.TIMEOUT),
        "group_zero_signal_ratio": group_zero_signal_ratio(collected),
        **execution_ratios(scored),
        **by_tool(scored),
        **reward_parts(scored),
    }


def accuracy(scored: Sequence[Scored]) -> float:
    """Responses whose final answer is correct / all responses."""
    return _share(scored, lambda trajectory, reward: reward.correct)


def code_ratio(scored: Sequence[Scored]) -> float:
    """Responses with at least one complete ```python block, run or not / all responses (figure 5, "code ratio")."""
    return _share(scored, lambda trajectory, reward: writes_code(trajectory))


def executed_code_ratio(scored: Sequence[Scored]) -> float:
    """Pieces of code that ran / pieces of code written (figure 5d, "executed code ratio").

    Below 1 where code was written but not called, or written after the C calls were used up.
    """
    written = [len(_pieces(trajectory)) for trajectory, _ in scored]
    ran = [min(len(trajectory.programs), n) for (trajectory, _), n in zip(scored, written, strict=True)]
    return sum(ran) / max(sum(written), 1)


def executed_response_ratio(scored: Sequence[Scored]) -> float:
    """Responses of which at least one program ran / responses with code."""
    return _share([(t, r) for t, r in scored if writes_code(t)], lambda trajectory, reward: bool(trajectory.programs))


def pass_ratio(scored: Sequence[Scored]) -> float:
    """Programs that ended OK / programs that ran (figure 5, "pass ratio"; over correct or incorrect responses where named so).

    A program counts by its exit status, never by what it printed: one that prints "Error" and exits with 0 passes.
    """
    statuses = [call.status for trajectory, _ in scored for call in trajectory.programs]
    return _mean([status is ExecutionStatus.OK for status in statuses])


def code_before_answer_ratio(scored: Sequence[Scored]) -> float:
    """Pieces of code that end before the response's first final box / pieces of code in responses with a box (figure 5d,
    "code before final answer"). A box inside a piece of code is none."""
    before: list[bool] = []
    for trajectory, _ in scored:
        text, spans = _text(trajectory), _pieces(trajectory)
        boxes = [m.start() for m in re.finditer(r"\\boxed", text)]
        answer = next((box for box in boxes if not any(a <= box < b for a, b in spans)), None)
        before += [] if answer is None else [end <= answer for _, end in spans]
    return _mean(before)


def code_first_response_ratio(scored: Sequence[Scored]) -> float:
    """Responses whose first program ran before their first final box / responses of which a program ran and that have a box.

    1 is reasoning by code; below it the policy answers first and lets code confirm.
    """
    boxed_after_code = []
    for trajectory, _ in scored:
        first_box = next((i for i, turn in enumerate(trajectory.turns) if "\\boxed" in turn.text), None)
        first_run = next((i for i, t in enumerate(trajectory.turns) if any(c.code for c in t.tool_calls)), None)
        if first_box is not None and first_run is not None:
            # a call ends its turn, so a box in the same turn came before it
            boxed_after_code.append(first_run < first_box)
    return _mean(boxed_after_code)


def group_zero_signal_ratio(collected: CollectedGroups) -> float:
    """Groups whose rewards are all the same / all groups. Their advantages are zero with every baseline that is the group's own."""
    return _mean([len({reward.value for reward in group.rewards}) <= 1 for group in collected.groups])


def execution_ratios(scored: Sequence[Scored]) -> dict[str, float]:
    """`execution/<status>`: programs that ended so / programs that ran, for every status there is but OK."""
    counts = Counter(call.status for trajectory, _ in scored for call in trajectory.programs)
    total = counts.total()
    failures = [status for status in ExecutionStatus if status not in (ExecutionStatus.OK, ExecutionStatus.INFRA)]
    return {f"execution/{status.value}": counts[status] / max(total, 1) for status in failures}


def by_tool(scored: Sequence[Scored]) -> dict[str, float]:
    """`tool/<name>/calls`, its calls / all responses, and `tool/<name>/pass_ratio`, those that ended OK / its calls, where other
    tools than Python were called; calls that name no tool are `none`."""
    calls = [call for trajectory, _ in scored for call in trajectory.tool_calls]
    names = sorted({call.tool for call in calls})
    if names in ([], ["python"]):
        return {}
    metrics = {}
    for name in names:
        statuses = [call.status is ExecutionStatus.OK for call in calls if call.tool == name]
        metrics[f"tool/{name or 'none'}/calls"] = len(statuses) / len(scored)
        metrics[f"tool/{name or 'none'}/pass_ratio"] = _mean(statuses)
    return metrics


def reward_parts(scored: Sequence[Scored]) -> dict[str, float]:
    """`reward/<part>`: mean of each named summand of the reward over all responses."""
    names = sorted({name for _, reward in scored for name in reward.parts})
    return {f"reward/{name}": sum(r.parts.get(name, 0.0) for _, r in scored) / len(scored) for name in names}


def writes_code(trajectory: Trajectory) -> bool:
    """Whether it ran a program or holds a complete ```python block."""
    return bool(trajectory.programs) or any(code_spans(turn.text) for turn in trajectory.turns)


def _pieces(trajectory: Trajectory) -> list[tuple[int, int]]:
    """(start, end) of each piece of code in what the policy wrote; of a call in a form of its own, the end of its turn."""
    spans = code_spans(_text(trajectory))
    if spans:
        return spans
    ends = itertools.accumulate(len(turn.text) for turn in trajectory.turns)
    return [
        (end, end) for end, turn in zip(ends, trajectory.turns, strict=True) for call in turn.tool_calls if call.code
    ]


def _text(trajectory: Trajectory) -> str:
    """What the policy wrote, without observations."""
    return "".join(turn.text for turn in trajectory.turns)


def _share(scored: Sequence[Scored], holds: Callable[[Trajectory, Reward], bool]) -> float:
    return _mean([holds(trajectory, reward) for trajectory, reward in scored])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
