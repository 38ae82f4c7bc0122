"""Reads the outer form of a normalised answer: list, tuple or interval, set, union, matrix, relation, or one scalar.

    "(-\\infty, 2) \\cup (3, \\infty)"  ─►  union of tuple "(", scalars, ")" and tuple "(", scalars, ")"

| kind | parts | marks |
|---|---|---|
| scalar | none; `text` is left to `syntax` | |
| list | things in a row without brackets, repeats kept; `text` as written | `,`, `or` or `and` |
| tuple | in brackets, in order; two parts may be an interval; angle brackets are round ones | opening, closing |
| reals | none: all real numbers | |
| set, union, ratio | `3:4` and times of day are ratios, equal only part by part | |
| difference | left, right | |
| matrix, cases | rows; a row of cases is value and condition (`otherwise`: what the rows before leave) | |
| relation | its sides, as scalars that are not read further | operators |
| family | what takes a value for each whole number, its parameters named anew | how many, Z or N |

Only the form is read here. Contract: linear passes over a text of bounded length, depth bounded, no evaluation. Raises
Unreadable for what has no consistent form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from torl_mega.reward.answers.brackets import depth_step, ends_word, spans, split_top, strip_outer
from torl_mega.reward.answers.syntax import PLAIN_FUNCTIONS, WHOLE, Unreadable

MAX_PARTS = 64
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Form:
    kind: str
    parts: tuple[Form, ...] = ()
    text: str = ""
    marks: tuple[str, ...] = ()


_OTHERWISE = re.compile(r"True|(?:\\text\s*\{)?\s*(?:otherwise|else|elsewhere)\s*\}?", re.IGNORECASE)
_CONDITION_WORDS = re.compile(r"\\text\s*\{\s*(?:if|for|when|where|,)*\s*\}|^\s*(?:if|for|when|where)\b|[,;.]\s*$")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_RELATIONS = ("\\approx", "\\equiv", "\\ne", "\\le", "\\ge", "\\sim", "=", "<", ">")
_JOINTS = (("or", r"\text{or}", " or "), ("and", r"\text{and}", " and "))
_DOMAIN = r"(?:\\mathbb\{(?P<d>[ZN])\}|(?P<e>[ZN]))(?:\s*[_^]\s*\{?\s*(?P<positive>[+*0]|\\ge\s*0|>\s*0)\s*\}?)*"
_EACH = r"(?:where|for|with)?\s*(?:all|any|every|each|some)?"
_NAMES = "[A-Za-z](?:\\s*,\\s*[A-Za-z])?"
_FOR_WHOLE = re.compile(
    rf"[\s,;(]*(?:(?:\\text\s*\{{[\s,]*{_EACH}\s*\}})?\s*(?P<a>{_NAMES})\s*(?:\\in\s*{_DOMAIN}"
    r"|\\text\s*\{\s*(?:is|are)?\s*(?:an|any)?\s*integers?\s*\})"
    rf"|\\text\s*\{{[\s,]*{_EACH}\s*integers?\s*\}}\s*(?P<b>{_NAMES}))[\s)]*",
    re.ASCII,
)
_GROUPED = re.compile(
    r"(?!.*(?:,[0-9]{3}[0-9]|,(?![0-9]{3})))\s*[-+]?\s*(?:\\dollar)?\s*[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?\b.*",
    re.ASCII,
)
_VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?"
_MEMBER = re.compile(rf"^\(?{_VARIABLE}(?:\s*,\s*{_VARIABLE})*\)?\s*\\in(?![A-Za-z])\s*", re.ASCII)
_LETTER = re.compile(rf"\\(?:text|begin|end)\s*\{{[^{{}}]*\}}|\\[A-Za-z]+|{'|'.join(PLAIN_FUNCTIONS)}|[A-Za-z]")


@lru_cache(maxsize=4096)
def read_form(text: str, depth: int = 0) -> Form:
    """The form of a normalised answer. Raises Unreadable."""
    if depth > _MAX_DEPTH:
        raise Unreadable("nested too deep")
    text = strip_outer(re.sub(r"^(?:=|\\approx(?![A-Za-z]))", "", _MEMBER.sub("", text)))
    if not text:
        raise Unreadable("empty")
    for read in (_family, _joined, _bracketed, _combined, _plain):
        if form := read(text, depth):
            return form
    return Form("scalar", text=text)


def _family(text: str, depth: int) -> Form | None:
    """`x = k\\pi, k \\in \\mathbb{Z}`; the parameters are called \\wholea and \\wholeb from here on."""
    for at in [m.start() for m in re.finditer(r"[,;(]|\\text", text)]:
        match = _FOR_WHOLE.fullmatch(text, at)
        if match is not None and text[:at].strip():
            return _make_family(text[:at], match, depth)
    return None


def _make_family(body: str, match: re.Match[str], depth: int) -> Form:
    names = re.findall("[A-Za-z]", match["a"] or match["b"])
    for name, alias in zip(names, WHOLE, strict=False):
        body = renamed(body, name, f"\\{alias} ")
    domain = "N" if match["positive"] else match["d"] or match["e"] or "Z"
    return Form("family", (read_form(body, depth + 1),), marks=(str(len(names)), domain))


def letters(text: str) -> set[str]:
    """The letters that stand for something: those of commands, words and function names do not."""
    return {found for found in _LETTER.findall(text) if len(found) == 1}


def renamed(text: str, letter: str, name: str) -> str:
    """`text` with `name` where the letter stands for something."""
    return _LETTER.sub(lambda m: name if m[0] == letter else m[0], text)


def _joined(text: str, depth: int) -> Form | None:
    if "or" in text or "and" in text:
        text = re.sub(r"\\text\s*\{\s*,?\s*(or|and)\s*,?\s*\}", r"\\text{\1}", text)
        text = re.sub(r"(?<=[0-9)\]}])or(?=[ 0-9(\[{\\A-Za-z-])", " or ", text)
    if groups := _solutions(text, depth):
        return groups
    for name, *spellings in _JOINTS:
        for spelling in spellings:
            if len(parts := split_top(text, spelling)) > 1:
                items = [p for part in parts for p in split_commas(part.strip().strip(","))]
                return Form("list", _forms(items, depth), text, (name,))
    parts = [p for p in split_top(text, ";") if p.strip()]
    if len(parts) > 1:  # `1,5; 2,5` may be two decimals
        return Form("list", _forms(parts, depth, flat=False), text, (",",))
    parts = split_commas(text)
    return Form("list", _forms(parts, depth), text, (",",)) if len(parts) > 1 else None


def _solutions(text: str, depth: int) -> Form | None:
    """`x=1, y=2 or x=2, y=1` (or with a semicolon): a list of systems, each a tuple of what the names are given."""
    if text.count("=") < 4:
        return None
    for separator in (";", r"\text{or}", " or "):
        systems = [[item for item in split_commas(part) if item.strip()] for part in split_top(text, separator)]
        if len(systems) > 1 and all(len(s) > 1 and all("=" in item for item in s) for s in systems):
            tuples = tuple(Form("tuple", _forms(system, depth), marks=("(", ")")) for system in systems)
            return Form("list", tuples, text, ("or",))
    return None


def _bracketed(text: str, depth: int) -> Form | None:
    unwrapped = text[1:-1].strip() if text[0] in "([|" and text[-1] in ")]|" and "\\begin{" in text[:12] else text
    match = _MATRIX.fullmatch(unwrapped)
    if match is not None and "\\end{" not in match[2]:
        return Form("matrix", _rows(re.split(r"\\\\|\\cr(?![a-z])", match[2].replace("\\hline", "")), depth))
    if text.startswith("\\begin{pieces}") and text.endswith("\\end{pieces}"):
        return _cases(text[14:-12])
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return Form("set")
    if text.startswith("\\{") and text.endswith("\\}") and spans(text):
        inside = text[2:-2]
        for bar in ("|", ":"):
            if len(parts := split_top(inside, bar)) == 2:
                return _set_builder(parts[0], parts[1], depth)
        return Form("set", _forms(split_commas(inside), depth))
    if text.startswith("\\langle") and text.endswith("\\rangle"):
        return Form("tuple", _forms(split_commas(text[7:-7]), depth), marks=("(", ")"))
    return _tuple(text, depth) if text[0] in "([" and text[-1] in ")]" and spans(text) else None


def _tuple(text: str, depth: int) -> Form | None:
    """In brackets; around one thing they only group it, but `[[1], [2]]` of a program keeps its inner ones."""
    inside = text[1:-1].strip()
    marks = (text[0], text[-1])
    if len(parts := split_top(inside, ";")) > 1:
        return Form("tuple", _forms(parts, depth, flat=False), marks=marks)
    if len(parts := split_commas(inside, thousands=False)) > 1:
        return Form("tuple", _forms(parts, depth), marks=marks)
    if marks == ("(", ")"):
        return read_form(inside, depth + 1)
    nested = marks == ("[", "]") and inside.startswith(("(", "[")) and spans(inside)
    return Form("tuple", (read_form(inside, depth + 1),), marks=marks) if nested else None


def _rows(texts: list[str], depth: int) -> tuple[Form, ...]:
    rows = [row.split("&") for row in texts if row.strip()]
    if not rows or len(rows) > MAX_PARTS or len({len(row) for row in rows}) != 1:
        raise Unreadable("a matrix without rows or with rows of unlike length")
    return tuple(Form("row", tuple(read_form(cell, depth + 1) for cell in row)) for row in rows)


def _cases(body: str) -> Form:
    rows = [split_top(row, "&") for row in body.split("\\\\") if row.strip()]
    if not rows or len(rows) > MAX_PARTS or any(len(row) != 2 for row in rows):
        raise Unreadable("cases that are no pairs of value and condition")
    cells = [[_CONDITION_WORDS.sub(" ", cell.strip().strip(",;.")).strip() for cell in row] for row in rows]
    pairs = [(value, "otherwise" if _OTHERWISE.fullmatch(when) else when) for value, when in cells]
    return Form("cases", tuple(Form("row", tuple(Form("scalar", text=cell) for cell in pair)) for pair in pairs))


def _combined(text: str, depth: int) -> Form | None:
    for separator in ("\\cup", " U "):
        if len(parts := split_top(text, separator)) > 1:
            return Form("union", _forms(parts, depth))
    parts = split_top(text, "\\setminus")
    return Form("difference", tuple(read_form(p, depth + 1) for p in parts)) if len(parts) == 2 else None


def _plain(text: str, depth: int) -> Form | None:
    if relation := _relation(text):
        return relation
    if text.replace(" ", "") == "\\mathbb{R}":
        return Form("reals")
    if len(parts := split_top(text, ":")) > 1:
        return Form("ratio", _forms(parts, depth))
    if "\\pm" not in text and "\\mp" not in text:
        return None
    if text.count("\\pm") + text.count("\\mp") > 2:
        raise Unreadable("more than two signs")
    both = (text.replace("\\pm", x).replace("\\mp", y) for x, y in ("+-", "-+"))
    return Form("list", _forms([strip_outer(t).removeprefix("+").strip() for t in both], depth), text, ("or",))


def _relation(text: str) -> Form | None:
    if not any(operator in text for operator in _RELATIONS):
        return None
    sides, operators, depth, at, start = [], [], 0, 0, 0
    while at < len(text):
        found = (r for r in _RELATIONS if text.startswith(r, at) and ends_word(text, at + len(r), r))
        operator = next(found, None) if depth == 0 else None
        if operator is not None:
            sides.append(text[start:at].strip())
            operators.append(operator)
            at = start = at + len(operator)
            continue
        depth += depth_step(text, at)
        at += 2 if text[at] == "\\" else 1
    if not operators:
        return None
    sides.append(text[start:].strip())
    if not all(sides) or len(operators) > 12:
        raise Unreadable("a relation with an empty side")
    return Form("relation", tuple(Form("scalar", text=side) for side in sides), marks=tuple(operators))


def _set_builder(element: str, condition: str, depth: int) -> Form:
    """`\\{x : x > 2\\}` and `\\{x \\in \\mathbb{R} : x > 2\\}` are the relation; `\\{2k : k \\in \\mathbb{Z}\\}` is a family."""
    match = _FOR_WHOLE.fullmatch(condition.strip())
    if match is not None:
        return _make_family(element, match, depth)
    form = read_form(condition, depth + 1)
    whole = re.fullmatch(r"\s*([A-Za-z])\s*\\in\s*(?:\\mathbb\{[ZN]\}|[ZN])\s*", element)
    if whole is not None and form.kind == "relation":
        return Form("set", _forms(list(map(str, _whole_between(form, whole[1]))), depth))
    real = re.fullmatch(r"\s*[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\{R\}|R))?\s*", element)
    if real is None or form.kind not in ("relation", "list", "family"):
        raise Unreadable("a set builder that is no condition on a real number")
    return form


def _whole_between(form: Form, name: str) -> range:
    """The whole numbers of `low < name < high`, with whole bounds. Raises Unreadable for any other condition."""
    sides, steps = [part.text.strip() for part in form.parts], {"<": 1, "\\le": 0}
    if len(sides) != 3 or sides[1] != name or not set(form.marks) <= set(steps):
        raise Unreadable("a set builder of whole numbers that is no range")
    try:
        low, high = int(sides[0]) + steps[form.marks[0]], int(sides[2]) - steps[form.marks[1]]
    except ValueError:
        raise Unreadable("a set builder of whole numbers between other bounds") from None
    if high - low >= MAX_PARTS:
        raise Unreadable("too many parts")
    return range(low, high + 1)


def _forms(texts: list[str], depth: int, *, flat: bool = True) -> tuple[Form, ...]:
    """The forms of several texts; with `flat` a plus-minus or a list among them counts as its parts."""
    if len(texts) > MAX_PARTS:
        raise Unreadable("too many parts")
    read = [read_form(text, depth + 1) for text in texts]
    return tuple(part for form in read for part in (form.parts if flat and form.kind == "list" else (form,)))


def split_commas(text: str, *, thousands: bool = True) -> list[str]:
    """At top-level commas. A comma inside `1,234` is part of the number where no space follows it and groups are of three."""
    parts = split_top(text, ", ")
    grouped = thousands or len(parts) > 1
    return [p for part in parts for p in ([part] if grouped and _GROUPED.fullmatch(part) else split_top(part, ","))]


_NAME = re.compile(
    r"\(?\s*(?:\\(?:(?:measured)?angle|triangle|over(?:line|rightarrow)|vec|text|Delta)?\s*\{?)?"
    r"[A-Za-z\\|][A-Za-z0-9_{}'|:\\ ]{0,16}"
    r"(?:\([A-Za-z0-9_+\-, ]{0,12}\))?(?:\s*,\s*[A-Za-z]){0,3}\s*\)?",
    re.ASCII,
)
_QUOTIENT = re.compile(r"\\frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}|([^/{}]+)/([^/{}]+)")
_DRESSED_NAME = re.compile(r"^\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])\s*|(?<=^[A-Za-z])\s*\^\s*\{\s*-\s*1\s*\}(?=\s*\()")
_MATRIX_NAME = re.compile(
    r"(?:\s*\(?\s*(?:\\text\s*\{)?[A-Z]\}?\s*\)?\s*(?:\^\s*(?:\{[-+0-9A-Za-z\\ ]*\}|\w|\\top))?)+", re.ASCII
)


def is_name(text: str) -> bool:
    """Something that a value is given to: x, x_1, f(x), f^{-1}(x), AB, \\angle ABC, |AB|, (x, y), A:B, \\frac{AB}{CD}, \\tan A."""
    text = text.strip()
    if match := _QUOTIENT.fullmatch(text):
        return is_name(match[1] or match[3]) and is_name(match[2] or match[4])
    text = _DRESSED_NAME.sub("", text)
    return _NAME.fullmatch(text) is not None and not re.search(r"\\(?:frac|sqrt|pi|sin|cos|tan|log|ln)", text)


def is_equation(form: Form) -> bool:
    return form.kind == "relation" and set(form.marks) <= {"=", "\\approx", "\\equiv"}


def last_exact(relation: Form) -> Form:
    """The last side before an approximation: 1/3 of `x = 5/15 = 1/3 \\approx 0.33`."""
    exact = relation.marks.index("\\approx") if "\\approx" in relation.marks[1:] else -1
    return read_form(relation.parts[exact if relation.marks[0] != "\\approx" else -1].text)


def assigned(relation: Form) -> Form | None:
    """What a name is given: 5 of `x = 5` and of `5 = x`; None for an equation such as `2x + z = 1`.

    A matrix may be given to a product or power of matrices or to a matrix of names: `A^{-1} = …`, `A^T B = …`.
    """
    first, last = relation.parts[0].text, relation.parts[-1].text
    if is_name(first):
        return last_exact(relation)
    cells = (
        re.split(r"&|\\\\", first[first.index("}") + 1 : first.rindex("\\end")]) if _MATRIX.fullmatch(first) else [""]
    )
    if (all(map(is_name, cells)) or _MATRIX_NAME.fullmatch(first)) and (value := last_exact(relation)).kind == "matrix":
        return value
    return read_form(first) if len(relation.parts) == 2 and is_name(last) else None
