"""Can the grader read the gold answers that a run is to be trained on? Found when a file is opened, not after a day of -1.

Each gold is compared with itself in the grader process, within the time limit of an answer. Of a file with more than MOST rows
every n-th is asked.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from torl_mega.data.problem_files import ProblemFile
from torl_mega.errors import DataError
from torl_mega.types import Problem

MOST = 50_000
_AT_ONCE = 256
_NUMBER = re.compile(r"-?\d{1,15}")  # nobody needs to be asked about these

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Golds:
    """What was found in one file."""

    num_asked: int
    unreadable: tuple[Problem, ...]

    def __str__(self) -> str:
        share = len(self.unreadable) / max(self.num_asked, 1)
        some = ", ".join(f"{p.problem_id} ({p.answer[:40]!r})" for p in self.unreadable[:3])
        return f"{len(self.unreadable):,} of {self.num_asked:,} gold answers ({share:.1%}) cannot be read by the grader: {some}"


async def read_golds(problems: ProblemFile, readable: Callable[[str], Awaitable[bool]]) -> Golds:
    """Asks `readable` about the gold of every problem."""
    rows = iter(_some(problems))
    found: list[Problem] = []
    num_asked = 0

    async def worker() -> None:
        nonlocal num_asked
        for problem in rows:  # one iterator for all workers
            num_asked += 1
            if not _NUMBER.fullmatch(problem.answer) and not await readable(problem.answer):
                found.append(problem)

    await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
    return Golds(num_asked, tuple(sorted(found, key=lambda problem: problem.problem_id)))


def judge_golds(spec: str, golds: Golds, *, most: float) -> None:
    """Says what cannot be read. Raises DataError when that is more than `most` of the file."""
    if len(golds.unreadable) > most * golds.num_asked:
        raise DataError(
            f"{spec}: {golds}; no attempt at them can be right. Leave them out with tools/prepare_data.py, name the right column "
            f"in data.columns, bring a reward.function, or raise data.max_unreadable_golds = {most}"
        )
    if golds.unreadable:
        log.warning("%s: %s", spec, golds)


def _some(problems: ProblemFile) -> Iterator[Problem]:
    step = -(-len(problems) // MOST)
    return (problem for row, problem in enumerate(problems) if row % step == 0)
