"""Reads one scalar expression (normalised LaTeX or plain text) into a tree. Nothing is evaluated here.

Contract: depth and length are bounded; text that is not wholly understood raises `Unreadable`. A number next to a
number, an open bracket or an unknown word is never read as a product; one behind a bracket or a fraction, or with an
exponent behind a letter, is.

Limits: sums, integrals, limits, modulo and anything else that leaves the work to the reader are not read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from torl_mega.reward.answers.tokens import FUNCTIONS, GREEK, UNEVALUATED, Token, Unreadable, tokenize

MAX_DEPTH = 40


@dataclass(frozen=True, slots=True)
class Node:
    kind: str  # num, sym, const, add, mul, div, neg, pow, fn, mixed
    args: tuple[Node, ...] = ()
    name: str = ""  # of a symbol, constant or function; the spelling of a number
    value: Fraction | None = None  # of a number


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0

    def whole(self) -> Node:
        node = self._sum()
        if self._at != len(self._tokens):
            raise Unreadable(f"unexpected {self._tokens[self._at].text!r}")
        return node

    # ------------------------------------------------------------ tokens

    def _peek(self, offset: int = 0) -> str:
        at = self._at + offset
        return self._tokens[at].text if at < len(self._tokens) else ""

    def _peek_kind(self) -> str:
        return self._tokens[self._at].kind if self._at < len(self._tokens) else ""

    def _next(self) -> Token:
        if self._at >= len(self._tokens):
            raise Unreadable("ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, text: str) -> bool:
        if self._peek() == text and self._at < len(self._tokens):
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"expected {text!r}, found {self._peek()!r}")

    # ------------------------------------------------------------ grammar

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        sign = self._sign()
        terms = [_negate(self._product(), sign)]
        while self._peek() in ("+", "-") and self._peek_kind() == "op":
            terms.append(_negate(self._product_after_sign(), 1))
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _sign(self) -> int:
        sign = 1
        while self._peek() in ("+", "-") and self._peek_kind() == "op":
            sign = -sign if self._next().text == "-" else sign
        return sign

    def _product_after_sign(self) -> Node:
        sign = self._sign()
        return _negate(self._product(), sign)

    def _product(self) -> Node:
        node = self._power()
        while True:
            if self._take("*"):
                sign = self._sign()
                node = Node("mul", (node, _negate(self._power(), sign)))
            elif self._take("/"):
                sign = self._sign()
                node = Node("div", (node, _negate(self._power(), sign)))
            elif self._starts_factor():
                node = self._implicit(node)
            else:
                return node

    def _implicit(self, left: Node) -> Node:
        spaced, kind, text = self._tokens[self._at].spaced, self._peek_kind(), self._peek()
        last = self._tokens[self._at - 1].text
        right = self._power()
        if kind in ("num", "repeat"):
            return self._number_behind(left, right, last, spaced)
        if last in (")", "]") or text in ("(", "["):
            return Node("mul", (left, right))
        if _is_whole(left) and _is_proper_fraction(right):
            return Node("mixed", (left, right))
        if _is_whole(left) and right.kind == "div" and all(_is_whole(a) for a in right.args):
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
        kind, text = self._peek_kind(), self._peek()
        if kind in ("num", "repeat", "word", "caps", "deco"):
            return True
        if kind == "cmd":
            return text not in ("\\}", "\\rfloor", "\\rceil", "\\|")
        return kind == "op" and (text in "([{" or (text == "|" and not self._bar_open))

    _bar_open = False

    def _power(self) -> Node:
        node = self._postfix(self._atom())
        if self._take("^"):
            node = Node("pow", (node, self._exponent()))
            node = self._postfix(node)
            if self._peek() == "^":
                raise Unreadable("double exponent")
        return node

    def _postfix(self, node: Node) -> Node:
        while True:
            if self._take("!"):
                if self._peek() == "!":
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
            node = self._sum()
            self._expect("}")
            return node
        sign = self._sign()
        return _negate(self._postfix(self._atom()), sign)

    def _atom(self) -> Node:
        token = self._next()
        if token.kind == "num":
            return self._subscripted_number(token.text)
        if token.kind == "repeat":
            return _repeating(token.text)
        if token.kind in ("word", "caps"):
            return self._symbol(token.text)
        if token.kind == "deco":
            return self._symbol(re.sub(r"\s", "", token.text))
        if token.kind == "cmd":
            return self._command(token.text[1:])
        if token.text in ("(", "[", "{"):
            return self._group(token.text)
        if token.text == "|":
            return self._bars()
        raise Unreadable(f"unexpected {token.text!r}")

    def _group(self, opening: str) -> Node:
        outer, self._bar_open = self._bar_open, False
        node = self._sum()
        self._bar_open = outer
        self._expect({"(": ")", "[": "]", "{": "}"}[opening])
        return node

    def _bars(self) -> Node:
        outer, self._bar_open = self._bar_open, True
        node = self._sum()
        self._bar_open = outer
        self._expect("|")
        return Node("fn", (node,), "abs")

    def _subscripted_number(self, text: str) -> Node:
        """`204_5` is a numeral in base 5: a name of its own, equal only to the same numeral in the same base."""
        if self._peek() == "_":
            return Node("sym", name=f"{text}{self._subscript()}")
        return _number(text)

    def _symbol(self, name: str) -> Node:
        if name == "e" and self._peek() != "_":
            return Node("const", name="e")
        if name == "i" and self._peek() != "_":
            return Node("const", name="i")
        if self._peek() == "_":
            name += self._subscript()
        while self._take("'"):
            name += "'"
        return Node("sym", name=name)

    def _subscript(self) -> str:
        self._expect("_")
        if not self._take("{"):
            return f"_{{{self._next().text}}}"
        parts, depth = [], 1
        while True:
            text = self._next().text
            depth += (text == "{") - (text == "}")
            if depth == 0:
                return f"_{{{''.join(parts)}}}"
            parts.append(text)

    def _command(self, name: str) -> Node:
        if name == "frac":
            top = self._argument()
            return Node("div", (top, self._argument()))
        if name == "binom":
            top = self._argument()
            return Node("fn", (top, self._argument()), "binom")
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            node = self._sum()
            self._expect("\\r" + name[1:])
            return Node("fn", (node,), "floor" if name == "lfloor" else "ceil")
        if name in ("pi", "infty"):
            if name == "infty":
                raise Unreadable("infinity is not a number")
            return Node("const", name="pi")
        if name in FUNCTIONS and name not in UNEVALUATED:
            return self._function(FUNCTIONS[name])
        if name in GREEK:
            return self._symbol("\\" + name)
        raise Unreadable(f"\\{name} is not read")

    def _argument(self) -> Node:
        """What follows \\frac or \\sqrt: a braced group or a single digit, letter or command."""
        if self._take("{"):
            node = self._sum()
            self._expect("}")
            return node
        token = self._tokens[self._at] if self._at < len(self._tokens) else None
        if token is not None and token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._at] = Token("num", token.text[1:], False)
            return _number(token.text[0])
        return self._atom()

    def _root(self) -> Node:
        degree = None
        if self._take("["):
            degree = self._sum()
            self._expect("]")
        if self._peek() == "(":
            self._next()
            inside = self._group("(")
        else:
            inside = self._argument_of_sqrt()
        exponent = Node("div", (_number("1"), degree or _number("2")))
        return Node("fn", (inside, exponent), "root")

    def _argument_of_sqrt(self) -> Node:
        """`\\sqrt 12` means the root of 12 to everybody but TeX."""
        if self._peek_kind() == "num":
            return _number(self._next().text)
        return self._argument()

    def _function(self, name: str) -> Node:
        power = base = None
        while self._peek() in ("^", "_"):
            if self._take("^"):
                power = self._exponent()
            else:
                base = self._log_base()
        inside = self._function_argument()
        if power is not None and _value(power) == -1 and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            return Node("fn", (inside,), f"a{name}")
        node = Node("fn", (inside,) if base is None else (inside, base), name)
        return node if power is None else Node("pow", (node, power))

    def _log_base(self) -> Node:
        self._expect("_")
        return self._argument()

    def _function_argument(self) -> Node:
        """A bracketed group, or the product that follows up to the next sign or function: `\\sin 2x \\cos y`."""
        if self._peek() in ("(", "{", "["):
            return self._postfix_power(self._group(self._next().text))
        node = self._power()
        while self._starts_factor() and not self._starts_function() and self._peek() != "(":
            node = self._implicit(node)
        return node

    def _postfix_power(self, node: Node) -> Node:
        """`\\sin(x)^2` squares the sine in most hands and the argument in others: not read."""
        if self._peek() == "^":
            raise Unreadable("power after a function's bracket")
        return node

    def _starts_function(self) -> bool:
        return self._peek_kind() == "cmd" and self._peek()[1:] in FUNCTIONS


def _number(text: str) -> Node:
    if len(text) > 5000:
        raise Unreadable("number too long")
    mantissa, e, exponent = text.partition("e") if "e" in text else text.partition("E")
    if e and abs(int(exponent)) > 5000:
        raise Unreadable("exponent too large")
    try:
        return Node("num", name=text, value=Fraction(text if e else mantissa))
    except ValueError:
        raise Unreadable(f"number {text!r}") from None


def _repeating(text: str) -> Node:
    match = re.fullmatch(r"([0-9]*)\.([0-9]*)\\\w+\s*\{([0-9]+)\}", text)
    assert match is not None
    whole, fixed, cycle = match.groups()
    if len(text) > 200:
        raise Unreadable("number too long")
    head = Fraction(int((whole + fixed) or "0"), 10 ** len(fixed))
    tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Node("num", name=text, value=head + tail)


def _negate(node: Node, sign: int) -> Node:
    return node if sign > 0 else Node("neg", (node,))


def _value(node: Node) -> Fraction | None:
    if node.kind == "neg":
        inner = _value(node.args[0])
        return None if inner is None else -inner
    return node.value if node.kind == "num" else None


def _is_whole(node: Node) -> bool:
    return node.kind == "num" and node.name.isdigit()


def _is_proper_fraction(node: Node) -> bool:
    if node.kind != "div" or not all(_is_whole(a) for a in node.args):
        return False
    top, bottom = (a.value for a in node.args)
    assert top is not None
    assert bottom is not None
    return top < bottom


@lru_cache(maxsize=8192)
def parse(text: str) -> Node:
    """The tree of a normalised expression. Raises Unreadable."""
    try:
        node = _Parser(tokenize(_join_thousands(text))).whole()
    except RecursionError:
        raise Unreadable("nested too deep") from None
    return node


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
