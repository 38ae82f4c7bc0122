"""The quickstart's task: endless, seeded integer arithmetic that a tiny model cannot do in its head but Python can.

Contract: `problems(seed)` gives the same sequence for the same seed on every machine and Python version (it draws from
`random.Random.random()` alone, whose stream Python guarantees), and never ends; a reader that wants a finite set takes
the first N. Two seeds draw from the same space of about 1.6 million problems, so a held-out set of a hundred shares
next to nothing with a training run of a few thousand.

Limits: one template, one difficulty. It is a stand-in for a maths data set, not a benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from torl_mega.types import Problem

SOURCE = "arithmetic"


def problems(seed: int) -> Iterator[Problem]:
    """Endless problems `a*b+c` (one in three) or `a*b-c`, with 10 <= a, b <= 99 and 1 <= c <= 99.

    The problem text is the bare expression (`37*45-12`), the answer its exact value as a decimal string.
    """
    rng = random.Random(seed)
    row = 0
    while True:
        a, b, c = integer(rng, 10, 99), integer(rng, 10, 99), integer(rng, 1, 99)
        sign, value = ("+", a * b + c) if integer(rng, 0, 2) == 0 else ("-", a * b - c)
        yield Problem(
            problem_id=f"{SOURCE}/{seed}/{row}", problem=f"{a}*{b}{sign}{c}", answer=str(value), source=SOURCE
        )
        row += 1


def integer(rng: random.Random, low: int, high: int) -> int:
    """Uniform in [low, high]; `Random.randint` may draw differently in another Python version."""
    return low + int(rng.random() * (high - low + 1))
