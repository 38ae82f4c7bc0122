"""math-verify: a second opinion on what is not read here, and the whole check for `reward.checker: math_verify`.

No signals and no time limits: who calls this can be killed.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from torl_mega.reward.answers.expression import NUM_POINTS, evaluate, sample
from torl_mega.reward.answers.normalize import normalize
from torl_mega.reward.answers.syntax import Node

_TOLERANCE = 1e-9


def second_opinion(answer: str, gold: str, reference: Node | None = None) -> bool:
    """For pairs of which one is not read here: sums, set builders, `\\sin(x)^2`.

    math-verify drops words and reads parts of what it cannot read whole, so it is asked only where both sides use the same
    commands and the same words, and a yes counts only when the numbers agree at sample points: those of the two
    expressions it read, or of `reference`, the gold answer as read here, and the answer. A reference without variables
    is never asked about: such an answer can be read, or it leaves the work to the reader.
    """
    if _vocabulary(answer) != _vocabulary(gold):
        return False
    parsed_gold, parsed = _parse(gold), _parse(answer)
    if not parsed_gold or not parsed or not _verify(parsed_gold, parsed):
        return False
    return _numbers_agree(parsed[0], parsed_gold[0], reference)


def math_verify_grade(answer: str, gold: str, problem: str = "") -> bool:
    """The paper's grader: math-verify on the boxed answer and the gold answer, with its own defaults."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    del problem
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = [parse(f"\\boxed{{{text}}}", configs, parsing_timeout=None) for text in (gold, answer)]  # type: ignore[arg-type]
    return _verify(*parsed)


def _vocabulary(text: str) -> frozenset[str]:
    words = r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]{2,}|[:;]|[^\x00-\x7f]"
    return frozenset(re.findall(words, normalize(text))) - {"\\frac"}


@lru_cache(maxsize=1024)
def _parse(text: str) -> Any:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0)
    return parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]


def _verify(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return bool(verify(gold, answer, timeout_seconds=None))


def _numbers_agree(answer: Any, gold: Any, reference: Node | None) -> bool:
    """At the positive sample points. What has no numbers (sets, sums of unknown functions) passes, unless there is a reference."""
    from sympy import Expr

    if not isinstance(answer, Expr) or not isinstance(gold, Expr):
        return reference is None
    if answer.free_symbols != gold.free_symbols:
        return False
    for index in range(NUM_POINTS // 2):
        values = {symbol: sample(str(symbol), index) for symbol in answer.free_symbols}
        x = answer.subs(values).evalf(20)
        y = gold.subs(values).evalf(20) if reference is None else complex(evaluate(reference, index))
        if not x.is_number or (reference is None and not y.is_number):
            return reference is None
        if abs(complex(x) - complex(y)) > _TOLERANCE * max(1.0, abs(complex(y))):
            return False
    return True
