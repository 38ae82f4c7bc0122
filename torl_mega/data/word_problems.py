"""The paper in small: endless, seeded word problems of eight families and three levels, some for the head, some for Python.

    sums, products        one digit: the head suffices and a program is a waste; three digits: Python alone
    systems               two unknowns, a rational answer
    counting              two conditions on divisibility
    recurrence            the n-th number of a list
    choose                the natural first program, `print(comb(n,k))`, raises and must be repaired
    chain                 the natural second program needs the number that the first one printed
    divisor               greatest common divisors: left out of RL, for evaluation (the base has learnt it like the others)

Contract: `problems(seed, families)` gives the same sequence for the same arguments on every machine and Python version (it
draws from `random.Random.random()` alone), families in turn, and never ends. `Problem.extra` holds `level` and the `numbers` of
the problem by name. `train`, `held_in` and `held_out` are what the configs of conf/paper_small name; no text is in two of
them, but the numbers of an easy one may be in another wording: what a small model knows by heart it knows in any words.
`python -m torl_mega.data.word_problems` prints an example of each.
Limits: three wordings a family, with names and things drawn. No family makes two calls necessary: one program could always do
it all.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import TypeVar

from torl_mega.data.arithmetic import integer
from torl_mega.types import Problem

LEVELS = (0, 0, 1, 1, 2)  # what is drawn from: easy, middle, hard
TRAIN_SEED, HELD_SEED, NUM_TRAIN, NUM_HELD = 1, 1_000_000, 4096, 256
Numbers = dict[str, int]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Family:
    """How a family draws, words and answers its problems."""

    draw: Callable[[random.Random, int], Numbers]  # of a level
    words: tuple[str, ...]
    answer: Callable[[Numbers], int | Fraction]


def _sums(rng: random.Random, level: int) -> Numbers:
    low, high = ((1, 9), (10, 99), (100, 999))[level]
    a, b, away = integer(rng, low, high), integer(rng, low, high), integer(rng, 0, 1)
    return {"a": max(a, b), "b": min(a, b), "away": away}


def _products(rng: random.Random, level: int) -> Numbers:
    low, high = ((2, 9), (11, 99), (101, 999))[level]
    return {"a": integer(rng, low, high), "b": integer(rng, low, high)}


def _systems(rng: random.Random, level: int) -> Numbers:
    """x + a*y = b, x - c*y = d."""
    if not level:
        x, y = integer(rng, 5, 9), integer(rng, 1, 4)
        return {"a": 1, "b": x + y, "c": 1, "d": x - y}
    most = (9, 99)[level - 1]
    d = integer(rng, 1, most)
    return {"a": integer(rng, 2, 9), "b": d + integer(rng, 1, most), "c": integer(rng, 2, 9), "d": d}


def _counting(rng: random.Random, level: int) -> Numbers:
    low, high = ((10, 20), (50, 99), (100, 999))[level]
    while True:
        n, a, b = integer(rng, low, high), integer(rng, 2, 9), integer(rng, 2, 9)
        if a % b:
            return {"n": n, "a": a, "b": b}


def _recurrence(rng: random.Random, level: int) -> Numbers:
    low, high = ((2, 2), (3, 5), (6, 9))[level]
    x, a, b = integer(rng, 1, 9), integer(rng, 2, 5), integer(rng, 1, 9)
    return {"x": x, "a": a, "b": b, "n": integer(rng, low, high)}


def _recurrence_answer(v: Numbers) -> int:
    x = v["x"]
    for _ in range(v["n"] - 1):
        x = v["a"] * x + v["b"]
    return x


def _choose(rng: random.Random, level: int) -> Numbers:
    low, high = ((3, 6), (7, 12), (13, 30))[level]
    n = integer(rng, low, high)
    return {"n": n, "k": integer(rng, 1 if not level else 2, 2 if not level else min(n - 2, 9))}


def _divisor(rng: random.Random, level: int) -> Numbers:
    most = ((3, 4), (9, 9), (30, 30))[level]
    g = integer(rng, 2, most[0])
    return {"a": g * integer(rng, 2, most[1]), "b": g * integer(rng, 2, most[1])}


FAMILIES: Mapping[str, Family] = {
    "sums": Family(
        _sums,
        (
            "{who} has {a} {things} and gets {b} more. How many {things} has {who}?",
            "{who} counts {a} {things}, then {b} others. How many is that?",
            "What is {a} plus {b}?",
        ),
        lambda v: v["a"] - v["b"] if v["away"] else v["a"] + v["b"],
    ),
    "products": Family(
        _products,
        (
            "A box holds {a} {things}. How many {things} are in {b} boxes?",
            "{who} buys {a} bags of {b} {things}. How many {things} is that?",
            "What is {a} times {b}?",
        ),
        lambda v: v["a"] * v["b"],
    ),
    "systems": Family(
        _systems,
        (
            "{p} plus {a} times {q} is {b} and {p} minus {c} times {q} is {d}. What is {q}?",
            "Find {q} if {p} + {a}{q} = {b} and {p} - {c}{q} = {d}.",
            "{who} says: {p} and {a} times {q} make {b}, {p} less {c} times {q} makes {d}. What is {q}?",
        ),
        lambda v: Fraction(v["b"] - v["d"], v["a"] + v["c"]),
    ),
    "counting": Family(
        _counting,
        (
            "How many numbers from 1 to {n} can be divided by {a} but not by {b}?",
            "{who} writes 1 to {n} and keeps what {a} divides and {b} does not. How many are kept?",
            "Of {n} {things} in a row {who} takes each that has a number divided by {a}, not by {b}. How many?",
        ),
        lambda v: v["n"] // v["a"] - v["n"] // math.lcm(v["a"], v["b"]),
    ),
    "recurrence": Family(
        _recurrence,
        (
            "A list begins with {x}. Each next number is {a} times the one before plus {b}. What is number {n}?",
            "{who} starts at {x} and goes on with {a} times the last number plus {b}. What is number {n}?",
            "The first term is {x}, each next one {a} times the last plus {b}. What is term {n}?",
        ),
        _recurrence_answer,
    ),
    "choose": Family(
        _choose,
        (
            "In how many ways can {k} of {n} {things} be chosen?",
            "{who} takes {k} of {n} {things}. How many ways are there?",
            "How many sets of {k} can be made of {n} {things}?",
        ),
        lambda v: math.comb(v["n"], v["k"]),
    ),
    "chain": Family(
        _products,
        (
            "Multiply {a} by {b}. What is the sum of the digits of the result?",
            "{who} multiplies {a} and {b} and adds up the digits. What comes out?",
            "What is the digit sum of {a} times {b}?",
        ),
        lambda v: sum(map(int, str(v["a"] * v["b"]))),
    ),
    "divisor": Family(
        _divisor,
        (
            "What is the greatest number that divides {a} and {b}?",
            "{who} shares {a} {things} and {b} cups among as many people as can be. How many?",
            "Which is the largest number that both {a} and {b} can be divided by?",
        ),
        lambda v: math.gcd(v["a"], v["b"]),
    ),
}  # fmt: skip
_AWAY = (  # sums that take away
    "{who} has {a} {things} and gives {b} away. How many {things} has {who}?",
    "{who} counts {a} {things}, then loses {b}. How many is that?",
    "What is {a} minus {b}?",
)
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn")
THINGS = ("coins", "books", "nuts", "cards", "pens", "eggs")
UNKNOWNS = (("x", "y"), ("m", "n"), ("u", "v"), ("s", "t"))
HELD_OUT = ("divisor",)
TRAINED = tuple(name for name in FAMILIES if name not in HELD_OUT)


def problems(seed: int, families: tuple[str, ...] = TRAINED) -> Iterator[Problem]:
    """Endless problems of `families` in turn; `source` is the family."""
    rng = random.Random(seed)
    row = 0
    while True:
        name = families[row % len(families)]
        level = LEVELS[integer(rng, 0, len(LEVELS) - 1)]
        numbers = FAMILIES[name].draw(rng, level)
        wordings = _AWAY if numbers.get("away") else FAMILIES[name].words
        words = _pick(rng, wordings).format(**numbers, **_dress(rng))
        answer = str(FAMILIES[name].answer(numbers))
        extra = {"level": level, "numbers": numbers}
        yield Problem(f"{name}/{seed}/{row}", words, answer, name, extra)
        row += 1


def _dress(rng: random.Random) -> dict[str, str]:
    p, q = _pick(rng, UNKNOWNS)
    return {"who": _pick(rng, NAMES), "things": _pick(rng, THINGS), "p": p, "q": q}


def _pick(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[integer(rng, 0, len(items) - 1)]


def is_held(problem: Problem) -> bool:
    """Whether it is evaluated on: one text in eight, by its checksum. Nothing is trained on it, the base neither."""
    return zlib.crc32(problem.problem.encode()) % 8 == 0


def train() -> Iterator[Problem]:
    """What the policy is trained on."""
    return islice((p for p in problems(TRAIN_SEED) if not is_held(p)), NUM_TRAIN)


def held_in() -> Iterator[Problem]:
    """NUM_HELD different problems of the families of training, of texts that are not trained on."""
    return _different(problems(HELD_SEED), NUM_HELD)


def held_out() -> Iterator[Problem]:
    """Different problems of a family that RL never trains on."""
    return _different(problems(HELD_SEED, HELD_OUT), NUM_HELD // 8)


def _different(source: Iterator[Problem], count: int) -> Iterator[Problem]:
    seen: set[str] = set()
    while len(seen) < count:
        problem = next(source)
        if is_held(problem) and problem.problem not in seen:
            seen.add(problem.problem)
            yield problem


if __name__ == "__main__":
    for shown in islice(problems(0, tuple(FAMILIES)), 3 * len(FAMILIES)):
        print(f"{shown.source} {shown.extra['level']}: {shown.problem}  {shown.answer}")
