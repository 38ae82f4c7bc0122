"""Finds the policy's final answer in what the policy wrote. Pure text, linear time, no LaTeX is understood here.

What counts is the last `\\boxed{}` (or `\\fbox{}`) outside of code and tool output. A box that never closes means that
the answer was cut off: then there is no answer, even when an earlier box is complete. Boxes of one sentence, joined by
`and`, `or`, a comma, a semicolon or nothing but space, are one answer of several values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*$", re.MULTILINE)
_INLINE_OPEN = re.compile(r"```(?P<language>python|output)[ \t]*$", re.MULTILINE)
_PROSE = frozenset(["", "text", "txt", "plaintext", "latex", "tex", "math", "markdown", "md"])
_SPACE = r"(?:[\s$]|\\quad|\\[,; ()\[\]])*"
_JOINED = re.compile(
    rf"(?:{_SPACE}(?P<joint>,?\s*(?:and|or|\\text\{{\s*(?:and|or)\s*\}})(?![A-Za-z])|[,;]){_SPACE}|[ $]*(?:\\quad)?[ $]*)"
    rf"(?P<name>[A-Za-z](?:_\w|_\{{\w+\}})?\s*=\s*)?"
)
_NAME = re.compile(r"(?<![\w\\}])[A-Za-z](?:_\w|_\{\w+\})?\s*=\s*$")
_MAX_NESTED_BOXES = 8
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z]) *")


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
    """`text` without its fenced programs and outputs; one that stays open reaches to the end.

    A fence without a language, or with one of prose, is just left out with what the policy wrote in it kept: it may close
    a block that the observation closed already, or frame the answer.
    """
    kept, at, in_code = [], 0, False
    for match in _fences(text):
        if not in_code:
            kept.append(text[at : match.start()])
        at, in_code = match.end(), match["language"].lower() not in _PROSE
    if not in_code:
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
    """The last box; the last ones of one sentence together, as a list."""
    closing = _closing_braces(text)
    boxes: list[tuple[int, int, int]] = []  # start of the command, start of what follows, end
    at = 0
    while match := _BOX.search(text, at):
        start = match.end()
        end = closing.get(start, start) if text[start : start + 1] == "{" else start
        boxes.append((match.start(), start, end))
        at = end + 1 if text[start : start + 1] == "{" else start
    if not boxes:
        return None
    _, start, end = boxes[-1]
    if text[start : start + 1] != "{":
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip().rstrip(".") or None
    return None if end == start else _with_joined(text, boxes)


def _with_joined(text: str, boxes: list[tuple[int, int, int]]) -> str:
    """The last box with those before it that belong to its sentence, each with the name before it: `x=3 or x=8`."""
    _, start, end = boxes[-1]
    alone = answer = text[start + 1 : end]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        gap = _JOINED.fullmatch(text[before[2] + 1 : after[0]]) if after[0] - before[2] <= 60 else None
        content = text[before[1] + 1 : before[2]]
        if before[2] == before[1] or gap is None or (not gap["joint"] and content == alone):
            break
        answer = content + (" or " if "or" in (gap["joint"] or "") else ", ") + (gap["name"] or "") + answer
        start, first = before[1], before[0]
    if answer is not alone and (name := _NAME.search(text, max(0, first - 20), first)):
        answer = name[0] + answer
    return answer


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
