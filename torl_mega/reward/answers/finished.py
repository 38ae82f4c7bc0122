"""Is a box an answer, or does it leave the work to the grader? What the policy would find and farm if it were let through."""

from __future__ import annotations

from torl_mega.reward.answers.forms import Relation, Scalar, assigned, is_equation, last_exact, read_form
from torl_mega.reward.answers.normalize import normalize, squeeze
from torl_mega.reward.answers.scalars import read_scalar, same_text
from torl_mega.reward.answers.syntax import Node, symbols
from torl_mega.reward.answers.tokens import Unreadable


def is_finished(answer: str, gold: str, problem: str = "") -> bool:
    """False for a box that leaves the work to the grader.

    Where the gold answer is a rational number: no sums, products of plain numbers, roots or functions (`37*45-12`);
    powers, factorials, fractions and their products stay allowed. And never an expression that stands in the problem
    itself (`\\sqrt{117}`, `(x+2)(x+3)`) unless it is the gold answer to the letter.
    """
    a, g = normalize(answer), normalize(gold)
    if same_text(a, g):
        return True
    try:
        node, gold_node = _value_node(a, given=False), _value_node(g, given=True)
    except Unreadable:
        return True  # lists, intervals, text: nothing to work out
    if _is_rational_literal(gold_node) and not _is_closed_form(node) and not symbols(node):  # `5 m` may be metres
        return False
    return not (
        _size(node) >= 3 and not _is_rational_literal(node) and squeeze(a) in squeeze(normalize(problem[:20_000]))
    )


def _value_node(text: str, *, given: bool) -> Node:
    """What an answer comes to. A gold equation such as `2x+4y-3=0` comes to no value."""
    form = read_form(text)
    if isinstance(form, Relation) and is_equation(form):
        form = assigned(form) or (form if given else last_exact(form))
    if not isinstance(form, Scalar):
        raise Unreadable("not a scalar")
    return read_scalar(form.text).node


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
