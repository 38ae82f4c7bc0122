"""Do two forms state the same? Each rule holds for every form: a part of a list, pair or matrix is compared as it would be alone.

    same(answer, gold) ─► scalars by value │ names and chains by what they come to │ conditions as sets of numbers
                          │ lists without order, tuples and matrices in it │ equations up to a factor

Raises Unreadable where a scalar cannot be evaluated. Not symmetric: what the gold answer is decides what a comma, a
bracket or a letter in the answer means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from typing import Any

import mpmath

from torl_mega.reward.answers import realset
from torl_mega.reward.answers.expression import NUM_POINTS, close, evaluate, same_everywhere
from torl_mega.reward.answers.forms import Form, assigned, is_equation, is_name, last_exact, read_form
from torl_mega.reward.answers.normalize import squeeze
from torl_mega.reward.answers.scalars import as_mpf, read_scalar, same_scalar, with_point
from torl_mega.reward.answers.syntax import WHOLE, Node, Unreadable, symbols

_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def same(a: Form, g: Form) -> bool:
    """Whether the prediction's form `a` states the same as the gold form `g`."""
    kinds = {a.kind, g.kind}
    if kinds == {"scalar"}:
        return same_scalar(a.text, g.text)
    if a.kind == "list" and g.kind in ("scalar", "relation"):
        pointed = with_point(a.text, g.text or g.parts[-1].text)
        if pointed is not None:
            return same(read_form(pointed), g)
    if "relation" in kinds:
        return _same_relation(a, g)
    if kinds & {"family", "cases", "ratio"}:
        pairwise = {"family": _same_family, "cases": _same_cases, "ratio": _in_order}
        return a.kind == g.kind and pairwise[a.kind](a, g)
    if "matrix" in kinds:
        rows, gold_rows = _rows(a), _rows(g)
        return len(rows) == len(gold_rows) > 0 and all(map(_in_order, rows, gold_rows))
    if _has_inequality(a) or _has_inequality(g):
        return _same_conditions(a, g)
    if kinds & {"union", "difference", "reals"}:
        return _same_real_set(a, g)
    if "tuple" in kinds:
        return (_same_tuple if kinds == {"tuple"} else _bare_for_tuple)(a, g) or _same_printed_list(a, g)
    return _same_members(a, g)


def _holds(a: Form, g: Form, rule: Callable[[Form, Form], bool] = same) -> bool:
    """`rule`, and False where something cannot be evaluated: another part or rule may fit."""
    try:
        return rule(a, g)
    except Unreadable:
        return False


def _in_order(a: Form, g: Form) -> bool:
    return len(a.parts) == len(g.parts) and all(map(same, a.parts, g.parts))


def _each_somewhere(a: Form, g: Form) -> bool:
    return len(a.parts) == len(g.parts) and all(any(_holds(x, y) for x in a.parts) for y in g.parts)


def _rows(form: Form) -> tuple[Form, ...]:
    """The rows of a matrix, also of one printed as a list of lists; empty for anything else."""
    if form.kind == "matrix":
        return form.parts
    if form.kind != "tuple" or form.marks[0] != "[":
        return ()
    nested = all(row.kind == "tuple" and row.marks[0] == "[" for row in form.parts)
    column = all(row.kind == "scalar" and row.text.startswith("[") for row in form.parts)
    return form.parts if nested else tuple(Form("row", (row,)) for row in form.parts) if column else ()


def _same_tuple(a: Form, g: Form) -> bool:
    if len(a.parts) != len(g.parts) or (len(g.parts) == 2 and a.marks != g.marks):
        return False
    if all(part.kind == "relation" for part in (*a.parts, *g.parts)):
        return _same_named_lists(a, g)
    return _in_order(_without_names(a), _without_names(g))


def _without_names(form: Form) -> Form:
    """`(x = 3, y = 1)` as (3, 1)."""
    named = (set(p.marks) == {"="} and p.kind == "relation" and is_name(p.parts[0].text) for p in form.parts)
    values = (read_form(p.parts[-1].text) if n else p for p, n in zip(form.parts, named, strict=True))
    return Form(form.kind, tuple(values), marks=form.marks)


def _bare_for_tuple(a: Form, g: Form) -> bool:
    """`1, 2` for `(1, 2)` and the other way, in order; braces are a set and never a tuple."""
    bare, pair = (a, g) if g.kind == "tuple" else (g, a)
    if bare.kind != "list" or pair.marks not in (("(", ")"), ("[", "]")) or bare.marks[0] == "or":
        return False
    return (pair.marks[0] == "(" or len(pair.parts) != 2) and _in_order(_without_names(a), _without_names(g))


def _same_printed_list(a: Form, g: Form) -> bool:
    """`[3, -1]` and `[(1, 2), (2, 1)]` of a solver for the same values in a row; two rising ends may be an interval."""
    if a.marks != ("[", "]") or (g.kind != "list" and len(a.parts) != 1):
        return False
    return not _holds(a, a, _same_real_set) and _same_members(Form("list", a.parts, marks=(",",)), g)


