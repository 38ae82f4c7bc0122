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
from torl_mega.reward.answers.syntax import Node, Unreadable, has_decimal, parse, symbols
from torl_mega.reward.answers.units import Quantity, contradict, split_letters, split_unit


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
        scale = Fraction(10**quantity.scale)
        if node.kind == "num" and node.value is not None:  # 1.2 million is a number, exact to the last digit
            node = Node("num", name=str(node.value * scale), value=node.value * scale)
        else:
            node = Node("mul", (node, Node("num", name=str(scale), value=scale)))
    return ScalarValue(node, quantity)


def same_scalar(a: str, g: str) -> bool:
    """Whether two scalars state the same: as text, or by value with units that do not contradict each other."""
    if same_text(a, g) or squeeze(a).removeprefix("+") == squeeze(g).removeprefix("+"):
        return True
    x, y = read_scalar(a), read_scalar(g)
    if _same_quantity(x, y):
        return True
    unit, gold_unit = letters_as_unit(a), letters_as_unit(g)
    if gold_unit is not None and (gold_unit[1] == 2 or x.quantity.unit == gold_unit[0].quantity.unit):
        y = gold_unit[0]
    if unit is not None and not symbols(y.node) and (unit[1] or y.quantity.unit == unit[0].quantity.unit):
        x = unit[0]
    return (unit is not None or gold_unit is not None) and _same_quantity(x, y)


def letters_as_unit(text: str) -> tuple[ScalarValue, int] | None:
    """The scalar with its last bare letters read as a unit, and how likely they are one; None where they cannot be."""
    split = split_letters(text)
    if split is None:
        return None
    node = parse(split[0].body)
    return None if symbols(node) else (ScalarValue(node, split[0]), split[1])


def _same_quantity(x: ScalarValue, y: ScalarValue) -> bool:
    unit, gold_unit = x.quantity.unit, y.quantity.unit
    if contradict(x.quantity, y.quantity):
        return False
    # for a gold 28, `28%` is meant to be 28; where the gold number is a share, `0.28%` is not 0.28
    share = unit == "percent" and not gold_unit and not symbols(y.node) and evaluate(y.node, 0).real <= 1
    if _equal(x.node, y.node) and not share:
        return True
    if (unit == "percent") != (gold_unit == "percent"):
        hundred = Node("num", name="100", value=Fraction(100))
        left = Node("div", (x.node, hundred)) if unit == "percent" else x.node
        right = Node("div", (y.node, hundred)) if gold_unit == "percent" else y.node
        return _equal(left, right)
    return False


def _equal(a: Node, g: Node) -> bool:
    if bool(symbols(a)) != bool(symbols(g)):
        return False
    decimal = not symbols(g) and (has_decimal(a) or has_decimal(g))
    return same_everywhere(a, g) or (decimal and _approximately(a, g))


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
    written = node.kind == "num" and has_decimal(node) and node.name[-1].isdigit()
    return len(node.name.partition(".")[2]) if written else 0


def same_text(a: str, g: str) -> bool:
    if squeeze(a) == squeeze(g):
        return True
    words = text_words(a)
    if not words or words != text_words(g):
        return False
    return "\\text" in a + g or len(max(words.split(), key=len)) > 3 or a[1:] == g[1:]


@lru_cache(maxsize=512)
def text_words(text: str) -> str:
    """A textual answer (`\\text{Evelyn}`, even) as lower-case words; empty for anything with mathematics in it."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip().strip("\"'.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z',.\- ]*", plain) or not re.search(r"[A-Za-z]{2}", plain):
        return ""
    return " ".join(re.sub(r"[,.\-]", " ", plain).lower().split()).removeprefix("the ")


_LABEL = re.compile(r"\(\s*[A-Z]\s*\)|\b[A-Z]\s*\)|\b[A-Z][.:]")
CHOICE = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])\s*\)|([A-Z])(?:[.:]|$))(?:\s+(?!\W*[A-Z]\W*$)|$)")
_CALLED = re.compile(r"^(?:\\text\s*\{)?\s*(?:option|choice|answer)\s*:?\s*\}?\s*(?=\(?[A-H]\b)", re.IGNORECASE)
_TAKEN_BACK = re.compile(
    rf"{_LABEL.pattern}|(?i:\b(?:or|and|not|nor|neither|wrong|incorrect|false|except|but|unless|maybe|either|both)\b|n't)"
)


def same_choice(a: str, g: str) -> bool:
    """(C) or C, the letter alone, on one side; on the other it too, or with what it stands for behind it, `(C) 12`.

    A second letter or a denial behind it takes it back.
    """
    a = _CALLED.sub("", a)
    for letter, labelled in ((g, a), (a, g)):
        alone, found = re.fullmatch(r"\(?\s*([A-H])\s*\)?", letter), CHOICE.match(labelled)
        if alone is not None and found is not None and alone[1] in found.groups():
            return not (_TAKEN_BACK if labelled is a else _LABEL).search(labelled, found.end())
    return False


def without_label(a: str, g: str) -> tuple[str, str] | None:
    """Both without the letter before one of them, for `37` and `(B) 37`; None where neither or each has one."""
    found = [CHOICE.match(text) for text in (a, g)]
    if (found[0] is None) == (found[1] is None):
        return None
    rest = [text if match is None else text[match.end() :] for text, match in zip((a, g), found, strict=True)]
    return None if not all(rest) or any(_TAKEN_BACK.search(text) for text in rest) else (rest[0], rest[1])


_DECIMAL_COMMA = re.compile(r"(?:[A-Za-z]\w*\s*=\s*)?[-+]?[0-9]+,[0-9]+(?![0-9]*[,;])", re.ASCII)


def with_point(a: str, g: str) -> str | None:
    """`2,74` as 2.74 for a gold answer written with a point; `1,234` is never 1.234, and `3,4` are two values for any other."""
    if "." not in g or "," in g or re.fullmatch(r"-?[1-9][0-9]{0,2},[0-9]{3}", a) or not _DECIMAL_COMMA.match(a):
        return None
    return a.replace(",", ".")


def as_mpf(x: Any) -> Any:
    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x
