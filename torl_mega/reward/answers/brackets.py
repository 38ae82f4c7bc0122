"""Finds the ends of brackets and cuts text outside of them. Linear passes over a text; nothing is understood here.

Brackets are `()`, `[]`, `{}`, `\\{\\}`, `\\langle\\rangle` and `\\begin … \\end`; `(0,1]` is one pair, so kinds may be mixed.
"""

from __future__ import annotations

_STEPS = {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}


def split_top(text: str, separator: str) -> list[str]:
    """At `separator` outside of all brackets and braces."""
    if separator not in text:
        return [text]
    parts, depth, at, start = [], 0, 0, 0
    while at < len(text):
        if depth == 0 and text.startswith(separator, at) and ends_word(text, at + len(separator), separator):
            parts.append(text[start:at])
            at = start = at + len(separator)
            continue
        depth += depth_step(text, at)
        at += 2 if text[at] == "\\" else 1
    return [*parts, text[start:]]


def ends_word(text: str, end: int, word: str) -> bool:
    """Whether the command `word` ends at `end`: `\\le` does not end inside of `\\left`."""
    return not (word.startswith("\\") and word[-1].isalpha()) or not text[end : end + 1].isalpha()


def depth_step(text: str, at: int) -> int:
    """+1 where a bracket opens at `at`, -1 where one closes, else 0."""
    if text[at] == "\\":
        if text.startswith(("\\{", "\\langle", "\\begin"), at):
            return 1
        return -1 if text.startswith(("\\}", "\\rangle", "\\end"), at) else 0
    return _STEPS.get(text[at], 0)


def closing(text: str, at: int) -> int:
    """Index just behind the bracket that closes the one at `at`; -1 when none does."""
    depth = 0
    while at < len(text):
        depth += depth_step(text, at)
        at += 2 if text[at] == "\\" else 1
        if depth <= 0:
            return min(at, len(text))
    return -1


def spans(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its very last character."""
    return closing(text, 0) == len(text)


def strip_outer(text: str) -> str:
    """Without sentence punctuation at the ends and without braces around the whole."""
    while True:
        before = text
        text = text.strip().rstrip(";:").strip()
        if text.endswith((".", ",")) and not text.endswith("\\dots."):
            text = text[:-1].strip()
        while text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1].strip()
        if text.startswith("{") and spans(text):
            text = text[1:-1]
        if text == before:
            return text
