"""Attempts as the viewer's page reads them: one line of an index, and what is fetched when one is opened.

    Recorded (a step's file) ─┐
                              ├─► Attempt ─► facts: numbers to filter and sort by  ─► columns of the set's index
    transcript (RUN/eval)  ───┘          └─► detail: text by token, calls, parts   ─► a chunk

Contract: JSON values only, and no character in any text that acts on its reader (`spans.visible`). What was not recorded is
None, never a guess: an evaluation has texts and no tokens, an older run no times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torl_mega.rollout.filters import has_void_turn
from torl_mega.rollout.recorder import Recorded
from torl_mega.types import ExecutionStatus, GraderStatus, Problem, StopReason, ToolCall, Turn
from torl_mega.view.spans import Pieces, visible

STATUSES = tuple(status.value for status in ExecutionStatus)
GRADES = tuple(status.value for status in GraderStatus)
ENDS = tuple(reason.value for reason in StopReason)
SHORT = 400  # characters of a problem, an answer in the index


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one problem."""

    group: int
    problem: Problem
    prompt: str  # as the policy saw it, or the problem alone
    num_prompt: int | None  # tokens
    answer: str | None  # that was compared with the gold
    facts: Mapping[str, Any]
    detail: Mapping[str, Any]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Trained:
    """What the trainer computed for an attempt's sampled tokens, in order: old log-probs and entropies."""

    logprobs: np.ndarray
    entropy: np.ndarray

    @property
    def filtered(self) -> bool:
        """It was sampled, and not trained on."""
        return any(math.isnan(x) for x in self.logprobs)


def of_recorded(item: Recorded, pieces: Pieces | None, trained: Trained | None) -> Attempt:
    """An attempt of a training step. Without `pieces` (no tokenizer) a turn is one text."""
    trajectory, reward = item.trajectory, item.reward
    versions = [v for turn in trajectory.turns for v in turn.policy_versions]
    sampled = sum(len(turn.token_ids) for turn in trajectory.turns)
    inserted = sum(len(turn.observation_ids) for turn in trajectory.turns)
    prompt = trajectory.prompt
    facts = {
        "sample": trajectory.sample_index,
        "reward": round(reward.value, 6),
        "correct": int(reward.correct),
        "advantage": round(item.advantage, 6),
        "tools": _statuses([call.status.value for call in trajectory.tool_calls]),
        "calls": len(trajectory.tool_calls),
        "void": int(has_void_turn(trajectory)),
        "sampled": sampled,
        "inserted": inserted,
        "oldest": min(versions, default=None),
        "newest": max(versions, default=None),
        "end": ENDS.index(trajectory.stop_reason.value),
        "grade": GRADES.index(reward.status.value),
        "spans": [round(t * 1e3) for t in trajectory.times] or None,
    }
    filtered = trained is not None and trained.filtered
    scores = None if filtered else trained
    turns, done = [], 0
    for turn in trajectory.turns:
        span = slice(done, done + len(turn.token_ids))
        turns.append(_turn(turn, pieces, scores, span))
        done = span.stop
    return Attempt(
        item.group,
        prompt.problem,
        visible(pieces.text(prompt.token_ids) if pieces else prompt.problem.problem),
        len(prompt.token_ids),
        reward.extracted,
        facts,
        {
            "turns": turns,
            "parts": [[visible(name), value] for name, value in reward.parts.items()],
            "filtered": filtered,
        },
        sampled + inserted,
    )


def of_transcript(row: Mapping[str, Any], group: int) -> Attempt:
    """An attempt of an evaluation. Raises KeyError, TypeError or ValueError for a row of another form."""
    calls = [_transcript_call(call) for call in row["tool_calls"]]
    length, response = int(row["num_tokens"]), str(row["response"])
    facts = {
        "sample": int(row["sample"]),
        "reward": None,
        "correct": int(bool(row["correct"])),
        "advantage": None,
        "tools": _statuses([call["status"] for call in calls]),
        "calls": len(calls),
        "void": None,
        "sampled": length,
        "inserted": None,
        "oldest": None,
        "newest": None,
        "end": ENDS.index(row["stop_reason"]),
        "grade": GRADES.index(row["grader"]),
        "spans": None,
    }
    problem = Problem(str(row["problem_id"]), str(row["problem"]), str(row["gold"]), str(row["source"]))
    answer = None if row["extracted"] is None else str(row["extracted"])
    turns = _cut(response, calls)
    return Attempt(
        group,
        problem,
        visible(problem.problem),
        None,
        answer,
        facts,
        {"turns": turns, "parts": [], "filtered": False},
        length,
    )


def _statuses(found: Sequence[str]) -> int:
    """A bit for every status that occurred."""
    bits = 0
    for status in found:
        bits |= 1 << STATUSES.index(status)
    return bits


def _turn(turn: Turn, pieces: Pieces | None, trained: Trained | None, span: slice) -> dict[str, Any]:
    said = (pieces.text(turn.observation_ids) if pieces else _observed(turn)) if turn.observation_ids else None
    texts, counts = pieces.of(turn.token_ids) if pieces else ([visible(turn.text)], None)
    return {
        "text": texts,
        "counts": counts,  # [piece, tokens] where a piece is not one token
        "ids": list(turn.token_ids),
        "logprobs": [round(x, 4) for x in turn.logprobs],
        "versions": _runs(turn.policy_versions),
        "trainer": None if trained is None else [round(float(x), 4) for x in trained.logprobs[span]],
        "entropy": None if trained is None else [round(float(x), 3) for x in trained.entropy[span]],
        "calls": [_call(call) for call in turn.tool_calls],
        "said": None if said is None else visible(said),
        "num_said": len(turn.observation_ids),
    }


def _observed(turn: Turn) -> str:
    return "".join(call.observation for call in turn.tool_calls)


def _runs(values: Sequence[int]) -> list[list[int]]:
    """[value, how often] for runs of equal values."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "code": visible(call.code),
        "status": call.status.value,
        "return_code": call.return_code,
        "observation": visible(call.observation),
        "wall_s": call.wall_s,
        "tool": visible(call.tool),
    }


def _transcript_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "code": visible(str(call["code"])),
        "status": ExecutionStatus(call["status"]).value,
        "return_code": None,
        "observation": str(call["observation"]),
        "wall_s": None,
        "tool": visible(str(call.get("tool", "python"))),
    }


def _cut(response: str, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns of a transcript: what was inserted is found again as its call's observation."""
    turns, begin = [], 0
    for call in calls:
        said = call["observation"]
        call["observation"] = visible(said)
        at = response.find(said, begin) if said else -1
        if at < 0:
            continue
        turns.append(_plain(response[begin:at], [call], said))
        begin = at + len(said)
    if begin < len(response) or not turns:
        turns.append(_plain(response[begin:], [], None))
    return turns


def _plain(text: str, calls: Sequence[Mapping[str, Any]], said: str | None) -> dict[str, Any]:
    return {
        "text": [visible(text)],
        "counts": None,
        "ids": None,
        "logprobs": None,
        "versions": None,
        "trainer": None,
        "entropy": None,
        "calls": list(calls),
        "said": None if said is None else visible(said),
        "num_said": None,
    }
