"""One spelling for answers that look alike: LaTeX dress, unicode, spacing, thousands. Text in, text out.

Contract: linear in the length of the text; never raises; nothing is evaluated. Characters that are not understood stay
as they are, so look-alikes (Cyrillic x, Arabic digits, direction marks) never turn into what they look like.
"""

from __future__ import annotations

import re
from functools import lru_cache

from torl_mega.reward.answers.brackets import closing, strip_outer
from torl_mega.reward.answers.printed import from_printed
from torl_mega.reward.answers.syntax import FUNCTIONS

_CHARACTERS = {
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{{{d}}}" for d in range(10)), strict=True)),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{{{d}}}" for d in range(10)), strict=True)),
    **dict.fromkeys("−–—‐‑﹣－", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060✓✔✅■□∎", ""),
    **dict.fromkeys("·⋅∙×∗", "*"),
    **dict(zip("÷⁄∕％（），。：“”’＝＋｛｝′", "///%(),.:\"\"'=+{}'", strict=True)),
    **{sign: f"\\frac{{{top}}}{{{bottom}}}" for sign, top, bottom in ("½12", "⅓13", "⅔23", "¼14", "¾34")},
    **{
        signs[0]: f"\\{signs[1:]} "
        for signs in (
            "≤le ⩽le ≥ge ⩾ge ≠ne ≈approx ∞infty πpi √sqrt ∪cup ∩cap ∈in ∅emptyset ±pm ∓mp ∘circ …dots θtheta αalpha "
            "βbeta γgamma λlambda φphi ωomega"
        ).split()
    },
    **dict(zip("∛∜ℝℤ", ("\\sqrt[3] ", "\\sqrt[4] ", "\\mathbb{R}", "\\mathbb{Z}"), strict=True)),
    **dict.fromkeys("°º", "^\\circ "),
    **dict(zip("０１２３４５６７８９", "0123456789", strict=True)),
    **{chr(0x1D7CE + i): str(i % 10) for i in range(50)},  # the digits of mathematical alphabets
}
_TABLE = str.maketrans(_CHARACTERS)

