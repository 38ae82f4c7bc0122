"""The sets of attempts that a run holds: one of each training step, one of each evaluation; read attempt by attempt.

Contract: nothing is held but what is yielded. A line that cannot be read is yielded as the error that names file and line, in
its place; a file that was cut off gives what it has and then the error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torl_mega.errors import DataError
from torl_mega.rollout.recorder import Recorded, guess_group, scan_rows, trainer_path, trajectory_from_json
from torl_mega.view.attempts import Attempt, Trained, of_recorded, of_transcript
from torl_mega.view.spans import Pieces


@dataclass(frozen=True, slots=True)
class Source:
    """One set on disk."""

    name: str  # "step_00007", "eval_step_00024": of the chunks' files and in addresses
    kind: Literal["step", "eval"]
    title: str
    step: int | None
    path: Path

    def signature(self) -> str:
        """Changes when a file does that the set is read from."""
        files = (self.path, trainer_path(self.path)) if self.kind == "step" else (self.path,)
        stats = [(f.stat().st_size, f.stat().st_mtime_ns) if f.is_file() else None for f in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def step_sources(run: Path) -> list[Source]:
    """The recorded steps, in order."""
    found = []
    for path in sorted((run / "trajectories").glob("step_*.jsonl.zst")):
        number = re.fullmatch(r"step_(\d+)\.jsonl\.zst", path.name)
        if number is None:
            raise DataError(f"{path}: not named step_NNNNN.jsonl.zst")
        found.append(Source(f"step_{number[1]}", "step", f"step {int(number[1])}", int(number[1]), path))
    return found


def eval_sources(run: Path) -> list[Source]:
    """The evaluations with transcripts, in order of their names."""
    return [_evaluation(path) for path in sorted((run / "eval").glob("*.jsonl"))]


def _evaluation(path: Path) -> Source:
    stem = path.name.removesuffix(".jsonl")
    number = re.fullmatch(r"step_(\d+)", stem)
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", stem)[:80]
    unique = plain if plain == stem else f"{plain}_{hashlib.sha256(stem.encode('utf-8', 'replace')).hexdigest()[:8]}"
    title = f"evaluation after {int(number[1])} steps" if number else f"evaluation {stem}"
    return Source(f"eval_{unique}", "eval", title, int(number[1]) if number else None, path)


def attempts(source: Source, pieces: Pieces | None) -> Iterator[Attempt | DataError]:
    """Every attempt of a set in the order of its file, and every fault in its place."""
    return _trained(source.path, pieces) if source.kind == "step" else _evaluated(source.path)


def _trained(path: Path, pieces: Pieces | None) -> Iterator[Attempt | DataError]:
    scores = _Scores(trainer_path(path))
    before: Recorded | None = None
    for line, row in enumerate(scan_rows(path), 1):
        if isinstance(row, DataError):
            scores.lose()  # from here on they can belong to another attempt
            yield row
            continue
        try:
            trajectory, reward = trajectory_from_json(row)
            group = int(row["group"]) if "group" in row else guess_group(before, trajectory)
            before = Recorded(group, trajectory, reward, float(row["advantage"]))
            attempt = of_recorded(before, pieces, scores.take(sum(trajectory.loss_mask)))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            scores.lose()
            yield DataError(f"{path}:{line}: not a trajectory: {type(exc).__name__} {exc}")
            continue
        yield attempt


class _Scores:
    """The trainer's numbers of a step, taken attempt by attempt; none where the file is absent or does not fit."""

    def __init__(self, path: Path) -> None:
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        self._at = 0
        try:
            with np.load(path) as file:
                logprobs, entropy = file["logprobs"], file["entropy"]
        except (OSError, ValueError, KeyError, EOFError):
            return
        if logprobs.ndim == entropy.ndim == 1 and len(logprobs) == len(entropy):
            self._arrays = logprobs, entropy

    def lose(self) -> None:
        self._arrays = None

    def take(self, num: int) -> Trained | None:
        if self._arrays is None or self._at + num > len(self._arrays[0]):
            self._arrays = None
            return None
        span = slice(self._at, self._at + num)
        self._at += num
        return Trained(self._arrays[0][span], self._arrays[1][span])


def _evaluated(path: Path) -> Iterator[Attempt | DataError]:
    group, before = -1, ("", "", -1)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row: Any = json.loads(line)
                    key = (row["source"], row["problem_id"], row["sample"])
                    group += key[:2] != before[:2] or key[2] <= before[2]
                    before = key
                    attempt = of_transcript(row, group)
                except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
                    ends = "" if line.endswith(b"\n") else "; the file was cut off here"
                    yield DataError(f"{path}:{number}: not a transcript: {type(exc).__name__} {exc}{ends}")
                    continue
                yield attempt
    except OSError as exc:
        yield DataError(f"{path}: not readable: {exc.strerror}")
