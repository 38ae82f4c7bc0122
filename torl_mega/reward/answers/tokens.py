"""Cuts a normalised expression into tokens. Words that are no function and no known command are refused, not multiplied."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TOKENS = 400


class Unreadable(Exception):
    """The text is not an expression this module evaluates."""


FUNCTIONS = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth exp ln log lg abs".split()},
    **{f"arc{name}": f"a{name}" for name in "sin cos tan cot sec csc".split()},
    **{name: name for name in "asin acos atan max min gcd".split()},
    "tg": "tan",
    "ctg": "cot",
    "arctg": "atan",
    "arcctg": "acot",
}
UNEVALUATED = {"max", "min", "gcd"}  # read as words that are not understood
WHOLE = ("wholea", "wholeb")  # commands that stand for the whole-number parameters of a family of values
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar"
).split() + list(WHOLE)
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<repeat>[0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*\{[0-9]+\}) |
      (?P<num>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]))?) |
      (?P<deco>\\(?:vec|hat|bar|overline|mathbf|mathcal|tilde|widehat|overrightarrow|mathbb|d?dot)
        \s*(?:\{(?:[A-Za-z0-9]{1,4}|\\[a-z]+)\}|[A-Za-z])) |
      (?P<text>\\text\s*\{[^{}]*\}) |
      (?P<cmd>\\(?:[A-Za-z]+|[{}|])) |
      (?P<caps>[A-Z]{2,}(?![a-z])) |
      (?P<word>[A-Za-z]) |
      (?P<op>[-+*/^_!()\[\]{}|'])
    )""",
    re.VERBOSE | re.ASCII,
)
_WORDS = frozenset(
    "odd yes no not all any none one two six ten red sun mon tue wed thu fri sat day or and is the for if".split()
)
_WORD_RUN = re.compile(r"[A-Za-z]+", re.ASCII)
PLAIN_FUNCTIONS = sorted(
    ["sqrt", "pi", "infty", *(f for f in FUNCTIONS if len(f) > 2 or f in ("ln", "tg"))], key=len, reverse=True
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    spaced: bool  # white space before it


def tokenize(text: str) -> list[Token]:
    """The tokens of a normalised expression. Raises Unreadable for a word, an unknown character or too many of them."""
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise Unreadable(f"unknown character {text[at]!r}")
        spaced = text[at] == " "
        kind, word = match.lastgroup, match[match.lastgroup]
        at = match.end()
        if kind == "word":
            run = _WORD_RUN.match(text, at - 1)
            assert run is not None
            function = next((f for f in PLAIN_FUNCTIONS if run[0].startswith(f)), None)
            if function is not None:
                kind, word, at = "cmd", "\\" + function, at - 1 + len(function)
            elif len(run[0]) > 3 or run[0].lower() in _WORDS:
                raise Unreadable(f"word {run[0]!r}")
        tokens.append(Token(kind, word, spaced))
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too long")
    return tokens
