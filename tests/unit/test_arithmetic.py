"""The generated task: exact answers, one sequence per seed, and next to no overlap between seeds."""

from __future__ import annotations

import re
from itertools import islice

from torl_mega.data.arithmetic import problems


def test_answers_are_exact() -> None:
    for p in islice(problems(7), 2000):
        a, b, sign, c = re.fullmatch(r"(\d+)\*(\d+)([+-])(\d+)", p.problem).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert all(low <= int(x) <= 99 for low, x in ((10, a), (10, b), (1, c)))
        assert int(p.answer) == int(a) * int(b) + (int(c) if sign == "+" else -int(c))


def test_a_seed_fixes_the_sequence() -> None:
    first = list(islice(problems(3), 500))
    assert first == list(islice(problems(3), 500))
    assert [p.problem_id for p in first[:3]] == ["arithmetic/3/0", "arithmetic/3/1", "arithmetic/3/2"]
    assert first[0].source == "arithmetic"


def test_the_stream_is_the_same_on_every_machine() -> None:
    assert [(p.problem, p.answer) for p in islice(problems(1), 3)] == GOLDEN


def test_held_out_problems_are_not_trained_on() -> None:
    held_out = {p.problem for p in islice(problems(1000), 128)}
    trained = {p.problem for p in islice(problems(1), 45 * 16)}
    assert len(held_out) >= 127
    assert len(held_out & trained) <= 1


GOLDEN = [("22*86+76", "1968"), ("54*50-65", "2635"), ("18*12-83", "133")]
