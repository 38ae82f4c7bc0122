"""Units, currency, percent, degrees and number words (million) around a normalised scalar. Text in, text out; linear."""

from __future__ import annotations

import re
from dataclasses import dataclass

# the first word of each is the unit's name
_UNITS = {
    words.split()[0]: words.split()
    for words in (
        "percent % percentage pct; degree degrees deg; dollar dollars usd bucks; cent cents; euro euros eur €; yuan rmb;"
        "pound pounds lb lbs; rupee rupees rs; m meter meters metre metres; cm centimeter centimeters centimetre centimetres;"
        "mm millimeter millimeters; km kilometer kilometers kilometre kilometres; in inch inches; ft foot feet; yd yard yards;"
        "mi mile miles; s sec secs second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks;"
        "month months; year years yr yrs; g gram grams; kg kilogram kilograms; mg milligram milligrams; oz ounce ounces;"
        "l liter liters litre litres; ml milliliter milliliters; gal gallon gallons; radian radians rad"
    ).split(";")
}
_CANONICAL_UNIT = {word: unit for unit, words in _UNITS.items() for word in words} | {
    "mph": "mi h",
    "m/s": "m s",
    **dict.fromkeys(("kmh", "kmph", "kph", "km/h"), "km h"),
}
_COUNTED = frozenset(
    (
        "unit units people person persons student students way ways apple apples ball balls point points square squares "
        "sq cubic integer integers solution solutions digit digits side sides edge edges vertex vertices marble marbles "
        "coin coins book books page pages time times game games car cars triangle triangles term terms number numbers pair "
        "pairs child children boy boys girl girls men women ticket tickets step steps block blocks tile tiles arrangement "
        "arrangements value values per a an the of each outcomes possibilities combinations sets set sequences sequence "
        "subsets subset factor factors divisor divisors zeros zeroes cookies candies pieces cards card handshakes paths "
        "path hats pencils pens cookie base total"
    ).split()
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_BARE = sorted((w for w in {*_CANONICAL_UNIT, *_COUNTED, *_SCALES} if len(w) > 1), key=len, reverse=True)
_ANY_WORD = "|".join(map(re.escape, _BARE))
_POWER = r"(\^\s*\{?[23]\}?)?"
_TRAILING_WORDS = re.compile(
    rf"(?<=[0-9}})\s])\s*((?:{_ANY_WORD})(?:\s+(?:{_ANY_WORD}))*)\s*{_POWER}$", re.IGNORECASE | re.ASCII
)
_TRAILING_TEXT = re.compile(rf"\s*\\text\s*\{{([^{{}}]*)\}}\s*(?:\(s\))?\s*{_POWER}$", re.ASCII)
_TRAILING_BRACKET = re.compile(r"(?<=[0-9}])\s*\(\s*(?:\\text\s*\{)?\s*([^\W\d_]+(?:\s[^\W\d_]+)*)\s*\}?\s*\)()$")
_MAY_END_UNIT = re.compile(r"(?:[^\W\d_]|[})]|\^\s*\{?[23])$")  # a letter, a bracket, a power
_LETTERS = "m g s h L cm mm km in ft yd mi hr yr kg mg oz ml lb rs m/s km/h"
_BARE_LETTERS = re.compile(
    rf"(.*?(?:[0-9}})\]]|\\pi))(\s*)({'|'.join(sorted(_LETTERS.split(), key=len, reverse=True))})\s*{_POWER}", re.ASCII
)
_PLAIN_NUMBER = re.compile(r"-?(?:[0-9][0-9.,]*|\\frac\s*\{[0-9]+\}\s*\{[0-9]+\}|[0-9]+\s*/\s*[0-9]+)", re.ASCII)
_NO_UNIT = re.compile(  # words that change the number before them, or take it back
    r"\b(?:or|and|not|no|nor|but|wrong|incorrect|false|maybe|except|more|less|most|least|than|over|divided|plus|minus"
    r"|negative|point|pi|squared|cubed|root|factorial|base|hal(?:f|ves)|thirds?|fourths?|fifths?|tenths?|quarters?"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozens?|score|hundreds|hundredths?)\b"
    r"|n't|(?<![a-z^])[0-9]|[04-9]",
    re.ASCII,
)
_LONG_WORD = re.compile(r"[a-z]{3}|^sq\b", re.IGNORECASE)  # what is shorter may be a product of variables
_SUFFIXES = {"\\degree": "degree", "%": "percent", "\\dollar": "dollar", "€": "euro", "£": "pound"}


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
    if currency := re.match(r"(-?)\s*(\\dollar|€|£)\s*", body):
        units.append(_SUFFIXES[currency[2]])
        body = currency[1] + body[currency.end() :]
    for _ in range(6):
        rest, unit = _drop_one_unit(body)
        if rest is None or not rest:
            break
        first, _, others = unit.partition(" ")
        body, scale = rest, scale + _SCALES.get(first, 0)  # million dollars
        units.insert(0, others if first in _SCALES else unit)
    unit = _canonical(units)
    known = bool(unit) and all(part in _UNITS for part in re.sub(r"\^[23]", "", unit).split())
    return Quantity(body.strip(), unit, known, scale)


