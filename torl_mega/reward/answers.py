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

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from torl_mega.reward import realset
from torl_mega.reward.expression import (
    Node,
    Unreadable,
    close,
    evaluate,
    has_decimal,
    parse,
    same_everywhere,
    symbols,
)
from torl_mega.reward.extract import extract_answer
from torl_mega.reward.normalize import Quantity, normalize, split_unit, squeeze
from torl_mega.reward.structure import Difference, Form, Items, Matrix, Relation, Scalar, Set, Tuple, Union, read_form

__all__ = ["check", "extract_answer", "grade", "is_finished", "warm_up"]

MAX_ANSWER_CHARS = 1000
_NAME = re.compile(
    r"\(?\s*(?:\\(?:angle|triangle|overline|vec|mathbf|text|measuredangle|Delta)?\s*\{?)?[A-Za-z\\|][A-Za-z0-9_{}'|:\\ ]{0,16}"
    r"(?:\([A-Za-z0-9_+\-, ]{0,12}\))?(?:\s*,\s*[A-Za-z]){0,3}\s*\)?",
    re.ASCII,
)


def check(answer: str, gold: str) -> bool:
    """Whether `answer` states the same as `gold`. Never raises for what a string holds, but may take long or much memory."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    a, g = normalize(answer), normalize(gold)
    if not a or not g:
        return False
    if _same_text(a, g) or _same_choice(a, g) or _decimal_comma(a, g):
        return True
    try:
        gold_form = read_form(g)
        _probe(gold_form)
    except Unreadable:
        return _math_verify(answer, gold)
    try:
        return _same(read_form(a), gold_form) or _list_of_grouped(a, g)
    except Unreadable:
        return False


def grade(answer: str, gold: str, problem: str = "") -> bool:
    """What the reward asks: right, and really an answer to `problem`."""
    return is_finished(answer, gold, problem) and check(answer, gold)


def warm_up() -> None:
    """Pays for imports and parser tables once, before workers are forked."""
    for text in ("5", "\\frac{3}{4}", "(-\\infty,2)\\cup(3,\\infty)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "y=2x+3"):
        check(text, "1+x")
        _math_verify(text, "\\sum_{k=1}^{n} k")


# ------------------------------------------------------------------------------------------------ text


def _same_text(a: str, g: str) -> bool:
    if squeeze(a) == squeeze(g):
        return True
    words = _words(a)
    return bool(words) and words == _words(g) and ("\\text" in a + g or len(max(words.split(), key=len)) > 3)


def _words(text: str) -> str:
    """A textual answer (`\\text{Evelyn}`, even) as lower-case words; empty for anything with mathematics in it."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip().strip("\"'.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z',.\- ]*", plain) or not re.search(r"[A-Za-z]{2}", plain):
        return ""
    return " ".join(re.sub(r"[,.\-]", " ", plain).lower().split()).removeprefix("the ")


def _same_choice(a: str, g: str) -> bool:
    """Gold (C) or C: the letter alone, or with what it stands for behind it, `(C) 12`."""
    gold = re.fullmatch(r"\(?\s*([A-H])\s*\)?", g)
    if gold is None:
        return False
    found = re.match(r"\(\s*([A-Z])\s*\)(?:\s|$)|([A-Z])\s*\)(?:\s|$)|([A-Z])(?:[.:](?:\s|$)|$)", a)
    return found is not None and gold[1] in found.groups()


# ------------------------------------------------------------------------------------------------ forms


def _probe(form: Form) -> None:
    """Raises Unreadable when a scalar of the gold answer cannot be evaluated."""
    if isinstance(form, Scalar):
        _Scalar.read(form.text)
    elif isinstance(form, Relation):
        for side in form.sides:
            if not _is_name(side):
                side_form = read_form(side)
                if side_form != form:
                    _probe(side_form)
    elif isinstance(form, Matrix):
        for cell in (c for row in form.rows for c in row):
            _probe(cell)
    else:
        for part in _parts(form):
            _probe(part)


def _parts(form: Form) -> tuple[Form, ...]:
    if isinstance(form, Union):
        return form.parts
    if isinstance(form, Difference):
        return (form.left, form.right)
    assert isinstance(form, Items | Tuple | Set)
    return form.items


def _same(a: Form, g: Form) -> bool:
    """Whether the prediction's form `a` states the same as the gold form `g`."""
    if isinstance(a, Scalar) and isinstance(g, Scalar):
        return _same_scalar(a.text, g.text)
    if isinstance(a, Matrix) or isinstance(g, Matrix):
        return isinstance(a, Matrix) and isinstance(g, Matrix) and _same_matrix(a, g)
    if isinstance(a, Relation) or isinstance(g, Relation):
        return _same_relation(a, g)
    if isinstance(a, Tuple) and isinstance(g, Tuple):
        return _same_tuple(a, g)
    if isinstance(a, Union | Difference) or isinstance(g, Union | Difference):
        return _same_real_set(a, g)
    if isinstance(a, Tuple) or isinstance(g, Tuple):
        return _bare_for_tuple(a, g)
    return _same_items(a, g)


