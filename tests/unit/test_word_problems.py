"""The eight families: golds against a second, slower method and the grader; what is held out stays out."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from torl_mega.data import word_problems as words
from torl_mega.reward.grader import Grader, Verdict
from torl_mega.types import Problem


def second_method(problem: Problem) -> str:
    """The answer from the text alone, by counting where the module computes."""
    n = [int(x) for x in re.findall(r"\d+", problem.problem)]
    match problem.source:
        case "sums":
            return str(
                len([*range(n[0]), *range(n[1])]) if not problem.extra["numbers"]["away"] else len(range(n[1], n[0]))
            )
        case "products":
            return str(sum(n[0] for _ in range(n[1])))
        case "systems":
            a, b, c, d = n
            return str(
                next(
                    Fraction(p, a + c) for p in range(1000) if b - a * Fraction(p, a + c) == d + c * Fraction(p, a + c)
                )
            )
        case "counting":
            last, a, b = n[-3:]
            first = 1
            return str(sum(i % a == 0 and i % b != 0 for i in range(first, last + 1)))
        case "recurrence":
            first, a, b, k = n
            power = a ** (k - 1)
            return str(power * first + b * (power - 1) // (a - 1))
        case "choose":
            row = [1]
            for _ in range(n[1]):  # Pascal's triangle
                row = [x + y for x, y in zip([0, *row], [*row, 0], strict=True)]
            return str(row[n[0]])
        case "chain":
            left, total = sum(n[0] for _ in range(n[1])), 0
            while left:
                left, digit = divmod(left, 10)
                total += digit
            return str(total)
        case "divisor":
            return str(max(i for i in range(1, min(n) + 1) if n[0] % i == 0 and n[1] % i == 0))
    raise AssertionError(problem.source)


def test_golds_by_a_second_method() -> None:
    for problem in islice(words.problems(3, tuple(words.FAMILIES)), 4000):
        assert second_method(problem) == problem.answer, problem


def test_golds_are_read_by_the_grader() -> None:
    drawn = list(islice(words.problems(4, tuple(words.FAMILIES)), 64))
    asyncio.run(compare(drawn))


async def compare(drawn: list[Problem]) -> None:
    """Each gold against itself and against that of the next problem of its family."""
    grader = Grader(2, 5.0)
    await grader.start()
    try:
        for mine, other in zip(drawn, drawn[8:], strict=False):
            same = other.answer == mine.answer
            assert await grader.check(mine.answer, mine.answer) is Verdict.RIGHT
            assert await grader.check(other.answer, mine.answer) is (Verdict.RIGHT if same else Verdict.WRONG), mine
    finally:
        await grader.close()


def test_a_seed_fixes_the_sequence_on_every_machine() -> None:
    first = list(islice(words.problems(0), 300))
    assert first == list(islice(words.problems(0), 300))
    assert [(p.problem_id, p.answer) for p in first[:3]] == GOLDEN
    assert Counter(p.source for p in first[:294]) == dict.fromkeys(words.TRAINED, 42)


def test_nothing_that_is_evaluated_on_is_trained_on() -> None:
    train, held_in, held_out = (list(f()) for f in (words.train, words.held_in, words.held_out))
    assert [len(p) for p in (train, held_in, held_out)] == [words.NUM_TRAIN, words.NUM_HELD, words.NUM_HELD // 8]
    evaluated = {p.problem for p in (*held_in, *held_out)}
    assert len(evaluated) == len(held_in) + len(held_out)
    assert not evaluated & {p.problem for p in train}
    assert {p.source for p in held_out} == set(words.HELD_OUT)
    assert {p.source for p in train} == {p.source for p in held_in} == set(words.TRAINED)


@pytest.mark.parametrize("family", words.FAMILIES)
def test_a_level_makes_problems_harder(family: str) -> None:
    drawn = list(islice(words.problems(5, (family,)), 600))
    digits = [
        [len("".join(re.findall(r"\d", p.problem + p.answer))) for p in drawn if p.extra["level"] == level]
        for level in range(3)
    ]
    means = [sum(d) / len(d) for d in digits]
    assert means == sorted(means)
    assert means[0] < means[2]


GOLDEN = [("sums/0/0", "1260"), ("products/0/1", "5642"), ("systems/0/2", "4")]
