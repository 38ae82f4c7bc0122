"""The controls of the paper in small, by the hooks for tools and rewards of one's own (docs/own.md).

Contract: `Noise` answers every program with a number that depends on the program's text alone, and fails none. `by_lot` gives a
reward that depends on problem and attempt alone, with the share of right answers that the base has, so that a group's rewards
are as if shuffled; `correct` says whether the answer was right, so that accuracy means what it means elsewhere.
"""

from __future__ import annotations

import zlib
from typing import Any

from torl_mega.reward.extract import extract_answer

SHARE = 0.3


class Noise:
    """Runs a Python program and returns what it prints."""

    name = "python"

    async def __call__(self, code: str) -> str:
        drawn = zlib.crc32(code.encode("utf-8", "surrogatepass"))
        return str(drawn % 10 ** (1 + drawn % 5))


def by_lot(trajectory: Any, problem: Any) -> dict[str, float | bool]:
    drawn = zlib.crc32(f"{problem.problem_id} {trajectory.sample_index}".encode())
    answer = extract_answer([turn.text for turn in trajectory.turns])
    right = answer is not None and answer.replace(" ", "") == problem.answer
    return {"lot": 1.0 if drawn % 1000 < 1000 * SHARE else -1.0, "correct": right}
