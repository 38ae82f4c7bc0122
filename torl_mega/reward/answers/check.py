"""Is this answer the gold answer? Pure, deterministic, the same in a main process, a thread and a worker.

    answer, gold ─► normalize ─► same text? ─► same form (list, interval, matrix, relation …) ─► same scalars, by value
                                                    └─ gold of a form not read here ─► math-verify

False positives are worse than false negatives: the policy finds and farms them. So an answer is wrong unless it was
shown right: a prediction that is not understood is wrong whenever the gold one is understood, and only a gold answer
that is not understood is left to math-verify.

`check` asks for mathematical equality. `grade` asks besides that the answer is one: that no arithmetic is left to do
where the gold answer is a number, and that it is not the problem's own expression copied into the box.

Limits: no signal is used and no time limit kept here (`pool.py` kills what takes too long); answers above
MAX_ANSWER_CHARS are wrong unread. Order does not matter in a bare list of values (roots), it does in brackets.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import mpmath

from torl_mega.reward.answers import realset
from torl_mega.reward.answers.expression import NUM_POINTS, close, evaluate, same_everywhere
from torl_mega.reward.answers.family import same_family
from torl_mega.reward.answers.finished import is_finished
from torl_mega.reward.answers.forms import (
    Cases,
    Difference,
    Family,
    Form,
    Items,
    Matrix,
    Ratio,
    Relation,
    Scalar,
    Set,
    Tuple,
    Union,
    assigned,
    is_equation,
    is_name,
    last_exact,
    letters,
    read_form,
    renamed,
)
from torl_mega.reward.answers.normalize import normalize, squeeze
from torl_mega.reward.answers.scalars import (
    as_mpf,
    is_labelled,
    read_scalar,
    same_choice,
    same_scalar,
    same_text,
    text_words,
    with_point,
)
from torl_mega.reward.answers.symbolic import math_verify_grade, second_opinion
from torl_mega.reward.answers.syntax import Node, symbols
from torl_mega.reward.answers.tokens import Unreadable
from torl_mega.reward.extract import extract_answer

__all__ = ["check", "extract_answer", "grade", "is_finished", "is_understood", "warm_up"]

MAX_ANSWER_CHARS = 1000


def check(answer: str, gold: str) -> bool:
    """Whether `answer` states the same as `gold`. Never raises for what a string holds, but may take long or much memory."""
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return False
    a, g = normalize(answer), normalize(gold)
    if not a or not g:
        return False
    if same_text(a, g) or same_choice(a, g):
        return True
    form, gold_form = _readable(_constants_as_in(a, g)), _readable(_constants_as_in(g, a))
    if form is None or gold_form is None:
        return _without_reading(answer, gold, gold_form)
    try:
        return _same(form, gold_form) or _list_of_grouped(form, g)
    except Unreadable:
        return False


def _constants_as_in(text: str, other: str) -> str:
    """sympy's `I` and `E` as i and e where the other side writes these; E alone is a letter to choose."""
    for printed, constant in (("I", "i"), ("E", "e")):
        if printed in text and constant in other and text.strip("() ") != "E":
            own, others = letters(text), letters(other)
            if printed in own and constant not in own and constant in others and printed not in others:
                text = renamed(text, printed, constant)
    return text


def _without_reading(answer: str, gold: str, gold_form: Form | None) -> bool:
    """One of both is not read. A gold answer that is read must be an expression with variables to be asked about."""
    if gold_form is None:
        return not is_labelled(normalize(gold)) and second_opinion(answer, gold)
    node = read_scalar(gold_form.text).node if isinstance(gold_form, Scalar) and not _is_infinite(gold_form) else None
    return node is not None and bool(symbols(node)) and second_opinion(answer, gold, node)


def grade(answer: str, gold: str, problem: str = "") -> bool:
    """What the reward asks: right, and really an answer to `problem`."""
    return len(answer) <= MAX_ANSWER_CHARS and is_finished(answer, gold, problem) and check(answer, gold)


CHECKERS = {"own": grade, "math_verify": math_verify_grade}  # for `reward.checker`


def is_understood(gold: str) -> bool:
    """Whether a gold answer is read here: a value, list, interval, matrix or relation, a few words, or a choice letter."""
    text = normalize(gold)
    if not text or len(gold) > MAX_ANSWER_CHARS:
        return False
    return _readable(text) is not None or 1 <= len(text_words(text).split()) <= 4


