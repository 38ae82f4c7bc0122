"""One spelling for answers that look alike: LaTeX dress, unicode, spacing, thousands, units and currency. Text in, text out.

Contract: linear in the length of the text; never raises; nothing is evaluated. Characters that are not understood stay
as they are, so look-alikes (Cyrillic x, Arabic digits, direction marks) never turn into what they look like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CHARACTERS = {
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{{{d}}}" for d in range(10)), strict=True)),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{{{d}}}" for d in range(10)), strict=True)),
    **dict.fromkeys("−–—‐‑﹣－", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
    **dict.fromkeys("·⋅∙×∗", "*"),
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "½": "\\frac{1}{2}",
    "⅓": "\\frac{1}{3}",
    "⅔": "\\frac{2}{3}",
    "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "∞": "\\infty ",
    "π": "\\pi ",
    "√": "\\sqrt ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "°": "^\\circ ",
    "º": "^\\circ ",
    "ℝ": "\\mathbb{R}",
    "∘": "\\circ ",
    "…": "\\dots ",
    "θ": "\\theta ",
    "α": "\\alpha ",
    "β": "\\beta ",
    "γ": "\\gamma ",
    "λ": "\\lambda ",
    "φ": "\\phi ",
    "ω": "\\omega ",
    "％": "%",
    "（": "(",
    "）": ")",
    "，": ",",
    "。": ".",
    "：": ":",
    "“": '"',
    "”": '"',
    "’": "'",
    "＝": "=",
    "＋": "+",
    "｛": "{",
    "｝": "}",
    "′": "'",
    **dict(zip("０１２３４５６７８９", "0123456789", strict=True)),
}
_TABLE = str.maketrans(_CHARACTERS)

_SUBSTITUTIONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"<\|[a-z_]+\|>", ""),
        (r"\\\\\s*\[[^\]\\]{0,8}(?:pt|em|ex|mm)\]", r"\\\\"),  # row spacing in matrices
        (r"\\\\\s+", r"\\\\"),
        (
            r"\\begin\{(?:aligned|align\*?|cases|equation\*?|gathered)\}|\\end\{(?:aligned|align\*?|cases|equation\*?|gathered)\}",
            " ",
        ),
        (r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg)(?![A-Za-z])\s*\.?", ""),
        (
            r"\\(?:displaystyle|textstyle|limits|nolimits|nonumber|rm|bf|it|mathstrut|strut|,?phantom\{\})(?![A-Za-z])",
            " ",
        ),
        (r"(?<=[0-9]),\s*\\[!,;: ]\s*(?=[0-9]{3}(?![0-9]))", ""),  # 32,\!349
        (r"(?<=[0-9])\s?\{,\}\s?(?=[0-9]{3}(?![0-9]))", ""),  # 14{,}916
        (r"(?<=[0-9])(?:\\[,;: !]|~)(?=[0-9]{3}(?![0-9]))", ""),  # 12\,345
        (r"\\(?:quad|qquad|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\})(?![A-Za-z])|\\[,;:!> ]|~", " "),
        (r"\\\$", r" \\dollar "),
        (r"\$|\\\(|\\\)|\\\[|\\\]", " "),
        (r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac"),
        (r"\\(?:dbinom|tbinom|choose)(?![A-Za-z])", r"\\binom"),
        (
            r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|textup|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|rm|operatorname\*?)\s*\{",
            r"\\text{",
        ),
        (r"\\(?:leqslant|leq|leqq)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geq|geqq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|not\s*=)(?![A-Za-z])|!=|\\not=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"\*\*", "^"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:lbrack)(?![A-Za-z])", "["),
        (r"\\(?:rbrack)(?![A-Za-z])", "]"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:setminus|backslash)(?![A-Za-z])", r"\\setminus"),
        (r"\\(?:ldots|cdots|dotsc|dotsb|dotsm)(?![A-Za-z])|\.\.\.+", r"\\dots "),
        (r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{or}"),
        (r"\\(?:land|wedge)(?![A-Za-z])", r"\\text{and}"),
        (r"\\(?:imath)(?![A-Za-z])", "i"),
        (r"\\(?:varphi)(?![A-Za-z])", r"\\phi"),
        (r"\\(?:varepsilon)(?![A-Za-z])", r"\\epsilon"),
        (r"\\mathbb\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))", r"\\mathbb{\1\2}"),
        (r"\\(?:Bbb)\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))", r"\\mathbb{\1\2}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\(?:degree|deg)(?![A-Za-z])", r" \\degree "),
        (r"\\%", "%"),
        (r"\\(?:underline|mathopen|mathclose|mathord|color\{[a-z]+\})(?![A-Za-z])", ""),
    )
)
_ONE_LETTER = re.compile(
    r"(?:(?<=[0-9})\s])\\text\s*\{\s*([A-FI-KM-Za-fi-kn-rt-zG])\s*\}|(?<![0-9})\s])\\text\s*\{\s*\(?\s*([A-Za-z])\s*\)?\s*\}|\\text\s*\{\s*\(\s*([A-Za-z])\s*\)\s*\})",
    re.ASCII,
)
_NUMBER_TEXT = re.compile(r"\\text\s*\{\s*([-+]?[0-9][0-9.,/]*)\s*\}", re.ASCII)


def normalize(text: str) -> str:
    """`text` in the one spelling that the rest of the grader reads: no `$`, no `\\left`, `\\frac`, `\\text{…}`, `*`, `\\le` …"""
    text = text.translate(_TABLE).replace("\n", " ").replace("\t", " ").replace("\r", " ")
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    text = _NUMBER_TEXT.sub(r" \1 ", _ONE_LETTER.sub(r" \1\2\3 ", text))
    return strip_outer(_collapse(text))


def _collapse(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def strip_outer(text: str) -> str:
    """Without sentence punctuation at the ends and without braces around the whole."""
    while True:
        before = text
        text = text.strip().rstrip(";:").strip()
        if text.endswith((".", ",")) and not text.endswith("\\dots."):
            text = text[:-1].strip()
        while text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1].strip()
        if text.startswith("{") and _closes_at_end(text):
            text = text[1:-1]
        if text == before:
            return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    skip = False
    for at, char in enumerate(text):
        if skip:
            skip = False
            continue
        if char == "\\":
            skip = True
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return at == len(text) - 1
    return False


def squeeze(text: str) -> str:
    """Normalised text without spaces, except between digits and between words, for comparing as text."""
    text = re.sub(r"(?<=[0-9]) (?=[0-9])", "\x00", text)
    text = re.sub(r"(?<=[A-Za-z]) (?=[A-Za-z])", "\x00", text)
    text = re.sub(r"([_^])\{([A-Za-z0-9])\}", r"\1\2", text.replace(" ", ""))
    return text.replace("\x00", " ")


# ------------------------------------------------------------------------------------------------ units

_UNITS = {
    "percent": "% percent percentage pct",
    "degree": "degree degrees deg",
    "dollar": "dollar dollars usd bucks",
    "cent": "cent cents",
    "euro": "euro euros eur €",
    "pound": "pound pounds lb lbs",
    "yuan": "yuan rmb",
    "rupee": "rupee rupees rs",
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "mg": "mg milligram milligrams",
    "oz": "oz ounce ounces",
    "l": "l liter liters litre litres",
    "ml": "ml milliliter milliliters",
    "gal": "gal gallon gallons",
    "mph": "mph",
    "kmh": "kmh kmph kph km/h",
    "radian": "radian radians rad",
}
_CANONICAL_UNIT = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_COUNTED = [
    "unit",
    "units",
    "people",
    "person",
    "persons",
    "student",
    "students",
    "way",
    "ways",
    "apple",
    "apples",
    "ball",
    "balls",
    "point",
    "points",
    "square",
    "squares",
    "sq",
    "cubic",
    "integer",
    "integers",
    "solution",
    "solutions",
    "digit",
    "digits",
    "side",
    "sides",
    "edge",
    "edges",
    "vertex",
    "vertices",
    "marble",
    "marbles",
    "coin",
    "coins",
    "book",
    "books",
    "page",
    "pages",
    "time",
    "times",
    "game",
    "games",
    "car",
    "cars",
    "triangle",
    "triangles",
    "term",
    "terms",
    "number",
    "numbers",
    "pair",
    "pairs",
    "child",
    "children",
    "boy",
    "boys",
    "girl",
    "girls",
    "men",
    "women",
    "ticket",
    "tickets",
    "step",
    "steps",
    "block",
    "blocks",
    "tile",
    "tiles",
    "arrangement",
    "arrangements",
    "value",
    "values",
    "per",
    "a",
    "an",
    "the",
    "of",
    "each",
    "outcomes",
    "possibilities",
    "combinations",
    "sets",
    "set",
    "sequences",
    "sequence",
    "subsets",
    "subset",
    "factor",
    "factors",
    "divisor",
    "divisors",
    "zeros",
    "zeroes",
    "cookies",
    "candies",
    "pieces",
    "cards",
    "card",
    "handshakes",
    "paths",
    "path",
    "hats",
    "pencils",
    "pens",
    "cookie",
    "base",
    "total",
]
_BARE = sorted((w for w in {*_CANONICAL_UNIT, *_COUNTED} if len(w) > 1), key=len, reverse=True)
_ANY_WORD = "|".join(map(re.escape, _BARE))
_TRAILING_WORDS = re.compile(
    rf"(?<=[0-9}})\s])\s*((?:{_ANY_WORD})(?:\s+(?:{_ANY_WORD}))*)\s*(\^\s*\{{?[23]\}}?)?$", re.IGNORECASE | re.ASCII
)
_TRAILING_TEXT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\(s\))?\s*(\^\s*\{?[23]\}?)?$", re.ASCII)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_TRAILING_SCALE = re.compile(
    r"\s*(?:\\text\s*\{\s*)?(thousand|million|billion|trillion)\s*\}?$", re.IGNORECASE | re.ASCII
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A scalar's text, the unit behind (or the currency before) it, and the power of ten that a word put on it."""

    body: str
    unit: str  # canonical, "" without one
    known: bool  # whether the unit is one of the table
    scale: int = 0


