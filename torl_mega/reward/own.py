"""A reward function of the user's, as the grader's children call it.

    (trajectory, problem) -> number | {part: number, ..., "correct": bool}          def or async def

The numbers are the parts of the reward, summed; a single number is the part `function`. `correct` says whether the answer
counts as right in accuracy and in filters; without it, an answer is right when its parts come to more than the middle of
`reward.wrong` and `reward.correct`. Anything else, and whatever is raised, is a fault: the trajectory is left out, counted.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import math
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torl_mega.config import SHAPING
from torl_mega.types import Trajectory

Outcome = dict[str, Any]  # {"parts": {name: number}, "correct": bool or None} or {"error": why}


def to_text(trajectory: Trajectory) -> str:
    """The trajectory as it travels to the grader process."""
    return base64.b64encode(pickle.dumps(trajectory, protocol=pickle.HIGHEST_PROTOCOL)).decode()


def judge_by(function: Callable[[Trajectory, Any], Any]) -> Callable[[str], Outcome]:
    """What a child of the grader process runs on each request."""

    def judge(text: str) -> Outcome:
        trajectory: Trajectory = pickle.loads(base64.b64decode(text))
        try:
            found = function(trajectory, trajectory.prompt.problem)
            if inspect.isawaitable(found):
                found = asyncio.run(_wait(found))
            return outcome(found)
        except MemoryError:
            raise
        except Exception as exc:  # the boundary to a user's function
            at = traceback.extract_tb(exc.__traceback__)[-1]
            return {"error": f"{type(exc).__name__}: {exc} ({at.filename}:{at.lineno})"}

    return judge


def outcome(found: Any) -> Outcome:
    """What the function returned, checked."""
    parts: Mapping[Any, Any] = found if isinstance(found, Mapping) else {"function": found}
    correct: Any = parts.get("correct")
    if type(correct).__name__ in ("bool_", "bool") and hasattr(correct, "item"):
        correct = correct.item()  # numpy's
    parts = {name: value for name, value in parts.items() if name != "correct"}
    if correct is not None and not isinstance(correct, bool):
        return {"error": f"correct = {correct!r} is no bool"}
    for name, value in parts.items():
        if not isinstance(name, str) or name in SHAPING:
            return {"error": f"{name!r} cannot be the name of a part; {', '.join(SHAPING)} are this project's own"}
        if not _is_number(value):
            return {"error": f"{name} = {value!r} is no finite number"}
    if not parts:
        return {"error": "it returned no part"}
    return {"parts": {name: float(value) for name, value in parts.items()}, "correct": correct}


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


async def _wait(found: Any) -> Any:
    return await found
