"""Is this answer the gold answer? Pure, deterministic, the same in a main process, a thread and a worker.

First version: text equality after normalisation, then math-verify.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from torl_mega.reward.extract import extract_answer

__all__ = ["check", "extract_answer", "warm_up"]

MAX_ANSWER_CHARS = 2000


def check(answer: str, gold: str) -> bool:
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    from math_verify import verify

    parsed_gold, parsed = _parse(gold), _parse(answer)
    return bool(parsed_gold and parsed and verify(parsed_gold, parsed, timeout_seconds=None))


def warm_up() -> None:
    """Pays for imports and parser tables once, before workers are forked."""
    for text in ("5", "\\frac{3}{4}", "(-\\infty,2)\\cup(3,\\infty)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "y=2x+3"):
        check(text, "1+x")


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(
        "\\boxed{" + text + "}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )  # type: ignore[arg-type]