def contradict(a: Quantity, g: Quantity) -> bool:
    """Whether both have a unit and it is not the same: cm and m, a.m. and p.m.; words in common may do (cm, cm long)."""
    if not a.unit or not g.unit or a.unit == g.unit:
        return False
    return (a.known and g.known) or not set(a.unit.split()) & set(g.unit.split())


def split_letters(text: str) -> tuple[Quantity, int] | None:
    """The quantity when the bare letters at the end are a unit, and how likely they are one.

    Letters without \\text are a unit or a product of variables. 0: a letter joined to what is before it, `5m`; 1: `5 m`,
    `5cm`; 2: two letters set apart from a plain number, `35 cm`.
    """
    match = _BARE_LETTERS.fullmatch(text.strip())
    if match is None:
        return None
    body, space, letters, power = match[1].strip(), match[2], match[3], re.sub(r"[^0-9]", "", match[4] or "")
    likely = int(len(letters) > 1) + bool(space)
    if likely == 2 and not _PLAIN_NUMBER.fullmatch(body):
        likely = 1
    return Quantity(body, _canonical([letters.lower() + (f"^{power}" if power else "")]), known=True), likely


def _drop_one_unit(body: str) -> tuple[str | None, str]:
    for suffix, unit in _SUFFIXES.items():
        if body.endswith(suffix):
            return body[: -len(suffix)].strip(), unit
    if not _MAY_END_UNIT.search(body):
        return None, ""
    match = _TRAILING_TEXT.search(body) or _TRAILING_BRACKET.search(body) or _TRAILING_WORDS.search(body)
    if match is None:
        return None, ""
    words = match[1].strip().lower().strip(".()")
    bare = match.re is _TRAILING_WORDS and not _LONG_WORD.search(words)
    product = match.re is _TRAILING_BRACKET and words.isascii() and len(words) < (2 if words in _CANONICAL_UNIT else 4)
    if bare or product or _NO_UNIT.search(words):  # 9 (x) is a product
        return None, ""
    power = re.sub(r"[^0-9]", "", match[2] or "")
    return body[: match.start()].strip(), words + (f"^{power}" if power else "")


def _canonical(units: list[str]) -> str:
    """`square centimeters` and `cm^2` are both cm^2; words that only count (apples, ways) fall away."""
    words = " ".join(units).replace("/", " ").split()
    power = "2" if {"square", "sq"} & set(words) else "3" if "cubic" in words else ""
    kept = []
    for word in words:
        stem, caret, exponent = word.partition("^")
        stem = stem.strip(".,")
        if stem in _COUNTED or not stem:
            continue
        kept.append(_CANONICAL_UNIT.get(stem, stem) + (f"^{exponent or power}" if caret or power else ""))
    return " ".join(dict.fromkeys(kept))
