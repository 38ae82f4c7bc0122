"""Is a box an answer, or does it leave the work to the grader? What the policy would find and farm if it were let through."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction

from torl_mega.reward.answers.expression import at_full_precision, evaluate
from torl_mega.reward.answers.forms import Form, assigned, is_equation, is_name, last_exact, read_form
from torl_mega.reward.answers.normalize import normalize
from torl_mega.reward.answers.scalars import letters_as_unit, read_scalar, same_scalar, same_text, without_label
from torl_mega.reward.answers.syntax import Node, Unreadable, parse, symbols

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_FORMULA_ENDS = re.compile(r"\$+|\\[()\[\]]|\n")
_BEFORE = r"(?:^|(?<![\\A-Za-z])[A-Za-z]{2,}[:,]?\s+|[:=]\s*)"
_AFTER = r"\s*(?:$|[.,;:?!](?:\s|$)|=|(?<=\s)[A-Za-z]{2})"


def is_finished(answer: str, gold: str, problem: str = "") -> bool:
    """False for a box that leaves the work to the grader.

    Where a number of the gold answer is rational: no sums, products of plain numbers, roots or functions for it, alone or
    inside a pair, list, set, interval or matrix (`37*45-12`); powers, factorials, fractions and their products stay
    allowed. And never the expression that the problem asks to be worked out (`\\sqrt{117}`, `(x+2)(x+3)`), unless the
    gold answer is that expression.
    """
    a, g = normalize(answer), normalize(gold)
    if same_text(a, g):
        return True
    a, g = without_label(a, g) or (a, g)
    with contextlib.suppress(Unreadable), at_full_precision():
        form, gold_form = read_form(a), read_form(g)
        golds = _scalars(gold_form, given=True)
        rational = [text for text in golds if _is_number(text)]
        if any(_is_work(text, rational) for text in _scalars(form, given=False)):
            return False
        value = _value(form, given=False)
        return value.kind != "scalar" or not _is_restated(value.text, golds, problem)
    return True  # text, or what is not read: nothing to work out


def _scalars(form: Form, *, given: bool) -> list[str]:
    """The scalars that a form states. A gold equation such as `2x+4y-3=0` states none."""
    form = _value(form, given=given)
    if form.kind == "scalar":
        return [form.text]
    parts = form.parts
    if form.kind == "relation":
        sides = [] if is_equation(form) else [read_form(side.text) for side in parts if not is_name(side.text)]
        parts = tuple(side for side in sides if side.kind == "scalar")
    if form.kind == "cases":
        parts = tuple(row.parts[0] for row in parts)
    return [text for part in parts for text in _scalars(part, given=given)]


def _value(form: Form, *, given: bool) -> Form:
    return assigned(form) or (form if given else last_exact(form)) if is_equation(form) else form


def _is_number(text: str) -> bool:
    try:
        return _is_rational_literal(read_scalar(text).node)
    except Unreadable:
        return False  # infinity, a word


def _is_work(text: str, rational: list[str]) -> bool:
    """Whether a scalar leaves arithmetic to be done to come to one of the gold numbers."""
    try:
        quantity = read_scalar(text).quantity
        node = parse(quantity.body)
        if symbols(node) and (unit := letters_as_unit(text)) is not None:
            node = unit[0].node  # `5 m` may be metres
        if symbols(node) or _is_closed_form(node):
            return False
        exact = isinstance(evaluate(node, 0), Fraction)  # \\sqrt{17} is an answer to its rounded value
        return any(same_scalar(text, n) for n in rational if exact or not re.search(r"\.[0-9]{6}", n))
    except Unreadable:
        return False


def _is_restated(text: str, golds: list[str], problem: str) -> bool:
    """Whether the answer is a formula of the problem and not the gold answer up to the order of terms and factors."""
    node = read_scalar(text).node
    if not problem or not node.args or _is_rational_literal(node):
        return False
    if any(_shape(node) == _shape(read_scalar(gold).node) for gold in golds):
        return False
    pieces = re.findall(r"\\[A-Za-z]+|\S", text)
    formula = re.compile(_BEFORE + r"\s*".join(map(re.escape, pieces)) + _AFTER)
    parts = _FORMULA_ENDS.split(_DRAWING.sub(" ", problem[:20_000]))
    return any(formula.search(normalize(part)) for part in parts if part)


def _shape(node: Node) -> str:
    """The tree as text, the same for terms and factors in another order."""
    args = [_shape(a) for a in node.args]
    if node.kind in ("add", "mul"):
        args.sort()
    return f"{node.kind} {node.value if node.kind == 'num' else node.name}({','.join(args)})"


def _is_rational_literal(node: Node) -> bool:
    if node.kind == "neg":
        return _is_rational_literal(node.args[0])
    if node.kind == "div":
        return all(_is_rational_literal(a) and a.kind != "div" for a in node.args)
    return node.kind in ("num", "mixed")


def _is_closed_form(node: Node) -> bool:
    if node.kind in ("num", "mixed"):
        return True
    if node.kind == "pow" or node.name in ("factorial", "binom"):
        return all(_is_rational_literal(a) for a in node.args)
    if node.kind in ("neg", "div", "mul") and all(_is_closed_form(a) for a in node.args):
        return node.kind != "mul" or "pow " in _shape(node) or "fn " in _shape(node)  # 2^3 * 5, 3 * 5!, but not 37 * 45
    return False