def _same_matrix(a: Matrix, g: Matrix) -> bool:
    return len(a.rows) == len(g.rows) and all(
        len(r) == len(s) and all(_same(x, y) for x, y in zip(r, s, strict=True))
        for r, s in zip(a.rows, g.rows, strict=True)
    )


def _same_tuple(a: Tuple, g: Tuple) -> bool:
    if len(a.items) != len(g.items):
        return False
    if len(g.items) == 2 and (a.opening, a.closing) != (g.opening, g.closing):
        return False
    return all(_same(_rhs(x), y) for x, y in zip(a.items, g.items, strict=True))


def _rhs(form: Form) -> Form:
    """`x = 3` inside a tuple is 3."""
    if isinstance(form, Relation) and set(form.operators) == {"="} and _is_name(form.sides[0]):
        return read_form(form.sides[-1])
    return form


def _bare_for_tuple(a: Form, g: Form) -> bool:
    """`1, 2` for `(1, 2)` and the other way, in order; braces are a set and never a tuple."""
    items = [form for form in (a, g) if isinstance(form, Items)]
    pair = [form for form in (a, g) if isinstance(form, Tuple)]
    if not items or (pair[0].opening, pair[0].closing) not in (("(", ")"), ("[", "]")) or items[0].joint == "or":
        return False
    if pair[0].opening == "[" and len(pair[0].items) == 2:
        return False
    return len(items[0].items) == len(pair[0].items) and all(
        _same(_rhs(x), _rhs(y)) for x, y in zip(_parts(a), _parts(g), strict=True)
    )


