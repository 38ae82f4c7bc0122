"""Puts what a program prints into LaTeX: sympy's and Python's calls, powers of calls, complex numbers, dictionaries.

    "Union(Interval.open(-oo, 0), {Rational(1, 2)})"  ─►  "(-\\infty , 0) \\cup \\{\\frac{1}{2}\\}"

Contract: text without such spellings comes back as it is; nothing is evaluated; each call is rewritten once.
"""

from __future__ import annotations

import re

from torl_mega.reward.answers.brackets import closing, split_top

_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt abs".split()
_CALLS = {
    **dict.fromkeys("Integer Float Decimal int64 int32 float64 float32 mpf Symbol".split(), "{0}"),
    **dict.fromkeys(("Rational", "Fraction"), "\\frac{{{0}}}{{{1}}}"),
    **dict.fromkeys(("Abs", "fabs"), "\\abs({0})"), **dict.fromkeys(("binomial", "comb"), "\\binom{{{0}}}{{{1}}}"),
    "floor": "\\lfloor {0} \\rfloor", **dict.fromkeys(("ceiling", "ceil"), "\\lceil {0} \\rceil"),
    "factorial": "({0})!", "cbrt": "\\sqrt[3]{{{0}}}", "root": "\\sqrt[{1}]{{{0}}}", "log": "\\log_{{{1}}}({0})",
    "Pow": "({0})^{{{1}}}", "Eq": "{0} = {1}", "Ne": "{0} \\ne {1}", "Complement": "{0} \\setminus {1}",
}  # fmt: skip
_JOINS = {
    "Union": " \\cup ",
    "Or": " \\text{or} ",
    "And": " \\text{and} ",
    "FiniteSet": ", ",
    "Tuple": ", ",
    "Point": ", ",
}
_MATRICES = ("Matrix", "ImmutableMatrix", "MutableDenseMatrix", "ImmutableDenseMatrix", "array")
_INTERVALS = ("Interval", "Interval.open", "Interval.Lopen", "Interval.Ropen")
_NAMES = sorted({*_CALLS, *_INTERVALS, *_JOINS, *_MATRICES, "Piecewise", *_FUNCTIONS}, key=len, reverse=True)
_CALL = re.compile(rf"(?<![A-Za-z\\_.])({'|'.join(map(re.escape, _NAMES))})\(", re.ASCII)
_WORDS = tuple(
    (re.compile(pattern, re.ASCII), sign)
    for pattern, sign in (
        (r"\b(?:sympy|sp|np|numpy|math|fractions|decimal|S)\.(?=[A-Za-z])", ""),
        (r"(?<![A-Za-z\\_])oo(?![A-Za-z_])", r"\\infty "),
        (r"\bEmptySet\b(?:\(\))?|\bset\(\)", r"\\emptyset "),
        (r"\bReals\b", r"\\mathbb{R}"),
    )
)
_COMPLEX = re.compile(r"\((-?[0-9.]+(?:e[-+]?[0-9]+)?[-+][0-9.]+(?:e[-+]?[0-9]+)?)j\)", re.ASCII)
_LETTER = re.compile("[A-Za-z]")
_PAIR = r"\s*[A-Za-z]\w*\s*:[^:{}]+?"
_DICTIONARY = re.compile(rf"\{{({_PAIR}(?:,{_PAIR})*)\}}", re.ASCII)


def from_printed(text: str) -> str:
    """`text` with every such spelling put into LaTeX."""
    if not _LETTER.search(text):
        return text
    plain = "\\" not in text
    for pattern, sign in _WORDS:
        text = pattern.sub(sign, text)
    if match := _COMPLEX.fullmatch(text.strip()):
        return f"{match[1]}i"
    if ":" in text and plain and (named := _dictionaries(text)):
        return named
    if plain and re.search("[<>=]", text):
        text = re.sub(r"\)\s*&\s*\(", r") \\text{and} (", re.sub(r"\)\s*\|\s*\(", r") \\text{or} (", text))
    end = len(text)
    while "(" in text[:end]:
        match = next(reversed(list(_CALL.finditer(text, 0, end))), None)  # the last one holds no other call
        if match is None:
            break
        end = match.start()
        stop = closing(text, match.end() - 1)
        if stop > 0 and text[stop - 1] == ")":
            inside = text[match.end() : stop - 1]
            text = text[:end] + _rewritten(match[1], inside, text[end:stop], text[stop : stop + 2]) + text[stop:]
    return text


def _dictionaries(text: str) -> str:
    """`{x: 1, y: 2}` of a solver is x = 1, y = 2; `[{…}, {…}]` are several solutions."""
    text = text.strip()
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    found = _DICTIONARY.findall(inner)
    if not found or re.sub(r"[,\s]", "", _DICTIONARY.sub("", inner)):
        return ""
    return "; ".join(solution.replace(":", " = ") for solution in found)


def _rewritten(name: str, inside: str, whole: str, after: str) -> str:
    args = [a.strip().strip("'\"") for a in split_top(inside, ",")]
    if name in ("Union", "Complement"):
        args = [f"\\{{{a[1:-1]}\\}}" if a.startswith("{") else a for a in args]
    if name == "Piecewise":
        rows = [split_top(a[1:-1], ",") for a in args]
        return "\\begin{cases}" + "\\\\".join("&".join(r) for r in rows) + "\\end{cases}"
    if name in _MATRICES:
        return _matrix(args[0])
    if name in _JOINS:
        joined = _JOINS[name].join(args)
        return f"\\{{{joined}\\}}" if name == "FiniteSet" else f"({joined})" if _JOINS[name] == ", " else joined
    if name in _INTERVALS and 2 <= len(args) <= 4:
        return _interval(name, *args)
    form = _CALLS.get(name, "")
    if form and len(args) == 1 + ("{1}" in form):
        return form.format(*args)
    if form.startswith("\\frac") and len(args) == 1:
        return f"({args[0]})"
    return f"({whole})" if after == "**" and name in _FUNCTIONS else whole


def _interval(name: str, low: str, high: str, left_open: str = "", right_open: str = "") -> str:
    opening = "(" if name.endswith((".open", ".Lopen")) or left_open == "True" or "infty" in low else "["
    closing = ")" if name.endswith((".open", ".Ropen")) or right_open == "True" or "infty" in high else "]"
    return f"{opening}{low}, {high}{closing}"


def _matrix(rows: str) -> str:
    """`[[1, 2], [3, 4]]` row by row; `[1, 2]` is a column."""
    cells = [row.strip() for row in split_top(rows.strip()[1:-1], ",")]
    lines = [" & ".join(split_top(c[1:-1], ",")) if c.startswith("[") else c for c in cells]
    return "\\begin{pmatrix}" + " \\\\ ".join(lines) + "\\end{pmatrix}"