def warm_up() -> None:
    """Pays for imports and parser tables once, before workers are forked."""
    for text in ("5", "\\frac{3}{4}", "(-\\infty,2)\\cup(3,\\infty)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "y=2x+3"):
        check(text, "1+x")
        math_verify_grade(text, text)
    second_opinion("\\sum_{k=1}^{n} k", "\\sum_{k=1}^{n} k")


# ------------------------------------------------------------------------------------------------ forms


def _readable(text: str) -> Form | None:
    """The form of a normalised answer; None where it or a scalar in it is not read."""
    try:
        form = read_form(text)
        check_readable(form)
    except Unreadable:
        return None
    return form


def check_readable(form: Form) -> None:
    """Raises Unreadable when a scalar of the form is not an expression."""
    if isinstance(form, Scalar):
        if not _is_infinite(form):
            read_scalar(form.text)
    elif isinstance(form, Relation):
        for side in form.sides:
            if not is_name(side):
                side_form = read_form(side)
                if side_form != form:
                    check_readable(side_form)
    elif isinstance(form, Cases):
        for value, _ in form.rows:
            read_scalar(value)
    else:
        for part in _parts(form):
            check_readable(part)


def _is_infinite(form: Scalar) -> bool:
    return form.text.replace(" ", "").lstrip("+-") == "\\infty" or _is_all_reals(form)


def _is_all_reals(form: Form) -> bool:
    return isinstance(form, Scalar) and form.text.replace(" ", "") == "\\mathbb{R}"


def _parts(form: Form) -> tuple[Form, ...]:
    if isinstance(form, Union | Ratio):
        return form.parts
    if isinstance(form, Difference):
        return (form.left, form.right)
    if isinstance(form, Family):
        return (form.body,)
    if isinstance(form, Matrix):
        return tuple(cell for row in form.rows for cell in row)
    assert isinstance(form, Items | Tuple | Set)
    return form.items


def _same(a: Form, g: Form) -> bool:
    """Whether the prediction's form `a` states the same as the gold form `g`."""
    if isinstance(a, Scalar) and isinstance(g, Scalar):
        return same_scalar(a.text, g.text)
    if isinstance(a, Items) and isinstance(g, Scalar | Relation):
        pointed = with_point(a.text, g.text if isinstance(g, Scalar) else g.sides[-1])
        if pointed is not None:
            return _same(read_form(pointed), g)
    if isinstance(a, Relation) or isinstance(g, Relation):
        return _same_relation(a, g)
    if isinstance(a, Family) or isinstance(g, Family):
        return isinstance(a, Family) and isinstance(g, Family) and same_family(a, g, _same)
    if isinstance(a, Cases) or isinstance(g, Cases):
        return isinstance(a, Cases) and isinstance(g, Cases) and _same_cases(a, g)
    if isinstance(a, Matrix) or isinstance(g, Matrix):
        return _same_matrix(a, g)
    if _has_inequality(a) or _has_inequality(g):
        return _same_conditions(a, g)
    if isinstance(a, Tuple) and isinstance(g, Tuple):
        return _same_tuple(a, g) or _same_listed_by_program(a, g)
    if isinstance(a, Ratio) or isinstance(g, Ratio):
        return isinstance(a, Ratio) and isinstance(g, Ratio) and _same_in_order(a.parts, g.parts)
    if isinstance(a, Union | Difference) or isinstance(g, Union | Difference) or _is_all_reals(a) or _is_all_reals(g):
        return _same_real_set(a, g)
    if isinstance(a, Tuple) or isinstance(g, Tuple):
        return _bare_for_tuple(a, g) or _same_listed_by_program(a, g)
    return _same_items(a, g)


def _same_matrix(a: Form, g: Form) -> bool:
    rows, gold_rows = _rows(a), _rows(g)
    if rows is None or gold_rows is None:
        return False
    return len(rows) == len(gold_rows) and all(_same_in_order(r, s) for r, s in zip(rows, gold_rows, strict=True))


def _rows(form: Form) -> tuple[tuple[Form, ...], ...] | None:
    """The rows of a matrix, also of one printed as a list of lists."""
    if isinstance(form, Matrix):
        return form.rows
    if not isinstance(form, Tuple) or form.opening != "[":
        return None
    rows = [row.items if isinstance(row, Tuple) else (row,) for row in form.items]
    nested = all(isinstance(row, Tuple) and row.opening == "[" for row in form.items)
    single = all(isinstance(row, Scalar) and row.text.startswith("[") for row in form.items)  # a column
    return tuple(rows) if nested or single else None


def _same_tuple(a: Tuple, g: Tuple) -> bool:
    if len(a.items) != len(g.items):
        return False
    if len(g.items) == 2 and (a.opening, a.closing) != (g.opening, g.closing):
        return False
    if all(isinstance(item, Relation) for item in (*a.items, *g.items)):
        return _same_relation_lists(Items(a.items), Items(g.items))
    return _same_in_order(tuple(_rhs(x) for x in a.items), tuple(_rhs(x) for x in g.items))


def _same_in_order(a: tuple[Form, ...], g: tuple[Form, ...]) -> bool:
    return len(a) == len(g) and all(_same(x, y) for x, y in zip(a, g, strict=True))


def _rhs(form: Form) -> Form:
    """`x = 3` inside a tuple is 3."""
    if isinstance(form, Relation) and set(form.operators) == {"="} and is_name(form.sides[0]):
        return read_form(form.sides[-1])
    return form


def _same_listed_by_program(a: Form, g: Form) -> bool:
    """`[3, -1]` and `[(1, 2), (2, 1)]` of a solver for the same values in a row; two rising ends may be an interval."""
    if not isinstance(a, Tuple) or (a.opening, a.closing) != ("[", "]"):
        return False
    listed = isinstance(g, Items) or len(a.items) == 1
    return listed and realset.read(a, _endpoint) is None and _same_items(Items(a.items), g)


def _bare_for_tuple(a: Form, g: Form) -> bool:
    """`1, 2` for `(1, 2)` and the other way, in order; braces are a set and never a tuple."""
    items = [form for form in (a, g) if isinstance(form, Items)]
    pair = [form for form in (a, g) if isinstance(form, Tuple)]
    if not items or (pair[0].opening, pair[0].closing) not in (("(", ")"), ("[", "]")) or items[0].joint == "or":
        return False
    if pair[0].opening == "[" and len(pair[0].items) == 2:
        return False
    return _same_in_order(tuple(_rhs(x) for x in _parts(a)), tuple(_rhs(y) for y in _parts(g)))


def _same_items(a: Form, g: Form) -> bool:
    """Without order; a list has each value as often as the other, two sets have the same members. One thing alone is a
    list or set of one."""
    if isinstance(a, Items) and isinstance(g, Items) and (_relations(a) or _relations(g)):
        return _same_relation_lists(a, g)
    left, right = (list(_parts(form)) if isinstance(form, Items | Set) else [form] for form in (a, g))
    if isinstance(a, Set) and isinstance(g, Set):
        left, right = _distinct(left), _distinct(right)
    if len(left) != len(right):
        return False
    for gold in right:
        match = next((x for x in left if _try_same(x, gold)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _distinct(forms: list[Form]) -> list[Form]:
    kept: list[Form] = []
    for form in forms:
        if not any(_try_same(form, other) for other in kept):
            kept.append(form)
    return kept


def _try_same(a: Form, g: Form) -> bool:
    try:
        return _same(a, g)
    except Unreadable:
        return False


def _relations(form: Items) -> bool:
    return any(isinstance(item, Relation) for item in form.items)


def _list_of_grouped(form: Form, g: str) -> bool:
    """Gold `100,200` may be a list after all when the prediction is one."""
    if "," not in g or not isinstance(form, Items) or isinstance(read_form(g), Items):
        return False
    return _same(form, read_form(g.replace(",", ", ")))


def _same_cases(a: Cases, g: Cases) -> bool:
    """Functions by cases: the same value on the same set of numbers, in any order of the rows."""
    left, right = _regions(a), _regions(g)
    return len(left) == len(right) and all(
        any(x[0] == y[0] and _try_same(Scalar(x[1]), Scalar(y[1])) for x in left) for y in right
    )


def _regions(form: Cases) -> list[tuple[realset.RealSet, str]]:
    """Where each row holds, without the rows before it."""
    regions, before, variable = [], realset.RealSet(()), ""
    for value, condition in form.rows:
        where = realset.ALL if condition == "otherwise" else realset.read(read_form(condition), _endpoint)
        if where is None or (where.variable and variable and where.variable != variable):
            raise Unreadable("a case that is no set of numbers in one variable")
        variable = variable or where.variable
        regions.append((realset.RealSet(realset.without(where, before).pieces), value))
        before = realset.either(before, where)
    return regions


# ------------------------------------------------------------------------------------------------ relations


def _same_relation(a: Form, g: Form) -> bool:
    if isinstance(a, Items) and isinstance(g, Items):
        return _same_relation_lists(a, g)
    if isinstance(a, Relation) and isinstance(g, Relation):
        return _both_relations(a, g)
    if isinstance(a, Relation) and is_equation(a):
        value = _stated_value(a)
        return value is not None and _approximations_agree(a, g, value)
    if isinstance(g, Relation) and is_equation(g):
        value = _stated_value(g)
        return value is not None and _same(a, value)
    return _same_conditions(a, g)


def _both_relations(a: Relation, g: Relation) -> bool:
    if is_equation(a) != is_equation(g):
        return False
    if not is_equation(g):
        return _same_sides(a, g) or _try_real_set(a, g) or _same_inequality(a, g)
    if is_name(a.sides[0]) and is_name(g.sides[0]):
        same_name = squeeze(a.sides[0]) == squeeze(g.sides[0])
        if same_name:
            return _same(last_exact(a), last_exact(g))
    return len(a.sides) == len(g.sides) == 2 and _proportional(a, g, positive=False)


def _same_sides(a: Relation, g: Relation) -> bool:
    return a.operators == g.operators and all(
        squeeze(x) == squeeze(y) or _try_same(Scalar(x), Scalar(y)) for x, y in zip(a.sides, g.sides, strict=True)
    )


def _stated_value(relation: Relation) -> Form | None:
    """What a chain comes to: what a name is given, or the one value of all its exact sides. Else None."""
    return assigned(relation) or _common_value(relation)


def _common_value(relation: Relation) -> Form | None:
    """The last exact side when all of them have one value: 7 of `14/2 = 7`, 22/7 of `22/7 \\approx 3.14`."""
    exact = relation.sides
    if "\\approx" in relation.operators:
        first = relation.operators.index("\\approx")
        if set(relation.operators[first:]) != {"\\approx"}:
            return None
        exact = exact[: first + 1]
    nodes = [read_scalar(side).node for side in exact]
    consistent = all(same_everywhere(nodes[0], node) for node in nodes[1:])
    return read_form(exact[-1]) if consistent else None


def _approximations_agree(a: Relation, g: Form, value: Form) -> bool:
    if _same(value, g):
        return True
    if a.operators[-1] != "\\approx" or not isinstance(value, Scalar) or not isinstance(g, Scalar):
        return False
    shown = read_form(a.sides[-1])  # 70/9 \approx 7.78 for a gold 7.78: right when it rounds so
    return isinstance(shown, Scalar) and same_scalar(shown.text, g.text) and _rounds_to(value.text, shown.text)


def _rounds_to(exact: str, shown: str) -> bool:
    x, y = evaluate(read_scalar(exact).node, 0), read_scalar(shown).node
    if y.kind != "num" or y.value is None:
        return False
    with mpmath.workdps(60):
        half_unit = mpmath.mpf(0.5000001) * mpmath.mpf(10) ** -len(y.name.partition(".")[2])
        return bool(abs(as_mpf(x) - as_mpf(y.value)) <= half_unit)


def _same_relation_lists(a: Items, g: Items) -> bool:
    """Lists in which names are given values: x = 1, y = 2."""
    if _has_inequality(a) or _has_inequality(g):
        return _same_conditions(a, g)
    if len(a.items) != len(g.items):
        return False
    named = [[i.sides[0] if isinstance(i, Relation) else "" for i in form.items] for form in (a, g)]
    if all(named[0]) and all(named[1]) and len({squeeze(n) for n in named[1]}) == len(named[1]):
        return all(any(_try_same(x, y) for x in a.items) for y in g.items)
    values = [[_value_of(i) for i in form.items] for form in (a, g)]
    if any(v is None for side in values for v in side):
        return False
    names = {squeeze(re.sub(r"_.*", "", n)) for side in named for n in side if n}
    plain = [[v for v in side if v is not None] for side in values]
    if len(names) > 1:  # x = 1, y = 2 against 1, 2
        return all(_try_same(x, y) for x, y in zip(*plain, strict=True))
    return _same_items(Items(tuple(plain[0])), Items(tuple(plain[1])))


def _has_inequality(form: Form) -> bool:
    parts = form.items if isinstance(form, Items) else (form,)
    return any(isinstance(part, Relation) and not is_equation(part) for part in parts)


def _same_conditions(a: Form, g: Form) -> bool:
    """As sets of real numbers, variable by variable; conditions that are none one by one, in any order."""
    sets = [_by_variable(form) for form in (a, g)]
    if all(sets):
        return sets[0] == sets[1]
    if _try_real_set(a, g):
        return True
    if (
        not isinstance(a, Items)
        or not isinstance(g, Items)
        or a.joint == "or" != g.joint
        or len(a.items) != len(g.items)
    ):
        return False
    return all(any(_try_same(x, y) for x in a.items) for y in g.items)


def _by_variable(form: Form) -> dict[str, tuple[realset.Piece, ...]] | None:
    """`x>0, y>0, x<5`: where each variable may lie; None for anything but conditions on two variables and more."""
    if not isinstance(form, Items) or form.joint == "or":
        return None
    groups: dict[str, list[Form]] = {}
    for item in form.items:
        where = realset.read(item, _endpoint) if isinstance(item, Relation) else None
        if where is None:
            return None
        groups.setdefault(squeeze(where.variable), []).append(item)
    sets = {name: realset.read(Items(tuple(items), form.joint), _endpoint) for name, items in groups.items()}
    return {name: s.pieces for name, s in sets.items() if s is not None} if len(sets) > 1 else None


def _value_of(form: Form) -> Form | None:
    return assigned(form) if isinstance(form, Relation) else form


def _proportional(a: Relation, g: Relation, *, positive: bool) -> bool:
    """Both equations say f = 0 with the same f up to a factor (a positive one for inequalities)."""
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
        quotient = x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else _div(x, y)
        if ratio is not None and not close(quotient, ratio):
            return False
        ratio, agreed = quotient, agreed + 1
    return agreed >= 3 and (not positive or as_mpf(ratio).real > 0)


def _div(x: Any, y: Any) -> Any:
    with mpmath.workdps(60):
        return mpmath.mpc(as_mpf(x)) / as_mpf(y)


def _difference(relation: Relation) -> Node:
    left, right = (read_scalar(side).node for side in relation.sides)
    return Node("add", (left, Node("neg", (right,))))


def _same_inequality(a: Relation, g: Relation) -> bool:
    if len(a.operators) != 1 or len(g.operators) != 1:
        return False
    flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
    if a.operators[0] == g.operators[0]:
        return _proportional(a, g, positive=a.operators[0] in flipped)
    if flipped.get(a.operators[0]) == g.operators[0]:
        return _proportional(Relation((a.sides[1], a.sides[0]), g.operators), g, positive=True)
    return False


def _same_real_set(a: Form, g: Form) -> bool:
    """Unions, intervals and inequalities in one variable, as sets of real numbers."""
    x, y = realset.read(a, _endpoint), realset.read(g, _endpoint)
    if x is None or y is None:
        return isinstance(a, Union) and isinstance(g, Union) and _same_items(Items(a.parts), Items(g.parts))
    if x.variable and y.variable and x.variable != y.variable:
        return False
    return x.pieces == y.pieces


def _try_real_set(a: Form, g: Form) -> bool:
    try:
        return _same_real_set(a, g)
    except Unreadable:
        return False


def _endpoint(text: str) -> Any:
    """A real endpoint as a number rounded to 40 digits, so that equal ones compare equal."""
    node = read_scalar(text).node
    if symbols(node):
        raise Unreadable("an endpoint with a variable in it")
    value = evaluate(node, 0)
    if isinstance(value, Fraction):
        return value
    with mpmath.workdps(45):
        if abs(value.imag) > mpmath.mpf(10) ** -40:
            raise Unreadable("an endpoint that is not real")
        if abs(value) >= 10**20:
            raise Unreadable("an endpoint too large to round")
        return Fraction(str(mpmath.nstr(value.real, 40, strip_zeros=False)))
