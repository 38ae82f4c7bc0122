"""Trajectories on disk: `trajectories/step_NNNNN.jsonl.zst`, one trajectory a line, readable with `zstdcat`.

A step's file appears whole or not at all. Reading gives back the same records that were written, so a run can be
trained again from its own log. Logprobs are written with 9 significant digits, which is exact for float32.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from torl_mega.errors import DataError
from torl_mega.types import (
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


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:05d}.jsonl.zst"


def write_step(folder: Path, step: int, groups: Sequence[Group], advantages: Sequence[float]) -> Path:
    """Writes all groups of a step. `advantages`: one per trajectory, in group order."""
    folder.mkdir(parents=True, exist_ok=True)
    path = step_path(folder, step)
    temporary = path.with_suffix(".tmp")
    scored = [(t, r) for g in groups for t, r in zip(g.trajectories, g.rewards, strict=True)]
    with temporary.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as out:
        for (trajectory, reward), advantage in zip(scored, advantages, strict=True):
            row = trajectory_to_json(step, trajectory, reward, advantage)
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    os.replace(temporary, path)
    return path


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON rows of one step. Raises DataError naming file and line."""
    try:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), 1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as exc:
                    raise DataError(f"{path}:{number}: not a JSON line: {exc}") from None
    except (OSError, zstandard.ZstdError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: not readable as trajectories: {exc}") from None


def read_groups(path: Path) -> tuple[Group, ...]:
    """The groups of one step, as they were collected: a new one begins with another problem or a lower sample index."""
    grouped: list[list[tuple[Trajectory, Reward]]] = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            scored = trajectory_from_json(row)
        except (KeyError, TypeError, ValueError) as exc:
            raise DataError(f"{path}:{number}: not a trajectory: {type(exc).__name__} {exc}") from None
        if not grouped or not _same_group(grouped[-1][-1][0], scored[0]):
            grouped.append([])
        grouped[-1].append(scored)
    return tuple(Group(rows[0][0].prompt, tuple(t for t, _ in rows), tuple(r for _, r in rows)) for rows in grouped)


def _same_group(before: Trajectory, after: Trajectory) -> bool:
    return before.prompt == after.prompt and after.sample_index > before.sample_index


def trajectory_to_json(step: int, trajectory: Trajectory, reward: Reward, advantage: float) -> dict[str, Any]:
    problem = trajectory.prompt.problem
    return {
        "step": step,
        "problem_id": problem.problem_id,
        "source": problem.source,
        "problem": problem.problem,
        "answer": problem.answer,
        "sample_index": trajectory.sample_index,
        "stop_reason": trajectory.stop_reason.value,
        "reward": {
            "value": reward.value,
            "correct": reward.correct,
            "status": reward.status.value,
            "extracted": reward.extracted,
            "parts": dict(reward.parts),
        },
        "advantage": advantage,
        "prompt_ids": list(trajectory.prompt.token_ids),
        "turns": [_turn_to_json(t) for t in trajectory.turns],
    }


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    call = turn.tool_call
    return {
        "text": turn.text,
        "token_ids": list(turn.token_ids),
        "logprobs": [float(f"{x:.9g}") for x in turn.logprobs],
        "policy_versions": list(turn.policy_versions),
        "tool_call": None
        if call is None
        else {
            "code": call.code,
            "status": call.status.value,
            "return_code": call.return_code,
            "observation": call.observation,
            "wall_s": call.wall_s,
        },
        "observation_ids": list(turn.observation_ids),
    }


def trajectory_from_json(row: Mapping[str, Any]) -> tuple[Trajectory, Reward]:
    problem = Problem(row["problem_id"], row["problem"], row["answer"], row["source"])
    turns = tuple(_turn_from_json(t) for t in row["turns"])
    prompt = Prompt(problem, tuple(row["prompt_ids"]))
    r = row["reward"]
    reward = Reward(r["value"], r["correct"], GraderStatus(r["status"]), r["extracted"], r["parts"])
    return Trajectory(prompt, row["sample_index"], turns, StopReason(row["stop_reason"])), reward


def _turn_from_json(row: Mapping[str, Any]) -> Turn:
    call = row["tool_call"]
    return Turn(
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        policy_versions=tuple(row["policy_versions"]),
        text=row["text"],
        tool_call=None
        if call is None
        else ToolCall(
            call["code"], ExecutionStatus(call["status"]), call["return_code"], call["observation"], call["wall_s"]
        ),
        observation_ids=tuple(row["observation_ids"]),
    )
