"""What ToRL's paper (arXiv 2503.23383) reports, to stand beside a run's own numbers. Nothing here is measured by this project.

Contract: numbers as printed, each group with the place it was read at; averages are those of the columns, because the paper's
own average for the 7B model (62.1) is not the mean of its row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

Size = Literal["1.5b", "7b"]
SOURCE = "arXiv 2503.23383"
BENCHMARKS = ("aime24", "aime25", "math500", "olympiadbench", "amc23")

# accuracy in %, greedy, one tool call; columns as BENCHMARKS
TABLE_3: Mapping[Size, Mapping[str, tuple[float, ...]]] = {
    "1.5b": {
        "Qwen2.5-Math-1.5B-Instruct": (10.0, 10.0, 66.0, 31.0, 62.5),
        "Qwen2.5-Math-1.5B-Instruct-TIR": (13.3, 13.3, 73.8, 41.3, 55.0),
        "ToRL-1.5B": (26.7, 26.7, 77.8, 44.0, 67.5),
    },
    "7b": {
        "Qwen2.5-Math-7B-Instruct": (10.0, 16.7, 74.8, 32.4, 65.0),
        "Qwen2.5-Math-7B-Instruct-TIR": (26.7, 16.7, 78.8, 45.0, 70.0),
        "SimpleRL-Zero": (33.3, 6.7, 77.2, 37.6, 62.5),
        "Eurus-2-7B-PRIME": (26.7, 13.3, 79.2, 42.1, 57.4),
        "ToRL-7B": (43.3, 30.0, 82.2, 49.9, 75.0),
    },
}
OURS: Mapping[Size, str] = {"1.5b": "ToRL-1.5B", "7b": "ToRL-7B"}
CODE_RATIO_AT_100 = 0.8  # section 3.3.1: from 40 % to 80 % within the first 100 steps


def row(size: Size, model: str) -> dict[str, float]:
    """Accuracy in % by benchmark."""
    return dict(zip(BENCHMARKS, TABLE_3[size][model], strict=True))


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def end_points(size: Size, evaluated: Collection[str]) -> dict[str, tuple[str, float]]:
    """(where it is from, value in [0, 1]) of each metric that the paper gives an end point for: benchmarks as `<name>/accuracy`,
    and as `eval_accuracy` their mean over those that were `evaluated`, as long as the paper has them all."""
    ours = row(size, OURS[size])
    points = {f"{name}/accuracy": (f"{OURS[size]}, Table 3", value / 100) for name, value in ours.items()}
    if evaluated and set(evaluated) <= set(ours):
        points["eval_accuracy"] = (f"{OURS[size]}, mean of Table 3", mean({b: ours[b] for b in evaluated}) / 100)
    return points | {"code_ratio": ("ToRL after 100 steps, §3.3.1", CODE_RATIO_AT_100)}
