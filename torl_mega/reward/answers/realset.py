"""Sets of real numbers as sorted pieces: intervals, unions, inequalities in one variable, single points, complements.

Contract: two forms that state the same set give equal `RealSet.pieces`. None for a form that is not a set of reals;
Unreadable where an endpoint is not a real number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

import mpmath

from torl_mega.reward.answers.expression import evaluate
from torl_mega.reward.answers.forms import Form, read_form
from torl_mega.reward.answers.scalars import read_scalar
from torl_mega.reward.answers.syntax import Unreadable, symbols

# An endpoint is (number, side): side -1 lies just below the number, +1 just above it, so that [a is (a, -1) and (a is (a, +1).
Cut = tuple[Fraction | float, int]
Piece = tuple[Cut, Cut]

_INFINITY = float("inf")
_LOW: Cut = (-_INFINITY, 1)
_HIGH: Cut = (_INFINITY, -1)
_VARIABLE = re.compile(r"(?!e$|\\pi$)\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?(?:\([A-Za-z]\))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class RealSet:
    pieces: tuple[Piece, ...]  # sorted, disjoint, not touching
    variable: str = ""  # of an inequality


ALL = RealSet(((_LOW, _HIGH),))


def read(form: Form) -> RealSet | None:
    if form.kind == "tuple":
        return _interval(form)
    if form.kind in ("reals", "scalar"):
        return ALL if form.kind == "reals" or form.text in ("R", "\\Re") else None
    if form.kind == "set":
        values = [_bound(part.text) for part in form.parts if part.kind == "scalar"]
        return RealSet(_merge([((v, -1), (v, 1)) for v in values])) if len(values) == len(form.parts) else None
    if form.kind == "relation":
        return _inequality(form)
    if form.kind == "list" and form.parts[0].marks == ("\\ne",):  # x \\ne 1, 2
        first = form.parts[0]
        parts = (
            Form("relation", (first.parts[0], p), marks=first.marks) if p.kind == "scalar" else p for p in form.parts
        )
        form = Form("list", tuple(parts), marks=form.marks)
    sets = [read(part) for part in form.parts] if form.kind in ("union", "list", "difference") else [None]
    known = [s for s in sets if s is not None]
    if len(known) != len(sets):
        return None
    return without(*known) if form.kind == "difference" else _listed(form, known)


def without(a: RealSet, b: RealSet) -> RealSet:
    return RealSet(_intersect(a.pieces, _complement(b.pieces)))


def _interval(form: Form) -> RealSet | None:
    if len(form.parts) != 2 or any(part.kind != "scalar" for part in form.parts):
        return None
    low, high = (_bound(part.text) for part in form.parts)
    if low >= high:
        return None
    left = (low, 1 if form.marks[0] == "(" or low == -_INFINITY else -1)
    right = (high, -1 if form.marks[1] == ")" or high == _INFINITY else 1)
    return RealSet(((left, right),))


def _inequality(form: Form) -> RealSet | None:
    """`x < 3`, `2 \\le x < 5`, `5 > x`, `x \\ne 2`, `x = 2`; None for anything else."""
    sides = [part.text.strip() for part in form.parts]
    where = [i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side)]
    if len(where) != 1 or len(sides) > 3 or not set(form.marks) <= {"<", ">", "\\le", "\\ge", "\\ne", "="}:
        return None
    at, pieces = where[0], ALL.pieces
    for i, operator in enumerate(form.marks):
        if i not in (at, at - 1):
            return None
        forward = i == at  # the variable stands on the left
        other = read_form(sides[i + 1] if forward else sides[i])  # a list in x \\ne \\pm 2
        for bound in other.parts if other.kind == "list" and operator == "\\ne" else (other,):
            pieces = _intersect(pieces, _half_line(operator, _bound(bound.text), forward))
    return RealSet(pieces, sides[at])


def _half_line(operator: str, value: Fraction | float, forward: bool) -> tuple[Piece, ...]:
    if operator in ("\\ne", "="):
        point = (((value, -1), (value, 1)),)
        return point if operator == "=" else _complement(point)
    closed = operator in ("\\le", "\\ge")
    below = (operator in ("<", "\\le")) == forward
    return ((_LOW, (value, 1 if closed else -1)),) if below else (((value, -1 if closed else 1), _HIGH),)


def _bound(text: str) -> Fraction | float:
    """An endpoint as a number rounded to 40 digits, so that equal ones compare equal. Raises Unreadable for what is none."""
    plain = text.replace(" ", "").removeprefix("+")
    if plain.lstrip("-") in ("\\infty", "infty", "inf", "oo"):
        return -_INFINITY if plain[0] == "-" else _INFINITY
    scalar = read_scalar(text)
    if symbols(scalar.node) or scalar.quantity.unit not in ("", "degree", "dollar"):
        raise Unreadable("an endpoint with a variable in it, or of another kind than numbers")
    value = evaluate(scalar.node, 0)
    if isinstance(value, Fraction):
        return value
    with mpmath.workdps(45):
        if abs(value.imag) > mpmath.mpf(10) ** -40 or abs(value) >= 10**20:
            raise Unreadable("an endpoint that is not real, or too large to round")
        return Fraction(str(mpmath.nstr(value.real, 40, strip_zeros=False)))


def _listed(form: Form, known: list[RealSet]) -> RealSet | None:
    """`or` unites. `and` means all of them. A comma between conditions means and, or where nothing meets all of them, or;
    `x \\ne c` always takes away. A comma between sets unites what does not overlap."""
    variables = {s.variable for s in known} - {""}
    if len(variables) > 1 or not known:
        return None
    joint, variable = form.marks[0] if form.marks else "or", next(iter(variables), "")
    united = _merge([piece for s in known for piece in s.pieces])
    if joint == "or" or (joint == "," and not variables):
        apart = joint == "or" or len(united) == sum(len(s.pieces) for s in known)
        return RealSet(united, variable) if apart else None
    conditions, exclusions = [], []
    for part, condition in zip(form.parts, known, strict=True):
        (exclusions if "\\ne" in part.marks else conditions).append(condition.pieces)
    pieces = reduce(_intersect, conditions, ALL.pieces)
    if not pieces and joint == ",":
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
    lows = [_LOW, *(high for _, high in pieces)]
    return _merge(list(zip(lows, [*(low for low, _ in pieces), _HIGH], strict=True)))
