"""Reads the outer form of a normalised answer: list, tuple or interval, set, union, matrix, relation, or one scalar.

    "(-\\infty, 2) \\cup (3, \\infty)"  ─►  Union(Tuple("(", …, ")"), Tuple("(", …, ")"))

Only the form is read here; scalars stay text and are left to `expression`. Contract: linear passes over a text of bounded
length, depth bounded, no evaluation. Raises Unreadable for what has no consistent form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from torl_mega.reward.answers.brackets import depth_step, ends_word, spans, split_top, strip_outer
from torl_mega.reward.answers.tokens import PLAIN_FUNCTIONS, WHOLE, Unreadable

MAX_ITEMS = 64
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Scalar:
    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """An unbracketed list: `1, 2` or `x=1 or x=2`; `joint` is how it is joined: `,`, `or` or `and`. It may hold repeats."""

    items: tuple[Form, ...]
    joint: str = ","
    text: str = ""  # as it was written


@dataclass(frozen=True, slots=True)
class Tuple:
    """In brackets, in order; with two items it may as well be an interval. Angle brackets are round ones."""

    opening: str
    items: tuple[Form, ...]
    closing: str


@dataclass(frozen=True, slots=True)
class Set:
    items: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Union:
    parts: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    left: Form
    right: Form


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`3:4`, and times of day; equal only part by part."""

    parts: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """`sides[0] operators[0] sides[1] …`"""

    sides: tuple[str, ...]
    operators: tuple[str, ...]  # = \\ne < > \\le \\ge \\approx \\equiv


@dataclass(frozen=True, slots=True)
class Family:
    """What takes a value for each whole number: `x = k\\pi, k \\in \\mathbb{Z}`. The parameters in `body` are named anew."""

    body: Form
    num_names: int
    domain: str  # Z or N


@dataclass(frozen=True, slots=True)
class Cases:
    """A function by cases: (value, condition) by row; the condition `otherwise` is what the rows before leave."""

    rows: tuple[tuple[str, str], ...]


Form = Scalar | Items | Tuple | Set | Union | Difference | Matrix | Ratio | Relation | Family | Cases

