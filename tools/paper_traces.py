"""What the base of the paper in small is taught: word problems answered in text and by programs, well and badly.

    torl pretrain conf/paper_small/base.yaml          streams `rows` (docs/reproduction.md)
    python tools/paper_traces.py                      prints some

Contract: `rows()` is endless and the same everywhere; a row's pieces are those in which a rollout encodes an answer (sampled
text up to the stop string, observation, the rest), so that a rollout meets no token sequence that pre-training has not seen.
Programs are run by this Python; they are made here, from the problem's numbers. No problem that is evaluated on is among them.
The rates are the constants below; the model's card (conf/paper_small/model/README.md) prints them.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

from torl_mega.data.word_problems import FAMILIES, is_held, problems
from torl_mega.rollout.python_tool import NO_OUTPUT, STOP, frame
from torl_mega.types import Problem

TEMPLATE = "Q: {problem}\nA:"  # as in conf/paper_small
SEED = 7
Piece = tuple[str, bool]  # text, whether the policy writes it


@dataclass(frozen=True)
class Mix:
    """Shares of the answers; what is left of 1 is a bare program that is never run, or a bare answer."""

    text: float = 0.53  # worked steps
    program: float = 0.24  # one program, its output, an answer
    repair: float = 0.09  # a program that raises, then another one
    check: float = 0.08  # an answer, then a program that confirms or contradicts it

    right_in_text: tuple[float, float, float] = (0.80, 0.30, 0.02)  # by level, with worked steps
    right_at_once: tuple[float, float, float] = (0.40, 0.10, 0.00)  # by level, without
    right_program: float = 0.72  # of those that run
    read: float = 0.85  # answers that are what the program printed
    follow: float = 0.70  # checked answers that follow the program
    import_at_once: float = 0.20  # programs for `choose` that import what they call
    at_one_go: float = 0.15  # programs for `chain` that need no second call


MIX = Mix()
_SOLUTIONS = {
    "sums": "{a}{sign}{b}={answer}",
    "products": "{a}*{b}={answer}",
    "systems": "({a}+{c})*y={b}-{d}, so y={answer}",
    "counting": "{a} divides {first}, {b} too {both}, {first}-{both}={answer}",
    "recurrence": "{terms}, number {n} is {answer}",
    "choose": "{k} of {n} are {answer}",
    "chain": "{a}*{b}={product} and its digits are {answer}",
    "divisor": "{a} and {b} have {answer}",
}
_PROGRAMS = {  # the right one, and others that run and are wrong
    "sums": ("print({a}{sign}{b})", "print({a}{other}{b})", "print({b}-{a})"),
    "products": ("print({a}*{b})", "print({a}+{b})", "print({a}*{a})"),
    "systems": (
        "from fractions import Fraction\nprint(Fraction({b}-{d},{a}+{c}))",
        "from fractions import Fraction\nprint(Fraction({b}+{d},{a}+{c}))",
        "print(({b}-{d})/({a}+{c}+1))",
    ),
    "counting": (
        "print(len([i for i in range(1,{n}+1) if i%{a}==0 and i%{b}]))",
        "print(len([i for i in range(1,{n}+1) if i%{a}==0]))",
        "print({n}//{a})",
    ),
    "recurrence": (
        "x={x}\nfor i in range({n}-1):\n    x={a}*x+{b}\nprint(x)",
        "x={x}\nfor i in range({n}):\n    x={a}*x+{b}\nprint(x)",
        "print({a}*{x}+{b})",
    ),
    "choose": ("from math import comb\nprint(comb({n},{k}))", "print({n}*{k})", "print({n}**{k})"),
    "chain": ("print(sum(map(int,str({a}*{b}))))", "print({a}*{b}%9)", "print({a}+{b})"),
    "divisor": ("import math\nprint(math.gcd({a},{b}))", "print({a}%{b})", "print(min({a},{b}))"),
}


def run(code: str) -> tuple[str, bool]:
    """(what it prints, True), or (the last line of its error, False), as the sandbox says them."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except Exception as exc:  # what a program raises is what the policy is shown
        return traceback.format_exception_only(exc)[-1].strip(), False
    return printed.getvalue().strip() or NO_OUTPUT, True


def answer(problem: Problem, rng: random.Random, mix: Mix = MIX) -> list[Piece]:
    """One answer to `problem`, in pieces."""
    draw = rng.random()
    if draw < mix.text:
        return [(f" {_in_text(problem, rng, mix)}", True)]
    if draw < mix.text + mix.program:
        return _with_program(problem, rng, mix)
    if draw < mix.text + mix.program + mix.repair:
        return _with_repair(problem, rng, mix)
    if draw < mix.text + mix.program + mix.repair + mix.check:
        return _with_check(problem, rng, mix)
    if rng.random() < 0.5:
        return [(f"{_block(_right(problem))}{_boxed(_wrong(problem.answer, rng))}", True)]
    return [(f" {_boxed(_maybe(problem, rng, mix.right_at_once))}", True)]


