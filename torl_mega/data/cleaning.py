"""Decides whether a row is fit for training: its gold answer can be checked, it is new, and no benchmark contains it.

Pure functions over text; `tools/prepare_data.py` runs them over files and reports every row they refuse.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from torl_mega.data.readers import Row
from torl_mega.reward.answers.check import is_readable
from torl_mega.types import Problem

NGRAM = 13  # words; the length GPT-3 (arXiv 2005.14165, appendix C) and most after it used
_PROOF_START = re.compile(
    r"^\s*(?:\([a-z0-9]\)\s*)?(?:prove|show|demonstrate|verify)\b(?!.*\?)", re.IGNORECASE | re.DOTALL
)
_PROOF_WORDS = ("proof", "prove", "see solution", "proved", "qed", "notfound", "not found", "none", "null", "n/a")


def refusal(problem: Problem, row: Row) -> str | None:
    """Why a row cannot be trained on, as one of `proof`, `unverifiable_answer`, `needs_figure`; None when it can."""
    kinds = {str(row.get(key, "")).lower() for key in ("problem_type", "question_type", "answer_type", "type")}
    if "proof" in kinds or problem.answer.lower().strip(" .$") in _PROOF_WORDS or _PROOF_START.match(problem.problem):
        return "proof"
    if not is_readable(problem.answer):
        return "unverifiable_answer"
    if re.search(r"!\[[^\]]*\]\(|<img|\[asy\]\s*$", problem.problem):
        return "needs_figure"
    return None


def fingerprint(text: str) -> int:
    """64 bits over the words, numbers and operators of a problem: spacing, case and LaTeX dress make no new problem,
    another sign does."""
    signs = "".join(re.findall(r"[+*/=<>^]|(?<![^\W\d_])-|-(?![^\W\d_])", _undressed(text)))
    digest = hashlib.blake2b(f"{plain(text)} {signs}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def plain(text: str) -> str:
    """The words and numbers of a problem in any script, in lower case."""
    return " ".join(re.findall(r"[^\W_]+", _undressed(text).lower()))


def _undressed(text: str) -> str:
    return re.sub(r"\\(?:left|right|text|mathrm|displaystyle|dfrac|tfrac|frac|,|!|;|quad)", " ", text)


class Benchmarks:
    """Finds training problems that stand in an evaluation set: the same normalised text, or a run of NGRAM words in common."""

    def __init__(self, problems: Iterable[Problem], *, ngram: int = NGRAM) -> None:
        self._ngram = ngram
        self._texts: dict[str, str] = {}
        self._grams: dict[int, str] = {}
        for problem in problems:
            words = plain(problem.problem).split()
            if not words:
                continue
            self._texts[" ".join(words)] = problem.problem_id
            for gram in _grams(words, ngram):
                self._grams[gram] = problem.problem_id

    def match(self, text: str) -> tuple[str, str] | None:
        """(kind, problem id of the benchmark) with kind `text` or `ngram`; None when the problem is clean."""
        words = plain(text).split()
        same = self._texts.get(" ".join(words))
        if same is not None:
            return "text", same
        found = next((self._grams[g] for g in _grams(words, self._ngram) if g in self._grams), None)
        return None if found is None else ("ngram", found)


def _grams(words: Sequence[str], n: int) -> Iterable[int]:
    return (hash_words(words[i : i + n]) for i in range(len(words) - n + 1))


def hash_words(words: Sequence[str]) -> int:
    """64 bits over a run of words."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")


def limr_scores(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """LIMR's alignment of each problem's learning curve with the mean curve (arXiv 2502.11886, eq. 1-2), at most 1.

    `curves`: problem id -> mean reward of its group in [0, 1] at each epoch, all of the same length K.
    score_i = 1 - sum_k (r_i^k - mean^k)^2 / sum_k (1 - mean^k)^2. Raises ValueError for curves of unlike length.
    """
    lengths = {len(curve) for curve in curves.values()}
    if len(lengths) > 1:
        raise ValueError(f"learning curves of unlike length: {sorted(lengths)}")
    if not curves or lengths == {0}:
        return {}
    mean = [sum(values) / len(curves) for values in zip(*curves.values(), strict=True)]
    scale = sum((1 - m) ** 2 for m in mean)
    if scale == 0:
        return dict.fromkeys(curves, 1.0)
    return {i: 1 - sum((r - m) ** 2 for r, m in zip(curve, mean, strict=True)) / scale for i, curve in curves.items()}