_OTHERWISE = re.compile(r"True|(?:\\text\s*\{)?\s*(?:otherwise|else|elsewhere)\s*\}?", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_RELATIONS = ("\\approx", "\\equiv", "\\ne", "\\le", "\\ge", "\\sim", "=", "<", ">")
_JOINTS = (("or", r"\text{or}", " or "), ("and", r"\text{and}", " and "))
_WHOLE_NUMBERS = (
    r"(?:\\mathbb\{(?P<domain>[ZN])\}|(?P<letter>[ZN]))(?:\s*[_^]\s*\{?\s*(?P<part>[+*0]|\\ge\s*0|>\s*0)\s*\}?)*"
)
_NAMES = r"(?P<names>[A-Za-z](?:\s*,\s*[A-Za-z])?)"
_EACH = r"(?:where|for|with)?\s*(?:all|any|every|each|some)?"
_FOR_WHOLE = re.compile(
    rf"[\s,;(]*(?:(?:\\text\s*\{{[\s,]*{_EACH}\s*\}})?\s*{_NAMES}\s*\\in\s*{_WHOLE_NUMBERS}"
    rf"|(?:\\text\s*\{{[\s,]*{_EACH}\s*\}})?\s*{_NAMES.replace('names', 'named')}\s*\\text\s*\{{\s*(?:is|are)?\s*(?:an|any)?\s*integers?\s*\}}"
    rf"|\\text\s*\{{[\s,]*{_EACH}\s*integers?\s*\}}\s*{_NAMES.replace('names', 'worded')})[\s)]*",
    re.ASCII,
)
_VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?"
_MEMBER = re.compile(rf"^\(?{_VARIABLE}(?:\s*,\s*{_VARIABLE})*\)?\s*\\in(?![A-Za-z])\s*", re.ASCII)


@lru_cache(maxsize=4096)
def read_form(text: str, depth: int = 0) -> Form:
    """The form of a normalised answer. Raises Unreadable."""
    if depth > _MAX_DEPTH:
        raise Unreadable("nested too deep")
    text = strip_outer(re.sub(r"^(?:=|\\approx(?![A-Za-z]))", "", _MEMBER.sub("", text)))
    if not text:
        raise Unreadable("empty")
    for read in (_family, _joined, _bracketed, _combined):
        if form := read(text, depth):
            return form
    return _plain(text, depth)


def _family(text: str, depth: int) -> Form | None:
    r"""`x = k\pi, k \in \mathbb{Z}`; the parameters are called \wholea and \wholeb from here on."""
    for at in [m.start() for m in re.finditer(r"[,;(]|\\text", text)]:
        match = _FOR_WHOLE.fullmatch(text, at)
        if match is not None and text[:at].strip():
            return _make_family(text[:at], match, depth)
    return None


def _make_family(body: str, match: re.Match[str], depth: int) -> Family:
    names = re.findall("[A-Za-z]", match["names"] or match["named"] or match["worded"])
    domain = "N" if match["part"] else match["domain"] or match["letter"] or "Z"
    for name, alias in zip(names, WHOLE, strict=False):
        body = renamed(body, name, f"\\{alias} ")
    return Family(read_form(body, depth + 1), len(names), domain)


_LETTER = re.compile(rf"\\text\s*\{{[^{{}}]*\}}|\\[A-Za-z]+|{'|'.join(PLAIN_FUNCTIONS)}|[A-Za-z]")


def letters(text: str) -> set[str]:
    """The letters that stand for something: those of commands, words and function names do not."""
    return {found for found in _LETTER.findall(text) if len(found) == 1}


def renamed(text: str, letter: str, name: str) -> str:
    """`text` with `name` where the letter stands for something."""
    return _LETTER.sub(lambda m: name if m[0] == letter else m[0], text)


def _joined(text: str, depth: int) -> Form | None:
    text = re.sub(r"\\text\s*\{\s*,?\s*(or|and)\s*,?\s*\}", r"\\text{\1}", text)
    text = re.sub(r"(?<=[0-9)\]}])or(?=[ 0-9(\[{\\A-Za-z-])", " or ", text)
    if groups := _solutions(text, depth):
        return groups
    for name, *spellings in _JOINTS:
        for spelling in spellings:
            parts = split_top(text, spelling)
            if len(parts) > 1:
                items = [p for part in parts for p in split_commas(part.strip().strip(","))]
                return Items(_forms(items, depth), name, text)
    parts = [p for p in split_top(text, ";") if p.strip()]
    if len(parts) > 1:  # `1,5; 2,5` may be two decimals
        return Items(tuple(read_form(part, depth + 1) for part in parts[: MAX_ITEMS + 1]), ",", text)
    parts = split_commas(text)
    return Items(_forms(parts, depth), ",", text) if len(parts) > 1 else None


def _solutions(text: str, depth: int) -> Form | None:
    """`x=1, y=2 or x=2, y=1` (or with a semicolon): a list of systems, each a tuple of what the names are given."""
    if text.count("=") < 4:
        return None
    for separator in (";", r"\text{or}", " or "):
        systems = [[item for item in split_commas(part) if item.strip()] for part in split_top(text, separator)]
        if len(systems) > 1 and all(len(s) > 1 and all("=" in item for item in s) for s in systems):
            return Items(tuple(Tuple("(", _forms(system, depth), ")") for system in systems), "or")
    return None


def _bracketed(text: str, depth: int) -> Form | None:
    match = _MATRIX.fullmatch(_unwrap_matrix(text))
    if match is not None and "\\end{" not in match[2]:
        return _matrix(match[2], depth)
    if text.startswith("\\begin{pieces}") and text.endswith("\\end{pieces}"):
        return _cases(text[14:-12])
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return Set(())
    if text.startswith("\\{") and text.endswith("\\}") and spans(text):
        inside = text[2:-2]
        bar = next((b for b in ("|", ":") if len(split_top(inside, b)) == 2), None)
        return _set_builder(*split_top(inside, bar), depth) if bar else Set(_forms(split_commas(inside), depth))
    if text.startswith("\\langle") and text.endswith("\\rangle"):
        return Tuple("(", _forms(split_commas(text[7:-7]), depth), ")")
    if text[0] in "([" and text[-1] in ")]" and spans(text):
        parts = split_top(text[1:-1], ";")
        if len(parts) == 1:
            parts = split_commas(text[1:-1], thousands=False)
            return Tuple(text[0], _forms(parts, depth), text[-1]) if len(parts) > 1 else _grouped(text, depth)
        return Tuple(text[0], tuple(read_form(p, depth + 1) for p in parts[: MAX_ITEMS + 1]), text[-1])
    return None


def _grouped(text: str, depth: int) -> Form | None:
    """Brackets around one thing only group it; `[[1], [2]]` of a program keeps its inner ones."""
    if text[0] == "(" and text[-1] == ")":
        return read_form(text[1:-1], depth + 1)
    inner = text[1:-1].strip()
    if inner.startswith(("(", "[")) and text[-1] == "]" and spans(inner):
        return Tuple("[", (read_form(inner, depth + 1),), "]")
    return None


def _cases(body: str) -> Cases:
    rows = [split_top(row, "&") for row in body.split("\\\\") if row.strip()]
    if not rows or len(rows) > MAX_ITEMS or any(len(row) != 2 for row in rows):
        raise Unreadable("cases that are no pairs of value and condition")
    dress = r"\\text\s*\{\s*(?:if|for|when|where|,)*\s*\}|^\s*(?:if|for|when|where)\b|[,;.]\s*$"
    stripped = [tuple(re.sub(dress, " ", cell.strip().strip(",;.")).strip() for cell in row) for row in rows]
    return Cases(tuple((value, "otherwise" if _OTHERWISE.fullmatch(when) else when) for value, when in stripped))


def _combined(text: str, depth: int) -> Form | None:
    parts = split_top(text, "\\cup")
    if len(parts) == 1:
        parts = split_top(text, " U ")
    if len(parts) > 1:
        return Union(_forms(parts, depth))
    parts = split_top(text, "\\setminus")
    if len(parts) == 2:
        return Difference(read_form(parts[0], depth + 1), read_form(parts[1], depth + 1))
    return None


def _plain(text: str, depth: int) -> Form:
    relation = _relation(text)
    if relation is not None:
        return relation
    if len(parts := split_top(text, ":")) > 1:
        return Ratio(_forms(parts, depth))
    if "\\pm" in text or "\\mp" in text:
        return _plus_minus(text, depth)
    return Scalar(text)


def _relation(text: str) -> Relation | None:
    if not any(operator in text for operator in _RELATIONS):
        return None
    pieces, operators, depth, at, start = [], [], 0, 0, 0
    while at < len(text):
        if depth == 0:
            operator = next((r for r in _RELATIONS if text.startswith(r, at) and ends_word(text, at + len(r), r)), None)
            if operator is not None:
                pieces.append(text[start:at].strip())
                operators.append(operator)
                at = start = at + len(operator)
                continue
        depth += depth_step(text, at)
        at += 2 if text[at] == "\\" else 1
    if not operators:
        return None
    pieces.append(text[start:].strip())
    if not all(pieces) or len(operators) > 12:
        raise Unreadable("a relation with an empty side")
    return Relation(tuple(pieces), tuple(operators))


def _plus_minus(text: str, depth: int) -> Form:
    if text.count("\\pm") + text.count("\\mp") > 2:
        raise Unreadable("more than two signs")
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    both = [strip_outer(t).removeprefix("+").strip() for t in (upper, lower)]
    return Items(_forms(both, depth), "or")


def _set_builder(element: str, condition: str, depth: int) -> Form:
    """`\\{x : x > 2\\}` and `\\{x \\in \\mathbb{R} : x > 2\\}` are the relation; `\\{2k : k \\in \\mathbb{Z}\\}` is a family."""
    match = _FOR_WHOLE.fullmatch(condition.strip())
    if match is not None:
        return _make_family(element, match, depth)
    if not re.fullmatch(r"\s*[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\{R\}|R))?\s*", element):
        raise Unreadable("a set builder over what is no real number")
    form = read_form(condition, depth + 1)
    if isinstance(form, Relation | Items | Family):
        return form
    raise Unreadable("a set whose condition is not a relation")


def _matrix(body: str, depth: int) -> Matrix:
    rows = [row for row in re.split(r"\\\\|\\cr(?![a-z])", body.replace("\\hline", "")) if row.strip()]
    if not rows or len(rows) > MAX_ITEMS:
        raise Unreadable("a matrix without rows")
    read = tuple(tuple(read_form(cell, depth + 1) for cell in row.split("&")) for row in rows)
    if len({len(row) for row in read}) != 1:
        raise Unreadable("rows of unlike length")
    return Matrix(read)


def _unwrap_matrix(text: str) -> str:
    if text[0] in "([|" and text[-1] in ")]|" and "\\begin{" in text[:12]:
        return text[1:-1].strip()
    return text


def _forms(parts: list[str], depth: int) -> tuple[Form, ...]:
    if len(parts) > MAX_ITEMS:
        raise Unreadable("too many items")
    flat: list[Form] = []
    for part in parts:
        form = read_form(part, depth + 1)
        if isinstance(form, Items):  # a plus-minus, or a list in a list
            flat.extend(form.items)
        else:
            flat.append(form)
    return tuple(flat)


# ------------------------------------------------------------------------------------------------ splitting


def split_commas(text: str, *, thousands: bool = True) -> list[str]:
    """At top-level commas. A comma inside `1,234` is part of the number where no space follows it and groups are of three."""
    parts = split_top(text, ", ")
    if len(parts) == 1 or not thousands:
        parts = [p for part in parts for p in ([part] if thousands and is_grouped(part) else split_top(part, ","))]
    else:
        parts = [p for part in parts for p in ([part] if is_grouped(part) else split_top(part, ","))]
    return parts


def is_grouped(text: str) -> bool:
    return bool(
        re.fullmatch(r"\s*[-+]?\s*(?:\\dollar)?\s*[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?\b.*", text, re.ASCII)
    ) and not (re.search(r",[0-9]{3}[0-9]|,(?![0-9]{3})", text))


# ------------------------------------------------------------------------------------------------ relations

_NAME = re.compile(
    r"\(?\s*(?:\\(?:angle|triangle|overline|vec|mathbf|text|measuredangle|Delta)?\s*\{?)?[A-Za-z\\|][A-Za-z0-9_{}'|:\\ ]{0,16}"
    r"(?:\([A-Za-z0-9_+\-, ]{0,12}\))?(?:\s*,\s*[A-Za-z]){0,3}\s*\)?",
    re.ASCII,
)

_QUOTIENT = re.compile(r"\\frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}|([^/{}]+)/([^/{}]+)")
_INVERSE = re.compile(r"^([A-Za-z])\s*\^\s*\{\s*-\s*1\s*\}(?=\s*\()")
_MATRIX_NAME = re.compile(
    r"(?:\s*\(?\s*(?:\\text\s*\{)?[A-Z]\}?\s*\)?\s*(?:\^\s*(?:\{[-+0-9A-Za-z\\ ]*\}|\w|\\top))?)+", re.ASCII
)
_ANGLE_FUNCTION = re.compile(r"^\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])\s*")


def is_name(text: str) -> bool:
    """Something that a value is given to: x, x_1, f(x), f^{-1}(x), AB, \\angle ABC, |AB|, (x, y), A:B, \\frac{AB}{CD}, \\tan A."""
    text = text.strip()
    if match := _QUOTIENT.fullmatch(text):
        return is_name(match[1] or match[3]) and is_name(match[2] or match[4])
    text = _INVERSE.sub(r"\1", _ANGLE_FUNCTION.sub("", text))
    return _NAME.fullmatch(text) is not None and not re.search(r"\\(?:frac|sqrt|pi|sin|cos|tan|log|ln)", text)


def is_equation(relation: Relation) -> bool:
    return set(relation.operators) <= {"=", "\\approx", "\\equiv"}


def last_exact(relation: Relation) -> Form:
    """The last side before an approximation: 1/3 of `x = 5/15 = 1/3 \\approx 0.33`."""
    sides = relation.sides
    if "\\approx" in relation.operators and relation.operators[0] != "\\approx":
        sides = sides[: relation.operators.index("\\approx") + 1]
    return read_form(sides[-1])


def assigned(relation: Relation) -> Form | None:
    """What a name is given: 5 of `x = 5` and of `5 = x`; None for an equation such as `2x + z = 1`.

    A matrix may be given to a product or power of matrices or to a matrix of names: `A^{-1} = …`, `A^T B = …`.
    """
    first = relation.sides[0]
    if is_name(first):
        return last_exact(relation)
    of_names = _MATRIX.fullmatch(first) and all(
        map(is_name, re.split(r"&|\\\\", first[first.index("}") + 1 : first.rindex("\\end")]))
    )
    if (of_names or _MATRIX_NAME.fullmatch(first)) and isinstance(value := last_exact(relation), Matrix):
        return value
    return read_form(relation.sides[0]) if len(relation.sides) == 2 and is_name(relation.sides[1]) else None
