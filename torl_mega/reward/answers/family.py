"""Compares families of values with whole-number parameters: `x = k\\pi, k \\in \\mathbb{Z}`.

Two families are one when, with the parameters named alike, they give the same value for the same parameters, or, for one
parameter over the integers, when their arithmetic progressions cover the same numbers: `\\frac{\\pi}{2} + k\\pi` and
`-\\frac{\\pi}{2} + k\\pi`.

Limits: progressions are compared over a dozen periods of the widest, and only where no other variable stands in them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import mpmath

from torl_mega.reward.answers.expression import Point, close, evaluate
from torl_mega.reward.answers.forms import Family, Form, Items, Relation, Scalar, Set, assigned
from torl_mega.reward.answers.scalars import as_mpf, read_scalar
from torl_mega.reward.answers.syntax import symbols
from torl_mega.reward.answers.tokens import Unreadable

_PARAMETER = "\\wholea"
_PERIODS = 12
_MAX_MEMBERS = 400


def same_family(a: Family, g: Family, same: Callable[[Form, Form], bool]) -> bool:
    """`same` compares the bodies, in which equal parameters have equal names."""
    if (a.num_names, a.domain) != (g.num_names, g.domain):
        return False
    try:
        if same(a.body, g.body):
            return True
    except Unreadable:
        pass  # bodies of unlike form; they may cover the same numbers all the same
    if g.num_names != 1 or g.domain != "Z":
        return False
    progressions = [_progressions(form.body) for form in (a, g)]
    if _name(a.body) and _name(g.body) and _name(a.body) != _name(g.body):
        return False
    width = _PERIODS * max(abs(step) for listed in progressions for _, step in listed)
    members = [_members(listed, width) for listed in progressions]
    return len(members[0]) == len(members[1]) and all(
        abs(x - y) < mpmath.mpf(10) ** -25 for x, y in zip(*members, strict=True)
    )


def _name(form: Form) -> str:
    first = form.items[0] if isinstance(form, Items) else form
    return first.sides[0].replace(" ", "") if isinstance(first, Relation) else ""


def _progressions(form: Form) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    """(start, step) of each arithmetic progression that the form lists. Raises Unreadable for anything else."""
    if isinstance(form, Items | Set):
        return [progression for item in form.items for progression in _progressions(item)]
    if isinstance(form, Relation) and (value := assigned(form)) is not None:
        return _progressions(value)
    if not isinstance(form, Scalar):
        raise Unreadable("a family of what is no number")
    node = read_scalar(form.text).node
    if symbols(node) != {_PARAMETER}:
        raise Unreadable("a family with another variable")
    at = [evaluate(node, Point(0, given={_PARAMETER: Fraction(k)})) for k in range(-2, 3)]
    with mpmath.workdps(60):
        numbers = [mpmath.mpmathify(as_mpf(value)) for value in at]
        steps = [after - before for before, after in pairwise(numbers)]
        if (
            any(n.imag != 0 for n in numbers)
            or steps[0] == 0
            or not all(close(s, steps[0]) for s in map(mpmath.mpc, steps))
        ):
            raise Unreadable("no arithmetic progression")
        return [(numbers[2].real, steps[0].real)]


def _members(progressions: list[tuple[mpmath.mpf, mpmath.mpf]], width: mpmath.mpf) -> list[mpmath.mpf]:
    """What the progressions have in [0, width), sorted, each once."""
    with mpmath.workdps(60):
        found: list[mpmath.mpf] = []
        for start, step in progressions:
            if width / abs(step) > _MAX_MEMBERS:
                raise Unreadable("progressions of very unlike steps")
            first = start - abs(step) * mpmath.floor(start / abs(step) + mpmath.mpf(10) ** -30)
            found += [first + k * abs(step) for k in range(int(mpmath.ceil(width / abs(step) - mpmath.mpf(10) ** -30)))]
        found.sort()
        return [x for i, x in enumerate(found) if i == 0 or x - found[i - 1] > mpmath.mpf(10) ** -25]