def _same_members(a: Form, g: Form) -> bool:
    """Without order; a list has each value as often as the other, two sets have the same members. One thing alone is a
    list or set of one."""
    if {a.kind, g.kind} == {"list"} and any(part.kind == "relation" for part in (*a.parts, *g.parts)):
        return _same_named_lists(a, g)
    left, right = (list(form.parts) if form.kind in ("list", "set") else [form] for form in (a, g))
    if {a.kind, g.kind} == {"set"}:
        left, right = ([f for i, f in enumerate(x) if not any(_holds(f, y) for y in x[:i])] for x in (left, right))
    if len(left) != len(right):
        return False
    for gold in right:
        match = next((x for x in left if _holds(x, gold)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_family(a: Form, g: Form) -> bool:
    """Equal values for equal parameters, taken in any order; over the integers also for -k, k + 1 and the like."""
    if a.marks != g.marks:
        return False
    names = WHOLE[: int(a.marks[0])]
    trials: list[dict[str, str]] = [
        dict(zip(names, order, strict=True)) for order in permutations(f"\\{name} " for name in names)
    ]
    if a.marks == ("1", "Z"):
        trials += [{names[0]: f"({sign}\\{names[0]}{shift})"} for sign in ("", "-") for shift in ("", "+1", "-1")]
    return any(_holds(_with_parameters(a.parts[0], trial), g.parts[0]) for trial in trials)


def _with_parameters(form: Form, names: dict[str, str]) -> Form:
    """The form with other expressions for its parameters."""
    text = re.sub(r"\\(whole[ab]) ?", lambda m: names[m[1]], form.text)
    return Form(form.kind, tuple(_with_parameters(part, names) for part in form.parts), text, form.marks)


def _same_cases(a: Form, g: Form) -> bool:
    """Functions by cases: the same value on the same set of numbers, in any order of the rows."""
    left, right = _regions(a), _regions(g)
    return len(left) == len(right) and all(any(x == y and _holds(v, w) for x, v in left) for y, w in right)


def _regions(form: Form) -> list[tuple[realset.RealSet, Form]]:
    """Where each row holds, without the rows before it, and its value."""
    regions, rest, variables = [], realset.ALL, set()
    for row in form.parts:
        value, condition = row.parts
        where = realset.ALL if condition.text == "otherwise" else realset.read(read_form(condition.text))
        variables |= {where.variable} - {""} if where is not None else {"", condition.text}
        if where is None or len(variables) > 1:
            raise Unreadable("a case that is no set of numbers in one variable")
        remaining = realset.without(rest, where)
        regions.append((realset.without(rest, remaining), value))
        rest = remaining
    return regions


# ------------------------------------------------------------------------------------------------ relations


def _same_relation(a: Form, g: Form) -> bool:
    if a.kind == g.kind:
        return _both_relations(a, g)
    if is_equation(a):
        value = _stated_value(a)
        return value is not None and (same(value, g) or _rounded(a, g, value))
    if is_equation(g):
        value = _stated_value(g)
        return value is not None and same(a, value)
    return _same_conditions(a, g)


def _both_relations(a: Form, g: Form) -> bool:
    if is_equation(a) != is_equation(g):
        return False
    sides, gold_sides = ([squeeze(part.text) for part in form.parts] for form in (a, g))
    if not is_equation(g):
        alike = a.marks == g.marks and all(
            map(lambda s, t, x, y: s == t or _holds(x, y), sides, gold_sides, a.parts, g.parts)
        )
        return alike or _holds(a, g, _same_real_set) or _same_inequality(a, g)
    if is_name(a.parts[0].text) and sides[0] == gold_sides[0]:
        return same(last_exact(a), last_exact(g))
    return len(sides) == len(gold_sides) == 2 and _proportional(a, g, positive=False)


def _stated_value(relation: Form) -> Form | None:
    """What a chain comes to: what a name is given, or the last exact side when all of them have one value: 7 of
    `14/2 = 7`, 22/7 of `22/7 \\approx 3.14`. Else None."""
    if value := assigned(relation):
        return value
    exact = relation.parts
    if "\\approx" in relation.marks:
        first = relation.marks.index("\\approx")
        if set(relation.marks[first:]) != {"\\approx"}:
            return None
        exact = exact[: first + 1]
    nodes = [read_scalar(side.text).node for side in exact]
    return read_form(exact[-1].text) if all(same_everywhere(nodes[0], node) for node in nodes[1:]) else None


def _rounded(a: Form, g: Form, value: Form) -> bool:
    """`70/9 \\approx 7.78` for a gold 7.78: right when it rounds so."""
    shown = a.parts[-1].text
    if a.marks[-1] != "\\approx" or {value.kind, g.kind} != {"scalar"} or not same_scalar(shown, g.text):
        return False
    x, y = evaluate(read_scalar(value.text).node, 0), read_scalar(shown).node
    if y.kind != "num" or y.value is None:
        return False
    with mpmath.workdps(60):
        half_unit = mpmath.mpf(0.5000001) * mpmath.mpf(10) ** -len(y.name.partition(".")[2])
        return bool(abs(as_mpf(x) - as_mpf(y.value)) <= half_unit)


def _same_named_lists(a: Form, g: Form) -> bool:
    """Lists in which names are given values: x = 1, y = 2."""
    if _has_inequality(a) or _has_inequality(g):
        return _same_conditions(a, g)
    if len(a.parts) != len(g.parts):
        return False
    named = [[squeeze(p.parts[0].text) if p.kind == "relation" else "" for p in form.parts] for form in (a, g)]
    values = [[assigned(p) if p.kind == "relation" else p for p in form.parts] for form in (a, g)]
    names = {re.sub(r"_.*", "", name) for side in named for name in side if name}
    if len(names) > 1 and (a.marks == ("or",)) != (g.marks == ("or",)):
        return False  # x = 1 or y = 2 is not both of them
    if all(named[0]) and all(named[1]) and len(set(named[1])) == len(named[1]):
        return _each_somewhere(a, g)
    left, right = ([value for value in side if value is not None] for side in values)
    if not len(left) == len(right) == len(g.parts):
        return False
    if len(names) > 1:  # x = 1, y = 2 against 1, 2
        return all(map(_holds, left, right))
    return _same_members(Form("list", tuple(left), marks=(",",)), Form("list", tuple(right), marks=(",",)))


def _has_inequality(form: Form) -> bool:
    parts = form.parts if form.kind == "list" else (form,)
    return any(part.kind == "relation" and not is_equation(part) for part in parts)


def _same_conditions(a: Form, g: Form) -> bool:
    """As sets of real numbers, variable by variable; conditions that are none one by one, in any order."""
    sets = [_by_variable(form) for form in (a, g)]
    if all(sets):
        return sets[0] == sets[1]
    lists = a.kind == g.kind == "list" and (a.marks == ("or",)) == (g.marks == ("or",))
    return _holds(a, g, _same_real_set) or (lists and _each_somewhere(a, g))


def _by_variable(form: Form) -> dict[str, tuple[realset.Piece, ...]] | None:
    """`x>0, y>0, x<5`: where each variable may lie; None for anything but conditions on two variables and more."""
    if form.kind != "list" or form.marks[0] == "or":
        return None
    groups: dict[str, list[Form]] = {}
    for part in form.parts:
        where = realset.read(part) if part.kind == "relation" else None
        if where is None:
            return None
        groups.setdefault(squeeze(where.variable), []).append(part)
    sets = {name: realset.read(Form("list", tuple(parts), marks=form.marks)) for name, parts in groups.items()}
    return {name: s.pieces for name, s in sets.items() if s is not None} if len(sets) > 1 else None


def _same_inequality(a: Form, g: Form) -> bool:
    if len(a.marks) != 1 or len(g.marks) != 1:
        return False
    if _FLIPPED.get(a.marks[0]) == g.marks[0]:
        a = Form("relation", a.parts[::-1], marks=g.marks)
    return a.marks == g.marks and _proportional(a, g, positive=a.marks[0] in _FLIPPED)


def _proportional(a: Form, g: Form, *, positive: bool) -> bool:
    """Both relations compare the same f with 0, up to a factor (a positive one for inequalities)."""
    f, h = (_difference(relation) for relation in (a, g))
    if symbols(f) != symbols(h) or not symbols(f):
        return False
    ratio: Any = None
    agreed = 0
    for point in range(NUM_POINTS):
        try:
            x, y = evaluate(f, point), evaluate(h, point)
        except Unreadable:
            continue
        if x == 0 or y == 0:
            return False
        with mpmath.workdps(60):
            exact = isinstance(x, Fraction) and isinstance(y, Fraction)
            quotient = x / y if exact else mpmath.mpc(as_mpf(x)) / as_mpf(y)
        if ratio is not None and not close(quotient, ratio):
            return False
        ratio, agreed = quotient, agreed + 1
    return agreed >= 3 and (not positive or as_mpf(ratio).real > 0)


def _difference(relation: Form) -> Node:
    left, right = (read_scalar(side.text) for side in relation.parts)
    if left.quantity.unit or right.quantity.unit:
        raise Unreadable("a relation between quantities with units")
    return Node("add", (left.node, Node("neg", (right.node,))))


def _same_real_set(a: Form, g: Form) -> bool:
    """Unions, intervals and inequalities in one variable, as sets of real numbers."""
    x, y = realset.read(a), realset.read(g)
    if x is None or y is None:
        unions = {a.kind, g.kind} == {"union"}
        return unions and _same_members(Form("list", a.parts, marks=(",",)), Form("list", g.parts, marks=(",",)))
    return x.pieces == y.pieces and (not x.variable or not y.variable or x.variable == y.variable)