def _in_text(problem: Problem, rng: random.Random, mix: Mix) -> str:
    found = _maybe(problem, rng, mix.right_in_text)
    numbers: dict[str, Any] = _values(problem) | {"answer": found}
    if problem.source == "counting":
        numbers["first"], numbers["both"] = (
            numbers["n"] // numbers["a"],
            numbers["n"] // math.lcm(numbers["a"], numbers["b"]),
        )
    if problem.source == "recurrence":
        numbers["terms"] = ", ".join(map(str, _terms(numbers)))
    if problem.source == "chain":
        numbers["product"] = numbers["a"] * numbers["b"]
        if found != problem.answer:
            numbers["product"] = _wrong(str(numbers["product"]), rng)
    return f"{_SOLUTIONS[problem.source].format(**numbers)}. {_boxed(found)}"


def _terms(numbers: dict[str, Any]) -> list[int]:
    """All but the last one, which is the answer."""
    terms = [numbers["x"]]
    for _ in range(numbers["n"] - 2):
        terms.append(numbers["a"] * terms[-1] + numbers["b"])
    return terms


def _with_program(problem: Problem, rng: random.Random, mix: Mix) -> list[Piece]:
    if problem.source == "chain" and rng.random() >= mix.at_one_go:
        numbers = problem.extra["numbers"]
        product = f"{numbers['a'] * numbers['b']}"
        second = f'print(sum(map(int,"{product}")))'
        return [*_ran(f"print({numbers['a']}*{numbers['b']})"), *_ran(second), (_read(problem.answer, rng, mix), True)]
    code = _right(problem) if rng.random() < mix.right_program else _program(problem, rng.choice((1, 2)))
    if problem.source == "choose" and code == _right(problem) and rng.random() >= mix.import_at_once:
        return _repaired(problem, code.partition("\n")[2], rng, mix)
    printed, passed = run(code)
    found = printed if passed else problem.answer
    return [*_ran(code), (_read(found, rng, mix), True)]


def _with_repair(problem: Problem, rng: random.Random, mix: Mix) -> list[Piece]:
    code = _right(problem)
    broken = rng.choice((code[:-1], code[:-1] + "]", code.replace("print(", "prnt(")))
    return _repaired(problem, broken, rng, mix)


def _repaired(problem: Problem, broken: str, rng: random.Random, mix: Mix) -> list[Piece]:
    """The second program mends the first one, or gives up for an answer from the head."""
    if rng.random() < 0.25:
        return [*_ran(broken), (f"{_boxed(_wrong(problem.answer, rng))}", True)]
    return [*_ran(broken), *_ran(_right(problem)), (_read(problem.answer, rng, mix), True)]


def _with_check(problem: Problem, rng: random.Random, mix: Mix) -> list[Piece]:
    first = _maybe(problem, rng, mix.right_in_text)
    code = _right(problem) if rng.random() < mix.right_program else _program(problem, rng.choice((1, 2)))
    printed, passed = run(code)
    said = "That is right." if printed == first else "That differs."
    final = printed if passed and rng.random() < mix.follow else first
    return [(f" It is {first}. Check:", True), *_ran(code), (f"{said} {_boxed(final)}", True)]


def _ran(code: str) -> list[Piece]:
    return [(f"{_block(code)}{STOP}", True), (frame(run(code)[0]), False)]


def _block(code: str) -> str:
    return f"\n```python\n{code}\n```\n"


def _read(printed: str, rng: random.Random, mix: Mix) -> str:
    return _boxed(printed if rng.random() < mix.read else _wrong(printed, rng))


def _boxed(found: str) -> str:
    return f"So \\boxed{{{found}}}."


def _maybe(problem: Problem, rng: random.Random, right: tuple[float, float, float]) -> str:
    return problem.answer if rng.random() < right[problem.extra["level"]] else _wrong(problem.answer, rng)


def _wrong(right: str, rng: random.Random) -> str:
    """An answer of the same look."""
    try:
        value = Fraction(right)
    except ValueError:  # what an error says
        return str(rng.randrange(100))
    if value.denominator > 1:
        return f"{value.numerator + rng.choice((-2, -1, 1, 2))}/{value.denominator}"
    size = max(1, abs(value.numerator) // 10)
    return str(value.numerator + rng.choice((-1, 1)) * rng.randint(1, size + 2))


def _values(problem: Problem) -> dict[str, Any]:
    away = problem.extra["numbers"].get("away")
    return {**problem.extra["numbers"], "sign": "-" if away else "+", "other": "+" if away else "-"}


def _program(problem: Problem, which: int) -> str:
    return _PROGRAMS[problem.source][which].format(**_values(problem))


def _right(problem: Problem) -> str:
    return _program(problem, 0)


def rows(seed: int = SEED, mix: Mix = MIX) -> Iterator[dict[str, Any]]:
    """Endless rows for `torl pretrain`: prompt and pieces."""
    rng = random.Random(seed)
    for problem in problems(seed, tuple(FAMILIES)):
        if not is_held(problem):
            yield {"prompt": TEMPLATE.format(problem=problem.problem), "pieces": answer(problem, rng, mix)}


if __name__ == "__main__":
    for row in islice(rows(), 24):
        print("-" * 20, row["prompt"] + "".join(text for text, _ in row["pieces"]), sep="\n")
