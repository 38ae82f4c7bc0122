"""Sets of real numbers as sorted pieces: intervals, unions, inequalities in one variable, single points, complements.

Contract: two forms that state the same set give equal `RealSet.pieces`. Endpoints come from the caller as comparable
numbers. None for a form that is not a set of reals; Unreadable where an endpoint is not a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
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


ALL = RealSet(((_LOW, _HIGH),))


def either(a: RealSet, b: RealSet) -> RealSet:
    return RealSet(_merge([*a.pieces, *b.pieces]))


def without(a: RealSet, b: RealSet) -> RealSet:
    return RealSet(_intersect(a.pieces, _complement(b.pieces)))


def read(form: Form, number: Number) -> RealSet | None:
    if isinstance(form, Tuple):
        return _interval(form, number)
    if isinstance(form, Scalar):
        return ALL if form.text.replace(" ", "") in ("\\mathbb{R}", "R", "\\Re") else None
    if isinstance(form, Set):
        return _points(form, number)
    if isinstance(form, Relation):
        return _inequality(form, number)
    if isinstance(form, Union):
        return _listed(Items(form.parts, "or"), [read(part, number) for part in form.parts])
    if isinstance(form, Items):
        return _listed(form, [read(part, number) for part in form.items])
    if isinstance(form, Difference):
        left, right = read(form.left, number), read(form.right, number)
        return None if left is None or right is None else without(left, right)
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
    if len(where) != 1 or len(form.sides) > 3 or not set(form.operators) <= {"<", ">", "\\le", "\\ge", "\\ne", "="}:
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
    if operator in ("\\ne", "="):
        point = (((value, -1), (value, 1)),)
        return point if operator == "=" else _complement(point)
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


def _listed(form: Items, sets: list[RealSet | None]) -> RealSet | None:
    """`or` unites. `and` means all of them. A comma between conditions means and, or where nothing meets all of them, or;
    `x \\ne c` always takes away. A comma between sets unites what does not overlap."""
    known = [s for s in sets if s is not None]
    variables = {s.variable for s in known} - {""}
    if len(known) != len(sets) or len(variables) > 1:
        return None
    variable = next(iter(variables), "")
    united = _merge([piece for s in known for piece in s.pieces])
    if form.joint == "or":
        return RealSet(united, variable)
    if form.joint == "," and not variables:
        apart = len(united) == sum(len(s.pieces) for s in known)
        return RealSet(united) if apart else None
    conditions, exclusions = [], []
    for item, condition in zip(form.items, known, strict=True):
        excludes = isinstance(item, Relation) and "\\ne" in item.operators
        (exclusions if excludes else conditions).append(condition.pieces)
    pieces = reduce(_intersect, conditions, ALL.pieces)
    if not pieces and form.joint == ",":
        pieces = _merge([piece for condition in conditions for piece in condition])
    return RealSet(reduce(_intersect, exclusions, pieces), variable)


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
