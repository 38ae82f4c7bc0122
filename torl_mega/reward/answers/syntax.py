"""Reads one scalar expression (normalised LaTeX or plain text) into a tree. Nothing is evaluated here.

Contract: depth and length are bounded; text that is not wholly understood raises `Unreadable`. A number next
to a number, an open bracket or an unknown word is never read as a product; one behind a bracket or a fraction, or with an
exponent behind a letter, is.

Limits: sums, integrals, limits, modulo and anything else that leaves the work to the reader are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_DEPTH = 40
MAX_TOKENS = 400


class Unreadable(Exception):
    """The text is not an expression this module evaluates."""


FUNCTIONS = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth exp ln log lg abs asin acos atan".split()},
    **{f"arc{name}": f"a{name}" for name in "sin cos tan cot sec csc".split()},
    **dict(zip("tg ctg arctg arcctg".split(), "tan cot atan acot".split(), strict=True)),
}
# commands that stand for the whole-number parameters of a family of values
WHOLE: tuple[str, ...] = ("wholea", "wholeb")
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
    "odd yes no not all any none one two six ten red sun mon tue wed thu fri sat day or and is the for if max min gcd lcm".split()
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
            run = _WORD_RUN.match(text, at - 1)[0]  # type: ignore[index]
            function = next((f for f in PLAIN_FUNCTIONS if run.startswith(f)), None)
            if function is not None:
                kind, word, at = "cmd", "\\" + function, at - 1 + len(function)
            elif len(run) > 3 or run.lower() in _WORDS:
                raise Unreadable(f"word {run!r}")
        tokens.append(Token(kind, word, spaced))
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too long")
    return tokens


_CLOSING = {"(": ")", "[": "]", "{": "}"}
_END = Token("", "", False)


@dataclass(frozen=True, slots=True)
class Node:
    kind: str  # num, sym, const, add, mul, div, neg, pow, fn, mixed
    args: tuple[Node, ...] = ()
    name: str = ""  # of a symbol, constant or function; the spelling of a number
    value: Fraction | None = None  # of a number


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens, self._at, self._depth, self._bar_open = tokens, 0, 0, False

    def whole(self) -> Node:
        node = self._sum()
        if self._at != len(self._tokens):
            raise Unreadable(f"unexpected {self._token.text!r}")
        return node

    @property
    def _token(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _END

    def _next(self) -> Token:
        if self._at >= len(self._tokens):
            raise Unreadable("ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._token.text == text
        self._at += found
        return found

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"expected {text!r}, found {self._token.text!r}")

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        terms = [self._signed(self._product)]
        while self._token.text in ("+", "-"):
            terms.append(self._signed(self._product))
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _signed(self, read: Callable[[], Node]) -> Node:
        sign = 1
        while self._token.text in ("+", "-"):
            sign = -sign if self._next().text == "-" else sign
        node = read()
        return node if sign > 0 else Node("neg", (node,))

    def _product(self) -> Node:
        node = self._power()
        while True:
            if self._take("*"):
                node = Node("mul", (node, self._signed(self._power)))
            elif self._take("/"):
                node = Node("div", (node, self._signed(self._power)))
            elif self._starts_factor():
                node = self._implicit(node)
            else:
                return node

    def _implicit(self, left: Node) -> Node:
        first, last = self._token, self._tokens[self._at - 1].text
        right = self._power()
        if first.kind in ("num", "repeat"):
            return self._number_behind(left, right, last, first.spaced)
        if last not in (")", "]") and first.text not in ("(", "[") and _is_whole(left):
            if _is_proper_fraction(right):
                return Node("mixed", (left, right))
            if right.kind == "div" and all(_is_whole(a) for a in right.args):
                raise Unreadable("a whole number next to an improper fraction")
        return Node("mul", (left, right))

    def _number_behind(self, left: Node, right: Node, last: str, spaced: bool) -> Node:
        """`7 3/4`; a product behind a bracket (of a fraction or a root too), and where the number is a power: `(n-3)2^n`, `x 10^3`.

        Any other number straight after something is not an expression: `x2` may be meant as an index or a power.
        """
        behind_bracket = last in (")", "]", "}")
        if spaced and not behind_bracket and _is_whole(left) and _is_whole(right) and self._take("/"):
            fraction = Node("div", (right, self._power()))
            if _is_proper_fraction(fraction):
                return Node("mixed", (left, fraction))
        if left.kind == "num" or (left.kind == "mul" and left.args[1].kind == "num"):
            raise Unreadable("a number next to a number")
        if behind_bracket or right.kind == "pow":
            return Node("mul", (left, right))
        raise Unreadable("a number right of a letter")

    def _starts_factor(self) -> bool:
        kind, text = self._token.kind, self._token.text
        if kind == "cmd":
            return text not in ("\\}", "\\rfloor", "\\rceil", "\\|")
        if kind == "op":
            return text in "([{" or (text == "|" and not self._bar_open)
        return kind in ("num", "repeat", "word", "caps", "deco")

    def _power(self) -> Node:
        node = self._postfix(self._atom())
        if self._take("^"):
            node = self._postfix(Node("pow", (node, self._exponent())))
            if self._token.text == "^":
                raise Unreadable("double exponent")
        return node

    def _postfix(self, node: Node) -> Node:
        while True:
            if self._take("!"):
                if self._token.text == "!":
                    raise Unreadable("double factorial")
                node = Node("fn", (node,), "factorial")
            elif self._take("\\degree"):
                node = Node("mul", (node, Node("div", (Node("const", name="pi"), _number("180")))))
            elif self._take("%"):
                node = Node("div", (node, _number("100")))
            else:
                return node

    def _exponent(self) -> Node:
        if self._take("{"):
            return self._until("}")
        return self._signed(lambda: self._postfix(self._atom()))

    def _until(self, closing: str, *, bar: bool = False) -> Node:
        outer, self._bar_open = self._bar_open, bar
        node = self._sum()
        self._bar_open = outer
        self._expect(closing)
        return node

    def _atom(self) -> Node:
        token = self._next()
        if token.kind == "num":  # `204_5` is a numeral in base 5: equal only to the same numeral in the same base
            return Node("sym", name=token.text + self._subscript()) if self._token.text == "_" else _number(token.text)
        if token.kind == "repeat":
            return _repeating(token.text)
        if token.kind in ("word", "caps", "deco"):
            return self._symbol(re.sub(r"\s", "", token.text))
        if token.kind == "cmd":
            return self._command(token.text[1:])
        if token.text in _CLOSING:
            return self._until(_CLOSING[token.text])
        if token.text == "|":
            return Node("fn", (self._until("|", bar=True),), "abs")
        raise Unreadable(f"unexpected {token.text!r}")

    def _symbol(self, name: str) -> Node:
        if name in ("e", "i") and self._token.text != "_":
            return Node("const", name=name)
        if self._token.text == "_":
            name += self._subscript()
        while self._take("'"):
            name += "'"
        return Node("sym", name=name)

    def _subscript(self) -> str:
        self._expect("_")
        if not self._take("{"):
            return f"_{{{self._next().text}}}"
        parts, depth = [], 1
        while depth:
            parts.append(self._next().text)
            depth += (parts[-1] == "{") - (parts[-1] == "}")
        return f"_{{{''.join(parts)}"

    def _command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            top = self._argument()
            args = (top, self._argument())
            return Node("div", args) if name == "frac" else Node("fn", args, "binom")
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            return Node("fn", (self._until("\\r" + name[1:]),), "floor" if name == "lfloor" else "ceil")
        if name == "pi":
            return Node("const", name="pi")
        if name in FUNCTIONS:
            return self._function(FUNCTIONS[name])
        if name in GREEK:
            return self._symbol("\\" + name)
        raise Unreadable(f"\\{name} is not read")

    def _argument(self) -> Node:
        """What follows \\frac or \\sqrt: a braced group or a single digit, letter or command."""
        if self._take("{"):
            return self._until("}")
        token = self._token
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._at] = Token("num", token.text[1:], False)
            return _number(token.text[0])
        return self._atom()

    def _root(self) -> Node:
        """`\\sqrt 12` means the root of 12 to everybody but TeX."""
        degree = self._until("]") if self._take("[") else _number("2")
        if self._take("("):
            inside = self._until(")")
        else:
            inside = _number(self._next().text) if self._token.kind == "num" else self._argument()
        return Node("fn", (inside, Node("div", (_number("1"), degree))), "root")

    def _function(self, name: str) -> Node:
        power = base = None
        while self._token.text in ("^", "_"):
            if self._next().text == "^":
                power = self._exponent()
            else:
                base = self._argument()
        inside = self._function_argument()
        if power == _MINUS_ONE and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            return Node("fn", (inside,), f"a{name}")
        node = Node("fn", (inside,) if base is None else (inside, base), name)
        return node if power is None else Node("pow", (node, power))

    def _function_argument(self) -> Node:
        """A bracketed group, or the product that follows up to the next sign or function: `\\sin 2x \\cos y`."""
        if self._token.text in _CLOSING:
            node = self._until(_CLOSING[self._next().text])
            if self._token.text == "^":  # squares the sine in most hands and the argument in others
                raise Unreadable("power after a function's bracket")
            return node
        node = self._power()
        while self._starts_factor() and self._token.text != "(":
            if self._token.kind == "cmd" and self._token.text[1:] in FUNCTIONS:
                break
            node = self._implicit(node)
        return node


def _number(text: str) -> Node:
    if len(text) > 5000:
        raise Unreadable("number too long")
    _, e, exponent = text.lower().partition("e")
    if e and abs(int(exponent)) > 5000:
        raise Unreadable("exponent too large")
    try:
        return Node("num", name=text, value=Fraction(text))
    except ValueError:
        raise Unreadable(f"number {text!r}") from None


def _repeating(text: str) -> Node:
    match = re.fullmatch(r"([0-9]*)\.([0-9]*)\\\w+\s*\{([0-9]+)\}", text)
    if match is None or len(text) > 200:
        raise Unreadable("number too long")
    whole, fixed, cycle = match.groups()
    head = Fraction(int((whole + fixed) or "0"), 10 ** len(fixed))
    tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Node("num", name=text, value=head + tail)


_MINUS_ONE = Node("neg", (_number("1"),))


def _is_whole(node: Node) -> bool:
    return node.kind == "num" and node.name.isdigit()


def _is_proper_fraction(node: Node) -> bool:
    if node.kind != "div" or not all(_is_whole(a) for a in node.args):
        return False
    top, bottom = (a.value or Fraction(0) for a in node.args)
    return top < bottom


@lru_cache(maxsize=8192)
def parse(text: str) -> Node:
    """The tree of a normalised expression. Raises Unreadable."""
    try:
        return _Parser(tokenize(_join_thousands(text))).whole()
    except RecursionError:
        raise Unreadable("nested too deep") from None


def _join_thousands(text: str) -> str:
    """`1 000`, `1,000` and `7,425,000.5` as one number; groups of three throughout, nothing else."""
    pattern = r"(?<![0-9.,])([1-9][0-9]{0,2})((?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9,]|\s*,\s*[0-9]| [0-9]{3})"
    return re.sub(pattern, lambda m: m[1] + re.sub("[, ]", "", m[2]), text)


def symbols(node: Node) -> frozenset[str]:
    own = {node.name} if node.kind == "sym" else set()
    return frozenset(own.union(*(symbols(a) for a in node.args)))


def has_decimal(node: Node) -> bool:
    """Whether a decimal fraction was written anywhere in it."""
    return (node.kind == "num" and "." in node.name and "\\" not in node.name) or any(has_decimal(a) for a in node.args)