def _same_items(a: Form, g: Form) -> bool:
    """Without order and repeats. One thing alone is a list or set of one."""
    if isinstance(a, Items) and isinstance(g, Items) and (_relations(a) or _relations(g)):
        return _same_relation_lists(a, g)
    left, right = (
        _distinct(_parts(a) if isinstance(a, Items | Set) else (a,)),
        _distinct(_parts(g) if isinstance(g, Items | Set) else (g,)),
    )
    if len(left) != len(right):
        return False
    rest = list(left)
    for gold in right:
        match = next((x for x in rest if _try_same(x, gold)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _distinct(forms: tuple[Form, ...]) -> list[Form]:
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


def _list_of_grouped(a: str, g: str) -> bool:
    """Gold `100,200` may be a list after all when the prediction is one."""
    if "," not in g or not isinstance(read_form(a), Items) or isinstance(read_form(g), Items):
        return False
    return _same(read_form(a), read_form(g.replace(",", ", ")))


# ------------------------------------------------------------------------------------------------ relations


def _is_name(text: str) -> bool:
    """Something that a value is given to: x, x_1, f(x), AB, \\angle ABC, |AB|, (x, y), A:B."""
    return _NAME.fullmatch(text.strip()) is not None and not re.search(r"\\(?:frac|sqrt|pi|sin|cos|tan|log|ln)", text)


def _same_relation(a: Form, g: Form) -> bool:
    if isinstance(a, Items) and isinstance(g, Items):
        return _same_relation_lists(a, g)
    if isinstance(a, Relation) and isinstance(g, Relation):
        return _both_relations(a, g)
    if isinstance(a, Relation) and _is_equation(a):
        value = _stated_value(a)
        return value is not None and _approximations_agree(a, g, value)
    if isinstance(g, Relation) and _is_equation(g):
        value = _assigned(g)
        return value is not None and _same(a, value)
    return _same_real_set(a, g)


def _is_equation(relation: Relation) -> bool:
    return set(relation.operators) <= {"=", "\\approx", "\\equiv"}


def _both_relations(a: Relation, g: Relation) -> bool:
    if _is_equation(a) != _is_equation(g):
        return False
    if not _is_equation(g):
        return _same_sides(a, g) or _try_real_set(a, g) or _same_inequality(a, g)
    if _is_name(a.sides[0]) and _is_name(g.sides[0]):
        same_name = squeeze(a.sides[0]) == squeeze(g.sides[0])
        if same_name:
            return _same(_last_exact(a), _last_exact(g))
    return len(a.sides) == len(g.sides) == 2 and _proportional(a, g, positive=False)


def _same_sides(a: Relation, g: Relation) -> bool:
    return a.operators == g.operators and all(
        squeeze(x) == squeeze(y) or _try_same(Scalar(x), Scalar(y)) for x, y in zip(a.sides, g.sides, strict=True)
    )


def _last_exact(relation: Relation) -> Form:
    """The last side before an approximation: 1/3 of `x = 5/15 = 1/3 \\approx 0.33`."""
    sides = relation.sides
    if "\\approx" in relation.operators and relation.operators[0] != "\\approx":
        sides = sides[: relation.operators.index("\\approx") + 1]
    return read_form(sides[-1])


def _assigned(relation: Relation) -> Form | None:
    """What a name is given in the gold answer; None for an equation such as `2x + z = 1`."""
    return _last_exact(relation) if _is_name(relation.sides[0]) else None


def _stated_value(relation: Relation) -> Form | None:
    """What a prediction's chain comes to: after a name, or when all its exact sides have one value. Else None."""
    if _is_name(relation.sides[0]):
        return _last_exact(relation)
    exact = relation.sides
    if "\\approx" in relation.operators:
        exact = exact[: relation.operators.index("\\approx") + 1]
    nodes = [_Scalar.read(side).node for side in exact]
    consistent = all(same_everywhere(nodes[0], node) for node in nodes[1:])
    return read_form(exact[-1]) if consistent else None


def _approximations_agree(a: Relation, g: Form, value: Form) -> bool:
    if _same(value, g):
        return True
    if a.operators[-1] != "\\approx" or not isinstance(value, Scalar) or not isinstance(g, Scalar):
        return False
    shown = read_form(a.sides[-1])  # 70/9 \approx 7.78 for a gold 7.78: right when it rounds so
    return isinstance(shown, Scalar) and _same_scalar(shown.text, g.text) and _rounds_to(value.text, shown.text)


def _rounds_to(exact: str, shown: str) -> bool:
    x, y = evaluate(_Scalar.read(exact).node, 0), _Scalar.read(shown).node
    digits = len(y.name.partition(".")[2]) if y.kind == "num" else 0
    return (
        y.kind == "num"
        and y.value is not None
        and abs(complex(_complex(x)) - float(y.value)) <= 0.5000001 * 10.0**-digits
    )


def _complex(x: Any) -> complex:
    return complex(float(x)) if isinstance(x, Fraction) else complex(x)


def _same_relation_lists(a: Items, g: Items) -> bool:
    """Lists in which names are given values: x = 1, y = 2."""
    if any(isinstance(i, Relation) and not _is_equation(i) for i in (*a.items, *g.items)):
        return _same_real_set(a, g)
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


def _value_of(form: Form) -> Form | None:
    return _assigned(form) if isinstance(form, Relation) else form


def _proportional(a: Relation, g: Relation, *, positive: bool) -> bool:
    """Both equations say f = 0 with the same f up to a factor (a positive one for inequalities)."""
    f, h = (_difference(relation) for relation in (a, g))
    if symbols(f) != symbols(h) or not symbols(f):
        return False
    ratio: Any = None
    agreed = 0
    for point in range(6):
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
    return agreed >= 3 and (not positive or _complex(ratio).real > 0)


def _div(x: Any, y: Any) -> Any:
    import mpmath

    with mpmath.workdps(60):
        return mpmath.mpc(_mp(x)) / _mp(y)


def _mp(x: Any) -> Any:
    import mpmath

    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def _difference(relation: Relation) -> Node:
    left, right = (_Scalar.read(side).node for side in relation.sides)
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
    node = _Scalar.read(text).node
    if symbols(node):
        raise Unreadable("an endpoint with a variable in it")
    value = evaluate(node, 0)
    if isinstance(value, Fraction):
        return value
    import mpmath

    with mpmath.workdps(45):
        if abs(value.imag) > mpmath.mpf(10) ** -40:
            raise Unreadable("an endpoint that is not real")
        return (
            Fraction(mpmath.nstr(value.real, 40, strip_zeros=False).replace("+", "")) if abs(value) < 10**20 else None
        )


# ------------------------------------------------------------------------------------------------ scalars


class _Scalar:
    """A scalar's value and its unit."""

    __slots__ = ("node", "quantity")

    def __init__(self, node: Node, quantity: Quantity) -> None:
        self.node, self.quantity = node, quantity

    @staticmethod
    @lru_cache(maxsize=4096)
    def read(text: str) -> _Scalar:
        text = text.strip()
        quantity = split_unit(text)
        try:
            node = parse(quantity.body)
        except Unreadable:
            node, quantity = parse(text), Quantity(text, "", False)
        if quantity.scale:
            node = Node("mul", (node, Node("num", name=str(10**quantity.scale), value=Fraction(10**quantity.scale))))
        return _Scalar(node, quantity)


def _same_scalar(a: str, g: str) -> bool:
    if _same_text(a, g) or squeeze(a).removeprefix("+") == squeeze(g).removeprefix("+"):
        return True
    x, y = _Scalar.read(a), _Scalar.read(g)
    unit, gold_unit = x.quantity.unit, y.quantity.unit
    if unit and gold_unit and unit != gold_unit and x.quantity.known and y.quantity.known:
        return False
    if _equal(x.node, y.node):
        return True
    if (unit == "percent") != (gold_unit == "percent"):
        hundred = Node("num", name="100", value=Fraction(100))
        left = Node("div", (x.node, hundred)) if unit == "percent" else x.node
        right = Node("div", (y.node, hundred)) if gold_unit == "percent" else y.node
        return _equal(left, right)
    return False


def _decimal_comma(a: str, g: str) -> bool:
    """`2,74` for 2.74: only when the other side is written as that very decimal."""
    pairs = ((a, g), (g, a))
    return any(
        re.fullmatch(r"-?[0-9]+,[0-9]+", comma) is not None and comma.replace(",", ".") == point
        for comma, point in pairs
    )


def _equal(a: Node, g: Node) -> bool:
    if symbols(a) != symbols(g) and not (symbols(a) and symbols(g)):
        return False
    if same_everywhere(a, g):
        return True
    return (has_decimal(a) or has_decimal(g)) and not symbols(g) and not symbols(a) and _approximately(a, g)


def _approximately(a: Node, g: Node) -> bool:
    """A decimal for an exact value: the same to 6 decimals and 5 significant digits (math-verify rounds to 6 decimals).

    A gold answer that is itself a short exact number must be hit to 9 digits: 4.999999999 is 5, 4.9999995 is not.
    """
    x, y = _complex(evaluate(a, 0)), _complex(evaluate(g, 0))
    exact = evaluate(g, 0)
    short = isinstance(exact, Fraction) and 10**6 % exact.denominator == 0
    limit = 1e-9 * max(1.0, abs(y)) if short else 5e-7
    return abs(x - y) <= min(limit, 1e-5 * abs(y))


# ------------------------------------------------------------------------------------------------ is it an answer?


def is_finished(answer: str, gold: str, problem: str = "") -> bool:
    """False for a box that leaves the work to the grader.

    Where the gold answer is a rational number: no sums, products of plain numbers, roots or functions (`37*45-12`);
    powers, factorials, fractions and their products stay allowed. And never an expression that stands in the problem
    itself (`\\sqrt{117}`, `(x+2)(x+3)`) unless it is the gold answer to the letter.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    a, g = normalize(answer), normalize(gold)
    if _same_text(a, g):
        return True
    try:
        node, gold_node = _value_node(a), _value_node(g)
    except Unreadable:
        return True  # lists, intervals, text: nothing to work out
    if _is_rational_literal(gold_node) and not _is_closed_form(node):
        return False
    return not (
        _size(node) >= 3 and not _is_rational_literal(node) and squeeze(a) in squeeze(normalize(problem[:20_000]))
    )


def _value_node(text: str) -> Node:
    form = read_form(text)
    if isinstance(form, Relation) and _is_equation(form):
        form = _last_exact(form)
    if not isinstance(form, Scalar):
        raise Unreadable("not a scalar")
    return _Scalar.read(form.text).node


def _is_rational_literal(node: Node) -> bool:
    if node.kind == "neg":
        return _is_rational_literal(node.args[0])
    if node.kind == "div":
        return all(_is_rational_literal(a) and a.kind != "div" for a in node.args)
    return node.kind in ("num", "mixed")


def _is_closed_form(node: Node) -> bool:
    if node.kind in ("num", "mixed"):
        return True
    if node.kind == "neg":
        return _is_closed_form(node.args[0])
    if node.kind == "div":
        return all(_is_closed_form(a) for a in node.args)
    if node.kind == "pow":
        return all(_is_rational_literal(a) for a in node.args)
    if node.kind == "fn":
        return node.name in ("factorial", "binom") and all(_is_rational_literal(a) for a in node.args)
    if node.kind == "mul":  # 2^3 * 5 and 1.2 * 10^5, but not 37 * 45
        return all(_is_closed_form(a) for a in node.args) and any(_has_power(a) for a in node.args)
    return False


def _has_power(node: Node) -> bool:
    return node.kind in ("pow", "fn") or any(_has_power(a) for a in node.args)


def _size(node: Node) -> int:
    return 1 + sum(_size(a) for a in node.args)


# ------------------------------------------------------------------------------------------------ math-verify


def _math_verify(answer: str, gold: str) -> bool:
    """For gold answers of a form that is not read here: sums, set builders, named functions."""
    if len(gold) > MAX_ANSWER_CHARS:
        return False
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed_gold, parsed = _parse_sympy(gold), _parse_sympy(answer)
    return bool(parsed_gold and parsed and verify(parsed_gold, parsed, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse_sympy(text: str) -> Any:
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex

    config = LatexExtractionConfig(boxed_match_priority=0)
    return parse_latex(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
