"""A few transcripts of a step or an evaluation, as text for a tracker.

Contract: read back from the files that the recorder and the evaluation have just written, of which only the beginning is read;
a step that was not recorded has none. One that is right, one that is wrong and one with a program that failed come first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torl_mega.rollout.recorder import read_rows, step_path, trajectory_from_json
from torl_mega.run.folder import RunFolder
from torl_mega.run.trackers import Samples
from torl_mega.types import ExecutionStatus

MOST_READ = 256  # attempts looked at for each choice
MOST_CHARS = 20_000


def sample_texts(folder: RunFolder) -> Samples:
    """What `Trackers` asks for transcripts: (kind of row, step, how many at most) -> (title, text)."""

    def samples(kind: str, step: int, most: int) -> Sequence[tuple[str, str]]:
        path = folder.evaluations / f"step_{step:05d}.jsonl" if kind == "eval" else step_path(folder.trajectories, step)
        if not path.is_file():
            return []
        attempts = list(itertools.islice(_evaluated(path) if kind == "eval" else _trained(path), MOST_READ))
        return [(f"sample_{i}", _text(attempt)) for i, attempt in enumerate(_chosen(attempts, most), 1)]

    return samples


def _evaluated(path: Path) -> Iterable[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row | {"failed": any(call["status"] != ExecutionStatus.OK.value for call in row["tool_calls"])}


def _trained(path: Path) -> Iterable[Mapping[str, Any]]:
    for row in read_rows(path):
        trajectory, reward = trajectory_from_json(row)
        failed = any(call.status is not ExecutionStatus.OK for call in trajectory.tool_calls)
        yield {
            "problem_id": row["problem_id"],
            "problem": row["problem"],
            "gold": row["answer"],
            "extracted": reward.extracted,
            "correct": reward.correct,
            "failed": failed,
            "response": trajectory.response_text,
        }


def _chosen(attempts: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    kinds = [
        [a for a in attempts if a["correct"]],
        [a for a in attempts if not a["correct"]],
        [a for a in attempts if a["failed"]],
    ]
    order = [*(a for kind in kinds for a in kind[:1]), *attempts]
    return list({id(attempt): attempt for attempt in order}.values())[:most]


def _text(attempt: Mapping[str, Any]) -> str:
    verdict = "correct" if attempt["correct"] else "wrong"
    head = f"{attempt['problem_id']}: {verdict}, answer {attempt['extracted']!r}, gold {attempt['gold']!r}"
    text = f"{head}\n\n{attempt['problem']}\n\n{attempt['response']}"
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}\n… {len(text) - MOST_CHARS} more characters"
