"""What the tiny base model is taught: arithmetic answered in text and in Python, well and badly.

Contract: `trace` gives the text of one answer in the very pieces in which a rollout would encode it (sampled text up to
the stop string, observation, the rest), so that a rollout meets no token sequence that pre-training has not seen.
Limits: `interpret` knows integer +, -, *, names, assignment and print, which is all that the traces use; whatever else
a model may write fails there. Nothing is executed by Python.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torl_mega.data.arithmetic import problems
from torl_mega.rollout.python_tool import NO_OUTPUT, STOP, frame
from torl_mega.types import Problem

TEMPLATE = "Q: {problem}=?\nA:"  # as in conf/quickstart.yaml
TRAIN_SEED, HELD_OUT_SEED, NUM_HELD_OUT = 10_007, 1000, 1024

Piece = tuple[str, bool]  # text, whether the policy writes it (and the loss counts it)


class _Failed(Exception):
    """A program of the model failed; the message is the last line of Python's traceback."""


def interpret(code: str) -> tuple[str, bool]:
    """(what Python prints for `code`, True), or (the last line of its traceback, False)."""
    names: dict[str, int] = {}
    printed: list[str] = []
    try:
        for statement in _parse(code).body:
            match statement:
                case ast.Expr(ast.Call(ast.Name("print"), [argument], [])):
                    printed.append(str(_value(argument, names)))
                case ast.Assign([ast.Name(name)], value):
                    names[name] = _value(value, names)
                case ast.Expr(value):
                    _value(value, names)
                case _:
                    raise _Failed("SyntaxError: invalid syntax")
    except _Failed as failed:
        return str(failed), False
    return "\n".join(printed) or NO_OUTPUT, True


def _parse(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _Failed(f"{type(error).__name__}: {reason}") from error


def _value(node: ast.expr, names: dict[str, int]) -> int:
    match node:
        case ast.Constant(int(number)):
            return number
        case ast.Name(name) if name in names:
            return names[name]
        case ast.Name(name):
            raise _Failed(f"NameError: name '{name}' is not defined")
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, names) + _value(right, names)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left, names) - _value(right, names)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, names) * _value(right, names)
        case ast.Call(function):
            return _value(function, names)
        case _:
            raise _Failed("TypeError: unsupported operand")


@dataclass(frozen=True)
class Mix:
    """Shares of the pre-training traces; what is left of 1 is text without code."""

    good: float = 0.25  # right program, output read right
    misread: float = 0.08  # right program, another answer than its output
    buggy: float = 0.12  # program that fails, then a wrong answer


def trace(problem: Problem, rng: random.Random, mix: Mix) -> list[Piece]:
    """One answer to `problem`, in the pieces in which a rollout would encode it."""
    expression, value = problem.problem, int(problem.answer)
    draw = rng.random()
    if draw >= mix.good + mix.misread + mix.buggy:
        return [(f" It is \\boxed{{{value + rng.choice((-30, -20, -10, -3, -2, -1, 0, 1, 2, 3, 10, 20, 30))}}}.", True)]
    if draw < mix.good + mix.misread:
        code = rng.choice((f"print({expression})",) * 3 + (f"x={expression}\nprint(x)",))
    else:
        code = rng.choice((f"print({expression}", f"print({expression}))", f"x={expression}\nprint(y)"))
    answer = value if draw < mix.good else value + rng.choice((-20, -10, -1, 1, 10, 20))
    return [
        (f"\n```python\n{code}\n```\n{STOP}", True),
        (frame(interpret(code)[0]), False),
        (f"So \\boxed{{{answer}}}.", True),
    ]


def training_problems(seed: int) -> Iterator[Problem]:
    """Endless problems that leave the held-out ones out."""
    held_out = {p.problem for p in islice(problems(HELD_OUT_SEED), NUM_HELD_OUT)}
    return (p for p in problems(TRAIN_SEED + seed) if p.problem not in held_out)
