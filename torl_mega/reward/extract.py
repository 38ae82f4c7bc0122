"""Finds the policy's final answer in what the policy wrote. Pure text, linear time, no LaTeX is understood here.

What counts is the last `\\boxed{}` (or `\\fbox{}`) outside of code and tool output. A box that never closes means that
the answer was cut off: then there is no answer, even when an earlier box is complete. Boxes joined by `and` or a comma
are one answer of several values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*$", re.MULTILINE)
_INLINE_OPEN = re.compile(r"```(?P<language>python|output)[ \t]*$", re.MULTILINE)
_JOINED = re.compile(
    r"[\s$]*(?:\\quad|\\[,; )\]])*[\s$]*(?:,|,?\s*and|,?\s*\\text\{\s*and\s*\})[\s$]*(?:\\quad|\\[,; (\[])*[\s$]*"
)
_MAX_NESTED_BOXES = 8
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")


def extract_answer(segments: Sequence[str]) -> str | None:
    """The content of the last box that the policy wrote, or None.

    `segments` are the texts of the turns, without the observations between them: what a tool printed is never looked
    at, and a box cannot reach from one turn into the next. Later turns win.
    """
    for segment in reversed(segments):
        prose = without_code(segment)
        if _BOX.search(prose):
            return last_boxed(prose)
    return None


def without_code(text: str) -> str:
    """`text` without its fenced blocks. A ```python or ```output block that stays open reaches to the end; a lone bare
    fence (the policy closing a block that the observation closed already) is just left out."""
    kept, at, opened_at, opener = [], 0, None, ""
    for match in _fences(text):
        if opened_at is None:
            kept.append(text[at : match.start()])
            opened_at, opener, at = match.end(), match["language"], match.end()
        elif match["language"] in ("python", "output"):  # a new block inside an open one: that one had no end
            if not opener:
                kept.append(text[at : match.start()])
            opener, at = match["language"], match.end()
        else:
            opened_at, at = None, match.end()
    if opened_at is None or not opener:
        kept.append(text[at:])
    return "".join(kept)


def _fences(text: str) -> list[re.Match[str]]:
    found = {m.end(): m for m in _INLINE_OPEN.finditer(text)} | {m.end(): m for m in _FENCE.finditer(text)}
    return [found[end] for end in sorted(found)]


def last_boxed(text: str) -> str | None:
    """The content of the last outermost `\\boxed{...}` of `text`; None without one or when the last one never closes.

    A box inside a box is unwrapped. `\\boxed 5` without braces holds what follows up to `$` or the end of the line.
    """
    for _ in range(_MAX_NESTED_BOXES):
        content = _last_outer_box(text)
        if content is None or not content.lstrip().startswith(("\\boxed{", "\\fbox{")):
            return content
        text = content
    return None


def _last_outer_box(text: str) -> str | None:
    """The last box; the last ones together, as a list, where only `and` or a comma stands between them."""
    closing = _closing_braces(text)
    boxes: list[tuple[int, int, int]] = []  # start of the command, start of what follows, end
    at = 0
    while match := _BOX.search(text, at):
        start = _skip_spaces(text, match.end())
        end = closing.get(start, start) if text[start : start + 1] == "{" else start
        boxes.append((match.start(), start, end))
        at = end + 1 if text[start : start + 1] == "{" else start
    if not boxes:
        return None
    _, start, end = boxes[-1]
    if text[start : start + 1] != "{":
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip().rstrip(".") or None
    if end == start:
        return None
    contents = [text[start + 1 : end]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        if before[2] == before[1] or not _JOINED.fullmatch(text, before[2] + 1, after[0]):
            break
        contents.insert(0, text[before[1] + 1 : before[2]])
    return ", ".join(contents)


def _skip_spaces(text: str, at: int) -> int:
    while text[at : at + 1] == " ":
        at += 1
    return at


def _closing_braces(text: str) -> dict[int, int]:
    """Index of each brace that closes -> by index of the one it closes; `\\{` and `\\}` are characters, not braces."""
    closing: dict[int, int] = {}
    stack: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            closing[stack.pop()] = match.start()
    return closing
