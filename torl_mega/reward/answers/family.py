"""Do two families of numbers, `x = k\\pi, k \\in \\mathbb{Z}`, cover the same numbers? `\\frac{\\pi}{2} + k\\pi` and `k\\pi - \\frac{\\pi}{2}` do.

Limits: arithmetic progressions of one parameter over the integers, compared over a dozen steps of the widest, and only
where no other variable stands in them; Unreadable for anything else.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import mpmath

from torl_mega.reward.answers.expression import Point, evaluate
from torl_mega.reward.answers.forms import Form, assigned, is_equation
from torl_mega.reward.answers.scalars import as_mpf, read_scalar
from torl_mega.reward.answers.syntax import symbols
from torl_mega.reward.answers.tokens import Unreadable

_PARAMETER = "\\wholea"
_STEPS = 12
_MAX_MEMBERS = 400
_NOISE = mpmath.mpf(10) ** -25


def cover_the_same(a: Form, g: Form) -> bool:
    """`a` and `g` are the bodies of two families with the same name, or none, for their numbers."""
    with mpmath.workdps(60):
        listed = [_progressions(form) for form in (a, g)]
        width = _STEPS * max(step for progressions in listed for _, step in progressions)
        x, y = ([m for p in progressions for m in _members(*p, width)] for progressions in listed)
        return all(any(abs(m - n) < _NOISE for n in y) for m in x) and all(
            any(abs(m - n) < _NOISE for n in x) for m in y
        )


def _progressions(form: Form) -> list[tuple[Any, Any]]:
    """(start, step > 0) of each arithmetic progression that the form lists."""
    if form.kind in ("list", "set"):
        return [progression for part in form.parts for progression in _progressions(part)]
    if is_equation(form) and (value := assigned(form)) is not None:
        return _progressions(value)
    node = read_scalar(form.text).node if form.kind == "scalar" else None
    if node is None or symbols(node) != {_PARAMETER}:
        raise Unreadable("a family of what is no number, or with another variable")
    at = [mpmath.mpc(as_mpf(evaluate(node, Point(0, given={_PARAMETER: Fraction(k)})))) for k in range(-2, 3)]
    steps = [after - before for before, after in pairwise(at)]
    if any(n.imag != 0 for n in at) or abs(steps[0]) < _NOISE or any(abs(s - steps[0]) > _NOISE for s in steps):
        raise Unreadable("no arithmetic progression")
    return [(at[2].real, abs(steps[0].real))]


def _members(start: Any, step: Any, width: Any) -> list[Any]:
    """What the progression has in [0, width)."""
    if width / step > _MAX_MEMBERS:
        raise Unreadable("progressions of very unlike steps")
    first = start - step * mpmath.floor(start / step + _NOISE)
    return [first + k * step for k in range(int(mpmath.ceil(width / step - _NOISE)))]