# what each of the commands behind it is written as
_COMMANDS = {
    spelling: plain
    for plain, spellings in {
        "": "underline boldsymbol bm mathopen mathclose mathord",
        " ": "tiny scriptsize small normalsize large Large LARGE huge Huge displaystyle textstyle limits nolimits nonumber rm "
        "bf it mathstrut strut checkmark blacksquare square Box qed quad qquad",
        "\\frac": "dfrac tfrac cfrac", "\\binom": "dbinom tbinom", "\\le ": "leqslant leq leqq", "\\ge ": "geqslant geq geqq",
        "\\ne ": "neq", "<": "lt", ">": "gt", "*": "cdot times ast", "/": "div", "\\{": "lbrace", "\\}": "rbrace",
        "[": "lbrack", "]": "rbrack", "|": "lvert rvert vert mid", "\\emptyset": "varnothing", "\\setminus": "backslash",
        "\\dots ": "ldots cdots dotsc dotsb dotsm", "\\text{or}": "lor vee", "\\text{and}": "land wedge", "i": "imath",
        "\\phi": "varphi", "\\epsilon": "varepsilon", " \\degree ": "degree deg",
    }.items()
    for spelling in spellings.split()
}  # fmt: skip
_LINES = r"(?:aligned|align\*?|cases|equation\*?|gathered)"
_FONTS = (
    "textbf textit textrm textsf texttt textnormal textup mbox hbox mathrm mathbf mathit mathsf rm operatorname\\*?"
)
# (characters of which the pattern needs one, the pattern, what takes its place)
_SUBSTITUTIONS: tuple[tuple[frozenset[str], re.Pattern[str], str], ...] = tuple(
    (frozenset(signs), re.compile(pattern, re.ASCII), replacement)
    for signs, pattern, replacement in (
        ("<", r"<\|[a-z_]+\|>", ""),
        ("\\", r"\\(?:boxed|fbox)\s*\{|\\mathbf\s*\{(?=[^{}]*[\\0-9+=(])", "{"),
        ("\\", r"\\(?:textcolor|colorbox|color|hspace\*?|vspace\*?)\s*\{[^{}]*\}|\\,?phantom\{\}", " "),
        ("\\", r"\\\\\s*\[[^\]\\]{0,8}(?:pt|em|ex|mm)\]", r"\\\\"),  # row spacing in matrices
        ("\\", r"\\\\\s+", r"\\\\"),
        ("\\", rf"\\(?:begin|end)\{{{_LINES}\}}", " "),
        ("\\", r"\\(?:left|right|middle|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg)(?![A-Za-z])\s*\.?", ""),
        ("\\", r"(?<=[0-9]),\s*\\[!,;: ]\s*(?=[0-9]{3}(?![0-9]))", ""),  # 32,\!349
        ("{", r"(?<=[0-9])\s?\{\s?,\s?\}\s?(?=[0-9]{3}(?![0-9]))", ""),  # 14{,}916
        ("\\~", r"(?<=[0-9])(?:\\[,;: !]|~)(?=[0-9]{3}(?![0-9]))", ""),  # 12\,345
        ("\\~", r"\\[,;:!> ]|~", " "),
        ("\\", r"\\\$", r" \\dollar "),
        ("\\$", r"\$|\\\(|\\\)|\\\[|\\\]", " "),
        ("\\", rf"\\(?:{_FONTS.replace(' ', '|')})\s*\{{", r"\\text{"),
        ("\\", rf"\\text\s*\{{\s*({'|'.join(sorted(FUNCTIONS, key=len, reverse=True))})\s*\}}", r"\\\1 "),
        ("=", r"<=|=<", r"\\le "),
        ("=", r">=", r"\\ge "),
        ("=", r"!=|\\not\s*=", r"\\ne "),
        ("*", r"\*\*", "^"),
        (".", r"\.\.\.+", r"\\dots "),
        ("y", r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
        ("\\", r"\\(?:mathbb|Bbb)\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))", r"\\mathbb{\1\2}"),
        ("^", r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", r" \\degree "),
        ("\\", r"\\%", "%"),
    )
)
_SYSTEM = re.compile(rf"\\begin\{{({_LINES})\}}((?:[^\\]|\\(?!end))*)\\end\{{\1\}}")
_WORDED_SETS = tuple(
    (re.compile(rf"(?:\\text\s*\{{)?\s*(?:{words})\s*\}}?", re.IGNORECASE | re.ASCII), sign)
    for words, sign in (
        (r"no (?:real )?(?:solutions?|roots?)", r"\emptyset"),
        (r"(?:the )?empty set", r"\emptyset"),
        (r"all (?:real(?: number)?s?|real values)", r"\mathbb{R}"),
    )
)
_ONE_LETTER = re.compile(
    r"\\text\s*\{\s*(\(\s*[A-Za-z]\s*\))\s*\}|(?<=[0-9})\s])\\text\s*\{\s*([A-FI-KM-Za-fi-kn-rt-zG])\s*\}"
    r"|(?<![0-9})\s])\\text\s*\{\s*([A-Za-z])\s*\}",
    re.ASCII,
)
_MARKDOWN = re.compile(r"^(?:\*\*(.+)\*\*|(__|[*_`])([^*_`]+)\2)$")
_QUOTED = re.compile(r"^(['\"])([^'\"]+)\1$")  # Python's repr of a text
_SPACES = re.compile(r"\s+")
_NUMBER_TEXT = re.compile(r"\\text\s*\{\s*([-+]?[0-9][0-9.,/]*)\s*\}", re.ASCII)


@lru_cache(maxsize=512)
def normalize(text: str) -> str:
    """`text` in the one spelling that the rest of the grader reads: no `$`, no `\\left`, `\\frac`, `\\text{…}`, `*`, `\\le` …"""
    text = _QUOTED.sub(r"\2", text.strip())
    text = from_printed(_MARKDOWN.sub(r"\1\3", _SPACES.sub(" ", text.translate(_TABLE)).strip()))
    if "\\" in text:
        text = _infix_to_prefix(_SYSTEM.sub(_join_lines, _single_backslashes(text)))
    present = set(text)
    for signs, pattern, replacement in _SUBSTITUTIONS:
        if not signs.isdisjoint(present):
            text = pattern.sub(replacement, text)
            present = set(text)
    if "\\" in text:
        text = re.sub(r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), text)
        text = _NUMBER_TEXT.sub(r" \1 ", _ONE_LETTER.sub(r" \1\2\3 ", text))
    text = strip_outer(_SPACES.sub(" ", text).strip())
    return next((sign for words, sign in _WORDED_SETS if words.fullmatch(text)), text) if " " in text else text


def _single_backslashes(text: str) -> str:
    """`\\\\frac` is \\frac written through one more layer of escapes; in matrices `\\\\` ends a row."""
    if "\\begin" not in text:
        return re.sub(r"(?<!\\)\\\\(?=[A-Za-z{}%$,!])", r"\\", text)
    return text.replace("\\\\", "\\") if re.search(r"(?<!\\)\\\\begin", text) else text


def _join_lines(match: re.Match[str]) -> str:
    """The lines of a system as a list; `&` only aligns there. What has columns is a function by cases."""
    lines = re.sub(r"&\s*(?=[=<>]|\\[lg]e)", " ", match[2])
    if "&" in lines or "\\begin" in lines:
        return f"\\begin{{pieces}}{match[2]}\\end{{pieces}}" if match[1] == "cases" else match[0]
    return lines.strip().removesuffix("\\\\").replace("\\\\", ", ")


def _infix_to_prefix(text: str) -> str:
    """`{a \\over b}` and `{a \\choose b}` as \\frac and \\binom; without braces around them they take in the whole text."""
    for _ in range(8):
        match = re.search(r"\\(over|choose)(?![A-Za-z])", text)
        if match is None:
            break
        around = (i for i in range(match.start() - 1, -1, -1) if text[i] == "{" and closing(text, i) > match.end())
        start = next(around, -1)
        end = closing(text, start) - 1 if start >= 0 else len(text)
        top, bottom = text[start + 1 : match.start()], text[match.end() : end]
        command = {"over": "frac", "choose": "binom"}[match[1]]
        text = f"{text[: max(start, 0)]}\\{command}{{{top.strip()}}}{{{bottom.strip()}}}{text[end + 1 :]}"
    return text


@lru_cache(maxsize=512)
def squeeze(text: str) -> str:
    """Normalised text without spaces, except between digits and between words, for comparing as text."""
    if " " not in text and "_" not in text and "^" not in text:
        return text
    text = re.sub(r"(?<=[0-9]) (?=[0-9])", "\x00", text)
    text = re.sub(r"(?<=[A-Za-z]) (?=[A-Za-z])", "\x00", text)
    text = re.sub(r"([_^])\{([A-Za-z0-9])\}(?![A-Za-z0-9])", r"\1\2", text.replace(" ", ""))
    return text.replace("\x00", " ")
