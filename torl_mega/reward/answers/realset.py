"""Sets of real numbers as sorted pieces: intervals, unions, inequalities in one variable, single points, complements.

Contract: two forms that state the same set give equal `RealSet.pieces`. Endpoints come from the caller as comparable
numbers. None for a form that is not a set of reals; Unreadable where an endpoint is not a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torl_mega.reward.answers.forms import Difference, Form, Items, Relation, Scalar, Set, Tuple, Union

# An endpoint is (number, side): side -1 lies just below the number, +1 just above it, so that [a is (a, -1) and (a is (a, +1).
Cut = tuple[Fraction | float, int]
Piece = tuple[Cut, Cut]
Number = Callable[[str], Any]

_LOW: Cut = (float("-inf"), 1)
_HIGH: Cut = (float("inf"), -1)
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?(?:\([A-Za-z]\))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class RealSet:
    pieces: tuple[Piece, ...]  # sorted, disjoint, not touching
    variable: str = ""  # of an inequality


def read(form: Form, number: Number) -> RealSet | None:
    if isinstance(form, Tuple):
        return _interval(form, number)
    if isinstance(form, Scalar):
        return RealSet(((_LOW, _HIGH),)) if form.text.replace(" ", "") in ("\\mathbb{R}", "R", "\\Re") else None
    if isinstance(form, Set):
        return _points(form, number)
    if isinstance(form, Relation):
        return _inequality(form, number)
    if isinstance(form, Union):
        return _all_of([read(part, number) for part in form.parts])
    if isinstance(form, Items):
        sets = [read(part, number) for part in form.items]
        return _intersection(sets) if form.joint == "and" else _all_of(sets)
    if isinstance(form, Difference):
        left, right = read(form.left, number), read(form.right, number)
        return None if left is None or right is None else RealSet(_intersect(left.pieces, _complement(right.pieces)))
    return None


def _interval(form: Tuple, number: Number) -> RealSet | None:
    if len(form.items) != 2 or not all(isinstance(item, Scalar) for item in form.items):
        return None
    low, high = (_bound(item.text, number) for item in form.items if isinstance(item, Scalar))
    if low is None or high is None or low >= high:
        return None
    left = (low, 1 if form.opening == "(" or low == float("-inf") else -1)
    right = (high, -1 if form.closing == ")" or high == float("inf") else 1)
    return RealSet(((left, right),))


def _points(form: Set, number: Number) -> RealSet | None:
    values = [_bound(item.text, number) for item in form.items if isinstance(item, Scalar)]
    if len(values) != len(form.items) or None in values:
        return None
    return RealSet(_merge([((v, -1), (v, 1)) for v in values if v is not None]))


def _inequality(form: Relation, number: Number) -> RealSet | None:
    """`x < 3`, `2 \\le x < 5`, `5 > x`, `x \\ne 2`; None for anything else."""
    where = [
        i
        for i, side in enumerate(form.sides)
        if _VARIABLE.fullmatch(side.strip()) and side.strip() not in ("\\pi", "e")
    ]
    if len(where) != 1 or len(form.sides) > 3 or not set(form.operators) <= {"<", ">", "\\le", "\\ge", "\\ne"}:
        return None
    at, pieces = where[0], ((_LOW, _HIGH),)
    for i, operator in enumerate(form.operators):
        other = form.sides[i + 1] if i == at else form.sides[i]
        if i not in (at, at - 1):
            return None
        value = _bound(other, number)
        if value is None:
            return None
        forward = i == at  # the variable stands on the left
        pieces = _intersect(pieces, _half_line(operator, value, forward))
    return RealSet(pieces, form.sides[at].strip())


def _half_line(operator: str, value: Fraction | float, forward: bool) -> tuple[Piece, ...]:
    if operator == "\\ne":
        return _complement((((value, -1), (value, 1)),))
    below = (operator in ("<", "\\le")) == forward
    closed = operator in ("\\le", "\\ge")
    if below:
        return ((_LOW, (value, 1 if closed else -1)),)
    return (((value, -1 if closed else 1), _HIGH),)


def _bound(text: str, number: Number) -> Fraction | float | None:
    plain = text.replace(" ", "").removeprefix("+")
    if plain in ("\\infty", "infty", "inf", "oo"):
        return float("inf")
    if plain in ("-\\infty", "-infty", "-inf", "-oo"):
        return float("-inf")
    return number(text)


def _all_of(sets: list[RealSet | None]) -> RealSet | None:
    if not sets or any(s is None for s in sets):
        return None
    known = [s for s in sets if s is not None]
    names = {s.variable for s in known} - {""}
    if len(names) > 1:
        return None
    return RealSet(_merge([piece for s in known for piece in s.pieces]), next(iter(names), ""))


def _intersection(sets: list[RealSet | None]) -> RealSet | None:
    if not sets or any(s is None for s in sets):
        return None
    known = [s for s in sets if s is not None]
    names = {s.variable for s in known} - {""}
    if len(names) > 1:
        return None
    pieces = known[0].pieces
    for s in known[1:]:
        pieces = _intersect(pieces, s.pieces)
    return RealSet(pieces, next(iter(names), ""))


def _merge(pieces: list[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for low, high in sorted(p for p in pieces if p[0] < p[1]):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _intersect(a: tuple[Piece, ...], b: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return _merge([(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b])


def _complement(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    rest, low = [], _LOW
    for piece in pieces:
        rest.append((low, piece[0]))
        low = piece[1]
    rest.append((low, _HIGH))
    return _merge(rest)
