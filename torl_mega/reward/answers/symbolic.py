"""math-verify: a second opinion on what is not read here, and the whole check for `reward.checker: math_verify`.

No signals and no time limits: who calls this can be killed.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from torl_mega.reward.answers.expression import evaluate, sample
from torl_mega.reward.answers.normalize import normalize
from torl_mega.reward.answers.syntax import Node, Unreadable

_VOCABULARY = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]{2,}|[0-9.]+|[:;]|[^\x00-\x7f]")


def second_opinion(answer: str, gold: str, reference: Node | None = None) -> bool:
    """For pairs of which one is not read here: sums, set builders, `\\sin(x)^2`.

    math-verify drops words and reads parts of what it cannot read whole, so it is asked only where both sides use the same
    commands, words and numbers, and a yes counts only when the answer's numbers agree at sample points with those of the
    gold answer, as math-verify read it or as `reference`, the tree that was read here.
    """
    if _vocabulary(answer) != _vocabulary(gold):
        return False
    parsed_gold, parsed = _parse(gold), _parse(answer)
    if not parsed_gold or not parsed or not _verify(parsed_gold, parsed):
        return False
    return _numbers_agree(parsed[0], parsed_gold[0], reference)


def math_verify_grade(answer: str, gold: str, _problem: str = "") -> bool:
    """The paper's grader: math-verify on the boxed answer and the gold answer, with its own defaults."""
    return _verify(_parse(gold, plain=True), _parse(answer, plain=True))


def _vocabulary(text: str) -> tuple[frozenset[str], list[str]]:
    found = _VOCABULARY.findall(normalize(text))
    return frozenset(w for w in found if not w[0].isdigit()) - {"\\frac"}, sorted(w for w in found if w[0].isdigit())


@lru_cache(maxsize=1024)
def _parse(text: str, *, plain: bool = False) -> Any:
    """What math-verify reads in the box; with `plain` also as an expression without LaTeX, and the first that it finds."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    configs: list[Any] = [LatexExtractionConfig(boxed_match_priority=0), *([ExprExtractionConfig()] if plain else [])]
    mode = "first_match" if plain else "no_fallback"
    return parse(f"\\boxed{{{text}}}", configs, fallback_mode=mode, parsing_timeout=None)  # type: ignore[arg-type]


def _verify(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return bool(verify(gold, answer, timeout_seconds=None))


def _numbers_agree(answer: Any, gold: Any, reference: Node | None) -> bool:
    """At three positive sample points. What has no numbers (sets, sums of unknown functions) passes without a reference."""
    from sympy import Expr

    if not isinstance(answer, Expr) or not isinstance(gold, Expr):
        return reference is None
    if answer.free_symbols != gold.free_symbols:
        return False
    for index in range(3):
        values: Any = {symbol: sample(str(symbol), index) for symbol in answer.free_symbols}
        try:
            x = complex(answer.subs(values).evalf(20))
            y = complex(gold.subs(values).evalf(20) if reference is None else evaluate(reference, index))
        except (TypeError, ValueError, OverflowError, Unreadable):
            return reference is None
        if abs(x - y) > 1e-9 * max(1.0, abs(y)):
            return False
    return True
