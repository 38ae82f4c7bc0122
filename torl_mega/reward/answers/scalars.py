"""Compares two scalars: as text, as values with units, and as decimals for exact values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from torl_mega.reward.answers.expression import evaluate, same_everywhere
from torl_mega.reward.answers.normalize import squeeze
from torl_mega.reward.answers.syntax import Node, has_decimal, parse, symbols
from torl_mega.reward.answers.tokens import Unreadable
from torl_mega.reward.answers.units import Quantity, contradict, split_letter_unit, split_unit


@dataclass(frozen=True, slots=True)
class ScalarValue:
    """The tree of a scalar's number and the unit that stands behind it."""

    node: Node
    quantity: Quantity


@lru_cache(maxsize=4096)
def read_scalar(text: str) -> ScalarValue:
    """Raises Unreadable for what is not an expression with a unit."""
    text = text.strip()
    quantity = split_unit(text)
    try:
        node = parse(quantity.body)
    except Unreadable:
        node, quantity = parse(text), Quantity(text, "", False)
    if quantity.scale:
        scale = 10**quantity.scale
        node = Node("mul", (node, Node("num", name=str(scale), value=Fraction(scale))))
    return ScalarValue(node, quantity)


def same_scalar(a: str, g: str) -> bool:
    if same_text(a, g) or squeeze(a).removeprefix("+") == squeeze(g).removeprefix("+"):
        return True
    x, y = read_scalar(a), read_scalar(g)
    if symbols(x.node) and not symbols(y.node) and (quantity := split_letter_unit(a)) is not None:
        x = ScalarValue(parse(quantity.body), quantity)
    unit, gold_unit = x.quantity.unit, y.quantity.unit
    if contradict(x.quantity, y.quantity):
        return False
    if _equal(x.node, y.node) and not (unit == "percent" and not gold_unit and _at_most_one(y.node)):
        return True
    if (unit == "percent") != (gold_unit == "percent"):
        hundred = Node("num", name="100", value=Fraction(100))
        left = Node("div", (x.node, hundred)) if unit == "percent" else x.node
        right = Node("div", (y.node, hundred)) if gold_unit == "percent" else y.node
        return _equal(left, right)
    return False


def _at_most_one(node: Node) -> bool:
    """Whether a gold number is a share, so that `0.28%` is not 0.28; for a gold 28, `28%` is meant to be 28."""
    if symbols(node):
        return False
    value = evaluate(node, 0)
    return (value if isinstance(value, Fraction) else value.real) <= 1


def _equal(a: Node, g: Node) -> bool:
    if symbols(a) != symbols(g) and not (symbols(a) and symbols(g)):
        return False
    if same_everywhere(a, g):
        return True
    return (has_decimal(a) or has_decimal(g)) and not symbols(g) and not symbols(a) and _approximately(a, g)


def _approximately(a: Node, g: Node) -> bool:
    """A decimal for an exact value: the same to 6 decimals and 5 significant digits, and right in all the digits it shows.

    A gold answer that is itself a short exact number must be hit to 9 digits: 4.999999999 is 5, 4.9999995 is not.
    """
    x, y = evaluate(a, 0), evaluate(g, 0)
    short = isinstance(y, Fraction) and 10**6 % y.denominator == 0
    with mpmath.workdps(60):
        size = abs(as_mpf(y))
        limit = 1e-9 * max(1, size) if short else mpmath.mpf(5e-7)
        shown = [mpmath.mpf(10) ** -n for n in (_decimals(a), _decimals(g)) if n]
        if shown:  # one unit of the last digit, or the rounding noise of a float
            limit = min(limit, max(*shown, 1e-12 * size))
        return bool(abs(as_mpf(x) - as_mpf(y)) <= min(limit, 1e-5 * size))


def _decimals(node: Node) -> int:
    """Digits behind the point of a number written as a decimal; 0 for anything else."""
    if node.kind == "neg":
        return _decimals(node.args[0])
    return (
        len(node.name.partition(".")[2]) if node.kind == "num" and has_decimal(node) and node.name[-1].isdigit() else 0
    )


def same_text(a: str, g: str) -> bool:
    if squeeze(a) == squeeze(g):
        return True
    words = text_words(a)
    if not words or words != text_words(g):
        return False
    return "\\text" in a + g or len(max(words.split(), key=len)) > 3 or a[1:] == g[1:]


def text_words(text: str) -> str:
    """A textual answer (`\\text{Evelyn}`, even) as lower-case words; empty for anything with mathematics in it."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip().strip("\"'.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z',.\- ]*", plain) or not re.search(r"[A-Za-z]{2}", plain):
        return ""
    return " ".join(re.sub(r"[,.\-]", " ", plain).lower().split()).removeprefix("the ")


_CHOICE = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])\s*\)|([A-Z])(?:[.:]|$))(?:\s+(?!\W*[A-Z]\W*$)|$)")


def same_choice(a: str, g: str) -> bool:
    """(C) or C, the letter alone, on one side; on the other it too, or with what it stands for behind it, `(C) 12`."""
    for letter, labelled in ((g, a), (a, g)):
        alone, found = re.fullmatch(r"\(?\s*([A-H])\s*\)?", letter), _CHOICE.match(labelled)
        if alone is not None and found is not None and alone[1] in found.groups():
            return True
    return False


def is_labelled(g: str) -> bool:
    """A choice letter with what it stands for behind it, `(C) 12`: only its letter or its very text is right."""
    return _CHOICE.match(g) is not None


def decimal_comma(a: str, g: str) -> bool:
    """`2,74` for 2.74: only when the other side is written as that very decimal. `1,234` is never 1.234."""
    pairs = ((a, g), (g, a))
    return any(
        re.fullmatch(r"-?[0-9]+,[0-9]+", comma) is not None
        and re.fullmatch(r"-?[1-9][0-9]{0,2},[0-9]{3}", comma) is None
        and comma.replace(",", ".") == point
        for comma, point in pairs
    )


def as_mpf(x: Any) -> Any:
    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x