def split_unit(text: str) -> Quantity:
    """`15 \\text{ cm}^2` -> 15 and cm^2; `\\dollar 18.90` -> 18.90 and dollar. A text that is all words keeps them."""
    body, units, scale = text.strip(), [], 0
    if body.startswith(("\\dollar", "€", "£")):
        units.append({"\\": "dollar", "€": "euro", "£": "pound"}[body[0]])
        body = body.removeprefix("\\dollar").lstrip("€£ ")
    elif body.startswith(("-\\dollar", "- \\dollar")):
        units.append("dollar")
        body = "-" + body.split("\\dollar", 1)[1].strip()
    for _ in range(6):
        rest, unit = _drop_one_unit(body)
        if rest is None or not rest:
            break
        body = rest
        if unit in _SCALES:
            scale += _SCALES[unit]
        elif unit:
            units.insert(0, unit)
    unit = _canonical(units)
    return Quantity(
        body.strip(), unit, bool(unit) and all(p in _UNITS for p in re.sub(r"\^[23]", "", unit).split()), scale
    )


def _drop_one_unit(body: str) -> tuple[str | None, str]:
    for suffix, unit in (
        ("\\degree", "degree"),
        ("%", "percent"),
        ("\\dollar", "dollar"),
        ("€", "euro"),
        ("£", "pound"),
    ):
        if body.endswith(suffix):
            return body[: -len(suffix)].strip(), unit
    if match := _TRAILING_SCALE.search(body):
        return body[: match.start()].strip(), match[1].lower()
    match = _TRAILING_TEXT.search(body) or _TRAILING_WORDS.search(body)
    if match is None:
        return None, ""
    power = re.sub(r"[^0-9]", "", match[2] or "")
    words = match[1].strip().lower().strip(".()")
    if words in _SCALES:
        return body[: match.start()].strip(), words
    return body[: match.start()].strip(), words + (f"^{power}" if power else "")


def _canonical(units: list[str]) -> str:
    """`square centimeters` and `cm^2` are both cm^2; words that only count (apples, ways) fall away."""
    words = " ".join(units).replace("/", " / ").split()
    power = "2" if {"square", "sq"} & set(words) else "3" if "cubic" in words else ""
    kept = []
    for word in words:
        stem, caret, exponent = word.partition("^")
        stem = stem.strip(".,")
        if stem in _COUNTED or not stem:
            continue
        kept.append(_CANONICAL_UNIT.get(stem, stem) + (f"^{exponent or power}" if caret or power else ""))
    return " ".join(dict.fromkeys(kept))
