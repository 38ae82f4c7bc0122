"""Asks math-verify about gold answers of a form that is not read here. No signals: who calls this can be killed."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from torl_mega.reward.answers.normalize import normalize


def ask_math_verify(answer: str, gold: str) -> bool:
    """For gold answers of a form that is not read here: sums, set builders, named functions.

    It drops words and reads parts of what it cannot read whole, so it is asked only where both sides use the same
    commands and the same words, and the question is how they are put together.
    """
    if _vocabulary(answer) != _vocabulary(gold):
        return False
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed_gold, parsed = _parse_sympy(gold), _parse_sympy(answer)
    return bool(parsed_gold and parsed and verify(parsed_gold, parsed, timeout_seconds=None))


def _vocabulary(text: str) -> frozenset[str]:
    words = r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]{2,}|[:;]|[^\x00-\x7f]"
    return frozenset(re.findall(words, normalize(text))) - {"\\frac"}


@lru_cache(maxsize=1024)
def _parse_sympy(text: str) -> Any:
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex

    config = LatexExtractionConfig(boxed_match_priority=0)
    return parse_latex(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
